"""What is pre-training worth? An answer from scratch, on two CPU cores, in under twelve minutes.

    make demo        (or: python launchers/demo.py [--output demo_run] [--seed 42] [--keep])

Reads the Python documentation installed here, trains a WordPiece tokenizer on it, builds shards, and pre-trains a small
BERT from random weights with four enhanced decoders on two DeepSpeed ranks; a SIGTERM interrupts the run once and the
same command resumes it. Then three encoders get the same fine-tuning: random weights, masked language modelling (MLM)
alone, and ours. The end is one table; the exit code is 1 if pre-training did not pay. Every command is shown as it
runs, so that you can repeat it; with --keep, what is there already is not made again.
"""

import argparse
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from quincunx.data_shards.errors import EXIT_PREEMPTED
from quincunx.engine.environment import free_port
from quincunx.engine.run_folder import LOCK_FILE
from quincunx.launchers.demo_results import print_learned, print_worth, records

MARK = ".demo"
"""File of a folder that the demo made, and may delete."""


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def start(command: str, log: Path | None = None) -> subprocess.Popen:
    """Shows a command and starts it, with its output on the terminal or in `log`."""
    print(f"$ {command}" + (f" > {log} &" if log else ""), flush=True)
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    if log is None:
        return subprocess.Popen(words)
    log.parent.mkdir(exist_ok=True)
    with open(log, "w") as file:
        return subprocess.Popen(words, stdout=file, stderr=file)


def make(output: Path, jobs: dict[str, str], interrupt_at: int | None = None) -> None:
    """Runs the commands whose result is missing: one on the terminal, several side by side, each into a log.

    jobs: what a command writes, whole or not at all, in `output` -> the command. interrupt_at: the step after which a
    training is interrupted, and then started again. The demo ends with the exit code of a command that fails.
    """
    started = []
    for made, command in jobs.items():
        if (output / made).exists():
            print(f"{output / made} is there", flush=True)
            continue
        log = output / "logs" / f"{made.replace('/', '.')}.log" if len(jobs) > 1 else None
        started.append((start(command, log), made, command, log))
    for process, made, command, log in started:
        code = process.wait() if interrupt_at is None else interrupt(process, output / made.split("/")[0], interrupt_at)
        if code == EXIT_PREEMPTED and interrupt_at is not None:
            say("The same command again: it resumes from the checkpoint.")
            make(output, jobs)
        elif code:
            print(log.read_text(errors="replace")[-2000:] if log else "", file=sys.stderr)
            print(f"error: exit code {code} of the command {command}", file=sys.stderr)
            sys.exit(code)


def interrupt(process: subprocess.Popen, run_folder: Path, step: int) -> int:
    """Sends a training's launcher SIGTERM once `step` is logged (not if it was logged before the start).

    Returns the launcher's exit code, or 75 if the ranks saved and left on request: on one node the deepspeed launcher
    dies of the signal without passing it on, and its ranks notice.
    """
    before = records(run_folder, "train")
    to_interrupt = not before or before[-1]["step"] < step
    while process.poll() is None:
        train = records(run_folder, "train") if to_interrupt else []
        if train and train[-1]["step"] >= step:
            say(f"Step {train[-1]['step']}: SIGTERM to the launcher, as a scheduler would send it.")
            process.send_signal(signal.SIGTERM)
            process.wait()
            with open(run_folder / LOCK_FILE) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # granted when the last rank has let go of the run folder
            event = records(run_folder, "event")[-1]
            if event.get("status") != "preempted":
                return process.returncode
            print(f"The ranks saved step {event['step']} and left with exit code {EXIT_PREEMPTED}.", flush=True)
            return EXIT_PREEMPTED
        time.sleep(0.5)
    return process.returncode


def refusal(output: Path, keep: bool, seed: int) -> str | None:
    """Why the demo must not touch `output`; None if it may."""
    if not Path("launchers", "demo.py").is_file():
        return "the demo runs commands of the project's folder: start it there"
    if output.exists() and not output.is_dir():
        return f"{output} is no folder; give --output a new one"
    if output.exists() and any(output.iterdir()) and not (output / MARK).is_file():
        return f"{output} holds something other than a demo ({MARK} is missing); give --output a new folder"
    kept = output / "ours" / "settings.yaml"
    if keep and kept.exists() and (made_with := yaml.safe_load(kept.read_text())["seed"]) != seed:
        return f"{output} was made with --seed {made_with}; give --output a new folder, or leave out --keep"
    return None


