"""The whole of quincunx on two CPU cores in under fifteen minutes, on text that every machine has.

    make demo        (or: python launchers/demo.py [--output demo_run] [--keep])

Reads the Python documentation installed here, builds shards, pre-trains a small encoder with four enhanced decoders
on two DeepSpeed ranks, interrupts the run once as a cluster would, resumes it (a finished run exports itself), prints
what was learned, fine-tunes the encoder for a minute to find docstrings by their summary lines, and measures it on
held-out ones beside BM25 and the encoder it all started from. Every command is shown as it is run, so that each can be
repeated by hand; with --keep, what is there already is not made again.
"""

import argparse
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from quincunx.data_shards.errors import EXIT_PREEMPTED
from quincunx.engine.environment import DEFAULT_PORT, free_port
from quincunx.engine.metrics_file import read_metrics
from quincunx.engine.run_folder import LOCK_FILE
from quincunx.launchers.demo_retrieval import START, fine_tune, measure_all, print_comparison, retriever_folder

TASK_NAMES = {
    "mlm": "encoder, masked words",
    "mkp": "keywords of the passage",
    "cmp": "what the encoder saw",
    "npr": "the next passage",
    "dor": "its query (summary line)",
}


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def show_command(command: list[str]) -> None:
    print(f"$ {shlex.join(command)}", flush=True)


def run(command: list[str]) -> None:
    """Runs one command of the chain; the demo ends with its exit code if it fails."""
    show_command(command)
    done = subprocess.run(command)
    if done.returncode:
        print(f"error: the command above ended with exit code {done.returncode}.", file=sys.stderr)
        sys.exit(done.returncode)


def make(command: list[str], made: Path) -> None:
    """Runs one command of the chain unless `made`, which it writes whole or not at all, is there."""
    if made.exists():
        print(f"{made} is there", flush=True)
        return
    run(command)


def of_kind(run_folder: Path, kind: str) -> list[dict]:
    """The run's records of one kind: "train", "held_out" or "probe"."""
    return [record for record in read_metrics(run_folder) if record["kind"] == kind]


def launcher_of_two_ranks(port: int = DEFAULT_PORT) -> list[str]:
    """The deepspeed launcher's command line, with a port of its own where another run meets at DeepSpeed's (`port`)."""
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    return ["deepspeed", "--num_gpus", "2", *(["--master_port", str(free_port())] if taken else [])]


def train_until(command: list[str], run_folder: Path, step: int) -> int:
    """Starts the training command and sends its launcher SIGTERM once `step` is logged (never, where it was before).

    Returns the launcher's exit code, or 75 where the ranks saved and left on request: on one node the deepspeed
    launcher dies of the signal without passing it on, and its ranks notice.
    """
    show_command(command)
    before = of_kind(run_folder, "train") if run_folder.exists() else []
    to_interrupt = not before or before[-1]["step"] < step
    process = subprocess.Popen(command)
    while process.poll() is None:
        train = of_kind(run_folder, "train") if to_interrupt else []
        if train and train[-1]["step"] >= step:
            say(f"Step {train[-1]['step']}: SIGTERM to the launcher, as a scheduler would send it.")
            process.send_signal(signal.SIGTERM)
            process.wait()
            return wait_for_ranks(run_folder)
        time.sleep(0.5)
    return process.returncode


