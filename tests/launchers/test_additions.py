"""docs/architecture.md's "to add a task, a loss, a stage": each in a module beside ours, in real runs.

A field has its own test: tests/data_shards/test_new_field.py.
"""

import subprocess
import sys
from pathlib import Path

from quincunx.engine.tracking import read_metrics

TASK_AND_LOSS = """
import sys

import torch

from quincunx.data_shards.tasks import TASKS, TaskKind
from quincunx.engine.model import SENTENCE_LOSSES

TASKS["sixth"] = TaskKind(code=8, field="passage", draw="uniform", title="a sixth task")


def contrastive(h_BD, batch, encode):
    view_BD = encode(batch.encoder)  # the same text under other dropout
    similarities_BB = torch.nn.functional.normalize(h_BD, dim=1) @ torch.nn.functional.normalize(view_BD, dim=1).T
    return torch.nn.functional.cross_entropy(similarities_BB / 0.05, torch.arange(len(h_BD)), reduction="none")


SENTENCE_LOSSES["contrastive"] = contrastive

if __name__ == "__main__":
    from quincunx.launchers.pretrain import main

    sys.exit(main())
"""

STAGE = """
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from quincunx.data_shards.stream import Order, Stream
from quincunx.engine.ranks import discover_environment
from quincunx.engine.settings import Machine, RunSettings, load_machine
from quincunx.engine.training import StepOutput, run_training


class Points(NamedTuple):
    x: torch.Tensor
    num_passages: int
    num_tokens: int = 0
    num_cut_texts: int = 0


class Packer:
    def pack(self, rows):
        return Points(torch.tensor(rows.sample_ids / 100, dtype=torch.float32), len(rows.sample_ids))

    def names(self, rows):
        return {"points": rows.sample_ids.tolist()}


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def loss_counts(self, batch):
        return [batch.num_passages]

    def compile_parts(self):
        self.line.compile()

    def forward(self, batch, counts):
        squares = (self.line(batch.x[:, None])[:, 0] - 2 * batch.x - 1) ** 2
        return StepOutput(squares.sum() / counts[0], squares.sum()[None].detach(), torch.zeros(1), 0.0)


@dataclass
class LineJob:
    settings: RunSettings
    machine: Machine
    model: Line
    stream: Stream
    data: dict
    loss_weights: dict = field(default_factory=lambda: {"squares": 1.0})
    evaluations: list = field(default_factory=list)

    def forward_passes(self, engine, batches, label_counts, seeds):
        for batch in batches:
            yield engine(batch, label_counts)

    def write_model_files(self, folder):
        pass


environment = discover_environment()
settings = RunSettings(
    output=sys.argv[1], steps=60, global_batch=8, learning_rate=0.1, device="cpu", tracking="none", export=False,
    log_every=1, checkpoint_every=30,
)


def prepare():
    machine = load_machine(settings, environment.world_size, cuda=False)
    stream = Stream(Packer(), Order(settings.seed, [np.full(10, 10)]), global_batch=8, micro_batch=machine.micro_batch)
    return LineJob(settings, machine, Line(), stream, {"dataset_ids": ["line"], "dataset_weights": [1]})


sys.exit(run_training(prepare, environment))
"""


def run(tmp_path: Path, module: str, *arguments: str) -> Path:
    (tmp_path / "addition.py").write_text(module)
    command = [sys.executable, tmp_path / "addition.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def losses(folder: Path, name: str) -> list[float]:
    return [record[f"loss/{name}"] for record in read_metrics(folder) if record["kind"] == "train"]


def test_a_sixth_task_and_a_loss_of_the_sentence_vectors_train(tmp_path, tiny_shards):
    sizes = ["--hidden_size", "32", "--num_layers", "1", "--num_heads", "2", "--max_tokens", "32"]
    learned = ["--tasks", "mkp", "sixth", "--task_weights", "1", "0.5", "--sentence_losses", "contrastive", "0.1"]
    machine = ["--global_batch", "8", "--steps", "12", "--log_every", "1", "--tracking", "none", "--no_export"]
    data = ["--shards", str(tiny_shards), "--output", str(tmp_path / "run"), "--held_out_every", "0", "--device", "cpu"]
    rates = ["--recipe", "demo", "--probe", "None", "--micro_batch", "8", "--learning_rate", "1e-2"]
    folder = run(tmp_path, TASK_AND_LOSS, *rates, *sizes, *learned, *machine, *data)
    for name in ("mlm", "mkp", "sixth", "contrastive"):
        found = losses(folder, name)
        assert len(found) == 12 and found[-1] < found[0], name
    last = [record for record in read_metrics(folder) if record["kind"] == "train"][-1]
    weighted = {"mlm": 1, "mkp": 1, "sixth": 0.5, "contrastive": 0.1}
    assert abs(last["loss/total"] - sum(w * last[f"loss/{name}"] for name, w in weighted.items())) < 1e-4


def test_a_stage_of_one_s_own_is_a_job_for_the_loop(tmp_path):
    folder = run(tmp_path, STAGE, str(tmp_path / "run"))
    found = losses(folder, "squares")
    assert len(found) == 60 and found[-1] < 0.1 * found[0]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000030", "step-00000060"]
