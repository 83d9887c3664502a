"""The folder of one run: held by one run at a time; its metrics; and the process that carries them to MLflow.

OUTPUT/settings.yaml        the resolved settings of the latest start
OUTPUT/metrics.jsonl        every metric and event (docs/tracking.md)
OUTPUT/tracking.json        how far metrics.jsonl has been sent to MLflow (engine/tracking.py)
OUTPUT/skipped_steps.jsonl  steps whose loss or gradient was not finite, with their sample ids
OUTPUT/checkpoints/         step-00001000/ ... (engine/checkpoint.py)
OUTPUT/export/              the finished models

The training process only appends to metrics.jsonl. A second process follows that file, so a slow, dead or hanging
server delays nothing but that one (MLflow's `log_metrics` blocks for 246 s on a dead one).
"""

import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from quincunx.data_shards.durable import free_aside
from quincunx.data_shards.errors import SettingsError

LOCK_FILE = "run.lock"
LOCK_PATIENCE_SECONDS = 10.0
SETTINGS_FILE = "settings.yaml"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "tracking.log"
MODEL_FOLDER = "model"
CLOSE_SECONDS = 10.0
CLOSE_SECONDS_FINISHED = 60.0


class RunFolder:
    """A run's folder, held by this process (rank 0) until it ends. Other ranks only use the paths."""

    def __init__(self, path: str, is_main: bool):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.model = self.path / MODEL_FOLDER
        self.settings_file = self.path / SETTINGS_FILE
        self.skipped_file = self.path / "skipped_steps.jsonl"
        if is_main:
            self._lock = self._hold()

    def _hold(self) -> IO[str]:
        """Takes the lock; a run that is just ending is waited for a few seconds.

        The lock is the kernel's (flock), so a killed run leaves none behind. Raises SettingsError if another run holds
        it, or if the folder cannot be made or locked.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK_FILE, "a+")  # noqa: SIM115 - held for the process's life
        except OSError as error:
            raise SettingsError(f"output {self.path} cannot be written: {error.strerror}") from None
        give_up_at = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_at:
                    lock.seek(0)
                    holder = lock.read().strip() or "unknown"
                    raise SettingsError(
                        f"output {self.path} is in use by another run ({holder}); stop it or choose another output"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                raise SettingsError(
                    f"output {self.path} is on a file system that cannot lock files ({error.strerror}), so two "
                    "runs could write there; mount it with locks, or choose another output"
                ) from None
        lock.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        lock.flush()
        return lock

    def set_aside(self) -> Path | None:
        """Moves everything of an earlier run into `OUTPUT.old-1`, -2 ...; that folder, None if there is nothing.

        Slurm runs a requeued job's command again as it was: what lies here then is the job's own run, and stays.
        """
        earlier = [entry for entry in self.path.iterdir() if entry.name != LOCK_FILE]
        if not earlier or os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            return None
        aside = free_aside(self.path)
        aside.mkdir()
        for entry in earlier:
            entry.rename(aside / entry.name)
        return aside


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of one line, None if a crash or a full disk tore it."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


class Tracker:
    """One run's metrics.jsonl, open for appending, and the process that sends it to MLflow."""

    def __init__(self, run_folder: Path, tracking: str, step: int = 0):
        """Opens the record and starts its sender; returns in milliseconds, whatever the server does.

        tracking: the run's setting, "none" for no sender; the sender reads it and all others from settings.yaml. step:
        that of the checkpoint that the run goes on from, 0 for a run that starts from nothing. The record is cut there:
        the later steps are trained and written again, so that each stands once. A line that a crash tore goes too.
        """
        self.run_folder, self.tracking, self._step = Path(run_folder), tracking, step
        self._file = open(self.run_folder / METRICS_FILE, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._unwritten = b""
        with open(self._file.name, "rb") as file:
            kept = sum(map(len, itertools.takewhile(functools.partial(is_of_steps_up_to, step), file)))
        self._file.truncate(kept)
        self._sender = None
        if tracking != "none":
            sender = [sys.executable, "-m", "quincunx.engine.tracking", str(self.run_folder), "--follow", str(kept)]
            with open(self.run_folder / LOG_FILE, "ab") as log:
                # Its own few sentences stand on our stderr; what libraries print goes to the log.
                self._sender = subprocess.Popen(sender, stdin=subprocess.PIPE, stdout=2, stderr=log)

    def log(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
        """Records metrics of `step` (optimizer steps done); kind is "train", "event" or an evaluation's.

        The line goes to the operating system at once, so that a killed process loses none. If the disk is full, that is
        said once, and the lines wait in memory until there is room.
        """
        self._step = step
        record = {"step": step, "time": round(time.time(), 3), "kind": kind}
        record |= {name: plain(value) for name, value in metrics.items()}
        complaining = not self._unwritten
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if complaining:
                print(f"warning: {self._file.name} cannot be written: {error.strerror}", file=sys.stderr, flush=True)

    def artifact(self, path: Path) -> None:
        """Has a file or folder sent to MLflow as it stands now or a moment later."""
        self.log(self._step, "event", {"event": "artifact", "path": str(Path(path).resolve())})

    def close(self, status: str) -> None:
        """Ends the record and waits until the sender is done: at most 10 s, at the end of a finished run 60 s.

        The sender itself gives up on the first request that is not answered within 10 s. If not all was sent, stderr
        says so, with the command that sends the rest. A second call does nothing.
        status: "finished", "preempted", "interrupted", "diverged", "hung" or "failed".
        """
        if self._file.closed:
            return
        self.log(self._step, "event", {"event": "closed", "status": status})
        if lost := self._unwritten.count(b"\n"):
            print(f"warning: {lost} lines of {self._file.name} are lost", file=sys.stderr, flush=True)
        self._file.close()
        if self._sender is None:
            return
        with self._sender as sender:
            with contextlib.suppress(BrokenPipeError):  # it has died; its exit code says so
                os.write(sender.stdin.fileno(), b"close\n")
            try:
                sender.wait(CLOSE_SECONDS_FINISHED if status == "finished" else CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                sender.kill()
        if sender.returncode != 0:
            command = f"python -m quincunx.engine.tracking {shlex.quote(str(self.run_folder))}"
            remedy = "the resumed run sends them" if status == "preempted" else f"send them with: {command}"
            print(
                f"tracking: the last lines of {METRICS_FILE} did not reach MLflow ({self.tracking}); {remedy}",
                file=sys.stderr,
                flush=True,
            )


def is_of_steps_up_to(step: int, line: bytes) -> bool:
    """Whether a line is whole and of a step that a checkpoint of `step` holds; of step 0 none is."""
    record = parse_line(line)
    return record is not None and 0 < step >= record["step"]


def plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors and numpy scalars become numbers, nan and inf become strings."""
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