def wait_for_ranks(run_folder: Path) -> int:
    """75 once the ranks have saved and closed the run; 1 if they have not within two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        event = of_kind(run_folder, "event")[-1]
        if event["event"] == "closed" and event["status"] == "preempted":
            with open(run_folder / LOCK_FILE) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # granted when the last of them has let go of the run folder
            print(f"The ranks saved step {event['step']} and left with exit code {EXIT_PREEMPTED}.", flush=True)
            return EXIT_PREEMPTED
        time.sleep(0.5)
    print("error: the ranks did not save within two minutes of the signal.", file=sys.stderr)
    return 1


def print_results(run_folder: Path) -> bool:
    """Prints the table of the run. Returns whether every task's loss passed its unigram cross-entropy."""
    held_out = of_kind(run_folder, "held_out")
    probe = of_kind(run_folder, "probe")
    before, after = held_out[0], held_out[-1]
    tasks = [key.removeprefix("held_out/loss/") for key in after if key.startswith("held_out/loss/")]
    print(f"\n{'':32}{'held-out loss (nats/token)':>34}{'':4}{'masked-token accuracy':>22}")
    header = f"{'task':<32}{'before':>9}{'after':>9}{'unigram':>10}{'passed':>10}{'before':>12}{'after':>10}"
    print(header + "\n" + "-" * len(header))
    passed = []
    for task in tasks:
        loss, unigram = after[f"held_out/loss/{task}"], after[f"held_out/unigram/{task}"]
        passed.append(loss < unigram)
        print(
            f"{task:<5}{TASK_NAMES.get(task, ''):<27}{before[f'held_out/loss/{task}']:>9.2f}{loss:>9.2f}"
            f"{unigram:>10.2f}{'yes' if passed[-1] else 'NO':>10}"
            f"{before[f'held_out/accuracy/{task}']:>12.1%}{after[f'held_out/accuracy/{task}']:>10.1%}"
        )
    print(
        "\nunigram: the cross-entropy of that task's own labelled tokens under their frequencies, what a model that"
        "\n         ignores the context reaches. Tasks that label rare words stand higher: read each loss beside it."
    )
    first, last = probe[0], probe[-1]
    print(f"\n{'retrieval probe':<32}{'before':>9}{'after':>9}")
    for key, name in (("probe/mrr@10", "MRR@10"), ("probe/ndcg@10", "nDCG@10")):
        print(f"{name:<32}{first[key]:>9.3f}{last[key]:>9.3f}")
    curve = ", ".join(f"{record['probe/mrr@10']:.2f}" for record in probe)
    print(f"MRR@10 along the run: {curve}")
    print(
        "How to read it: held-out summary lines search for their docstrings by [CLS] vectors, without any fine-tuning"
        "\n(1 is perfect). It may fall at first: all-MiniLM-L6-v2 starts with a space made for retrieval by contrastive"
        "\ntraining, and pre-training rebuilds it. Fine-tuning comes next, and is where a pre-trained encoder earns"
        "\nits keep."
    )
    return all(passed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_run"), help="folder of everything it makes")
    parser.add_argument("--keep", action="store_true", help="keep what an earlier demo left, and go on from there")
    parser.add_argument("--interrupt-at", type=int, default=60, help="optimizer step of the interruption")
    settings = parser.parse_args()
    if settings.output.exists() and not settings.keep:
        if any(settings.output.iterdir()) and not (settings.output / "shards").is_dir():
            print(
                f"error: {settings.output} holds something else than a demo; give --output a new folder",
                file=sys.stderr,
            )
            return 2
        shutil.rmtree(settings.output)
    started = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    python, shards, run_folder = sys.executable, settings.output / "shards", settings.output / "run"

    say("1. Corpus to shards: the documentation of Python's standard library, as installed here")
    corpus = ["--format", "python_docs", "--path", "stdlib", "--held_out_share", "0.1", "--probe_queries", "200"]
    sizes = ["--pairs", "true", "--tokenizer", START, "--max_tokens", "64"]
    make([python, "launchers/build_shards.py", *corpus, *sizes, "--output", str(shards)], shards / "manifest.json")

    say("2. Pre-training on two ranks, the demo recipe (recipes/demo.yaml)")
    train = [*launcher_of_two_ranks(), "launchers/pretrain.py", "--deepspeed", "ds_configs/zero2.json"]
    if settings.output != Path("demo_run"):
        train += ["--shards", str(shards), "--output", str(run_folder), "--probe", str(shards / "probe")]
    if (run_folder / "export" / "encoder").exists():
        print(f"{run_folder / 'export'} is there")
    else:
        code = train_until(train, run_folder, settings.interrupt_at)
        if code == EXIT_PREEMPTED:
            say("3. The same command again: it goes on where it stopped")
            run(train)
        elif code:
            print(f"error: the command above ended with exit code {code}.", file=sys.stderr)
            return code

    say(f"4. What was learned in {(time.monotonic() - started) / 60:.1f} minutes")
    passed = print_results(run_folder)

    say("5. Fine-tuning: summary lines of training docstrings as queries, BM25's best wrong passages as negatives")
    fine_tune(python, launcher_of_two_ranks(), settings.output, make)

    say("6. Search in the held-out docstrings: BM25, the encoder it started from, before and after fine-tuning")
    measure_all(python, settings.output, make)

    say("7. The result")
    print_comparison(settings.output)

    print(f"\nThe retriever, a sentence-transformers model: {retriever_folder(settings.output)}/")
    print(f"The encoder and the bundle with every decoder: {run_folder}/export/")
    print(f"Everything lies in {settings.output}/ and took {(time.monotonic() - started) / 60:.1f} minutes.")
    print("Ask it yourself, on the held-out docstrings:")
    found = f"--embeddings {settings.output}/results/fine-tuned.embeddings --corpus {shards}/probe"
    print(f"  .venv/bin/python launchers/search.py --model {retriever_folder(settings.output)} {found} --interactive")
    print("Curves, parameters and artifacts of pre-training in a browser:")
    print(f"  .venv/bin/mlflow ui --backend-store-uri sqlite:///{run_folder}/mlflow.db")
    if not passed:
        print("error: a task's held-out loss has not passed its unigram cross-entropy.", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
