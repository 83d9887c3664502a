"""What benchmarks measure against must be what was published: reference cases, and the FLOPs of a step."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from published_model import PaddedText, PublishedModel, build_published_model, make_padded_passes  # noqa: E402
from replay_case import HEADS, PASSES, read_case, under  # noqa: E402


@pytest.mark.parametrize("impl", ["retromae", "master"])
def test_the_rebuilt_step_gives_the_losses_of_the_reference_case(impl):
    metadata, tensors = read_case(ROOT / "tests" / "fixtures" / f"{impl}_small.safetensors")
    config = BertConfig(
        **json.loads(metadata["config"]) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    model = PublishedModel(config, list(HEADS[impl].values()), enhanced=impl == "retromae")
    assert not model.lm.load_state_dict(under(tensors, "weight.lm."), strict=False).unexpected_keys
    for head, task in HEADS[impl].items():
        layers = under(tensors, f"weight.{head}.")
        model.decoders[task].load_state_dict(
            layers if impl == "master" else {f"0.{name}": tensor for name, tensor in layers.items()}
        )
    batch, out = under(tensors, "batch."), under(tensors, "out.")

    def text(ids: str, labels: str, mask: str, visible: torch.Tensor | None = None) -> PaddedText:
        return PaddedText(batch[ids].long(), batch[labels].long(), batch[mask].long(), visible)

    visible = batch["decoder_attention_mask"].bool() if impl == "retromae" else None
    passes = [
        (
            text(step.ids, step.labels, step.mask),
            {task: text(*names, visible) for task, names in step.decoders.items()},
        )
        for step in PASSES[impl]
    ]
    losses = model(passes)
    for number, step in enumerate(PASSES[impl]):
        torch.testing.assert_close(losses[f"encoder {number}"], out[step.loss], rtol=1e-5, atol=0)
        for task in step.decoders:
            name = "decoder_loss" if impl == "retromae" else f"{task}_loss"
            torch.testing.assert_close(losses[f"{task} {number}"], out[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("recipe", "gflop"), [("retromae", 109.5), ("master", 404.6)])
def test_a_rebuilt_step_costs_the_published_flops(recipe, gflop):
    """BERT-base, one passage of 128 tokens; attention's products are within the 1 %.

    Only forward is run: backward has two products for each of its products.
    """
    model = build_published_model(recipe, 30522, hidden=768, layers=12, heads=12)
    passes = make_padded_passes(recipe, np.array([128]), 30522, 128)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(passes)
    assert 3 * counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.01)
