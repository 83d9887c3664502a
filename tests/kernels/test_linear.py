import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from quincunx.kernels.linear import Linear, by_onednn, linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(7,), (2, 3), (0,), (1, 1)])
def test_the_linear_layer_is_torchs_in_value_and_gradients(rows, bias):
    """Against torch's own in float64; float32 of either is within 1e-5 of it."""
    torch.manual_seed(0)
    truth, ours = nn.Linear(96, 33, bias=bias).double(), Linear(96, 33, bias=bias)
    ours.load_state_dict(truth.state_dict())
    x = torch.randn(*rows, 96, requires_grad=True)
    weights = torch.randn(*rows, 33)
    assert by_onednn(x)
    expected = truth(x.double())
    found = ours(x)
    assert found.shape == expected.shape and torch.allclose(found.double(), expected, atol=1e-5)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [x, *truth.parameters()])
    gradients = torch.autograd.grad((found * weights).sum(), [x, *ours.parameters()])
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert mine.shape == theirs.shape and torch.allclose(mine.double(), theirs.double(), atol=1e-5)


def test_other_types_are_torchs_own():
    x, weight, bias = torch.randn(5, 8).double(), torch.randn(3, 8).double(), torch.randn(3).double()
    assert not by_onednn(x) and not by_onednn(x.bfloat16())
    assert torch.equal(linear(x, weight, bias), nn.functional.linear(x, weight, bias))


def test_an_input_without_gradient_and_a_repeated_product_are_bitwise_the_same():
    layer, x = Linear(64, 16), torch.randn(9, 64)
    assert torch.equal(layer(x), layer(x)) and layer(x).requires_grad
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (16, 64)


def test_torchs_counter_counts_its_operations():
    layer, x = Linear(64, 16), torch.randn(9, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 9 * 64 * 16
