"""A GLUE task as a job for the training loop (engine/training.py): a cross-encoder with as many labels as the task.

Classes are learned by cross-entropy, STS-B's scores by squared error; both are means over the global batch, so neither
the number of ranks nor the micro-batch changes the gradient. The order is data_shards/order.py's, a pure function of
seed and step: an epoch takes every example once, and its last ones share a step with the first of the next.

Letters: B examples of a micro-batch, T tokens, N examples of a file, C labels of the model.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.order import Order
from quincunx.data_shards.stream import Stream
from quincunx.engine.deepspeed_config import load_config
from quincunx.engine.environment import Environment, choose_device, gather_rows, rank_and_world
from quincunx.engine.export import MODEL_FOLDER
from quincunx.engine.host_memory import return_freed_memory
from quincunx.engine.job import Evaluation
from quincunx.engine.packing import batches_by_length, pack
from quincunx.engine.retrieval.cross_encoder import CrossEncoder, Reranker, load_reranker, save_reranker
from quincunx.engine.retrieval.finetune_job import LossSums
from quincunx.engine.retrieval.glue_batches import GlueBatch, GluePacker, tokenise_examples
from quincunx.engine.retrieval.glue_data import TASKS, GlueExamples, find_files, read_examples, unlike_published
from quincunx.engine.retrieval.glue_export import export_glue
from quincunx.engine.retrieval.glue_metrics import measure
from quincunx.engine.retrieval.glue_settings import GlueSettings, find_idle_settings
from quincunx.engine.run_folder import RunFolder
from quincunx.engine.tensors import text_to_tensors
from quincunx.engine.throughput import encoder_multiply_adds
from quincunx.engine.training import run_training

SCORE_TOLERANCE = 0.5
"""A score this near to its label counts as right in accuracy/squared_error."""


@dataclass(frozen=True)
class GlueJob:
    """One rank's part of a GLUE run; fields and methods as engine/job.py has them."""

    settings: GlueSettings
    config: dict[str, Any]
    micro_batch: int
    total_steps: int
    cuda: bool
    loaded: Reranker
    """The model to train, with its tokenizer."""
    stream: Stream
    train: GlueExamples
    dev: GlueExamples
    dev_tokens: tuple[list[np.ndarray], list[np.ndarray] | None]
    """dev's ids and token types."""
    test: Path | None

    @property
    def model(self) -> CrossEncoder:
        return self.loaded.model

    @property
    def dataset_ids(self) -> list[str]:
        """Of the training file and, so that all ranks measure the same, of the dev file."""
        return [self.train.digest, self.dev.digest]

    @property
    def dataset_weights(self) -> list[int]:
        return [1, 0]

    @property
    def task_names(self) -> list[str]:
        return ["cross_entropy" if TASKS[self.settings.task].classes else "squared_error"]

    @property
    def task_weights(self) -> list[float]:
        return [1.0]

    @property
    def evaluations(self) -> list[Evaluation]:
        return [Evaluation("dev", self.settings.dev_every, self.measure_dev, shown=True)]

    @property
    def warnings(self) -> list[str]:
        name, sentences = self.settings.task, find_idle_settings(self.settings)
        for split, examples in (("train", self.train), ("dev", self.dev)):
            if (sentence := unlike_published(name, split, examples)) is not None:
                sentences.append(sentence)
            if examples.num_broken:
                sentences.append(f"{examples.num_broken} rows of {examples.path} are broken and left out")
        return sentences

    def describe(self) -> str:
        steps = len(self.train) / self.settings.global_batch
        return (
            f"{TASKS[self.settings.task].title}: {len(self.train):,} examples, an epoch is {steps:,.1f} steps, "
            f"{len(self.dev):,} of dev"
        )

    def write_model_files(self, folder: Path) -> None:
        """The model that the run starts from; its configuration and tokenizer are the export's."""
        card = f"Where this run started: {self.settings.encoder}\n"
        max_tokens = self.settings.max_tokens
        save_reranker(folder / MODEL_FOLDER, self.model, None, self.loaded.tokenizer, max_tokens=max_tokens, card=card)

    def num_labels(self, batch: GlueBatch) -> list[int]:
        return [len(batch)]

    def forward_passes(
        self, engine: Any, batches: list[GlueBatch], label_counts: torch.Tensor, seeds: list[int]
    ) -> Iterator[LossSums]:
        device = label_counts.device
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            types = None if batch.token_types is None else torch.from_numpy(batch.token_types).to(device)
            logits = engine(text_to_tensors(batch.text, device), types).float()
            loss_sum, correct = sum_losses(logits, torch.from_numpy(batch.labels).to(device))
            yield LossSums((loss_sum / label_counts).sum(), loss_sum.detach()[None], correct[None])

    def flops(self, batch: GlueBatch) -> float:
        lengths = np.diff(batch.text.cu_seqlens)
        return 3 * 2 * encoder_multiply_adds(self.model.model.base_model, lengths, np.ones_like(lengths))

    def sample_ids(self, step: int) -> dict[str, list]:
        """Places of the examples among the training file's, from 0."""
        return {"examples": self.stream.order.global_batch(step, self.settings.global_batch).sample_ids.tolist()}

    def compile(self) -> None:
        self.model.model.base_model.compile(dynamic=True)

    def measure_dev(self, device: torch.device) -> dict[str, float]:
        """dev/MEASURE and dev/loss (per example) of the model as it stands, on every rank; every rank must call it."""
        was_training = self.model.training
        self.model.eval()
        try:
            logits = predict(self.model, *self.dev_tokens, device)
        finally:
            self.model.train(was_training)
        labels = self.dev.labels
        loss = float(sum_losses(torch.from_numpy(logits), torch.from_numpy(labels))[0]) / len(labels)
        measures = {"loss": loss, **measure(self.settings.task, logits, labels)}
        return {f"dev/{name}": value for name, value in measures.items()}

    def export(self, folder: RunFolder) -> list[Path]:
        return export_glue(folder.path, folder.export, self.test, "cuda" if self.cuda else "cpu")


