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

from quincunx.data_shards.errors import SettingsError

LOCK_FILE = "run.lock"
LOCK_PATIENCE_SECONDS = 10.0
SETTINGS_FILE = "settings.yaml"
SKIPPED_FILE = "skipped_steps.jsonl"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "tracking.json"
LOG_FILE = "tracking.log"
MODEL_FOLDER = "model"
CLOSE_SECONDS = 10.0
CLOSE_SECONDS_FINISHED = 60.0
STATUSES = ("finished", "preempted", "interrupted", "diverged", "hung", "failed")


class RunFolder:
    """A run's folder, held by this process (rank 0) until it ends. Other ranks only use the paths."""

    def __init__(self, path: str, is_main: bool):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.model = self.path / MODEL_FOLDER
        self.settings_file = self.path / SETTINGS_FILE
        self._lock: IO[str] | None = None
        if is_main:
            self._hold()

    def _hold(self) -> None:
        """Takes the lock; a run that is just ending is waited for a few seconds.

        The lock is the kernel's (flock), so a killed run leaves none behind. Raises SettingsError where another run
        holds it, or where the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK_FILE, "a+")  # noqa: SIM115 - held for the process's life
        except OSError as error:
            raise SettingsError(f"output {self.path} cannot be written: {error.strerror}") from None
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    raise SettingsError(
                        f"output {self.path} lies on a file system that cannot lock files ({error.strerror}), so that "
                        "two runs could write there; mount it with locks, or choose another output"
                    ) from None
                if time.monotonic() > deadline:
                    self._lock.seek(0)
                    holder = self._lock.read().strip() or "unknown"
                    raise SettingsError(
                        f"output {self.path} is in use by another run ({holder}); stop it or choose another output"
                    ) from None
                time.sleep(0.2)
        self._lock.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        self._lock.flush()

    def set_aside(self) -> Path | None:
        """Moves everything of an earlier run into `OUTPUT.old-1`, -2 ...; that folder, None where there is nothing.

        Slurm runs a requeued job's command again as it was: what lies here then is the job's own run, and stays.
        """
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            return None
        earlier = [entry for entry in self.path.iterdir() if entry.name != LOCK_FILE]
        if not earlier:
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        aside.mkdir()
        for entry in earlier:
            entry.rename(aside / entry.name)
        return aside

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Writes the resolved settings of this start."""
        import yaml

        self.settings_file.write_text(yaml.safe_dump(settings, sort_keys=False))

    def note_skipped_step(self, record: dict[str, Any]) -> None:
        """Appends one skipped step to skipped_steps.jsonl."""
        with open(self.path / SKIPPED_FILE, "a") as file:
            file.write(json.dumps(record) + "\n")


