import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quincunx.engine.encoder import ScratchShape, load_encoder
from quincunx.engine.lean_modules import ActivatedLinear, LeanDropout


def test_dropout_drops_its_share_and_keeps_the_mean():
    """20,000 draws at 0.3: the share's standard deviation is 0.003."""
    dropout, x = LeanDropout(0.3), torch.ones(20000, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x)
    assert abs((y == 0).float().mean().item() - 0.3) < 0.015
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.7))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())
    assert dropout.eval()(x) is x


@pytest.mark.parametrize("bias", [True, False])
def test_an_activated_linear_is_the_activation_and_the_linear_in_value_and_gradients(bias):
    torch.manual_seed(0)
    plain = nn.Linear(12, 5, bias=bias).double()
    lean = ActivatedLinear(12, 5, F.gelu).double()
    lean.bias = lean.bias if bias else None
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = torch.autograd.grad((plain(F.gelu(x)) * weights).sum(), [x, *plain.parameters()])
    found = torch.autograd.grad((lean(x) * weights).sum(), [x, *lean.parameters()])
    assert torch.allclose(lean(x), plain(F.gelu(x)))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "xlm-roberta"])
def test_the_encoder_keeps_no_activated_rows_for_the_backward_pass(family):
    """Of each layer's two tensors of the feed-forward's width, one is kept."""
    shape = ScratchShape(hidden=32, layers=2, heads=2, intermediate=96, max_positions=20)
    encoder, _ = load_encoder(family, from_scratch=shape, vocab_size=50, pad_token_id=0, dropout=0.1)
    assert sum(isinstance(module, ActivatedLinear) for module in encoder.modules()) == 2
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        vectors = torch.randn(10, 32, requires_grad=True)
        encoder.train()(vectors, torch.arange(10), torch.tensor([0, 10], dtype=torch.int32), 10)
    assert [shape[-2:] for shape in kept].count((10, 96)) == 2
