"""What a stage brings to the training loop (engine/training.py): its model, data, losses, evaluations and export."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from quincunx.engine.run_folder import RunFolder
from quincunx.engine.settings import RunSettings


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
    config: dict[str, Any]
    """The DeepSpeed JSON, filled."""
    micro_batch: int
    total_steps: int
    cuda: bool
    model: torch.nn.Module
    stream: Any
    """iterate(step) gives the rank's micro-batches step by step; wait_seconds is the time its consumer has waited."""
    dataset_ids: list[str]
    """Digests of all that is trained on."""
    dataset_weights: list[int]
    task_names: list[str]
    """Names of the losses, in the order of num_labels and of a StepOutput's sums."""
    task_weights: list[float]
    evaluations: list[Evaluation]
    warnings: list[str]
    """Sentences about settings without effect."""

    def describe(self) -> str:
        """One line on what is trained on what."""

    def write_model_files(self, folder: Path) -> None:
        """Keeps in the run folder what an export needs beside the weights. Rank 0 only."""

    def num_labels(self, batch: Any) -> list[int]:
        """What each loss of a micro-batch is a mean over: labelled tokens, or queries."""

    def forward_passes(
        self, engine: Any, batches: list, label_counts: torch.Tensor, seeds: list[int]
    ) -> Iterator["StepOutput"]:
        """The step's micro-batches through the engine, one output each, in order; the loop runs backward on each.

        label_counts: num_labels of the global batch, float32 on the device; a loss is this rank's share of the mean.
        seeds: torch's seed for each forward's dropout.
        """

    def flops(self, batch: Any) -> float:
        """FLOPs of forward and backward of a micro-batch, for mfu."""

    def sample_ids(self, step: int) -> dict[str, list]:
        """What names the examples of the global batch of `step`, counted from 0."""

    def compile(self) -> None:
        """torch.compile for the parts of the model that gain by it."""

    def export(self, folder: RunFolder) -> list[Path]:
        """Writes the finished models into folder.export; returns what MLflow should show. Rank 0 only."""


class StepOutput(Protocol):
    """What a job's forward pass gives."""

    loss: torch.Tensor
    """Scalar: this micro-batch's share of the weighted sum of losses, each a mean over the global batch."""
    nll_sums: torch.Tensor
    """[tasks], sums of each loss over what num_labels counts, detached."""
    correct: torch.Tensor
    """[tasks], how many of them the model got right."""
