"""linear_cross_entropy against torch's cross-entropy of full logits."""

import pytest
import torch
import torch.nn.functional as F

from quincunx.kernels.linear_cross_entropy import linear_cross_entropy

SLICES = [(0, 13), (13, 13), (13, 40)]
"""Three tasks, the second without rows."""


def make_inputs(dtype=torch.float32, scale=1.0, rows=40, width=24, words=101):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator) * scale
    weight = torch.randn(words, width, generator=generator) * 0.3
    bias = torch.randn(words, generator=generator) * 0.1
    labels = torch.randint(words, (rows,), generator=generator)
    row_weights = torch.cat([torch.full((13,), 1 / 13), torch.full((27,), 0.5 / 27)])[:rows]
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), labels, row_weights


def plain(hidden, weight, bias, labels, row_weights):
    nll = F.cross_entropy(hidden @ weight.T + bias, labels, reduction="none")
    return (nll * row_weights.to(nll.dtype)).sum(), nll


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("scale", [1.0, 60.0, 100.0])
def test_loss_sums_and_gradients_equal_those_of_full_logits(dtype, tolerance, scale):
    """float32 rounds logits of +-400 (scale 100) at 3e-5, hence the factor `scale`."""
    hidden, weight, bias, labels, row_weights = make_inputs(dtype, scale)
    loss, nll_sums, correct = linear_cross_entropy(hidden, weight, bias, labels, row_weights, SLICES, chunk_rows=7)
    reference, nll = plain(hidden, weight, bias, labels, row_weights)
    torch.testing.assert_close(loss, reference, rtol=tolerance, atol=tolerance * scale)
    expected = torch.stack([nll[start:end].sum() for start, end in SLICES])
    torch.testing.assert_close(nll_sums, expected.detach(), rtol=tolerance, atol=tolerance * scale)
    hits = (hidden @ weight.T + bias).argmax(-1) == labels
    assert correct.tolist() == [int(hits[start:end].sum()) for start, end in SLICES]
    ours = gradients(3 * loss, hidden, weight, bias)
    theirs = gradients(3 * reference, hidden, weight, bias)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance * scale, atol=tolerance * scale)


def test_the_chunk_size_does_not_matter():
    inputs = make_inputs(torch.float64)
    results = []
    for chunk_rows in (1, 13, 39, 40, 1000, None):
        loss, nll_sums, correct = linear_cross_entropy(*inputs, SLICES, chunk_rows=chunk_rows)
        results.append([loss, nll_sums, correct.double(), *gradients(loss, *inputs[:3])])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_no_rows_give_zero_loss_and_zero_gradients():
    hidden, weight, bias, labels, row_weights = make_inputs()
    loss, nll_sums, correct = linear_cross_entropy(
        hidden[:0], weight, bias, labels[:0], row_weights[:0], [(0, 0), (0, 0)]
    )
    assert loss.item() == 0 and nll_sums.tolist() == [0, 0] and correct.tolist() == [0, 0]
    assert all((gradient == 0).all() for gradient in gradients(loss, weight, bias))


def test_without_gradients_the_values_are_the_same_and_no_gradient_is_kept():
    inputs = make_inputs()
    loss = linear_cross_entropy(*inputs, SLICES)[0]
    with torch.no_grad():
        again = linear_cross_entropy(*inputs, SLICES)[0]
    assert again.item() == loss.item() and again.grad_fn is None


def test_a_second_backward_is_refused():
    inputs = make_inputs()
    loss = linear_cross_entropy(*inputs, SLICES)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run forward again"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_twice_eager_torch(dtype):
    """Truth is float64 of the rounded inputs; weights of 1 / 30,000 would underflow a careless fp16."""
    hidden, weight, bias, labels, row_weights = make_inputs(dtype)
    row_weights = row_weights / 30000
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    truth = gradients(plain(*wide, labels, row_weights.double())[0] * 2**16, *wide)
    ours = gradients(
        linear_cross_entropy(hidden, weight, bias, labels, row_weights, SLICES, chunk_rows=11)[0] * 2**16,
        hidden, weight, bias,
    )  # fmt: skip
    nll = F.cross_entropy((hidden @ weight.T + bias).float(), labels, reduction="none")
    eager = gradients((nll * row_weights).sum() * 2**16, hidden, weight, bias)
    for mine, other, true in zip(ours, eager, truth, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - true).norm() <= 2 * (other.double() - true).norm()
