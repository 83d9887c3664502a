"""Tracking against real stores: sqlite, a real `mlflow server`, a dead port, and a socket that never answers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from quincunx.engine import run_folder
from quincunx.engine.ranks import free_port
from quincunx.engine.run_folder import METRICS_FILE, Tracker
from quincunx.engine.tracking import RUN_TAG, TrackingState, numbers, read_metrics, resolve_uri

ROOT = Path(__file__).parents[2]
TASKS = ("mlm", "mkp", "cmp", "npr", "dor")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of an `mlflow server`, stopped by its id."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "store"),
    ]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it has a session of its own, and asked kindly it takes 20 s
        process.wait(30)


@pytest.fixture
def patient(monkeypatch):
    """A finished run waits for its sender as long as it takes: what arrives is tested, not how fast."""
    monkeypatch.setattr(run_folder, "CLOSE_SECONDS_FINISHED", 400.0)


@pytest.fixture
def hanging():
    """The address of a socket that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def begin(folder: Path, uri: str, step: int = 0, **changes) -> Tracker:
    """Starts the record of a run, as a run does that goes on from `step`; `changes`: of its settings."""
    settings = {"tasks": ["mkp", "cmp"], "learning_rate": 1e-4, "probe": None, "run_name": "first", "tracking": uri}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings | changes))
    return Tracker(folder, uri, step)


def train(tracker, first: int, last: int, loss=lambda step, task: 9.0 - 0.01 * step) -> list[float]:
    """Logs steps `first` to `last` as a run does; returns the seconds each took."""
    seconds = []
    for step in range(first, last + 1):
        started = time.perf_counter()
        tracker.log(step, "train", {f"loss/{task}": loss(step, task) for task in TASKS})
        seconds.append(time.perf_counter() - started)
    return seconds


def runs_of(folder: Path, uri: str) -> list:
    """The MLflow runs of a run folder."""
    client = MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{TrackingState.load(folder).run_id}'")


def steps_of(client: MlflowClient, run, metric: str) -> list[int]:
    """The steps that MLflow has of a metric, each as often as it was sent."""
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, metric))


def test_the_record_is_cut_to_the_resumed_step_and_each_step_stands_once(tmp_path):
    tracker = Tracker(tmp_path, "none")
    for step in range(1, 31):
        tracker.log(step, "train", {"loss/mlm": 1.0 / step})
        if step % 10 == 0:
            tracker.log(step, "probe", {"probe/mrr@10": 0.5})
    with open(tmp_path / METRICS_FILE, "ab") as file:
        file.write(b'{"step": 31, "time": 1.0, "kind": "train", "loss/mlm": 0.0')  # a crash tore this line
    assert len(list(read_metrics(tmp_path))) == 33
    tracker = Tracker(tmp_path, "none", 20)
    train(tracker, 21, 30)
    steps = [record["step"] for record in read_metrics(tmp_path) if record["kind"] == "train"]
    assert steps == list(range(1, 31))
    assert [record["step"] for record in read_metrics(tmp_path) if record["kind"] == "probe"] == [10, 20]
    Tracker(tmp_path, "none")
    assert list(read_metrics(tmp_path)) == []


def test_every_line_is_strict_json_and_nan_survives(tmp_path):
    import numpy as np
    import torch

    values = {"a": float("nan"), "b": torch.tensor(1.5), "c": np.float32("-inf"), "ids": [1, 2], "d": True}
    Tracker(tmp_path, "none").log(3, "train", values)
    line = (tmp_path / METRICS_FILE).read_text()
    record = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (record["a"], record["b"], record["c"], record["ids"], record["d"]) == ("nan", 1.5, "-inf", [1, 2], True)
    values = numbers(record)
    assert values["b"] == 1.5 and values["c"] == -float("inf") and values["a"] != values["a"] and len(values) == 3


def test_a_full_disk_does_not_stop_the_run_and_loses_no_line_once_there_is_room(tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    tracker = Tracker(tmp_path, "none")
    disk = tracker._file
    with open("/dev/full", "ab", buffering=0) as tracker._file:
        train(tracker, 1, 3)
    tracker._file = disk
    train(tracker, 4, 4)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("No space left") == 1


def test_sqlite_in_the_run_folder_holds_all_of_one_run_across_a_restart(tmp_path, patient, capfd):
    tracker = begin(tmp_path, "sqlite")
    train(tracker, 1, 30)
    tracker.log(30, "probe", {"probe/mrr@10": 0.25})
    tracker.artifact(tmp_path / "settings.yaml")
    for _ in range(600):  # making the store takes seconds, on a busy machine many
        if TrackingState.load(tmp_path).sent_bytes:
            break
        time.sleep(0.1)
    tracker.close("preempted")

    # The checkpoint was of step 20: steps 21 to 30 come again, and the learning rate has been changed.
    tracker = begin(tmp_path, "sqlite", 20, learning_rate=2e-4)
    train(tracker, 21, 40)
    tracker.close("finished")

    uri = resolve_uri("sqlite", tmp_path)
    client, (run,) = MlflowClient(tracking_uri=uri), runs_of(tmp_path, uri)
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    params = {"tasks": "['mkp', 'cmp']", "learning_rate": "0.0001", "probe": "None"}
    assert run.data.params == params | {"run_name": "first", "tracking": "sqlite"}
    assert run.data.tags["resumed_with.learning_rate"] == "0.0002"
    for task in TASKS:
        assert steps_of(client, run, f"loss/{task}") == list(range(1, 41))
    assert run.data.metrics["probe/mrr_at_10"] == 0.25
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"settings.yaml", METRICS_FILE}
    (tmp_path / "download").mkdir()
    stored = client.download_artifacts(run.info.run_id, METRICS_FILE, str(tmp_path / "download"))
    assert Path(stored).read_bytes() == (tmp_path / METRICS_FILE).read_bytes()
    assert f"to see the run: mlflow ui --backend-store-uri {uri}\n" in capfd.readouterr().err


