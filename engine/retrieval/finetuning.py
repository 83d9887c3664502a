"""Fine-tuning as jobs for the training loop (engine/training.py): a dual encoder's step and a reranker's.

The losses of a step are means over the global batch of queries, and the passages of all of them are each query's
negatives. So neither the number of ranks nor the micro-batch changes the gradient: a step of several micro-batches
first encodes all of them without a graph, takes the loss's gradient with respect to the vectors, and then encodes them
again one by one to carry it into the weights (gradient cache, Gao and others, arXiv 2101.06983). Dropout is seeded
per micro-batch, so both passes draw the same.

Letters: B queries of this rank's step, Q of all ranks', G candidates of a query (its positive first), N = Q * G
passages, D channels.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from quincunx.data_shards.batches import PackedText
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.stream import Stream
from quincunx.engine.deepspeed_config import check_settings, fill_config
from quincunx.engine.environment import Environment, choose_device, rank_and_world
from quincunx.engine.host_memory import return_freed_memory
from quincunx.engine.job import Evaluation
from quincunx.engine.probe import Probe, load_probe, run_probe
from quincunx.engine.retrieval.candidates import read_candidates
from quincunx.engine.retrieval.collection import read_passages, read_queries
from quincunx.engine.retrieval.cross_encoder import Reranker, load_reranker, save_reranker
from quincunx.engine.retrieval.dual_encoder import DualEncoder, Retriever, load_retriever, save_retriever
from quincunx.engine.retrieval.examples import (
    RerankerBatch,
    RerankerPacker,
    RetrieverBatch,
    RetrieverPacker,
    stream_examples,
)
from quincunx.engine.retrieval.files import file_digest
from quincunx.engine.retrieval.finetune_export import export_finetuned
from quincunx.engine.retrieval.finetune_settings import FinetuneSettings, find_idle_settings, find_problems
from quincunx.engine.retrieval.groups import Groups
from quincunx.engine.retrieval.losses import (
    contrastive_loss,
    gather_with_gradient,
    kl_loss,
    known_positives,
    listwise_loss,
    margin_mse_loss,
    r_drop,
)
from quincunx.engine.run_folder import RunFolder
from quincunx.engine.run_settings import total_steps
from quincunx.engine.tensors import text_to_tensors
from quincunx.engine.throughput import encoder_multiply_adds
from quincunx.engine.training import run_training

MODEL_FOLDER = "model"


class LossSums(NamedTuple):
    """A StepOutput (engine/job.py) of fine-tuning."""

    loss: torch.Tensor
    nll_sums: torch.Tensor
    correct: torch.Tensor


@dataclass(frozen=True)
class FinetuneJob:
    """What the two kinds of fine-tuning share; fields and methods as engine/job.py has them."""

    settings: FinetuneSettings
    config: dict[str, Any]
    micro_batch: int
    total_steps: int
    cuda: bool
    loaded: Retriever | Reranker
    """The model to train, with its tokenizer."""
    stream: Stream
    probe: Probe | None
    dataset_ids: list[str]

    @property
    def model(self) -> torch.nn.Module:
        return self.loaded.model

    @property
    def dataset_weights(self) -> list[int]:
        return [1] * len(self.dataset_ids)

    @property
    def warnings(self) -> list[str]:
        return find_idle_settings(self.settings)

    def describe(self) -> str:
        groups = self.stream.packer.groups
        filled = f", groups of {groups.num_filled:,} queries filled up" if groups.num_filled else ""
        return (
            f"stage {self.settings.stage}: {len(groups):,} queries with {groups.group - 1} negatives{filled}, an epoch "
            f"is {len(groups) / self.settings.global_batch:,.1f} steps"
        )

    def num_labels(self, batch: RetrieverBatch | RerankerBatch) -> list[int]:
        return [len(batch)] * len(self.task_names)

    def sample_ids(self, step: int) -> dict[str, list]:
        groups = self.stream.packer.groups
        places = self.stream.order.global_batch(step, self.settings.global_batch).sample_ids
        return {"query_ids": groups.queries.ids_at(groups.query_rows[places])}

    def compile(self) -> None:
        for encoder in {id(part): part for part in self.encoders()}.values():
            encoder.compile(dynamic=True)

    def export(self, folder: RunFolder) -> list[Path]:
        return export_finetuned(folder.path, folder.export)


class RetrieverJob(FinetuneJob):
    """Stages retriever1, retriever2 and distil: a dual encoder."""

    @property
    def task_names(self) -> list[str]:
        return [self.settings.distil_loss, "contrastive"] if self.settings.stage == "distil" else ["contrastive"]

    @property
    def task_weights(self) -> list[float]:
        return [1.0, self.settings.contrastive_weight] if self.settings.stage == "distil" else [1.0]

    @property
    def evaluations(self) -> list[Evaluation]:
        if self.probe is None:
            return []
        measure = functools.partial(
            run_probe, self.model, self.probe, encode=self.model.encode_packed, cosine=self.settings.normalise
        )
        return [Evaluation("probe", self.settings.probe_every, measure, shown=True)]

    def encoders(self) -> list[torch.nn.Module]:
        return [self.model.tower("query").model, self.model.tower("passage").model]

    def write_model_files(self, folder: Path) -> None:
        if not (folder / MODEL_FOLDER).is_dir():
            save_retriever(
                folder / MODEL_FOLDER,
                self.model,
                None,
                self.loaded.tokenizer,
                max_query_tokens=self.settings.max_query_tokens,
                max_passage_tokens=self.settings.max_passage_tokens,
                card=f"Where this run started: {self.settings.encoder}\n",
            )

    def flops(self, batch: RetrieverBatch) -> float:
        config = self.model.passage.config
        lengths = np.diff(batch.queries.cu_seqlens), np.diff(batch.passages.cu_seqlens)
        return 3 * 2 * sum(encoder_multiply_adds(config, part) for part in lengths)

    def forward_passes(
        self, engine: Any, batches: list[RetrieverBatch], label_counts: torch.Tensor, seeds: list[int]
    ) -> Iterator[LossSums]:
        device = label_counts.device
        texts = [(text_to_tensors(b.queries, device), text_to_tensors(b.passages, device)) for b in batches]
        fits_at_once = len(batches) == 1

        def encode(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(seeds[number])
            return engine(*texts[number])

        with torch.set_grad_enabled(fits_at_once):
            vectors = [encode(number) for number in range(len(batches))]
        leaves = [part.detach().float().requires_grad_() for pair in vectors for part in pair]
        loss, sums = self._step_losses(batches, torch.cat(leaves[::2]), torch.cat(leaves[1::2]), label_counts)
        gradients = torch.autograd.grad(loss, leaves)
        for number in range(len(batches)):
            pair = vectors[number] if fits_at_once else encode(number)
            # The scalar whose gradient in the weights is the loss's: its value means nothing.
            carrier = sum((part * gradient).sum() for part, gradient in zip(pair, gradients[2 * number :]))
            yield LossSums(carrier, *(sums if number == 0 else torch.zeros_like(sums)))

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
            rows_N = gather_integers(np.concatenate([batch.passage_rows for batch in batches]), device)
            positives_QP = gather_integers(np.concatenate([batch.positives for batch in batches]), device)
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
            if settings.distil_loss == "kl":
                losses.insert(0, kl_loss(student_BG / settings.temperature, teacher_BG))
            else:
                losses.insert(0, margin_mse_loss(student_BG, teacher_BG))
            firsts.insert(0, student_BG.argmax(1) == teacher_BG.argmax(1))
        weights = torch.tensor(self.task_weights, device=device)
        sums = torch.stack([part.sum() for part in losses])
        correct = torch.stack([part.sum() for part in firsts])
        return (weights * sums / label_counts).sum(), torch.stack([sums.detach(), correct.to(sums.dtype)])


class RerankerJob(FinetuneJob):
    """Stage reranker: a cross-encoder with listwise cross-entropy and R-Drop."""

    @property
    def task_names(self) -> list[str]:
        return ["listwise", "r_drop"] if self.settings.r_drop else ["listwise"]

    @property
    def task_weights(self) -> list[float]:
        return [1.0, self.settings.r_drop] if self.settings.r_drop else [1.0]

    @property
    def evaluations(self) -> list[Evaluation]:
        return []

    def encoders(self) -> list[torch.nn.Module]:
        return [self.model.model.base_model]

    def write_model_files(self, folder: Path) -> None:
        if not (folder / MODEL_FOLDER).is_dir():
            card = f"Where this run started: {self.settings.encoder}\n"
            max_tokens = self.settings.max_pair_tokens
            save_reranker(
                folder / MODEL_FOLDER, self.model, None, self.loaded.tokenizer, max_tokens=max_tokens, card=card
            )

    def flops(self, batch: RerankerBatch) -> float:
        """Of all candidates once forward and backward; a chosen part or a second dropout pass is not counted."""
        return 3 * 2 * encoder_multiply_adds(self.model.config, np.diff(batch.pairs.cu_seqlens))

    def forward_passes(
        self, engine: Any, batches: list[RerankerBatch], label_counts: torch.Tensor, seeds: list[int]
    ) -> Iterator[LossSums]:
        device = label_counts.device
        weights = torch.tensor(self.task_weights, device=device)
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            num_queries, num_candidates = len(batch), self.settings.gradient_candidates or batch.group
            pairs = np.arange(num_queries * batch.group).reshape(num_queries, batch.group)
            if num_candidates < batch.group:
                with torch.no_grad():
                    scores_BG = self._scores(engine, batch, pairs, device)
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
            yield LossSums((weights * sums / label_counts).sum(), sums.detach(), correct)

    def _scores(self, engine: Any, batch: RerankerBatch, pairs: np.ndarray, device: torch.device) -> torch.Tensor:
        """float32 scores of the pairs whose numbers in the batch are given, in their shape."""
        text, tokens = take_sequences(batch.pairs, pairs.ravel())
        types = None
        if batch.token_types is not None:
            types = torch.from_numpy(batch.token_types[tokens]).to(device)
        return engine(text_to_tensors(text, device), types).float().view(pairs.shape)


def take_sequences(text: PackedText, numbers: np.ndarray) -> tuple[PackedText, np.ndarray]:
    """(the sequences of a packed text with these numbers, in that order; which of its tokens they are)."""
    lengths = np.diff(text.cu_seqlens)[numbers]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(bounds[-1]) + np.repeat(text.cu_seqlens[numbers] - bounds[:-1], lengths)
    return PackedText(text.input_ids[tokens], bounds.astype(np.int32)), tokens


def gather_integers(mine: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 [ranks * n, ...] on `device`: every rank's rows, of which all ranks have as many."""
    tensor = torch.from_numpy(np.ascontiguousarray(mine, np.int64)).to(device)
    num_ranks = rank_and_world()[1]
    if num_ranks == 1:
        return tensor
    gathered = tensor.new_empty(num_ranks * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor)
    return gathered


