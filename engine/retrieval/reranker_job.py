"""The step of a reranker: listwise cross-entropy over a query's candidates, with R-Drop.

A gradient through a part of the candidates (SimLM): all are scored without a graph, and the positive and the negatives
that score highest are read again with one.

Letters: B queries of a micro-batch, G candidates of a query (its positive first).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quincunx.data_shards.batches import join_texts, to_device
from quincunx.engine.encoder import encoder_multiply_adds
from quincunx.engine.retrieval.cross_encoder import save_reranker
from quincunx.engine.retrieval.examples import RerankerBatch
from quincunx.engine.retrieval.finetuning import FinetuneJob
from quincunx.engine.retrieval.losses import listwise_loss, r_drop
from quincunx.engine.training import Evaluation, StepOutput


class RerankerJob(FinetuneJob):
    """Stage reranker: a cross-encoder with listwise cross-entropy and R-Drop."""

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"listwise": 1.0} | ({"r_drop": self.settings.r_drop} if self.settings.r_drop else {})

    @property
    def evaluations(self) -> list[Evaluation]:
        return []

    def write_model_files(self, folder: Path) -> None:
        save_reranker(folder, self.loaded, card=f"Where this run started: {self.settings.encoder}\n")

    def forward_passes(
        self, engine: Any, batches: list[RerankerBatch], label_counts: torch.Tensor, seeds: list[int]
    ) -> Iterator[StepOutput]:
        device = label_counts.device
        weights = torch.tensor([*self.loss_weights.values()], device=device)
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            num_queries, num_candidates = len(batch), self.settings.gradient_candidates or batch.group
            pairs = np.arange(num_queries * batch.group).reshape(num_queries, batch.group)
            if num_candidates < batch.group:
                self.model.eval()  # chosen without dropout, as the published code does
                with torch.no_grad():
                    scores_BG = self._scores(engine, batch, pairs, device)
                self.model.train()
                hardest = scores_BG[:, 1:].topk(num_candidates - 1, dim=1).indices.cpu().numpy() + 1
                pairs = np.take_along_axis(pairs, np.pad(hardest, ((0, 0), (1, 0))), axis=1)
            if self.settings.r_drop:
                # Both dropout passes in one forward, which ZeRO 3 and gradient checkpointing take as any other.
                scores_BG, again_BG = self._scores(engine, batch, np.concatenate([pairs, pairs]), device).chunk(2)
                losses = [(listwise_loss(scores_BG) + listwise_loss(again_BG)) / 2, r_drop(scores_BG, again_BG)]
            else:
                scores_BG = self._scores(engine, batch, pairs, device)
                losses = [listwise_loss(scores_BG)]
            sums = torch.stack([part.sum() for part in losses])
            correct = (scores_BG.argmax(1) == 0).sum().to(sums.dtype).expand(len(losses))
            yield StepOutput((weights * sums / label_counts).sum(), sums.detach(), correct, self._flops(batch))

    def _scores(self, engine: Any, batch: RerankerBatch, pairs: np.ndarray, device: torch.device) -> torch.Tensor:
        """float32 scores of the pairs whose numbers in the batch are given, in their shape."""
        numbers, types = pairs.ravel(), None
        if batch.token_types is not None:
            types = torch.from_numpy(np.concatenate([batch.token_types[number] for number in numbers])).to(device)
        text = to_device(join_texts([batch.pairs[number] for number in numbers]), device)
        return engine(text, types).float().view(pairs.shape)

    def _flops(self, batch: RerankerBatch) -> float:
        """Of what is read with a graph, forward and backward, and of the choice's forward before it."""
        lengths = np.array([len(pair) for pair in batch.pairs])
        forward = 2 * encoder_multiply_adds(self.model.model.base_model, lengths)
        share = (self.settings.gradient_candidates or batch.group) / batch.group
        return forward * (3 * share * (2 if self.settings.r_drop else 1) + (share < 1))