def test_a_real_server_receives_what_a_dead_one_missed(tmp_path, server, patient, capfd):
    dead = f"http://127.0.0.1:{free_port()}"
    tracker = begin(tmp_path, dead)
    train(tracker, 1, 5)
    tracker.close("preempted")
    assert "the resumed run sends them" in capfd.readouterr().err
    tracker = begin(tmp_path, server, 5)
    train(tracker, 6, 10)
    tracker.artifact(ROOT / "LICENSE")
    tracker.close("finished")
    client, (run,) = MlflowClient(tracking_uri=server), runs_of(tmp_path, server)
    assert steps_of(client, run, "loss/dor") == list(range(1, 11))
    assert run.info.status == "FINISHED" and run.data.params["probe"] == "None"
    assert any(name.startswith("system/") for name in run.data.metrics)
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"LICENSE", METRICS_FILE}


@pytest.mark.parametrize("kind", ["dead", "hanging"])
def test_a_server_that_does_not_answer_costs_neither_steps_nor_shutdown_nor_lines(tmp_path, kind, hanging, capfd):
    uri = hanging if kind == "hanging" else f"http://127.0.0.1:{free_port()}"
    started = time.perf_counter()
    tracker = begin(tmp_path, uri)
    opening = time.perf_counter() - started
    slowest = max(train(tracker, 1, 200))
    time.sleep(5)  # the sender has met the server by now
    slowest = max(slowest, *train(tracker, 201, 400))
    sender = tracker._sender
    started = time.perf_counter()
    tracker.close("finished")
    closing = time.perf_counter() - started
    # MLflow itself blocks for 246 s on a dead server and for ever on a hanging one. Here a request waits 10 s, and on a
    # busy machine the sender may still be importing MLflow. Schedulers kill after 30 s.
    assert opening < 1 and slowest < 0.5 and closing < 20
    assert sender.poll() is not None, "the sender outlived the run"
    said = capfd.readouterr().err
    assert f"the last lines of metrics.jsonl did not reach MLflow ({uri}); send them with: " in said
    assert f"python -m quincunx.engine.tracking {tmp_path}" in said
    assert len(list(read_metrics(tmp_path))) == 401


def test_the_sender_dies_with_a_killed_run_and_the_next_start_sends_the_rest(tmp_path, patient):
    (tmp_path / "settings.yaml").write_text("{tracking: sqlite, run_name: killed}")
    code = (
        "import os, signal, sys, time\n"
        "from quincunx.engine.run_folder import Tracker\n"
        f"tracker = Tracker({str(tmp_path)!r}, 'sqlite')\n"
        "for step in range(1, 11): tracker.log(step, 'train', {'loss/mlm': 1.0})\n"
        "print(tracker._sender.pid, flush=True)\n"
        "time.sleep(1.5)\n"  # in the middle of making the sqlite store
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    pid = killed.stdout.strip()
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists(), "the sender outlived a killed run"
    tracker = Tracker(tmp_path, "sqlite", 10)
    tracker.log(11, "train", {"loss/mlm": 0.5})
    tracker.close("finished")
    store = resolve_uri("sqlite", tmp_path)
    (run,) = runs_of(tmp_path, store)
    assert steps_of(MlflowClient(tracking_uri=store), run, "loss/mlm") == list(range(1, 12))


def send(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "quincunx.engine.tracking", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_was_not_sent_can_be_sent_later_and_sending_again_adds_nothing(tmp_path):
    """tracking.json is one of an earlier version, which kept more in it."""
    tracker = begin(tmp_path, "none")
    train(tracker, 1, 1200)  # more metrics than MLflow takes in a batch
    tracker.close("finished")
    assert tracker._sender is None
    earlier = {"run_id": "a1b2", "run_name": "x", "uri": "none", "params": {}, "mlflow_run_id": None}
    (tmp_path / "tracking.json").write_text(json.dumps(earlier | {"sent_bytes": 0, "sent_steps": {}}))
    size, store = (tmp_path / METRICS_FILE).stat().st_size, resolve_uri("sqlite", tmp_path)
    for sent in (size, 0):
        done = send(tmp_path, "--tracking", "sqlite")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"Sent {sent:,} bytes of metrics.jsonl to {store}")
    (run,) = runs_of(tmp_path, store)
    assert run.data.tags[RUN_TAG] == "a1b2" and run.info.status == "FINISHED"
    assert steps_of(MlflowClient(tracking_uri=store), run, "loss/mlm") == list(range(1, 1201))


def test_a_folder_that_is_no_run_or_has_no_store_is_refused(tmp_path):
    done = send(tmp_path)
    assert done.returncode == 2 and "is not a run folder (it has no settings.yaml of a run)" in done.stderr
    begin(tmp_path, "none").close("finished")
    done = send(tmp_path)
    assert done.returncode == 2 and "the run was not tracked by MLflow; give --tracking URI" in done.stderr
