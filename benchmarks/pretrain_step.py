"""One pre-training step: seconds, passages and tokens a second, peak memory, as one JSON line.

    python benchmarks/pretrain_step.py --recipe master --layers 6 --hidden 384 --heads 12 --batch 8 \
        --lengths msmarco --max-tokens 144 --threads 2 --steps 10 --baseline --json out.json

A step is forward, backward, clipping and AdamW, random weights, synthetic ids, dropout 0.1, no DeepSpeed. On a CPU in
float32; on a CUDA card ours in bf16 with float32 master weights, as ZeRO has it, and TFLOP/s and MFU are told as well.

With `--baseline` the recipe's published step (published_model.py: padded, logits at every position, MASTER with its
three encoder passes; on a card under bf16 autocast) is also run, in a process of its own so that its peak memory is its
own; the two take turns, so that a noisy machine is noisy for both.

`--sweep OUTPUT` runs every recipe beside its published step, then the given recipe over growing batches, lengths and
vocabularies, and writes OUTPUT.json, OUTPUT.md and OUTPUT.png.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import turns

MAX_GRAD_NORM = 1.0
SHAPE = (
    "recipe", "layers", "hidden", "heads", "batch", "lengths", "max_tokens", "vocabulary", "threads", "steps", "device",
)  # fmt: skip
"""Settings that make a step what it is, and go into its record."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one pre-training step.")
    parser.add_argument("--recipe", choices=["retromae", "master", "quincunx"], default="retromae")
    parser.add_argument("--layers", type=int, default=6, help="encoder layers")
    parser.add_argument("--hidden", type=int, default=384, help="channels; the feed-forward has four times as many")
    parser.add_argument("--heads", type=int, default=12, help="attention heads")
    parser.add_argument("--batch", type=int, default=8, help="passages a step")
    parser.add_argument("--lengths", choices=["msmarco", "full"], default="msmarco", help="mean 75 of 144, or all full")
    parser.add_argument("--max-tokens", type=int, default=144, help="longest passage, in tokens")
    parser.add_argument("--vocabulary", type=int, default=30522, help="words")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a card where there is one"
    )
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed; two more come first")
    parser.add_argument("--baseline", action="store_true", help="also the published step")
    parser.add_argument(
        "--json", type=Path, nargs="?", help="print the JSON line (always done); append it to this file"
    )
    parser.add_argument("--sweep", type=Path, metavar="OUTPUT", help="every recipe, and how a step scales")
    parser.add_argument("--model", choices=["quincunx", "published"], help=argparse.SUPPRESS)
    return parser.parse_args()


class Training:
    """One model with its optimizer: `step()` is a training step, `flops` what its matrix products cost."""

    def __init__(self, model, loss: Callable, device: str, master_weights: bool):
        """`master_weights`: the model's are bf16, the optimizer updates float32 copies."""
        import torch

        self.parameters, self.loss = list(model.parameters()), loss
        self.masters = self.parameters
        if master_weights:
            self.masters = [parameter.detach().float() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, weight_decay=0.01, fused=True)
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step(self) -> None:
        import torch

        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        self.wait()


def our_training(arguments: argparse.Namespace) -> tuple[Training, float]:
    """The model that trains, with memory handled as engine/pretraining.py has it, and the FLOPs of a step.

    A step includes moving the batch to the card; the published step finds its batch there.
    """
    import torch
    from synthetic import make_batch, passage_lengths, recipe_tasks

    from quincunx.data_shards.batches import to_device
    from quincunx.engine.model import build_model

    torch.manual_seed(0)
    lengths = passage_lengths(arguments.lengths, arguments.batch, arguments.max_tokens)
    batch = make_batch(arguments.recipe, lengths, arguments.vocabulary)
    model = build_model(
        "bert",
        recipe_tasks(arguments.recipe),
        max_tokens=arguments.max_tokens,
        dropout=0.1,
        from_scratch={
            "hidden_size": arguments.hidden,
            "num_hidden_layers": arguments.layers,
            "num_attention_heads": arguments.heads,
        },
        vocab_size=arguments.vocabulary,
        pad_token_id=0,
    ).train()
    on_card = arguments.device == "cuda"
    if on_card:
        model = model.to("cuda", torch.bfloat16)
    counts = torch.tensor(batch.num_labels(), device=arguments.device)

    def loss() -> torch.Tensor:
        return model(to_device(batch, arguments.device), counts).loss

    return Training(model, loss, arguments.device, master_weights=on_card), model.flops(batch)


