"""What a run has recorded: read from metrics.jsonl, and sent to MLflow. The only file that imports mlflow.

    python -m quincunx.engine.tracking RUN [--tracking URI]     sends what is not in MLflow yet; repeat it at will

A training run starts the same process beside itself (engine/run_folder.py), with its stdin as a line to it. "close"
means send what is left and go; end of file means that the training process is dead, so go at once: whoever resumes the
run sends the rest. The process runs at low priority, ignores the signals that a scheduler sends to every process of a
job, and retries a store that does not answer for as long as the run lasts. It alone writes tracking.json.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import select
import shlex
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from quincunx.data_shards.durable import written_whole
from quincunx.data_shards.errors import SettingsError, exit_with_one_sentence
from quincunx.engine.run_folder import LOG_FILE, METRICS_FILE, SETTINGS_FILE, parse_line

STATE_FILE = "tracking.json"
EXPERIMENT = "quincunx"
RUN_TAG = "quincunx.run_id"
MLFLOW_STATUS = {"finished": "FINISHED", "preempted": "SCHEDULED", "interrupted": "KILLED"}  # all others: FAILED
POLL_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
LAST_TRY_SECONDS = 3.0
SYSTEM_SECONDS = 10.0
REQUEST_SECONDS = 10
BYTES_A_BATCH = 256 * 1024
METRICS_A_BATCH = 1000  # MLflow's own limit of one log_batch call; that of params is 100


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
    """The MLflow tracking URI of a `tracking` setting: "sqlite" is mlflow.db in the run folder."""
    return f"sqlite:///{Path(run_folder).resolve() / 'mlflow.db'}" if uri == "sqlite" else uri


def is_remote(uri: str) -> bool:
    """Whether a server stands between us and the store."""
    return not uri.startswith(("sqlite:", "file:", "/", "."))


def view_command(uri: str) -> str:
    """The shell command that shows what a store holds, as a user types it."""
    return f"open {uri}" if is_remote(uri) else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


@dataclasses.dataclass
class TrackingState:
    """tracking.json: who the run is, where it is tracked, and how far its record has been sent.

    run_id is ours, made when the run is first sent; the MLflow run carries it as a tag, by which it is found again even
    if a server made a run and died before it could answer.
    """

    run_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    uri: str = ""
    mlflow_run_id: str | None = None
    sent_bytes: int = 0
    sent_steps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Last step sent of each kind of record."""

    @classmethod
    def load(cls, run_folder: Path) -> "TrackingState":
        path = Path(run_folder) / STATE_FILE
        saved = json.loads(path.read_text()) if path.exists() else {}
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in names})  # earlier runs kept more in it

    def save(self, run_folder: Path) -> None:
        with written_whole(Path(run_folder) / STATE_FILE) as file:
            file.write(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


class Sender:
    """The connection of one run to its MLflow store. Raises whatever MLflow raises if the store does not answer."""

    def __init__(self, run_folder: Path, uri: str):
        from mlflow import MlflowClient
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.folder = Path(run_folder)
        self.settings = yaml.safe_load((self.folder / SETTINGS_FILE).read_text())
        self.state = TrackingState.load(self.folder)
        if uri != self.state.uri:  # another store has received nothing yet
            self.state = TrackingState(self.state.run_id, uri)
        _create_database(uri)
        self.client = MlflowClient(tracking_uri=uri)
        if self.state.mlflow_run_id is None:
            self.state.mlflow_run_id = self._find_or_create_run()
            self.state.save(self.folder)
        self.run = self.state.mlflow_run_id
        self._running = False
        self._send_params()
        self._system = SystemMetricsMonitor(self.run, tracking_uri=uri)  # not started: we read its samples
        self._system_due = time.monotonic()

    def _find_or_create_run(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:  # without a server, MLflow would put the artifacts under the folder that the command was started in
            folder = None if is_remote(self.state.uri) else (self.folder.resolve() / "mlartifacts").as_uri()
            experiment_id = self.client.create_experiment(name, artifact_location=folder)
        ours = self.client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{self.state.run_id}'", max_results=1)
        if ours:
            return ours[0].info.run_id
        name, tags = self.settings["run_name"] or self.folder.name, {RUN_TAG: self.state.run_id}
        return self.client.create_run(experiment_id, run_name=name, tags=tags).info.run_id

    def _send_params(self) -> None:
        """MLflow's params are written once; a setting that a restart changed becomes a tag `resumed_with.NAME`."""
        from mlflow.entities import Param, RunTag

        known = self.client.get_run(self.run).data.params
        settings = {name: str(value) for name, value in self.settings.items()}
        new = [Param(name, value) for name, value in settings.items() if name not in known]
        changed = [
            RunTag(f"resumed_with.{name}", value) for name, value in settings.items() if known.get(name, value) != value
        ]
        self.client.log_batch(self.run, params=new, tags=changed)

    def send_new_lines(self) -> None:
        """Sends every whole line after the last one sent, and keeps the place in tracking.json after each batch."""
        with open(self.folder / METRICS_FILE, "rb") as file:
            while True:
                file.seek(self.state.sent_bytes)
                lines = [line for line in file.readlines(BYTES_A_BATCH) if line.endswith(b"\n")]
                if not lines:
                    return
                self._send_records([record for record in map(parse_line, lines) if record is not None])
                self.state.sent_bytes += sum(map(len, lines))
                self.state.save(self.folder)

    def _send_records(self, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        if not self._running:  # a resumed run's status is that of its last end
            self.client.update_run(self.run, status="RUNNING")
            self._running = True
        metrics, reached = [], dict(self.state.sent_steps)
        for record in records:
            # MLflow cannot take a metric back; the steps that a resumed run repeats give the same losses, so skip them.
            if record["kind"] != "event" and record["step"] > reached.get(record["kind"], -1):
                reached[record["kind"]] = record["step"]
                milliseconds = int(record["time"] * 1000)
                metrics += [  # MLflow refuses "@": probe/mrr@10 is shown as probe/mrr_at_10
                    Metric(name.replace("@", "_at_"), value, milliseconds, record["step"])
                    for name, value in numbers(record).items()
                ]
        for start in range(0, len(metrics), METRICS_A_BATCH):
            self.client.log_batch(self.run, metrics=metrics[start : start + METRICS_A_BATCH])
        self.state.sent_steps = reached
        for record in records:
            if record.get("event") == "artifact":
                self._send_artifact(Path(record["path"]))
            elif record.get("event") == "closed":
                self._send_artifact(self.folder / METRICS_FILE)
                self.client.set_terminated(self.run, MLFLOW_STATUS.get(record["status"], "FAILED"))

    def _send_artifact(self, path: Path) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.run, str(path), artifact_path=path.name)
        elif path.exists():
            self.client.log_artifact(self.run, str(path))
        else:
            say(f"{path} is gone, so MLflow does not get it")

    def send_system_metrics(self) -> None:
        """Each 10 s a sample of MLflow's system metrics: processor, memory, disk, network, GPUs of this node."""
        from mlflow.entities import Metric

        if time.monotonic() < self._system_due:
            return
        self._system_due = time.monotonic() + SYSTEM_SECONDS
        self._system.collect_metrics()
        now, step = int(time.time() * 1000), self.state.sent_steps.get("train", 0)
        samples = self._system.aggregate_metrics()
        for monitor in self._system.monitors:
            monitor.clear_metrics()
        self.client.log_batch(self.run, metrics=[Metric(f"system/{name}", v, now, step) for name, v in samples.items()])


def _create_database(uri: str) -> None:
    """Makes a new sqlite store under another name and renames it when it is whole.

    Making one takes about 3 s, a run may be killed at any moment, and a half-made store is refused for ever.
    """
    from mlflow import MlflowClient

    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        MlflowClient(tracking_uri=f"sqlite:///{staging}").search_experiments(max_results=1)
        os.replace(staging, path)


def say(sentence: str) -> None:
    print(f"tracking: {sentence}", flush=True)


def follow(run_folder: Path, uri: str, closing: threading.Event, failing: threading.Event) -> int:
    """Sends new lines each second until `closing` is set and all is sent; 0 if so, 1 if the last try failed."""
    sender, pause = None, POLL_SECONDS
    while True:
        last = closing.is_set()
        try:
            sender = sender or Sender(run_folder, uri)
            sender.send_new_lines()
            sender.send_system_metrics()
            if failing.is_set():
                failing.clear()
                say(f"MLflow at {uri} answers again")
            pause = POLL_SECONDS
        except Exception as error:  # whatever a server or its client raises, the run goes on and so does the sender
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if not failing.is_set():
                failing.set()
                say(f"MLflow at {uri} takes no metrics ({type(error).__name__}); {METRICS_FILE} keeps them meanwhile")
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            last = closing.is_set()
        if last:
            return int(failing.is_set())
        closing.wait(pause)


def _fail_fast() -> None:
    """One request, 10 s: MLflow's own 7 retries of 120 s would hold the sender for minutes. A user's setting stands."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def _watch_parent(closing: threading.Event, failing: threading.Event) -> None:
    """Sets `closing` when the training process says "close"; ends this process when that one is dead."""
    parent = os.getppid()
    while os.getppid() == parent:  # a forked worker of the parent may keep the pipe open after its death
        if not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            continue
        if closing.is_set() or os.read(0, 16) != b"close\n":
            break
        if failing.is_set():  # a store that has not answered lately gets one short last try
            threading.Timer(LAST_TRY_SECONDS, os._exit, (1,)).start()
        closing.set()
    os._exit(1)


def follow_run(run_folder: Path, uri: str, kept: int) -> None:
    """The sender beside a run, whose record has just been cut to `kept` bytes; ends the process."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.nice(10)
    closing, failing = threading.Event(), threading.Event()
    threading.Thread(target=_watch_parent, args=(closing, failing), daemon=True).start()
    fcntl.flock(sys.stderr, fcntl.LOCK_EX)  # tracking.log: one sender at a time keeps its place in tracking.json
    state = TrackingState.load(run_folder)
    state.sent_bytes = min(state.sent_bytes, kept)
    state.save(run_folder)
    say(f"to see the run: {view_command(uri)}")
    os._exit(follow(run_folder, uri, closing, failing))  # no thread of a library may hold it


def send_rest(run_folder: Path, uri: str) -> int:
    """Sends what has not been sent and returns how many bytes of metrics.jsonl that were; sending twice is harmless.

    Raises SettingsError if the run is still going, or if the store does not take the record.
    """
    with open(run_folder / LOG_FILE, "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"{run_folder} is being sent by the run itself: wait until it has ended") from None
        try:
            sender = Sender(run_folder, uri)
            sent_before = sender.state.sent_bytes
            sender.send_new_lines()
        except Exception as error:  # MLflow raises whatever its transport or store raises
            raise SettingsError(f"MLflow at {uri} did not take the record: {error}") from error
        return sender.state.sent_bytes - sent_before


def main() -> None:
    parser = argparse.ArgumentParser(description="Sends to MLflow what a run has recorded and not sent.")
    parser.add_argument("run", type=Path, help="run folder, the --output of pretrain.py or finetune.py")
    parser.add_argument(
        "--tracking",
        metavar="URI",
        help='MLflow store: a tracking URI, or "sqlite" for mlflow.db in the run folder (default: the run\'s own)',
    )
    parser.add_argument("--follow", type=int, metavar="BYTES", help=argparse.SUPPRESS)  # run_folder.py's Tracker
    arguments = parser.parse_args()
    run = arguments.run
    settings = yaml.safe_load((run / SETTINGS_FILE).read_text()) if (run / SETTINGS_FILE).exists() else {}
    if not {"tracking", "run_name"} <= settings.keys():
        raise SettingsError(
            f"{run} is not a run folder (it has no {SETTINGS_FILE} of a run); give a training's --output"
        )
    uri = resolve_uri(arguments.tracking or settings["tracking"], run)
    if uri == "none":
        raise SettingsError("the run was not tracked by MLflow; give --tracking URI, or --tracking sqlite")
    _fail_fast()
    if arguments.follow is not None:
        follow_run(run, uri, arguments.follow)
    print(f"Sent {send_rest(run, uri):,} bytes of {METRICS_FILE} to {uri}")
    print(f"To see them: {view_command(uri)}")


if __name__ == "__main__":
    exit_with_one_sentence(main)
