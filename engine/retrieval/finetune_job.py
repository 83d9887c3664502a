"""What every fine-tuning brings to the training loop; retriever_job.py and reranker_job.py have the steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quincunx.data_shards.stream import Stream
from quincunx.engine.evaluations import Probe
from quincunx.engine.retrieval.cross_encoder import Reranker
from quincunx.engine.retrieval.dual_encoder import Retriever
from quincunx.engine.retrieval.examples import RerankerBatch, RetrieverBatch
from quincunx.engine.retrieval.finetune_export import export_finetuned
from quincunx.engine.retrieval.finetune_settings import FinetuneSettings, find_idle_settings
from quincunx.engine.run_folder import RunFolder


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
    """Of candidates, passages, queries, and the model that training starts from."""

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
