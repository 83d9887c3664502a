import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quincunx.data_shards.batches import PackedText
from quincunx.engine.encoder import ScratchShape, load_encoder
from quincunx.engine.lean_modules import READING_FAMILIES, ActivatedLinear, LeanDropout, reads_rows
from quincunx.engine.tensors import cls_and_labels, cls_rows, labels_to_tensors, text_to_tensors


def test_dropout_drops_its_share_and_keeps_the_mean():
    """20,000 draws at 0.3: the share's standard deviation is 0.003."""
    dropout, x = LeanDropout(0.3), torch.ones(20000, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x)
    assert abs((y == 0).float().mean().item() - 0.3) < 0.015
    assert torch.allclose(y[y != 0], torch.tensor(2**16 / (2**16 - round(0.3 * 2**16))))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())
    assert dropout.eval()(x) is x


@pytest.mark.parametrize("rate", [1e-6, 1e-4, 0.9, 1.0])
def test_dropout_draws_are_independent_and_keep_the_mean_at_any_rate(rate):
    """The mean of 1e6 ones stays 1 within 5 standard errors; neighbours (drawn from one word) do not fall together."""
    torch.manual_seed(0)
    dropped = LeanDropout(rate)(torch.ones(1_000_003, dtype=torch.float64)).eq(0)
    error = 5 * (rate * (1 - rate) / 1e6) ** 0.5 + (2**-15 if rate < 1 else 0)
    assert abs(dropped.double().mean() - rate) <= error
    for distance in (1, 2, 3, 4):
        together = (dropped[distance:] & dropped[:-distance]).double().mean()
        assert abs(together - rate**2) <= 10 * error


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


@pytest.mark.parametrize(
    "family", [*READING_FAMILIES, "modernbert", "roberta-prelayernorm", "xlm-roberta-xl", "distilbert"]
)
def test_rows_that_are_read_are_those_of_the_whole_encoder(family):
    """In value and gradients; a passage may have many labels, one, or none, and its [CLS] may have one, too."""
    shape = ScratchShape(hidden=32, layers=2, heads=2, intermediate=96, max_positions=20)
    torch.manual_seed(0)
    encoder = load_encoder(family, from_scratch=shape, vocab_size=50, pad_token_id=0)[0].double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # fresh norms and biases would hide that one is left out
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert reads_rows(encoder.model) == (family in READING_FAMILIES)
    cu_seqlens = np.array([0, 9, 12, 30, 32], np.int32)
    text = text_to_tensors(PackedText(np.arange(32, dtype=np.int32), cu_seqlens))
    positions = np.array([1, 2, 8, 12, 13, 29, 31])
    read, cls, labelled = cls_and_labels(text, labels_to_tensors(positions, positions, cu_seqlens))
    words = encoder.word_embeddings(text.input_ids)
    whole = encoder(words, text.positions, text.cu_seqlens, text.max_length)
    some = encoder(words, text.positions, text.cu_seqlens, text.max_length, read)
    firsts = encoder(words, text.positions, text.cu_seqlens, text.max_length, cls_rows(text))
    expected = torch.cat([whole[cu_seqlens[:-1]], whole[positions], whole[cu_seqlens[:-1]]])
    found = torch.cat([some[cls], some[labelled], firsts])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    tolerance = 1e-8 if family in READING_FAMILIES else 1e-5  # ModernBERT rotates in float32
    leaves = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), leaves, retain_graph=True, allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


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