def finetune(settings: FinetuneSettings, environment: Environment) -> int:
    """Runs or resumes a fine-tuning on this rank; returns the process's exit code (engine/training.py)."""
    return run_training(lambda: prepare(settings, environment), settings, environment)


def prepare(settings: FinetuneSettings, environment: Environment) -> FinetuneJob:
    """Checks settings, JSON, data and model, and opens them. Raises SettingsError or DataError."""
    config, micro_batch = check_settings(settings, find_problems(settings), environment.world_size)
    cuda = choose_device(settings.device, environment)
    candidates = read_candidates(settings.candidates)
    passages = read_passages(settings.corpus, titles=settings.titles)
    queries = read_queries(settings.queries)
    torch.manual_seed(settings.seed)
    loaded = load_reranker_to_train(settings) if settings.is_reranker else load_retriever_to_train(settings)
    if not cuda:
        return_freed_memory(sum(parameter.numel() for parameter in loaded.model.parameters()))
    groups = Groups(
        candidates,
        queries,
        passages,
        num_hard_negatives=settings.num_negatives,
        seed=settings.seed,
        with_scores=settings.stage == "distil",
    )
    stream = stream_examples(
        make_packer(settings, groups, loaded),
        seed=settings.seed,
        global_batch=settings.global_batch,
        micro_batch=micro_batch,
        rank=environment.rank,
        world_size=environment.world_size,
        num_workers=settings.num_workers,
    )
    probe = None
    if settings.probe is not None and settings.probe_every and not settings.is_reranker:
        probe = load_probe(
            Path(settings.probe),
            loaded.tokenizer,
            settings.max_passage_tokens,
            settings.max_query_tokens,
            settings.probe_split,
        )
    return (RerankerJob if settings.is_reranker else RetrieverJob)(
        settings=settings,
        config=fill_config(config, settings, micro_batch, environment.world_size, cuda),
        micro_batch=micro_batch,
        total_steps=total_steps(settings, len(candidates)),
        cuda=cuda,
        loaded=loaded,
        stream=stream,
        probe=probe,
        dataset_ids=[file_digest(settings.candidates), passages.digest, queries.digest],
    )


