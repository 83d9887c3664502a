"""FLOPs of a training step per passage, forward and backward, by torch's own counter.

    python benchmarks/flops.py [--recipes retromae master quincunx] [--passages 8] [--json out.json]

BERT-base with 30,522 words, MS MARCO lengths (mean 75, at most 144 tokens), every decoder text as long as its passage.
The step really runs, on the CPU, so what is counted is what is executed: padding inside the CPU attention included,
element-wise work left out, as the counter does. Published MASTER code: 404.6 GFLOP a passage at 128 tokens, padded.
"""

import argparse
import json
from pathlib import Path

import torch
from synthetic import RECIPES, make_batch, passage_lengths, recipe_tasks, versions
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, register_flop_formula, sdpa_flop

from quincunx.engine.model import build_model

VOCAB_SIZE = 30522
TARGETS = {"master": 105.0, "quincunx": 112.0}
"""Most GFLOP a passage (docs/model.md)."""


@register_flop_formula(torch.ops.aten.addmm_)
def count_addmm_in_place(self_shape, a_shape, b_shape, *_, out_shape=None, **__) -> int:
    """The weight gradient of the LM head is summed in place, which torch's counter does not know."""
    return addmm_flop(self_shape, a_shape, b_shape)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def count_cpu_attention(query_shape, key_shape, value_shape, *_, out_shape=None, **__) -> int:
    """The CPU's attention kernel, forward: two products."""
    return sdpa_flop(query_shape, key_shape, value_shape)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def count_cpu_attention_backward(grad_shape, query_shape, key_shape, value_shape, *_, out_shape=None, **__) -> int:
    """Backward: five products, the scores computed anew among them."""
    return sdpa_flop(query_shape, key_shape, value_shape) * 5 // 2


class WholeStep:
    """In place of the counter's per-module bookkeeping, whose hooks refuse a backward inside a backward."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def count(recipe: str, passages: int) -> dict[str, float]:
    """GFLOP a passage of one recipe's step; the LM head makes its gradients in the forward call."""
    torch.manual_seed(0)
    lengths = passage_lengths("msmarco", passages, 144)
    batch = make_batch(recipe, lengths, VOCAB_SIZE)
    model = build_model(
        "bert",
        recipe_tasks(recipe),
        max_tokens=144,
        dropout=0.0,
        from_scratch={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        vocab_size=VOCAB_SIZE,
        pad_token_id=0,
    )
    counts = torch.tensor(batch.num_labels())
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = WholeStep()
    with counter:
        output = model(batch, counts)
        forward = counter.get_total_flops()
        output.loss.backward()
    scale = 1e9 * passages
    return {
        "gflop_per_passage": round(counter.get_total_flops() / scale, 2),
        "forward_call": round(forward / scale, 2),
        "mean_tokens": float(lengths.mean()),
        "labelled_rows_per_passage": round(sum(batch.num_labels()) / passages, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--passages", type=int, default=8, help="passages of the counted step")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    results = {recipe: count(recipe, arguments.passages) for recipe in arguments.recipes}
    print(f"{'recipe':<12}{'GFLOP/passage':>15}{'at most':>10}{'tokens':>9}{'LM-head rows':>14}")
    for recipe, figures in results.items():
        target = TARGETS.get(recipe)
        print(
            f"{recipe:<12}{figures['gflop_per_passage']:>15.1f}{target or '':>10}{figures['mean_tokens']:>9.1f}"
            f"{figures['labelled_rows_per_passage']:>14.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": results} | versions(), indent=1) + "\n")


if __name__ == "__main__":
    main()
