"""Tracking: a run's metrics in metrics.jsonl, and from there in MLflow, at no cost to the run.

The training process only appends lines to metrics.jsonl. A second process (tracking_sender.py) reads that file from
the byte where it stopped, sends what is new and keeps its place in tracking.json. So a slow, dead or hanging server
delays nothing but the sender (MLflow's `log_metrics` blocks for 246 s on a dead one), nothing queues in memory, and
`python launchers/send_metrics.py --run FOLDER` sends the rest at any later time.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from quincunx.engine.metrics_file import METRICS_FILE, MetricsWriter

STATE_FILE = "tracking.json"
LOG_FILE = "tracking.log"
CLOSE_SECONDS = 10.0
CLOSE_SECONDS_FINISHED = 60.0
STATUSES = ("finished", "preempted", "interrupted", "diverged", "hung", "failed")


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


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow's params: {"adam": {"beta1": 0.9}} becomes {"adam.beta1": "0.9"}."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


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
    params: all settings, nested or flat; they become MLflow's params.
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
    state.params = flatten(params)
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
        if status not in STATUSES:
            raise ValueError(f"a run ends as one of {', '.join(STATUSES)}, not as {status!r}")
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
            [sys.executable, "-m", "quincunx.engine.tracking_sender", str(run_folder)],
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