def make_packer(
    settings: FinetuneSettings, groups: Groups, loaded: Retriever | Reranker
) -> RetrieverPacker | RerankerPacker:
    """What turns queries and their drawn candidates into the stage's micro-batches."""
    if settings.is_reranker:
        return RerankerPacker(groups, loaded.tokenizer, max_tokens=settings.max_pair_tokens)
    return RetrieverPacker(
        groups,
        loaded.tokenizer,
        max_query_tokens=settings.max_query_tokens,
        max_passage_tokens=settings.max_passage_tokens,
        query_prompt=loaded.query_prompt,
        passage_prompt=loaded.passage_prompt,
    )


def load_retriever_to_train(settings: FinetuneSettings) -> Retriever:
    """The dual encoder that training starts from. Raises SettingsError."""
    retriever = load_retriever(
        settings.encoder,
        pooling=settings.pooling,
        normalise=settings.normalise,
        max_query_tokens=settings.max_query_tokens,
        max_passage_tokens=settings.max_passage_tokens,
        dropout=settings.dropout,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    model = retriever.model
    if settings.towers == "shared" and not model.shared:
        raise SettingsError(f"encoder {settings.encoder} has two towers; take --towers separate")
    if settings.towers == "separate" and model.shared:
        model = DualEncoder(model.passage, copy.deepcopy(model.passage), model.pooling, model.normalise)
        retriever = dataclasses.replace(retriever, model=model)
    model.train()
    return retriever


def load_reranker_to_train(settings: FinetuneSettings) -> Reranker:
    """The cross-encoder that training starts from. Raises SettingsError."""
    reranker = load_reranker(
        settings.encoder,
        max_tokens=settings.max_pair_tokens,
        dropout=settings.dropout,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    reranker.model.train()
    return reranker
