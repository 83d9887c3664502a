"""Both kernels against their rivals, forward and backward together, in one run.

    python benchmarks/kernels.py [--parts lm_head attention scaling cpu] [--output benchmarks/results/kernels]

On a CUDA card: the shared LM head against naive logits, torch.compile, torch's own chunked linear_cross_entropy, Liger,
cut-cross-entropy and quack (those that are installed), at BERT-base, BERT-large and ModernBERT-large shapes, beside the
measured time of its three matrix products alone; the enhanced attention against FlexAttention, SDPA with a dense bias
and its torch twin; and both over growing batches, lengths and vocabularies. On a CPU: the chunked LM head against full
logits, each in a process of its own, taking turns. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.

A contender that is missing or fails is listed with the reason. Times are medians with the 20 % and 80 % quantiles.
"""

import argparse
import functools
import importlib.util
import json
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import turns
from synthetic import ALWAYS, DECODER_RATE, passage_lengths, versions
from torch.nn.utils.rnn import pad_sequence

from quincunx.kernels.enhanced_attention import enhanced_attention, visibility
from quincunx.kernels.linear_cross_entropy import largest_chunk, linear_cross_entropy

# Labelled rows of 256 passages of MS MARCO lengths under the quincunx recipe, hidden size, vocabulary.
LM_HEAD_SHAPES = {
    "base": (98_700, 768, 30_522),
    "large": (98_700, 1024, 30_522),
    "modernbert-large": (98_700, 1024, 50_368),
}
SCALING_SHAPES = ((6_168, 30_522), (24_675, 30_522), (98_700, 30_522), (24_675, 128_256), (6_168, 250_002))
CPU_ROWS, CPU_HIDDEN, CPU_VOCAB = 8_192, 384, 30_522


class Absent(Exception):
    """A contender that cannot run here, and why."""


# ---------------------------------------------------------------- LM head


def lm_head_inputs(rows: int, width: int, vocab: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Random hidden rows, weight, bias, labels and row weights; logits of about the size that training meets."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device, dtype=torch.float32)
    hidden, weight, bias = draw(rows, width), draw(vocab, width) * 0.05, draw(vocab) * 0.1
    tensors = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)
    return *tensors, labels, torch.full((rows,), 1 / rows, device=device)


def weighted_nll(hidden, weight, bias, labels, row_weights) -> torch.Tensor:
    """The loss with full logits, as it is commonly written."""
    nll = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="none")
    return (nll * row_weights).sum()


