"""The step of a dual encoder: stages retriever1, retriever2 and distil.

The losses are means over the global batch of queries, and the passages of all of them are each query's negatives. So
neither the number of ranks nor the micro-batch changes the gradient: a step of several micro-batches first encodes all
of them without a graph, takes the loss's gradient with respect to the vectors, and then encodes them again one by one
to carry it into the weights (gradient cache, Gao and others, arXiv 2101.06983). Dropout is seeded per micro-batch, so
both passes draw the same.

Letters: B queries of this rank's step, Q of all ranks', G candidates of a query (its positive first), M = B * G
passages of this rank, N = Q * G, D channels.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quincunx.data_shards.batches import to_device
from quincunx.engine.encoder import encoder_multiply_adds
from quincunx.engine.evaluations import run_probe
from quincunx.engine.ranks import rank_and_world
from quincunx.engine.retrieval.dual_encoder import save_retriever
from quincunx.engine.retrieval.examples import RetrieverBatch
from quincunx.engine.retrieval.finetuning import FinetuneJob
from quincunx.engine.retrieval.losses import (
    contrastive_loss,
    gather_rows,
    gather_with_gradient,
    kl_loss,
    known_positives,
    margin_mse_loss,
)
from quincunx.engine.training import Evaluation, StepOutput


class RetrieverJob(FinetuneJob):
    """Stages retriever1, retriever2 and distil: a dual encoder."""

    @property
    def loss_weights(self) -> dict[str, float]:
        if self.settings.stage != "distil":
            return {"contrastive": 1.0}
        return {self.settings.distil_loss: 1.0, "contrastive": self.settings.contrastive_weight}

    @property
    def evaluations(self) -> list[Evaluation]:
        if self.probe is None:
            return []
        measure = functools.partial(
            run_probe, self.model, self.probe, encode=self.model.encode_packed, cosine=self.settings.normalise
        )
        return [Evaluation("probe", self.settings.probe_every, measure, shown=True)]

    def write_model_files(self, folder: Path) -> None:
        save_retriever(folder, self.loaded, card=f"Where this run started: {self.settings.encoder}\n")

    def forward_passes(
        self, engine: Any, batches: list[RetrieverBatch], label_counts: torch.Tensor, seeds: list[int]
    ) -> Iterator[StepOutput]:
        device = label_counts.device
        texts = [(to_device(batch.queries, device), to_device(batch.passages, device)) for batch in batches]
        fits_at_once = len(batches) == 1

        def encode(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(seeds[number])
            return engine(*texts[number])

        with torch.set_grad_enabled(fits_at_once):
            vectors = [encode(number) for number in range(len(batches))]
        leaves = [part.detach().float().requires_grad_() for pair in vectors for part in pair]
        loss, sums = self._step_losses(batches, torch.cat(leaves[::2]), torch.cat(leaves[1::2]), label_counts)
        gradients = torch.autograd.grad(loss, leaves)
        for number, batch in enumerate(batches):
            pair = vectors[number] if fits_at_once else encode(number)
            # Surrogate loss: its gradient equals that of the true loss; its value is meaningless.
            carrier = sum((part * gradient).sum() for part, gradient in zip(pair, gradients[2 * number :]))
            lengths = np.concatenate([np.diff(text.cu_seqlens) for text in (batch.queries, batch.passages)])
            flops = 3 * 2 * encoder_multiply_adds(self.model.passage.model, lengths)
            yield StepOutput(carrier, *(sums if number == 0 else torch.zeros_like(sums)), flops)

    def _step_losses(
        self,
        batches: list[RetrieverBatch],
        queries_BD: torch.Tensor,
        passages_MD: torch.Tensor,
        label_counts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(this rank's share of the step's loss, [2, tasks]: each loss summed and how often the positive was first)."""
        settings, device = self.settings, queries_BD.device
        rank, num_ranks = rank_and_world()
        num_queries, group = len(queries_BD), batches[0].group
        targets_Q = torch.arange(0, num_ranks * len(passages_MD), group, device=device)
        excluded_QN = None
        if settings.mask_known_positives:
            positives_QP, rows_N = (
                gather_rows(torch.from_numpy(np.concatenate([getattr(batch, name) for batch in batches])).to(device))
                for name in ("positives", "passage_rows")
            )
            excluded_QN = known_positives(positives_QP, rows_N, targets_Q)
        losses_B, first_B = contrastive_loss(
            gather_with_gradient(queries_BD),
            gather_with_gradient(passages_MD),
            targets_Q,
            temperature=settings.temperature,
            rows=slice(rank * num_queries, (rank + 1) * num_queries),
            excluded_QN=excluded_QN,
            all_pairs=settings.all_pairs,
        )
        losses, firsts = [losses_B], [first_B]
        if settings.stage == "distil":
            student_BG = torch.einsum("bd,bgd->bg", queries_BD, passages_MD.view(num_queries, group, -1))
            teacher_BG = torch.from_numpy(np.concatenate([batch.teacher_scores for batch in batches])).to(device)
            follow = {"kl": kl_loss, "margin_mse": margin_mse_loss}[settings.distil_loss]
            losses.insert(0, follow(student_BG / settings.temperature, teacher_BG))
            firsts.insert(0, student_BG.argmax(1) == teacher_BG.argmax(1))
        weights = torch.tensor([*self.loss_weights.values()], device=device)
        sums = torch.stack([part.sum() for part in losses])
        correct = torch.stack([part.sum() for part in firsts])
        return (weights * sums / label_counts).sum(), torch.stack([sums.detach(), correct.to(sums.dtype)])
