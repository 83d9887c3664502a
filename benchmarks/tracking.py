"""What tracking costs a training step: seconds inside Tracker.log, and at the run's start and end.

    python benchmarks/tracking.py [--steps 2000] [--output benchmarks/results/tracking.json]

Each store is given the metrics of a five-task run, 26 numbers a step, one step each 2 ms: none (metrics.jsonl alone),
sqlite, a port where nothing listens, and a socket that accepts and never answers. Beside them, MLflow's own log_metrics
called in the loop, on sqlite; on a dead server it blocks for minutes, which is not repeated here.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from quincunx.engine.run_folder import Tracker

PAUSE_SECONDS = 0.002
TASKS = ("mlm", "mkp", "cmp", "npr", "dor", "gor")
OTHERS = (
    "loss/total", "passages_per_second", "tokens_per_second", "mfu", "data_wait_share", "grad_norm", "learning_rate",
    "memory_gb", "skipped_steps", "bad_steps", "cut_texts", "step_seconds", "forward_seconds", "backward_seconds",
)  # fmt: skip


def metrics_of(step: int) -> dict[str, float]:
    """A step's metrics, of the size that a run with all five tasks logs."""
    losses = {f"loss/{task}": 7.0 + 1.0 / (step + index + 1) for index, task in enumerate(TASKS)}
    right = {f"accuracy/{task}": 0.1 + 0.01 / (step + index + 1) for index, task in enumerate(TASKS)}
    return losses | right | dict.fromkeys(OTHERS, step / 7.0)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in microseconds."""
    ordered = sorted(seconds)
    return {
        "median_us": round(statistics.median(ordered) * 1e6, 1),
        "p99_us": round(ordered[int(0.99 * len(ordered))] * 1e6, 1),
        "max_us": round(ordered[-1] * 1e6, 1),
    }


def measure_tracker(uri: str, steps: int) -> dict[str, float]:
    """Opens, logs and closes one run against `uri`."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"tracking": uri, "run_name": "benchmark", **{f"setting_{n}": n for n in range(60)}}
        (Path(folder) / "settings.yaml").write_text(json.dumps(settings))
        started = time.perf_counter()
        tracker = Tracker(Path(folder), uri)
        opening, seconds = time.perf_counter() - started, []
        for step in range(1, steps + 1):
            metrics = metrics_of(step)
            started = time.perf_counter()
            tracker.log(step, "train", metrics)
            seconds.append(time.perf_counter() - started)
            time.sleep(PAUSE_SECONDS)
        started = time.perf_counter()
        tracker.close("finished")
        closing = time.perf_counter() - started
    return percentiles(seconds) | {"open_ms": round(opening * 1e3, 2), "close_s": round(closing, 2)}


def measure_mlflow(steps: int) -> dict[str, float]:
    """MLflow's own log_metrics in the loop, on sqlite: what the tracker replaces."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.start_run()
        opening, seconds = time.perf_counter() - started, []
        for step in range(1, steps + 1):
            metrics = metrics_of(step)
            started = time.perf_counter()
            mlflow.log_metrics(metrics, step=step)
            seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        mlflow.end_run()
        closing = time.perf_counter() - started
    return percentiles(seconds) | {"open_ms": round(opening * 1e3, 2), "close_s": round(closing, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps logged to each store")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/tracking.json"), help="file of the results"
    )
    arguments = parser.parse_args()
    results = {}
    with socket.socket() as hanging, socket.socket() as dead:
        for listener in (hanging, dead):
            listener.bind(("127.0.0.1", 0))
        hanging.listen(64)
        for name, uri in (
            ("none", "none"),
            ("sqlite", "sqlite"),
            ("dead server", f"http://127.0.0.1:{dead.getsockname()[1]}"),
            ("hanging server", f"http://127.0.0.1:{hanging.getsockname()[1]}"),
        ):
            results[name] = measure_tracker(uri, arguments.steps)
    results["mlflow.log_metrics in the loop, sqlite"] = measure_mlflow(min(arguments.steps, 300))
    print(f"{'microseconds a step':<40}{'median':>10}{'p99':>10}{'max':>10}{'open, ms':>12}{'close, s':>10}")
    for name, row in results.items():
        figures = f"{row['median_us']:>10.0f}{row['p99_us']:>10.0f}{row['max_us']:>10.0f}"
        print(f"{name:<40}{figures}{row['open_ms']:>12.1f}{row['close_s']:>10.2f}")
    record = {
        "benchmark": "tracking",
        "steps": arguments.steps,
        "metrics_a_step": len(metrics_of(1)),
        "results": results,
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mlflow", "quincunx")},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