def published_training(arguments: argparse.Namespace) -> Training:
    """The same recipe as it was published; memory is the C library's business, as it was."""
    import torch
    from published_model import build_published_model, make_padded_passes
    from synthetic import passage_lengths

    torch.manual_seed(0)
    lengths = passage_lengths(arguments.lengths, arguments.batch, arguments.max_tokens)
    passes = make_padded_passes(arguments.recipe, lengths, arguments.vocabulary, arguments.max_tokens, arguments.device)
    shape = (arguments.vocabulary, arguments.hidden, arguments.layers, arguments.heads)
    model = build_published_model(arguments.recipe, *shape).train().to(arguments.device)

    def loss() -> torch.Tensor:
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.device == "cuda"):
            return sum(model(passes).values())

    return Training(model, loss, arguments.device, master_weights=False)


def serve(arguments: argparse.Namespace) -> None:
    """Runs a step for every line on stdin and answers with its seconds and the peak memory so far in GB."""
    import torch

    from quincunx.engine.throughput import peak_memory_gb

    torch.set_num_threads(arguments.threads)
    flops = None
    if arguments.model == "quincunx":
        training, flops = our_training(arguments)
    else:
        training = published_training(arguments)
    device = torch.device(arguments.device)
    turns.serve(training.step, lambda: [peak_memory_gb(device), flops])


