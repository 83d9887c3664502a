"""What a stage brings to the training loop (engine/training.py): its model, data, losses and evaluations."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from quincunx.data_shards.stream import Stream
from quincunx.engine.settings import Machine, RunSettings


class Evaluation(NamedTuple):
    """What is measured before the first step, every so many steps, and after the last. Every rank takes part."""

    kind: str
    """Kind of its records in metrics.jsonl: "held_out", "probe" or "dev"."""
    every: int
    """Steps between two measurements; 0 never."""
    measure: Callable[[torch.device], dict[str, float]]
    shown: bool
    """Whether its numbers are printed."""


class Job(Protocol):
    """What a stage brings to the run, on each rank; made before the process group starts."""

    settings: RunSettings
    machine: Machine
    model: torch.nn.Module
    """Its loss_counts(batch) says what each loss is a mean over (labelled tokens, queries), its compile_parts() runs
    torch.compile on the parts that gain by it."""
    stream: Stream
    """The rank's micro-batches step by step. A batch has num_passages, num_tokens and num_cut_texts."""
    data: dict[str, list]
    """What a checkpoint must agree on: dataset_ids, digests of all that is trained on, and dataset_weights."""
    loss_weights: dict[str, float]
    """Weight of each loss by its name, in the order of loss_counts and of a StepOutput's sums."""
    evaluations: list[Evaluation]

    def forward_passes(
        self, engine: Any, batches: list, label_counts: torch.Tensor, seeds: list[int]
    ) -> Iterator["StepOutput"]:
        """The step's micro-batches through the engine, one output each, in order; the loop runs backward on each.

        label_counts: loss_counts of the global batch, float32 on the device; a loss is this rank's share of the mean.
        seeds: torch's seed for each forward's dropout.
        """

    def write_model_files(self, folder: Path) -> None:
        """Keeps in `folder` what an export needs beside the weights (launchers/export.py). Rank 0 only."""


class StepOutput(Protocol):
    """What a job's forward pass gives."""

    loss: torch.Tensor
    """Scalar: this micro-batch's share of the weighted sum of losses, each a mean over the global batch."""
    nll_sums: torch.Tensor
    """[losses], sums of each loss over what loss_counts counts, detached."""
    correct: torch.Tensor
    """[losses], how many of them the model got right."""
    flops: float
    """FLOPs of forward and backward, matrix products only, for mfu; recomputation does not count."""
