"""One pre-training step on a CPU: seconds, passages and tokens a second, peak memory, as one JSON line.

    python benchmarks/pretrain_step.py --recipe master --layers 6 --hidden 384 --heads 12 --batch 8 \
        --lengths msmarco --max-tokens 144 --threads 2 --steps 10 --baseline --json out.json

A step is forward, backward, clipping and AdamW, float32, random weights, synthetic ids, dropout 0.1, no DeepSpeed. With
`--baseline` the same model is also run as it is commonly written (padded to the longest passage, logits at every
position of the encoder and every decoder; padded_model.py), in a process of its own so that its peak memory is its own;
the two take turns, so that a noisy machine is noisy for both.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

VOCAB_SIZE = 30522
MAX_GRAD_NORM = 1.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one pre-training step.")
    parser.add_argument("--recipe", choices=["retromae", "master", "quincunx"], default="retromae")
    parser.add_argument("--layers", type=int, default=6, help="encoder layers")
    parser.add_argument("--hidden", type=int, default=384, help="channels; the feed-forward has four times as many")
    parser.add_argument("--heads", type=int, default=12, help="attention heads")
    parser.add_argument("--batch", type=int, default=8, help="passages a step")
    parser.add_argument("--lengths", choices=["msmarco", "full"], default="msmarco", help="mean 75 of 144, or all full")
    parser.add_argument("--max-tokens", type=int, default=144, help="longest passage, in tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed; two more come first")
    parser.add_argument("--baseline", action="store_true", help="also the padded model with full logits")
    parser.add_argument("--json", type=Path, help="append the line to this file too")
    parser.add_argument("--model", choices=["packed", "padded"], help=argparse.SUPPRESS)
    return parser.parse_args()


def packed_step(arguments: argparse.Namespace) -> Callable[[], None]:
    """One step of the model that trains, with memory handled as engine/preparation.py has it."""
    import torch
    from synthetic import make_batch, passage_lengths, recipe_tasks

    from quincunx.engine.encoder import ScratchShape
    from quincunx.engine.host_memory import return_freed_memory
    from quincunx.engine.model import build_model
    from quincunx.engine.tensors import to_tensors

    torch.manual_seed(0)
    lengths = passage_lengths(arguments.lengths, arguments.batch, arguments.max_tokens)
    batch = make_batch(arguments.recipe, lengths, VOCAB_SIZE)
    model = build_model(
        "bert",
        recipe_tasks(arguments.recipe),
        max_tokens=arguments.max_tokens,
        dropout=0.1,
        from_scratch=ScratchShape(hidden=arguments.hidden, layers=arguments.layers, heads=arguments.heads),
        vocab_size=VOCAB_SIZE,
        pad_token_id=0,
    ).train()
    return_freed_memory(sum(parameter.numel() for parameter in model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    counts = torch.tensor(batch.num_labels())

    def step() -> None:
        model(to_tensors(batch), counts).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def padded_step(arguments: argparse.Namespace) -> Callable[[], None]:
    """One step of the same recipe as it is commonly written."""
    import torch
    from padded_model import PaddedModel, pad_batch
    from synthetic import make_batch, passage_lengths

    from quincunx.engine.host_memory import return_freed_memory

    torch.manual_seed(0)
    lengths = passage_lengths(arguments.lengths, arguments.batch, arguments.max_tokens)
    batch = pad_batch(make_batch(arguments.recipe, lengths, VOCAB_SIZE))
    shape = (VOCAB_SIZE, arguments.hidden, arguments.layers, arguments.heads)
    model = PaddedModel(arguments.recipe, *shape, dropout=0.1).train()
    return_freed_memory(sum(parameter.numel() for parameter in model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step() -> None:
        model(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def serve(arguments: argparse.Namespace) -> None:
    """Runs a step for every line on stdin and answers with its seconds and the process's peak memory in GB."""
    import torch

    torch.set_num_threads(arguments.threads)
    step = packed_step(arguments) if arguments.model == "packed" else padded_step(arguments)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
        print(json.dumps([seconds, peak]), flush=True)


def measure(arguments: argparse.Namespace, models: list[str]) -> dict[str, dict[str, float]]:
    """Figures of each model, each in its own process, taking turns step by step."""
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    workers = {
        model: subprocess.Popen(
            [sys.executable, *sys.argv, "--model", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for model in models
    }
    seconds, peak = {model: [] for model in models}, dict.fromkeys(models, 0.0)
    for turn in range(2 + arguments.steps):
        for model, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                raise SystemExit(f"the {model} model ended with exit code {worker.wait()}")
            took, peak[model] = json.loads(answer)
            if turn >= 2:
                seconds[model].append(took)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    from synthetic import passage_lengths

    tokens = int(passage_lengths(arguments.lengths, arguments.batch, arguments.max_tokens).sum())
    return {
        model: {
            "median_seconds": round(statistics.median(taken), 4),
            "minimum_seconds": round(min(taken), 4),
            "passages_per_second": round(arguments.batch / statistics.median(taken), 3),
            "best_passages_per_second": round(arguments.batch / min(taken), 3),
            "tokens_per_second": round(tokens / statistics.median(taken), 1),
            "peak_rss_gb": round(peak[model], 3),
        }
        for model, taken in seconds.items()
    }


def main() -> None:
    arguments = parse_arguments()
    if arguments.model:
        serve(arguments)
        return
    figures = measure(arguments, ["packed", "padded"] if arguments.baseline else ["packed"])
    from synthetic import versions

    names = ("recipe", "layers", "hidden", "heads", "batch", "lengths", "max_tokens", "threads", "steps")
    record = {name: getattr(arguments, name) for name in names} | figures["packed"]
    if arguments.baseline:
        record["padded"] = figures["padded"]
        record["times_as_fast"] = round(figures["padded"]["median_seconds"] / figures["packed"]["median_seconds"], 2)
        record["memory_share"] = round(figures["packed"]["peak_rss_gb"] / figures["padded"]["peak_rss_gb"], 3)
    line = json.dumps(record | versions())
    print(line)
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