def measure(arguments: argparse.Namespace, models: list[str]) -> dict[str, dict[str, float]]:
    """Figures of each model, each in its own process, taking turns step by step."""
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    flags = [part for name in SHAPE for part in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    commands = {model: [sys.executable, __file__, *flags, "--model", model] for model in models}
    try:
        answers = turns.take_turns(commands, 2 + arguments.steps, environment)
    except turns.ContenderEnded as ended:
        if ended.name != "published":
            raise SystemExit(str(ended)) from None
        print(ended, file=sys.stderr)  # out of memory, say: ours is still worth a line
        return measure(arguments, ["quincunx"])

    from synthetic import passage_lengths

    tokens = int(passage_lengths(arguments.lengths, arguments.batch, arguments.max_tokens).sum())
    figures = {}
    for model, turn in answers.items():
        taken, (_, peak, flops) = [seconds for seconds, _, _ in turn[2:]], turn[-1]
        median = statistics.median(taken)
        figures[model] = {
            "median_seconds": round(median, 4),
            "minimum_seconds": round(min(taken), 4),
            "passages_per_second": round(arguments.batch / median, 3),
            "best_passages_per_second": round(arguments.batch / min(taken), 3),
            "tokens_per_second": round(tokens / median, 1),
            "peak_rss_gb" if arguments.device == "cpu" else "peak_gpu_gb": round(peak, 3),
        }
        if flops:
            figures[model]["tflops_per_second"] = round(flops / median / 1e12, 3)
    return figures


def record_of(arguments: argparse.Namespace) -> dict:
    """The figures of one shape, beside the published step's where wanted."""
    import torch
    from synthetic import versions

    from quincunx.engine.throughput import peak_flops_of

    figures = measure(arguments, ["quincunx", "published"] if arguments.baseline else ["quincunx"])
    ours = figures["quincunx"]
    peak_flops = peak_flops_of(torch.device(arguments.device), 1, "bfloat16")
    if peak_flops:
        ours["mfu"] = round(ours["tflops_per_second"] * 1e12 / peak_flops, 3)
    record = {name: getattr(arguments, name) for name in SHAPE} | ours
    if "published" in figures:
        theirs = record["published"] = figures["published"]
        memory = "peak_rss_gb" if arguments.device == "cpu" else "peak_gpu_gb"
        record["times_as_fast"] = round(theirs["median_seconds"] / ours["median_seconds"], 2)
        record["memory_share"] = round(ours[memory] / theirs[memory], 3)
    return record | versions()


def sweep(arguments: argparse.Namespace) -> None:
    """Writes the records of every recipe and of growing shapes as JSON, a table and a plot."""
    from synthetic import RECIPES

    def run(**changes) -> dict:
        record = record_of(argparse.Namespace(**vars(arguments) | changes))
        print(json.dumps(record), flush=True)
        return record

    batch, longest = arguments.batch, arguments.max_tokens
    parts = {"recipes": [run(recipe=recipe, baseline=True) for recipe in RECIPES]}
    parts["batch"] = [run(batch=n, baseline=False) for n in (max(1, batch // 4), batch, 2 * batch)]
    parts["max_tokens"] = [
        run(max_tokens=n, lengths="full", baseline=False) for n in (longest // 2, longest, 2 * longest)
    ]
    parts["vocabulary"] = [run(vocabulary=n, baseline=False) for n in (8_192, 30_522, 50_368)]
    output = arguments.sweep
    output.with_suffix(".json").write_text(json.dumps(parts, indent=1) + "\n")
    output.with_suffix(".md").write_text(to_markdown(parts))
    plot(parts, output.with_suffix(".png"))


def to_markdown(parts: dict[str, list[dict]]) -> str:
    first = parts["recipes"][0]
    memory = "peak_rss_gb" if first["device"] == "cpu" else "peak_gpu_gb"
    lines = [
        "# A pre-training step",
        "",
        f"{first['layers']} x {first['hidden']} on {first['device']}, medians of {first['steps']} steps. Last column: "
        "the published step's passages/s and GB, and how many times as fast ours is (quincunx, which nobody published: "
        "five of RetroMAE's decoders, padded).",
        "",
        "| recipe | batch | max tokens | lengths | words | passages/s | TFLOP/s | MFU | peak GB | published |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for rows in parts.values() for row in rows):
        theirs = row.get("published")
        beside = f"{theirs['passages_per_second']}, {theirs[memory]} ({row['times_as_fast']} x)" if theirs else ""
        cells = [row[name] for name in ("recipe", "batch", "max_tokens", "lengths", "vocabulary")]
        cells += [row["passages_per_second"], row["tflops_per_second"], row.get("mfu", ""), row[memory], beside]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def plot(parts: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    recipes = parts["recipes"]
    places = range(len(recipes))
    axis = axes.flat[0]
    axis.bar([x - 0.2 for x in places], [r["passages_per_second"] for r in recipes], 0.4, label="quincunx")
    published = [r.get("published", {}).get("passages_per_second", 0) for r in recipes]
    axis.bar([x + 0.2 for x in places], published, 0.4, label="published step", color="tab:gray")
    axis.set_xticks(list(places), [r["recipe"] for r in recipes])
    axis.set_ylabel("passages/s")
    axis.legend()
    for axis, name in zip(axes.flat[1:], ("batch", "max_tokens", "vocabulary"), strict=True):
        rates = [r["tokens_per_second"] for r in parts[name]]
        axis.plot([r[name] for r in parts[name]], rates, marker="o")
        axis.set_xlabel({"batch": "passages a step", "max_tokens": "tokens a passage", "vocabulary": "words"}[name])
        axis.set_ylabel("tokens/s")
        axis.set_ylim(0, 1.1 * max(rates))
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "auto":
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
        if arguments.device == "cpu":
            print("No CUDA card here: the step runs on the CPU in float32.", file=sys.stderr)
    if arguments.model:
        serve(arguments)
    elif arguments.sweep:
        sweep(arguments)
    else:
        line = json.dumps(record_of(arguments))
        print(line)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
