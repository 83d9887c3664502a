"""What benchmarks measure against costs the published FLOPs; tests/test_replay_case.py compares its losses."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from published_model import build_published_model, make_padded_passes  # noqa: E402


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
