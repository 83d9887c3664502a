"""A tiny corpus and real training processes for the launcher tests.

The corpus is 48 documents of three short passages over 120 invented words, each passage with a query; the encoder is a
BERT of 2 x 32 from scratch. A run of a few steps on two ranks takes about 15 s, nearly all of it imports.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from quincunx.engine.ranks import free_port

ROOT = Path(__file__).parent.parent.parent
LAUNCHER = str(ROOT / "launchers" / "pretrain.py")
FINETUNE = str(ROOT / "launchers" / "finetune.py")
BIN = Path(sys.executable).parent
MARK = "QUINCUNX_TEST_COMMAND"
TINY = {
    "encoder": "bert", "from_scratch": True, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_tokens": 32,
    "tasks": ["mkp", "cmp", "npr", "dor"], "decoder": "enhanced", "global_batch": 8, "learning_rate": 1e-3, "steps": 6,
    "log_every": 1, "checkpoint_every": 3, "held_out_every": 0, "tracking": "none", "export": False, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory, write_text_shards) -> Path:
    """A shard set of 144 training and 6 held-out passages with every field but continuations."""
    draw = random.Random(0)
    words = ["".join(draw.choice("aeioubdgkmnprst") for _ in range(draw.randint(3, 7))) for _ in range(120)]

    def passage() -> str:
        return " ".join(words[min(int(draw.expovariate(1 / 25)), 119)] for _ in range(draw.randint(8, 18)))

    documents = [[passage() for _ in range(3)] for _ in range(50)]
    return write_text_shards(tmp_path_factory.mktemp("tiny"), documents, num_train=48, max_tokens=32)


@dataclass
class Finished:
    """A training process that has ended."""

    code: int
    output: str
    folder: Path

    def lines(self, kind: str = "train") -> dict[int, dict]:
        """metrics.jsonl's lines of one kind by step."""
        return lines(self.folder, kind)

    def losses(self) -> dict[int, float]:
        return {step: line["loss/total"] for step, line in self.lines().items()}


def lines(folder: Path, kind: str = "train") -> dict[int, dict]:
    """metrics.jsonl's lines of one kind by step; a last line that is still being written is left out."""
    path = folder / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in whole]
    return {record["step"]: record for record in records if record["kind"] == kind}


def command(shards: Path, folder: Path, ranks: int = 1, launcher: str = "ranks", stage: str = "zero2", **settings):
    """A tiny pre-training's command line, settings over TINY; the rest as in training_command."""
    settings = {**TINY, "shards": [str(shards)], **settings}
    return training_command(LAUNCHER, folder, settings, ranks, launcher, stage)


def training_command(
    script: str, folder: Path, settings: dict, ranks: int = 1, launcher: str = "ranks", stage: str = "zero2"
) -> list[str]:
    """The command line of a training launcher; launcher: python (one process), ranks, deepspeed or torchrun."""
    before = {
        "python": [sys.executable],
        "ranks": [sys.executable, str(Path(__file__).parent / "spawn_ranks.py"), str(ranks), sys.executable],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())],
        "torchrun": [
            str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", str(free_port()), "--no-python",
            sys.executable,
        ],
    }[launcher]  # fmt: skip
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(json.dumps({"output": str(folder), **settings}))
    return [*before, script, "--deepspeed", f"ds_configs/{stage}.json", "--recipe", str(recipe)]


@contextlib.contextmanager
def started(argv: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A training command whose output goes to `log`; in the end it and all that it started are killed.

    All of them carry a mark in their environment.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", MARK: uuid.uuid4().hex, **environment}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            variables.pop(name, None)
    with open(log, "w") as file:
        process = subprocess.Popen(argv, stdout=file, stderr=file, env=variables, cwd=ROOT, start_new_session=True)
    process.mark = variables[MARK]
    try:
        yield process
    finally:
        for pid in members(process):
            send(pid, signal.SIGKILL)
        process.wait()


def run(shards: Path, folder: Path, timeout: float = 240, environment: dict | None = None, **arguments) -> Finished:
    """Runs a tiny pre-training to its end."""
    return run_command(command(shards, folder, **arguments), folder, timeout, environment)


def run_command(argv: list[str], folder: Path, timeout: float = 240, environment: dict | None = None) -> Finished:
    """Runs a training command to its end."""
    log = folder.parent / f"{folder.name}.log"
    with started(argv, log, **(environment or {})) as process:
        code = process.wait(timeout)
    return Finished(code, log.read_text(), folder)


def members(process: subprocess.Popen) -> list[int]:
    """Ids of a command's living processes, however remote (torchrun gives ranks sessions of their own)."""
    everyone = psutil.process_iter(["environ"])
    return sorted(one.pid for one in everyone if (one.info["environ"] or {}).get(MARK) == process.mark)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Ids of the training processes (not launchers, not helpers) of a command, in order of their start."""
    found = []
    for pid in members(process):
        with contextlib.suppress(psutil.Error):  # it has ended
            if {LAUNCHER, FINETUNE} & {*psutil.Process(pid).cmdline()[1:3]}:  # `python [-u] SCRIPT ...`
                found.append(pid)
    return found


def wait_until(condition, seconds: float, what: str):
    """Polls until `condition()` is true and returns its value; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s: {what}")


def send(pid: int, number: int) -> None:
    """Signals a process that may be gone by now."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints of a run folder."""
    return sorted((folder / "checkpoints").glob("step-*"))


@pytest.fixture(scope="session")
def harness() -> SimpleNamespace:
    """The functions above, since test modules cannot import a conftest."""
    functions = (
        command, committed, lines, members, ranks_of, run, run_command, send, started, training_command, wait_until,
    )  # fmt: skip
    named = {function.__name__: function for function in functions}
    return SimpleNamespace(**named, tiny=TINY, launcher=LAUNCHER, finetune=FINETUNE)


@pytest.fixture
def launched(monkeypatch, capsys):
    """Runs a launcher in this process; gives what it prints."""

    def run(main, *flags) -> str:
        monkeypatch.setattr(sys, "argv", ["launcher", *map(str, flags)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a launcher in this process, which must refuse its flags; gives its exit code and its one sentence."""
    from quincunx.data_shards.errors import exit_with_one_sentence

    def run(main, *flags) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["launcher", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            exit_with_one_sentence(main)
        (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return ended.value.code, said

    return run