def quincunx_head(hidden, weight, bias, labels, row_weights, **options) -> torch.Tensor:
    slices = [(0, len(labels) // 6), (len(labels) // 6, len(labels))]
    return linear_cross_entropy(hidden, weight, bias, labels, row_weights, slices, **options)[0]


def torch_chunked(hidden, weight, bias, labels, row_weights) -> torch.Tensor:
    """One scalar for all rows: torch's has neither row weights nor task sums."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, options=options)


def liger(hidden, weight, bias, labels, row_weights) -> torch.Tensor:
    require("liger_kernel")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, bias)[0]


def cut_cross_entropy(hidden, weight, bias, labels, row_weights) -> torch.Tensor:
    require("cut_cross_entropy")
    from cut_cross_entropy import linear_cross_entropy as cut

    return cut(hidden, weight, labels, bias=bias)


def quack(hidden, weight, bias, labels, row_weights) -> torch.Tensor:
    """Without the bias, which it does not take."""
    require("quack")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels)


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")


def lm_head_contenders() -> dict[str, Callable[..., torch.Tensor]]:
    return {
        "quincunx, form A": functools.partial(quincunx_head, impl="triton", form="A"),
        "quincunx, form B": functools.partial(quincunx_head, impl="triton", form="B"),
        "quincunx, torch twin": functools.partial(quincunx_head, impl="torch"),
        "full logits": weighted_nll,
        "full logits, torch.compile": torch.compile(weighted_nll, dynamic=False),
        "torch linear_cross_entropy": torch_chunked,
        "Liger": liger,
        "cut-cross-entropy": cut_cross_entropy,
        "quack": quack,
    }


def three_products(hidden, weight) -> Callable[[], None]:
    """The matrix products alone, in chunks as large as ours: what is left when the loss itself costs nothing."""
    weight = weight.detach()
    chunks = hidden.detach().split(largest_chunk(hidden, len(weight)))
    # A row stride of whole cache lines, random like real gradients: zeros multiply faster.
    width = -(-len(weight) // 128) * 128
    scores = torch.randn(len(chunks[0]), width, device=hidden.device, dtype=hidden.dtype)[:, : len(weight)]
    outputs = [torch.empty_like(chunks[0]), torch.empty_like(weight)]

    def products() -> None:
        for chunk in chunks:
            part = scores[: len(chunk)]
            torch.mm(part, weight, out=outputs[0][: len(chunk)])
            torch.mm(part.T, chunk, out=outputs[1])
            torch.mm(chunk, weight.T, out=part)

    return products


def compare_lm_heads(rows: int, width: int, vocab: int, repeat_ms: int) -> dict:
    """Times and peak memory of every contender at one shape, bf16."""
    torch._dynamo.reset()  # compiled rivals shall meet every shape as if it were the only one
    inputs = lm_head_inputs(rows, width, vocab, "cuda", torch.bfloat16)
    leaves = inputs[:3]
    floor = measure(three_products(*leaves[:2]), repeat_ms)
    table = {"three products alone": floor}
    for name, contender in lm_head_contenders().items():
        figures = attempt(functools.partial(forward_and_backward, contender, inputs, leaves), leaves, repeat_ms)
        if "median_ms" in figures:
            figures["percent_of_three_products"] = round(100 * floor["median_ms"] / figures["median_ms"], 1)
        table[name] = figures
    return {"rows": rows, "hidden": width, "vocabulary": vocab, "contenders": table}


def forward_and_backward(function: Callable, inputs: tuple, leaves: tuple) -> None:
    output = function(*inputs)
    for leaf in leaves:
        leaf.grad = None
    if output.ndim:
        output.backward(torch.ones_like(output))
    else:
        output.backward()


# -------------------------------------------------------------- attention


def attention_inputs(lengths: np.ndarray, heads: int, channels: int, device: str, dtype: torch.dtype) -> dict:
    """Packed sequences with whole-token words that are seen at a rate of one half."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, longest = int(lengths.sum()), int(lengths.max())

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype).requires_grad_()

    rng = np.random.default_rng(0)
    thresholds = np.full(tokens, int(ALWAYS * DECODER_RATE), np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    words = np.arange(tokens) - np.repeat(starts[:-1], lengths)
    integers = {
        "cu_seqlens": starts,
        "keys": rng.integers(-(2**31), 2**31, len(lengths)),
        "word_ids": words,
        "keep_thresholds": thresholds,
    }
    return {
        "leaves": (
            draw(len(lengths), heads, channels),
            draw(longest, heads, channels),
            draw(tokens, heads, channels),
            draw(tokens, heads, channels),
        ),
        "lengths": lengths,
        **{name: torch.from_numpy(x.astype(np.int32)).to(device) for name, x in integers.items()},
    }


def quincunx_attention(inputs: dict, impl: str) -> torch.Tensor:
    rule = (inputs[name] for name in ("cu_seqlens", "keys", "word_ids", "keep_thresholds"))
    return enhanced_attention(*inputs["leaves"], *rule, max_length=int(inputs["lengths"].max()), impl=impl)


def padded(inputs: dict, rows: torch.Tensor) -> torch.Tensor:
    """Packed rows [T, ...] as [S, L, ...], zeros behind each sequence."""
    return pad_sequence(rows.split(inputs["lengths"].tolist()), batch_first=True)


def padded_streams(inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v [S, H, L, C] with every query formed."""
    h_SHC, position_LHC, k_THC, v_THC = inputs["leaves"]
    q_SLHC = h_SHC[:, None] + position_LHC
    return tuple(x.transpose(1, 2) for x in (q_SLHC, padded(inputs, k_THC), padded(inputs, v_THC)))


def dense_mask(inputs: dict) -> torch.Tensor:
    """bool [S, 1, L, L], made for every batch anew as a loader would."""
    words_SL, thresholds_SL = (padded(inputs, inputs[name]) for name in ("word_ids", "keep_thresholds"))
    rows_SL = torch.arange(words_SL.shape[1], dtype=torch.int32, device=words_SL.device).expand_as(words_SL)
    visible_SLL = visibility(inputs["keys"], rows_SL, words_SL, thresholds_SL)
    visible_SLL[:, :, 0] = True
    return visible_SLL[:, None]


def sdpa_dense(inputs: dict) -> torch.Tensor:
    return F.scaled_dot_product_attention(*padded_streams(inputs), attn_mask=dense_mask(inputs))


def flex(inputs: dict) -> torch.Tensor:
    """FlexAttention over padded sequences with the hash as its mask; the block mask is made for every batch anew."""
    from torch.nn.attention.flex_attention import create_block_mask

    from quincunx.kernels.enhanced_attention import draw30

    q, k, v = padded_streams(inputs)
    lengths, keys = inputs["cu_seqlens"].diff(), inputs["keys"]
    words, thresholds = (padded(inputs, inputs[name]) for name in ("word_ids", "keep_thresholds"))

    def sees(sequence, head, row, column):
        drawn = draw30(keys[sequence], row.int(), words[sequence, column]) < thresholds[sequence, column]
        return ((column == 0) | (drawn & (row != column))) & (column < lengths[sequence])

    size = (len(lengths), None, q.shape[2], q.shape[2])
    block_mask = create_block_mask(sees, *size, device=q.device, _compile=True)
    return compiled_flex_attention()(q, k, v, block_mask=block_mask)


@functools.cache
def compiled_flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def compare_attentions(lengths: np.ndarray, heads: int, channels: int, repeat_ms: int) -> dict:
    torch._dynamo.reset()
    inputs = attention_inputs(lengths, heads, channels, "cuda", torch.bfloat16)
    contenders = {
        "quincunx": functools.partial(quincunx_attention, impl="triton"),
        "quincunx, torch twin": functools.partial(quincunx_attention, impl="torch"),
        "SDPA, dense mask": sdpa_dense,
        "FlexAttention": flex,
    }
    leaves = inputs["leaves"]
    table = {
        name: attempt(functools.partial(forward_and_backward, contender, (inputs,), leaves), leaves, repeat_ms)
        for name, contender in contenders.items()
    }
    shape = {"sequences": len(lengths), "tokens": int(lengths.sum()), "longest": int(lengths.max())}
    return shape | {"heads": heads, "head_size": channels, "contenders": table}


# -------------------------------------------------------------- measuring


def attempt(step: Callable[[], None], leaves: tuple[torch.Tensor, ...], repeat_ms: int) -> dict:
    """`measure`, or the reason why there is nothing to measure."""
    try:
        return measure(step, repeat_ms, leaves)
    except Absent as reason:
        return {"absent": str(reason)}
    except Exception as error:  # a rival's failure is a result, too
        torch.cuda.empty_cache()
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}


def measure(step: Callable[[], None], repeat_ms: int, leaves: tuple[torch.Tensor, ...] = ()) -> dict[str, float]:
    """Milliseconds (median, 20 % and 80 % quantile) and the peak of memory beyond what stood before, in GB."""
    import triton

    step()  # compiles
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    median, low, high = triton.testing.do_bench(step, rep=repeat_ms, quantiles=[0.5, 0.2, 0.8])
    figures = {"median_ms": median, "low_ms": low, "high_ms": high, "peak_gb": peak}
    return {name: round(value, 4) for name, value in figures.items()}


def cuda_parts(parts: list[str], repeat_ms: int) -> dict:
    """Everything that needs a card."""
    results: dict = {}
    if "lm_head" in parts:
        results["lm_head"] = {name: compare_lm_heads(*shape, repeat_ms) for name, shape in LM_HEAD_SHAPES.items()}
    five_decoders = np.tile(passage_lengths("msmarco", 256, 144), 5)
    if "attention" in parts:
        results["attention"] = {
            "base, MS MARCO lengths": compare_attentions(five_decoders, 12, 64, repeat_ms),
            "large, MS MARCO lengths": compare_attentions(five_decoders, 16, 64, repeat_ms),
            "base, 512 tokens": compare_attentions(np.full(160, 512), 12, 64, repeat_ms),
        }
    if "scaling" in parts:
        short = repeat_ms // 4
        results["lm_head_scaling"] = {
            f"{rows} rows, {vocab} words": compare_lm_heads(rows, 768, vocab, short) for rows, vocab in SCALING_SHAPES
        }
        results["attention_scaling"] = {
            f"{count} sequences of {length}": compare_attentions(np.full(count, length), 12, 64, short)
            for count, length in ((640, 128), (160, 512), (40, 2048), (10, 8192))
        }
    properties = torch.cuda.get_device_properties(0)
    results["card"] = {"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
    return results


def cpu_part(num_turns: int) -> dict:
    """The chunked head against full logits, float32: seconds and peak memory, processes taking turns."""
    names = ("chunked", "full logits")
    commands = {name: [sys.executable, __file__, "--serve", name] for name in names}
    answers = turns.take_turns(commands, 1 + num_turns)
    seconds = {name: [took for took, _ in answers[name][1:]] for name in names}  # the first warms up
    table = {
        name: {
            "median_seconds": round(statistics.median(seconds[name]), 3),
            "minimum_seconds": round(min(seconds[name]), 3),
            "peak_gb": round(answers[name][-1][1], 3),
        }
        for name in names
    }
    ours, theirs = table["chunked"], table["full logits"]
    return {
        "rows": CPU_ROWS,
        "hidden": CPU_HIDDEN,
        "vocabulary": CPU_VOCAB,
        "threads": torch.get_num_threads(),
        "contenders": table,
        "memory_share": round(ours["peak_gb"] / theirs["peak_gb"], 3),
        "times_as_fast": round(theirs["median_seconds"] / ours["median_seconds"], 2),
    }


def serve(name: str) -> None:
    """A step for every line on stdin; answers with its seconds and the peak memory beyond the inputs, in GB."""
    inputs = lm_head_inputs(CPU_ROWS, CPU_HIDDEN, CPU_VOCAB, "cpu", torch.float32)
    function = functools.partial(quincunx_head, impl="torch") if name == "chunked" else weighted_nll
    small = tuple(x[:2].detach().requires_grad_(x.is_floating_point()) for x in inputs)
    forward_and_backward(weighted_nll, (small[0], *inputs[1:3], small[3] % CPU_VOCAB, small[4]), inputs[:3])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def peak_gb() -> list[float]:
        return [(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9]

    turns.serve(functools.partial(forward_and_backward, function, inputs, inputs[:3]), peak_gb)


# ---------------------------------------------------------------- writing


def to_markdown(results: dict) -> str:
    lines = ["# Kernels against their rivals", "", f"torch {results['versions']['torch']}", ""]
    if "card" in results:
        lines += [f"Card: {results['card']['name']}. Forward and backward together, bf16.", ""]
    else:
        lines += ["GPU part: pending, no card at hand; `python benchmarks/kernels.py` on one fills it.", ""]
    for part in ("lm_head", "attention", "lm_head_scaling", "attention_scaling"):
        for shape, result in results.get(part, {}).items():
            lines += [f"## {part.replace('_', ' ')}: {shape}", ""]
            lines += ["| | median ms | 20 to 80 % | peak GB | % of three products |", "|---|---|---|---|---|"]
            for name, row in result["contenders"].items():
                if "median_ms" not in row:
                    lines.append(f"| {name} | {row.get('absent') or row.get('failed')} | | | |")
                    continue
                share = row.get("percent_of_three_products", "")
                spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
                lines.append(f"| {name} | {row['median_ms']:.2f} | {spread} | {row['peak_gb']:.2f} | {share} |")
            lines.append("")
    if "cpu" in results:
        cpu = results["cpu"]
        lines += [
            f"## CPU: LM head, {cpu['rows']} x {cpu['hidden']} by {cpu['vocabulary']}",
            "",
            f"float32, {cpu['threads']} threads, each in its own process, taking turns.",
            "",
            "| | median s | minimum s | peak GB beyond the inputs |",
            "|---|---|---|---|",
        ]
        for name, row in cpu["contenders"].items():
            lines.append(f"| {name} | {row['median_seconds']} | {row['minimum_seconds']} | {row['peak_gb']} |")
        lines += ["", f"{cpu['memory_share']} of the memory, {cpu['times_as_fast']} times as fast.", ""]
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Bars of the medians, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (f"{part.replace('_', ' ')}: {shape}", "ms", {n: r.get("median_ms") for n, r in result["contenders"].items()})
        for part in ("lm_head", "attention")
        for shape, result in results.get(part, {}).items()
    ]
    if "cpu" in results:
        contenders = results["cpu"]["contenders"]
        panels.append(("CPU, LM head", "s", {n: r["median_seconds"] for n, r in contenders.items()}))
        panels.append(("CPU, LM head", "GB beyond the inputs", {n: r["peak_gb"] for n, r in contenders.items()}))
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.2 * len(panels)), layout="constrained", squeeze=False)
    for axis, (title, unit, values) in zip(axes[:, 0], panels, strict=True):
        measured = {name: value for name, value in values.items() if value is not None}
        colours = ["tab:orange" if name.startswith(("quincunx", "chunked")) else "tab:gray" for name in measured]
        axis.barh(list(measured), list(measured.values()), color=colours)
        axis.invert_yaxis()
        axis.set_title(title)
        axis.set_xlabel(unit)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["lm_head", "attention", "scaling", "cpu"]
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--repeat-ms", type=int, default=2000, help="milliseconds each contender is repeated for")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each process of the CPU part")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png")
    parser.add_argument("--serve", choices=["chunked", "full logits"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    results: dict = {"versions": versions()}
    if torch.cuda.is_available():
        import triton

        results["versions"] |= {"triton": triton.__version__, "cuda": torch.version.cuda}
        results |= cuda_parts(arguments.parts, arguments.repeat_ms)
    else:
        print("No CUDA card here: only the CPU part runs; the GPU tables stay empty.", file=sys.stderr)
    if "cpu" in arguments.parts:
        results["cpu"] = cpu_part(arguments.turns)
    markdown = to_markdown(results)
    print(markdown)
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(markdown)
        plot(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