def stages(out: str, seed: int, launcher: str) -> dict[str, dict[str, str]]:
    """Every command of the demo, by title and by what it makes in the folder `out`."""
    shards, pairs, held_out = f"{out}/shards", f"{out}/shards/pairs", f"{out}/shards/probe"
    corpus = "--format python_docs --path stdlib --held_out_share 0.1 --probe_queries 1000 --pairs true"
    build = f"python launchers/build_shards.py {corpus} --tokenizer train:2048 --max_tokens 64 --output {shards}"

    pretrain = f"launchers/pretrain.py --recipe demo --shards {shards} --seed {seed}"
    train = f"{launcher} {pretrain} --deepspeed ds_configs/zero2.json --probe {held_out} --output {out}"
    alone = "--tasks [] --task_weights null"
    nothing = f"{alone} --steps 0 --held_out_every 0 --probe null --tracking none"

    texts, bm25 = f"--corpus {pairs} --queries {pairs}", "python launchers/search.py --method bm25"
    mine = f"python launchers/mine.py --run {out}/bm25.train.trec --qrels {pairs}/qrels/train.tsv {texts}"
    mine = f"{mine} --depth 50 --num_negatives 10 --random_fill 10"
    tune = f"python launchers/finetune.py --recipe demo --seed {seed} --candidates {out}/negatives.jsonl {texts}"

    found = {"random": "random.tuned", "mlm": "mlm.tuned", "ours": "ours.tuned", "untuned": "ours"}
    models = {name: f"{out}/{run}/export/{'retriever' if '.' in run else 'encoder'}" for name, run in found.items()}
    # float32: vectors of an encoder that has learned little are nearly alike, and float16 ranks them wrongly.
    encode = f"python launchers/encode.py --dtype float32 --corpus {held_out}"
    search = "python launchers/search.py"
    asked = f"--queries {held_out} --qrels {held_out}/qrels/test.tsv --depth 100 --output {out}"
    return {
        "Corpus to shards: Python's documentation, as installed here; a tenth of its documents is held out": {
            "shards/manifest.json": build
        },
        "Pre-training from random weights on two ranks (recipes/demo.yaml): MLM and four decoders": {
            "ours/export/encoder": f"{train}/ours"
        },
        "A rival: the same steps of MLM alone": {"mlm/export/encoder": f"{train}/mlm {alone} --tracking none"},
        "The random weights that all three start from (no step of pre-training); BM25's results beside it": {
            "random/export/encoder": f"python {pretrain} {nothing} --output {out}/random",
            "bm25.train.trec": f"{bm25} {texts} --depth 50 --output {out}/bm25.train.trec",
        },
        "Hard negatives: BM25's wrong results": {"negatives.jsonl": f"{mine} --output {out}/negatives.jsonl"},
        "The same fine-tuning for all three (recipes/finetune/demo.yaml): summary lines find their docstrings": {
            f"{run}.tuned/export/retriever": f"{tune} --encoder {out}/{run}/export/encoder --output {out}/{run}.tuned"
            for run in ("random", "mlm", "ours")
        },
        "Vectors of the held-out docstrings, which no training has seen": {
            f"{name}.vectors/manifest.json": f"{encode} --model {model} --output {out}/{name}.vectors"
            for name, model in models.items()
        },
        "Search for them by their summary lines": {
            "bm25.trec": f"{bm25} --corpus {held_out} {asked}/bm25.trec",
            **{
                f"{name}.trec": f"{search} --model {model} --embeddings {out}/{name}.vectors {asked}/{name}.trec"
                for name, model in models.items()
            },
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_run"), help="folder of everything it makes")
    parser.add_argument("--keep", action="store_true", help="keep what an earlier demo left, and go on from there")
    parser.add_argument("--interrupt-at", type=int, default=300, help="optimizer step of the interruption")
    parser.add_argument("--seed", type=int, default=42, help="seed of weights, order, masks and negatives")
    given = parser.parse_args()
    output, out, started = given.output, shlex.quote(str(given.output)), time.monotonic()
    if problem := refusal(output, given.keep, given.seed):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    mark = open(output / MARK, "a")  # noqa: SIM115 - locked for the process's life
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"error: another demo is making {output}; wait for it, or give --output a new folder", file=sys.stderr)
        return 2
    if not given.keep:
        for entry in output.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARK:
                entry.unlink()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launcher = f"deepspeed --num_gpus 2 --master_port {free_port()}"  # other runs on this machine have theirs
    failures = []
    for number, (title, jobs) in enumerate(stages(out, given.seed, launcher).items(), 1):
        say(f"{number}. {title} [minute {(time.monotonic() - started) / 60:.1f}]")
        is_ours = "ours/export/encoder" in jobs
        make(output, jobs, given.interrupt_at if is_ours else None)
        if is_ours:
            failures += print_learned(output / "ours")
    say("The result: what pre-training was worth")
    failures += print_worth(output)
    print(f"\nEverything lies in {output}/ and took {(time.monotonic() - started) / 60:.1f} minutes. Ask it yourself:")
    index = f"--embeddings {out}/ours.vectors --corpus {out}/shards/probe"
    print(f"  .venv/bin/python launchers/search.py --model {out}/ours.tuned/export/retriever {index} --interactive")
    print("Curves, settings and artifacts of the pre-training in a browser:")
    print(f"  .venv/bin/mlflow ui --backend-store-uri sqlite:///{out}/ours/mlflow.db")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