def sum_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the summed loss, how many are right), scalars: of classes [B, C] in nats, of scores [B] squared errors."""
    if labels.dtype == torch.int64:
        return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum().to(logits.dtype)
    errors = logits - labels
    return errors.square().sum(), (errors.detach().abs() <= SCORE_TOLERANCE).sum().to(logits.dtype)


def predict(
    model: CrossEncoder, ids: list[np.ndarray], types: list[np.ndarray] | None, device: torch.device
) -> np.ndarray:
    """float32 [N] or [N, C]: the logits of all examples in their order, on every rank; every rank must call it.

    Rank r takes batches r, r + ranks, ...; one that has a batch fewer takes the last one once more, so that all run the
    same number of forwards, as ZeRO-3 needs. Raises DataError where the ranks together have not every example once.
    """
    rank, num_ranks = rank_and_world()
    batches = batches_by_length(ids)
    rows = []
    with torch.no_grad():  # not inference_mode, whose tensors ZeRO-3 cannot gather into
        for turn in range(-(-len(batches) // num_ranks)):
            number = rank + turn * num_ranks
            batch = batches[min(number, len(batches) - 1)]
            packed = text_to_tensors(pack([ids[n] for n in batch]), device)
            types_T = None if types is None else torch.from_numpy(np.concatenate([types[n] for n in batch])).to(device)
            logits = model(packed, types_T).double()
            if number < len(batches):
                rows.append(torch.cat([torch.from_numpy(batch)[:, None].to(logits), logits.view(len(batch), -1)], 1))
    mine = torch.cat(rows) if rows else torch.empty(0, 1 + model.num_labels, dtype=torch.float64, device=device)
    shares = [sum(map(len, batches[other::num_ranks])) for other in range(num_ranks)]
    gathered = gather_rows(mine, shares).cpu().numpy()
    if not np.array_equal(np.sort(gathered[:, 0]), np.arange(len(ids))):
        raise DataError(
            f"{num_ranks} ranks predicted {len(gathered)} examples where each of {len(ids)} was due once: give all "
            "machines the same files"
        )
    ordered = gathered[np.argsort(gathered[:, 0]), 1:].astype(np.float32)
    return ordered[:, 0] if model.num_labels == 1 else ordered


def run_glue(settings: GlueSettings, environment: Environment) -> int:
    """Runs or resumes a GLUE run on this rank; returns the process's exit code (engine/training.py)."""
    return run_training(partial(prepare, settings, environment), settings, environment)


def prepare(settings: GlueSettings, environment: Environment) -> GlueJob:
    """Checks files and model, and opens them. Raises SettingsError or DataError."""
    cuda = choose_device(settings.device, environment)
    config, micro_batch = load_config(settings, environment.world_size, cuda)
    task = TASKS[settings.task]
    files = find_files(settings.data, {"train": settings.train, "dev": settings.dev, "test": settings.test})
    train, dev = (
        read_examples(settings.task, files[split], split, skip_broken=settings.skip_broken_rows)
        for split in ("train", "dev")
    )
    if files["test"] is not None and environment.is_main:
        read_examples(settings.task, files["test"], "test")  # an error now, not after the training
    torch.manual_seed(settings.seed)
    loaded = load_reranker(
        settings.encoder,
        num_labels=len(task.classes) or 1,
        max_tokens=settings.max_tokens,
        dropout=settings.dropout,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    loaded.model.train()
    if task.classes:
        loaded.model.config.id2label = dict(enumerate(task.classes))
        loaded.model.config.label2id = {name: label for label, name in enumerate(task.classes)}
    if not cuda:
        return_freed_memory(sum(parameter.numel() for parameter in loaded.model.parameters()))
    tokenizer = copy.deepcopy(loaded.tokenizer)  # it will cut at max_tokens, the exported one must not
    ids, types, _ = tokenise_examples(tokenizer, dev.firsts, dev.seconds, settings.max_tokens)
    stream = Stream(
        GluePacker(train, tokenizer, settings.max_tokens),
        Order(settings.seed, [np.array([len(train)])]),
        global_batch=settings.global_batch,
        micro_batch=micro_batch,
        rank=environment.rank,
        world_size=environment.world_size,
        num_workers=settings.num_workers,
    )
    return GlueJob(
        settings=settings,
        config=config,
        micro_batch=micro_batch,
        total_steps=settings.total_steps(len(train)),
        cuda=cuda,
        loaded=loaded,
        stream=stream,
        train=train,
        dev=dev,
        dev_tokens=(ids, types),
        test=files["test"],
    )
