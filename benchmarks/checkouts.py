"""A training step of two checkouts of this repository, taking turns: is the new code faster?

    python benchmarks/checkouts.py --old ../before --new . --shards runs/shards --ranks 2 --output RESULT.json \
        -- --recipe retromae --tasks mkp cmp npr dor ... --global_batch 32

What follows `--` are settings of launchers/pretrain.py (no --shards, --output); the steps are those of the loop, with
DeepSpeed and the packer. Each rank has one thread. A step's wall-clock and processor seconds are rank 0's; processor
seconds are what a machine with other work on it can still compare.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import turns

WARM_UP = 5
"""Steps before those that count."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the training step of two checkouts in turns.")
    parser.add_argument("--old", type=Path, required=True, help="a checkout of this repository")
    parser.add_argument("--new", type=Path, required=True, help="another one")
    parser.add_argument("--shards", type=Path, required=True, help="shard set to train on")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("settings", nargs="*", help="after --: settings of launchers/pretrain.py")
    return parser.parse_args()


def worker() -> None:
    """One rank of a checkout: rank 0 steps when told and answers; the others wait for it in every step's first sum."""
    import torch

    from quincunx.engine import training
    from quincunx.launchers import pretrain

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # the launcher prints, too

    def serve(run: training.Run) -> int:
        steps = run.job.stream.iterate(0)

        def step() -> None:
            batches, failure = training.take(steps)
            label_counts, _ = training.agree(run, batches, failure)
            for output in run.job.forward_passes(run.engine, batches, label_counts, [0] * len(batches)):
                run.engine.backward(output.loss * run.environment.world_size, scale_wrt_gas=False)
                run.engine.step()
            run.watchdog.beat()

        if run.environment.is_main:
            sys.stdout = answers
            turns.serve(step, lambda: [time.process_time()])
        else:
            while True:
                step()
        os._exit(0)

    training.train = serve
    pretrain.main(sys.argv[2:])


def start(checkout: Path, arguments: argparse.Namespace, folder: Path) -> tuple[list, list[subprocess.Popen]]:
    """(command of rank 0, the other ranks' processes)."""
    package = folder / "package"
    package.mkdir(parents=True)
    (package / "quincunx").symlink_to(checkout.resolve())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--worker", *arguments.settings]
    command += ["--shards", arguments.shards.resolve(), "--output", folder / "run", "--tracking", "none"]
    settings = {"PYTHONPATH": package, "OMP_NUM_THREADS": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    settings |= {"WORLD_SIZE": arguments.ranks, "LOCAL_WORLD_SIZE": arguments.ranks}
    common = [f"{name}={value}" for name, value in settings.items()]
    ranks = [["env", *common, f"RANK={rank}", f"LOCAL_RANK={rank}", *command] for rank in range(arguments.ranks)]
    return ranks[0], [subprocess.Popen(rank, stdout=subprocess.DEVNULL) for rank in ranks[1:]]


def main() -> None:
    arguments = parse_arguments()
    others: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as folder:
        commands = {}
        for name in ("old", "new"):
            commands[name], started = start(getattr(arguments, name), arguments, Path(folder) / name)
            others += started
        try:
            answers = turns.take_turns(commands, WARM_UP + arguments.steps)
        finally:
            for process in others:
                process.kill()
                process.wait()
    figures = {}
    for name, turn in answers.items():
        wall = [seconds for seconds, _ in turn[WARM_UP:]]
        clock = [processor for _, processor in turn[WARM_UP - 1 :]]
        processor = [after - before for before, after in itertools.pairwise(clock)]
        figures[name] = {
            "wall_median_seconds": round(statistics.median(wall), 4),
            "wall_minimum_seconds": round(min(wall), 4),
            "processor_median_seconds": round(statistics.median(processor), 4),
            "processor_minimum_seconds": round(min(processor), 4),
        }
    figures["times_as_fast"] = {key: round(figures["old"][key] / figures["new"][key], 3) for key in figures["new"]}
    record = {"ranks": arguments.ranks, "steps": arguments.steps, "settings": " ".join(arguments.settings), **figures}
    print(json.dumps(record))
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    worker() if sys.argv[1:2] == ["--worker"] else main()
