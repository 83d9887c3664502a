from itertools import pairwise

import pytest
import torch

from quincunx.engine.training import learning_rate_at, parameter_groups


def test_the_rate_rises_linearly_and_falls_linearly_to_almost_nothing():
    rates = [learning_rate_at(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    falls = [a - b for a, b in pairwise(rates[10:])]
    assert falls == pytest.approx([1 / 90] * 89)
    assert max(rates) == 1.0 and rates[99] == pytest.approx(1 / 90) and min(rates) > 0


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert learning_rate_at(0, 10, 3e-4, 0.0) == 3e-4
    assert learning_rate_at(9, 10, 3e-4, 1.0) == 3e-4


def test_biases_and_norm_scales_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    decaying, others = parameter_groups(model, 0.01)
    assert decaying["weight_decay"] == 0.01 and others["weight_decay"] == 0.0
    assert [p.ndim for p in decaying["params"]] == [2, 2] and [p.ndim for p in others["params"]] == [1, 1, 1]
