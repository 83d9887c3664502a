"""The folder of one run: held by one run at a time, its metrics, and the process that carries them to MLflow.

OUTPUT/settings.yaml        the resolved settings of the latest start
OUTPUT/metrics.jsonl        every metric and event
OUTPUT/tracking.json        who the run is in MLflow, and how far metrics.jsonl has been sent
OUTPUT/skipped_steps.jsonl  steps whose loss or gradient was not finite, with their sample ids
OUTPUT/checkpoints/         step-00001000/ ... (engine/checkpoint.py)
OUTPUT/export/              the finished models

A line of metrics.jsonl is {"step": optimizer steps done, "time": seconds since 1970, "kind": "train" | "held_out" |
"probe" | "event", ...values}. JSON has no word for nan and inf, so they are the strings "nan", "inf" and "-inf".

The training process only appends lines to it. A second process (engine/tracking.py) reads the file from the byte where
it stopped, sends what is new and keeps its place in tracking.json. So a slow, dead or hanging server delays nothing but
the sender (MLflow's `log_metrics` blocks for 246 s on a dead one), nothing queues in memory, and
`python launchers/send_metrics.py --run FOLDER` sends the rest at any later time.
"""

import contextlib
import dataclasses
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
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from quincunx.data_shards.durable import free_aside, written_whole
from quincunx.data_shards.errors import SettingsError

LOCK_FILE = "run.lock"
LOCK_PATIENCE_SECONDS = 10.0
SETTINGS_FILE = "settings.yaml"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "tracking.json"
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


def read_metrics(run_folder: Path) -> Iterator[dict[str, Any]]:
    """The run's records, oldest first; torn lines are left out. Nothing if the run has written none yet."""
    path = Path(run_folder) / METRICS_FILE
    if path.exists():
        with open(path, "rb") as file:
            yield from filter(None, map(parse_line, file))


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The record's metrics as floats, nan and inf included; step, time and everything that is no number left out."""
    metrics = {name: value for name, value in record.items() if name not in ("step", "time", "kind")}
    return {
        name: float(value)
        for name, value in metrics.items()
        if type(value) in (int, float) or value in ("nan", "inf", "-inf")
    }


def resolve_uri(uri: str, run_folder: Path) -> str:
    """The MLflow tracking URI of a `tracking` setting: "sqlite" is mlflow.db in the run folder, "none" is no MLflow."""
    return f"sqlite:///{Path(run_folder).resolve() / 'mlflow.db'}" if uri == "sqlite" else uri


def is_remote(uri: str) -> bool:
    """Whether a server stands between us and the store."""
    return not uri.startswith(("sqlite:", "file:", "/", "."))


def view_command(uri: str, run_folder: Path) -> str:
    """The shell command that shows the run, as a user types it."""
    uri = resolve_uri(uri, run_folder)
    if uri == "none":
        return f"tail -f {shlex.quote(str(Path(run_folder) / METRICS_FILE))}"
    return f"open {uri}" if is_remote(uri) else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


@dataclasses.dataclass
class TrackingState:
    """tracking.json: who the run is, where it is tracked, and how far the sender has come.

    run_id is ours, made when the run first starts and kept in its checkpoints; the MLflow run carries it as a tag, by
    which it is found again even if a server made a run and died before it could answer.
    """

    run_id: str
    run_name: str
    uri: str
    params: dict[str, str]
    mlflow_run_id: str | None = None
    sent_bytes: int = 0
    sent_steps: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, run_folder: Path) -> "TrackingState | None":
        path = Path(run_folder) / STATE_FILE
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def save(self, run_folder: Path) -> None:
        with written_whole(Path(run_folder) / STATE_FILE) as file:
            file.write(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def point_to(self, uri: str) -> None:
        """Another store has received nothing yet."""
        if uri != self.uri:
            self.uri, self.mlflow_run_id, self.sent_bytes, self.sent_steps = uri, None, 0, {}


class Tracker:
    """One run's metrics.jsonl, open for appending, and the process that sends it to MLflow."""

    def __init__(
        self,
        uri: str,
        run_folder: Path,
        run_name: str,
        params: dict[str, Any],
        run_id: str | None = None,
        step: int = 0,
    ):
        """Opens the record and starts its sender; returns in milliseconds, whatever the server does.

        uri: "sqlite" (mlflow.db in the run folder), any MLflow tracking URI, or "none". params: all settings; they
        become MLflow's params. run_id, step: those of the checkpoint that the run goes on from, None and 0 for a run
        that starts from nothing. The record is cut there: the later steps are trained and written again, so that each
        stands once. A line that a crash tore goes too.
        """
        self.run_folder, self._step = Path(run_folder), step
        self._file = open(self.run_folder / METRICS_FILE, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._unwritten = b""
        with open(self._file.name, "rb") as file:
            kept = sum(map(len, itertools.takewhile(functools.partial(is_of_steps_up_to, step), file)))
        self._file.truncate(kept)

        state = TrackingState.load(self.run_folder)
        if state is None or run_id not in (None, state.run_id):
            state = TrackingState(run_id or uuid.uuid4().hex, run_name, "", {})
        state.point_to(resolve_uri(uri, self.run_folder))
        state.params = {name: str(value) for name, value in params.items()}
        state.sent_bytes = min(state.sent_bytes, kept)
        state.save(self.run_folder)
        self.run_id = state.run_id
        self._sender = None
        if uri != "none":
            with open(self.run_folder / LOG_FILE, "ab") as log:
                self._sender = subprocess.Popen(
                    [sys.executable, "-m", "quincunx.engine.tracking", str(self.run_folder)],
                    stdin=subprocess.PIPE,
                    stdout=2,  # its own few sentences stand on our stderr; what libraries print goes to the log
                    stderr=log,
                )

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

        The sender itself gives up on the first request that is not answered within 10 s. What could not be sent is said
        on stderr, with the command that sends it later. A second call does nothing.
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
            print(f"tracking: {self._unsent(status)}", file=sys.stderr, flush=True)

    def _unsent(self, status: str) -> str:
        """How much of the record MLflow has not received, and what sends it."""
        state = TrackingState.load(self.run_folder)
        with open(self.run_folder / METRICS_FILE, "rb") as file:
            file.seek(state.sent_bytes)
            unsent = sum(1 for _ in file)
        lines = f"{unsent} line{'' if unsent == 1 else 's'} of {METRICS_FILE}"
        if status == "preempted":
            return f"{lines} are not in MLflow at {state.uri} yet; the resumed run sends them"
        command = f"python launchers/send_metrics.py --run {shlex.quote(str(self.run_folder))}"
        return f"{lines} did not reach MLflow at {state.uri}, send them with: {command}"


def is_of_steps_up_to(step: int, line: bytes) -> bool:
    """Whether a line is whole and of a step that a checkpoint of `step` holds; of step 0 none is."""
    record = parse_line(line)
    return record is not None and 0 < step >= record["step"]


def plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors and numpy scalars become numbers, nan and inf become strings."""
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