class MetricsWriter:
    """The record, open for appending, cut back to the steps that the resumed checkpoint holds.

    path: the file. resume_step: optimizer steps the loaded checkpoint has done, 0 for a run that starts from nothing.
    The steps after it will be trained and written again, so that each stands once; a line that a crash tore goes too.
    """

    def __init__(self, path: Path, resume_step: int):
        if path.exists():
            os.truncate(path, _bytes_until(path, resume_step))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._unwritten = b""

    def append(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Hands one line to the operating system, so that a killed process loses none.

        Where the disk is full, that is said once, and the lines wait in memory until there is room.
        """
        record = {"step": step, "time": round(time.time(), 3), "kind": kind}
        record.update((name, plain(value)) for name, value in values.items())
        complaining = not self._unwritten
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if complaining:
                print(f"warning: {self._file.name} cannot be written: {error.strerror}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            print(f"warning: {lost} lines of {self._file.name} are lost", file=sys.stderr, flush=True)
        self._file.close()


def _bytes_until(path: Path, resume_step: int) -> int:
    """The length of the leading lines that are whole and belong to steps up to `resume_step` (none where it is 0)."""
    kept = 0
    if resume_step <= 0:
        return kept
    with open(path, "rb") as file:
        for line in file:
            record = parse_line(line)
            if record is None or record["step"] > resume_step:
                break
            kept += len(line)
    return kept


def plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors and numpy scalars become numbers, nan and inf become strings."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of one line, None where a crash or a full disk tore it."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"step", "time", "kind"} <= record.keys() else None


def read_metrics(run_folder: Path) -> Iterator[dict[str, Any]]:
    """The run's records, oldest first; torn lines are left out. Nothing where the run has written none yet."""
    path = Path(run_folder) / METRICS_FILE
    if path.exists():
        with open(path, "rb") as file:
            yield from filter(None, map(parse_line, file))


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The record's metrics as floats, nan and inf included; step, time and everything that is no number left out."""
    values = {}
    for name, value in record.items():
        if name in ("step", "time", "kind") or isinstance(value, bool):
            continue
        if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
            values[name] = float(value)
    return values


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


def send_command(run_folder: Path) -> str:
    """The shell command that sends whatever the run has not sent yet."""
    return f"python launchers/send_metrics.py --run {shlex.quote(str(run_folder))}"


@dataclasses.dataclass
class TrackingState:
    """tracking.json: who the run is, where it is tracked, and how far the sender has come.

    run_id is ours, made when the run first starts and kept in its checkpoints; the MLflow run carries it as a tag, by
    which it is found again even where a server made a run and died before it could answer.
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
        path = Path(run_folder) / STATE_FILE
        staging = path.with_suffix(".tmp")
        staging.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        os.replace(staging, path)

    def point_to(self, uri: str) -> None:
        """Another store has received nothing yet."""
        if uri != self.uri:
            self.uri, self.mlflow_run_id, self.sent_bytes, self.sent_steps = uri, None, 0, {}


def open_tracker(
    uri: str,
    run_folder: Path,
    run_name: str,
    params: dict[str, Any],
    resume_run_id: str | None = None,
    resume_step: int = 0,
    is_main: bool = True,
) -> "Tracker":
    """Opens the run's record and starts its sender; returns in milliseconds, whatever the server does.

    uri: "sqlite" (mlflow.db in the run folder), any MLflow tracking URI, or "none".
    params: all settings; they become MLflow's params.
    resume_run_id: the `run_id` that the checkpoint carries, None for a run that starts from nothing.
    resume_step: optimizer steps the loaded checkpoint has done; later lines of metrics.jsonl are cut off.
    is_main: False on every rank but 0; the tracker then does nothing.
    """
    run_folder = Path(run_folder)
    if not is_main:
        return Tracker(run_folder, "", None, None)
    run_folder.mkdir(parents=True, exist_ok=True)
    writer = MetricsWriter(run_folder / METRICS_FILE, resume_step)
    state = TrackingState.load(run_folder)
    if state is None or resume_run_id not in (None, state.run_id):
        state = TrackingState(resume_run_id or uuid.uuid4().hex, run_name, "", {})
    state.point_to(resolve_uri(uri, run_folder))
    state.params = {name: str(value) for name, value in params.items()}
    state.sent_bytes = min(state.sent_bytes, (run_folder / METRICS_FILE).stat().st_size)
    state.save(run_folder)
    return Tracker(run_folder, state.run_id, writer, None if uri == "none" else _start_sender(run_folder))


class Tracker:
    """One run's record, open for writing, and the process that sends it. Made by open_tracker."""

    def __init__(self, run_folder: Path, run_id: str, writer: MetricsWriter | None, sender: subprocess.Popen | None):
        self.run_folder, self.run_id = run_folder, run_id
        self._writer, self._sender, self._step = writer, sender, 0

    def log(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
        """Records metrics of `step` (optimizer steps done); kind is "train", "event" or an evaluation's."""
        if self._writer is not None:
            self._step = step
            self._writer.append(step, kind, metrics)

    def artifact(self, path: Path) -> None:
        """Has a file or folder sent to MLflow as it stands now or a moment later."""
        self.log(self._step, "event", {"event": "artifact", "path": str(Path(path).resolve())})

    def close(self, status: str = "finished") -> None:
        """Ends the record and waits until the sender is done: at most 10 s, at the end of a finished run 60 s.

        The sender itself gives up on the first request that is not answered within 10 s. What could not be sent is said
        on stderr, with the command that sends it later. A second call does nothing.
        status: "finished", "preempted", "interrupted", "diverged", "hung" or "failed".
        """
        assert status in STATUSES, status
        if self._writer is None:
            return
        self.log(self._step, "event", {"event": "closed", "status": status})
        self._writer.close()
        self._writer = None
        if self._sender is not None:
            patience = CLOSE_SECONDS_FINISHED if status == "finished" else CLOSE_SECONDS
            if _stop_sender(self._sender, patience) != 0:
                print(f"tracking: {unsent_sentence(self.run_folder, status)}", file=sys.stderr, flush=True)


def unsent_sentence(run_folder: Path, status: str) -> str:
    """How much of the record MLflow has not received, and what sends it."""
    state = TrackingState.load(run_folder)
    with open(Path(run_folder) / METRICS_FILE, "rb") as file:
        file.seek(state.sent_bytes)
        unsent = sum(1 for _ in file)
    lines = f"{unsent} line{'' if unsent == 1 else 's'} of {METRICS_FILE}"
    if status == "preempted":
        return f"{lines} are not in MLflow at {state.uri} yet; the resumed run sends them"
    return f"{lines} did not reach MLflow at {state.uri}, send them with: {send_command(run_folder)}"


def _start_sender(run_folder: Path) -> subprocess.Popen:
    with open(run_folder / LOG_FILE, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "quincunx.engine.tracking", str(run_folder)],
            stdin=subprocess.PIPE,
            stdout=2,  # its own few sentences stand on our stderr; what libraries print goes to the log
            stderr=log,
        )


def _stop_sender(sender: subprocess.Popen, patience: float) -> int:
    """Asks the sender to finish, kills it after `patience` seconds; its exit code, 0 where everything was sent."""
    with contextlib.suppress(BrokenPipeError):  # it has died; its exit code says so
        os.write(sender.stdin.fileno(), b"close\n")
    try:
        return sender.wait(patience)
    except subprocess.TimeoutExpired:
        sender.kill()
        return sender.wait()
    finally:
        sender.stdin.close()
