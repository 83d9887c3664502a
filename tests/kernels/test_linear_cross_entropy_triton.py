"""The Triton kernels of linear_cross_entropy against float64 truth and eager torch; interpreted without a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from quincunx.kernels import linear_cross_entropy_triton
from quincunx.kernels.linear_cross_entropy import linear_cross_entropy

# The interpreter computes lanes beyond the last row too, whose results nobody stores.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FORMS = [(torch.float32, "A"), (torch.float16, "A"), (torch.bfloat16, "A"), (torch.bfloat16, "B")]
NAMES = ("nll", "hidden", "weight", "bias")


def make_inputs(device, dtype, rows=40, width=40, words=203, highest=6.0, shift=0.0):
    """Logits reach from -highest to highest around `shift`; row weights are lambda_t / N_t of two tasks."""
    generator = torch.Generator().manual_seed(rows + words)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(words, width, generator=generator) * 0.3
    bias = torch.randn(words, generator=generator) * 0.1 + shift
    if rows:
        hidden *= highest / (hidden @ weight.T).abs().max()
    labels = torch.randint(words, (rows,), generator=generator)
    labels[::3] = (hidden @ weight.T).argmax(-1)[::3]
    row_weights = torch.where(torch.arange(rows) < rows // 3, 1.0, 0.2) / max(rows, 1)
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)]
    return *leaves, labels.to(device), row_weights.to(device)


def run(inputs, form, chunk_rows=None, slices=None):
    """Per-row negative log-likelihoods (every row a task), gradients, and correct rows."""
    rows = len(inputs[3])
    slices = slices or [(i, i + 1) for i in range(rows)]
    loss, nll, correct = linear_cross_entropy(*inputs, slices, chunk_rows, impl="triton", form=form)
    assert loss.item() == pytest.approx((nll * inputs[4]).sum().item(), rel=1e-5, nan_ok=True) or len(slices) != rows
    return nll, *torch.autograd.grad(loss, inputs[:3]), correct


def eager(inputs, dtype):
    """The same of unchunked torch: logits in `dtype`, cross-entropy in float32 or wider."""
    hidden, weight, bias = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
    scores = F.linear(hidden, weight, bias)
    nll = F.cross_entropy(scores.to(torch.promote_types(dtype, torch.float32)), inputs[3], reduction="none")
    loss = (nll * inputs[4].to(nll.dtype)).sum()
    return nll.detach(), *torch.autograd.grad(loss, (hidden, weight, bias)), scores.argmax(-1) == inputs[3]


def assert_as_good_as_eager(found, inputs, form):
    """No result errs more than three times as much as eager torch's in the same dtype.

    A few rows can have lucky sums: a negative log-likelihood may err by one rounding of the highest logit.
    """
    dtype = inputs[0].dtype
    highest = F.linear(*(x.detach() for x in inputs[:3])).abs().max().item()
    floors = [torch.finfo(dtype).eps * highest * math.sqrt(len(inputs[3])), 0, 0, 0]
    truth = eager(inputs, torch.float64)
    for name, mine, other, true, floor in zip(NAMES, found, eager(inputs, dtype), truth, floors):
        error, allowed = (mine.double() - true).norm(), 3 * (other.double() - true).norm() + floor
        assert error <= allowed + 1e-6 * true.norm(), f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    if dtype == torch.float32 or form == "B":  # rounded logits tie
        assert torch.equal(found[4].bool(), truth[4])


@pytest.mark.parametrize(("dtype", "form"), FORMS)
@pytest.mark.parametrize(
    "sizes",
    [
        *({"rows": rows} for rows in (1, 2, 31, 32, 33, 127, 128, 129)),
        *(
            {"words": words, "width": width}
            for words, width in ((2, 8), (64, 32), (127, 33), (128, 64), (129, 20), (300, 72))
        ),
    ],
    ids=str,
)
def test_around_a_tile_the_error_is_eager_torchs(device, dtype, form, sizes):
    """Tiles are 32 rows in the interpreter and 128 on GPUs."""
    inputs = make_inputs(device, dtype, **sizes)
    assert_as_good_as_eager(run(inputs, form), inputs, form)


@pytest.mark.parametrize(("dtype", "form"), FORMS)
@pytest.mark.parametrize("chunk_rows", [1, 16, 50])
def test_chunks_change_nothing_but_rounding(device, dtype, form, chunk_rows):
    inputs = make_inputs(device, dtype, rows=50 if chunk_rows > 1 else 5)
    found, whole = run(inputs, form, chunk_rows), run(inputs, form)
    assert_as_good_as_eager(found, inputs, form)
    # cuBLAS may add in another order at another number of rows: form A's stored logits, up to 6, then differ by an eps.
    stored = form == "A" and dtype != torch.float32
    tolerance = 2 * 6.0 * torch.finfo(dtype).eps if stored else 1e-5
    torch.testing.assert_close(found[0], whole[0], rtol=tolerance, atol=tolerance)
    assert stored or torch.equal(found[4], whole[4])
    for mine, other in zip(found[1:4], whole[1:4]):
        assert (mine - other).norm() <= torch.finfo(dtype).eps * 2 * other.norm()


@pytest.mark.parametrize("form", ["A", "B"])
def test_a_chunk_of_several_stripes_sums_the_gradient_of_the_bias(device, form):
    inputs = make_inputs(device, torch.bfloat16, rows=linear_cross_entropy_triton.STRIPE + 1, words=20, width=8)
    assert_as_good_as_eager(run(inputs, form), inputs, form)


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_sums_are_those_of_the_tasks_also_of_tasks_without_rows(device, dtype, form):
    inputs = make_inputs(device, dtype, rows=20)
    nll, *_, correct = run(inputs, form)
    for slices in ([(0, 0), (0, 13), (13, 13), (13, 20), (20, 20)], [(0, 20), (20, 20)]):
        _, nll_sums, hits = linear_cross_entropy(*inputs, slices, impl="triton", form=form)
        torch.testing.assert_close(nll_sums, torch.stack([nll[a:b].sum() for a, b in slices]))
        assert hits.tolist() == [int(correct[a:b].sum()) for a, b in slices]


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_no_rows_give_zero_loss_and_zero_gradients(device, dtype, form):
    inputs = make_inputs(device, dtype, rows=0)
    loss, nll_sums, correct = linear_cross_entropy(*inputs, [(0, 0), (0, 0)], impl="triton", form=form)
    assert loss.item() == 0 and nll_sums.tolist() == [0, 0] and correct.tolist() == [0, 0]
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, inputs[:3]))


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_rows_of_weight_zero_have_no_gradient_and_change_no_other(device, dtype, form):
    hidden, weight, bias, labels, row_weights = make_inputs(device, dtype)
    row_weights = torch.where(torch.arange(40, device=device) % 2 == 0, row_weights, 0)
    _, *found, _ = run((hidden, weight, bias, labels, row_weights), form)
    assert (found[0][1::2] == 0).all()
    kept = hidden[::2].detach().requires_grad_()
    _, *expected, _ = run((kept, weight, bias, labels[::2], row_weights[::2]), form)
    for mine, other in zip((found[0][::2], *found[1:]), expected):
        assert (mine - other).norm() <= torch.finfo(dtype).eps * other.norm()
    _, *found, _ = run((hidden, weight, bias, labels, torch.zeros_like(row_weights)), form)
    assert all((gradient == 0).all() for gradient in found)


@pytest.mark.parametrize(("dtype", "form"), FORMS)
@pytest.mark.parametrize(("highest", "shift"), [(60, 0), (100, 0), (6, -60), (6, -100), (6, 60), (6, 100), (300, 0)])
def test_far_logits_err_no_more_than_eager_torchs(device, dtype, form, highest, shift):
    inputs = make_inputs(device, dtype, highest=float(highest), shift=float(shift))
    assert_as_good_as_eager(run(inputs, form), inputs, form)


@pytest.mark.parametrize("shift", [-45.0, 45.0])
def test_a_row_of_small_weight_still_counts(device, shift):
    """One row weighs 1e-8 of the heaviest; all alone in its row of dW it still counts."""
    hidden, weight, bias, labels, row_weights = make_inputs(device, torch.bfloat16, shift=shift)
    row_weights[5] = row_weights.max() * 1e-8
    found = run((hidden, weight, bias, labels, row_weights), "B")
    truth = eager((hidden, weight, bias, labels, row_weights), torch.float64)
    assert (found[1].double() - truth[1])[5].norm() <= 0.02 * truth[1][5].norm()
    assert_as_good_as_eager(found, (hidden, weight, bias, labels, row_weights), "B")


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_two_runs_agree_bit_by_bit_whatever_lay_in_memory(device, dtype, form, monkeypatch):
    """Fresh memory full of NaN: pads of the workspace, partial sums and outputs are written before they are read."""
    inputs = make_inputs(device, dtype, rows=70)
    first = run(inputs, form, chunk_rows=32)
    new_empty, empty_like, empty = torch.Tensor.new_empty, torch.empty_like, torch.empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    for a, b in zip(first, run(inputs, form, chunk_rows=32)):
        assert torch.equal(a, b)


def poison(tensor):
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 1)


@pytest.mark.parametrize(("dtype", "form"), FORMS)
@pytest.mark.parametrize("highest", [6.0, 200.0])
def test_without_gradients_the_values_are_the_same(device, dtype, form, highest):
    inputs = make_inputs(device, dtype, rows=50, highest=highest)
    expected = linear_cross_entropy(*inputs, [(0, 50)], 32, impl="triton", form=form)
    with torch.no_grad():
        found = linear_cross_entropy(*inputs, [(0, 50)], 32, impl="triton", form=form)
    assert expected[0].grad_fn is not None and found[0].grad_fn is None
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tile", [{"words": 256}, {"descriptors": True}, {"words": 256, "descriptors": True}])
def test_tiles_may_reach_beyond_the_padded_vocabulary(device, tile, monkeypatch):
    """Hopper's do: 300 words are padded to 384, two tiles of 256 are 512. GPUs take the tile of their table anyway."""
    product = linear_cross_entropy_triton.INTERPRETED_PRODUCT._replace(**tile)
    monkeypatch.setattr(linear_cross_entropy_triton, "INTERPRETED_PRODUCT", product)
    inputs = make_inputs(device, torch.bfloat16, words=300)
    assert_as_good_as_eager(run(inputs, "B", chunk_rows=16), inputs, "B")


@pytest.mark.parametrize("store", [True, False])
def test_descriptors_and_pointers_are_the_same(device, store, monkeypatch):
    """On GPUs a tensor that starts two bytes late takes the pointers' place."""
    inputs = make_inputs(device, torch.bfloat16, rows=50)
    product = linear_cross_entropy_triton.INTERPRETED_PRODUCT
    monkeypatch.setattr(linear_cross_entropy_triton, "INTERPRETED_PRODUCT", product._replace(descriptors=True))
    late = torch.zeros(50 * 40 + 1, dtype=torch.bfloat16, device=device)[1:].view(50, 40).copy_(inputs[0].detach())
    results = []
    for hidden in (inputs[0].detach(), late):
        with torch.set_grad_enabled(store):
            results.append(linear_cross_entropy(hidden, *inputs[1:], [(0, 50)], 32, impl="triton", form="B"))
            if store:
                results[-1] += torch.autograd.grad(results[-1][0], inputs[1:3])
    for a, b in zip(*results):
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0
        assert (a - b).abs().max() <= 10 * eps * b.abs().max()


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_labels_outside_the_vocabulary_make_the_loss_nan_and_harm_no_other_row(device, dtype, form):
    """As on a GPU, where nobody looks at the labels before the kernels do."""
    hidden, weight, bias, labels, _ = (x.detach() for x in make_inputs(device, dtype, rows=40))
    nll, expected = torch.empty(2, 40, device=device)
    correct = torch.empty(40, dtype=torch.bool, device=device)
    arguments = 40, nll, correct, None, form
    linear_cross_entropy_triton.run_chunks(hidden, weight, bias, labels, *arguments)
    expected.copy_(nll)
    labels[[3, 7, 8, 30]] = torch.tensor([-100, 203, 203 + 2**32, 250], device=device)
    linear_cross_entropy_triton.run_chunks(hidden, weight, bias, labels, *arguments)
    assert nll.isnan().nonzero().flatten().tolist() == [3, 7, 8, 30]
    assert torch.equal(nll[~nll.isnan()], expected[~nll.isnan()]) and not correct[nll.isnan()].any()


def test_a_row_of_nan_makes_its_own_loss_nan(device):
    hidden, *others = make_inputs(device, torch.bfloat16, rows=40)
    hidden.data[33] = float("nan")
    nll = run((hidden, *others), "B", chunk_rows=32)[0]
    assert nll.isnan().nonzero().flatten().tolist() == [33]


def test_auto_is_form_a_where_form_b_cannot_run(device):
    for dtype in (torch.float16, torch.float32):
        inputs = make_inputs(device, dtype, rows=5)
        for a, b in zip(run(inputs, "auto"), run(inputs, "A")):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_nothing_waits_for_the_device(dtype, form):
    inputs = make_inputs("cuda", dtype, rows=300)

    def step():
        loss = linear_cross_entropy(*inputs, [(0, 300)], 128, impl="triton", form=form)[0]
        torch.autograd.grad(loss, inputs[:3])

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_seventy_thousand_rows_need_less_than_two_gigabytes(dtype, form):
    """Beside hidden, weight and their gradients; rows x words exceeds what 32 bits address."""
    hidden = torch.randn(72000, 768, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(30522, 768, device="cuda", dtype=dtype) * 0.04).requires_grad_()
    bias = torch.zeros(30522, device="cuda", dtype=dtype).requires_grad_()
    labels = torch.randint(30522, (72000,), device="cuda")
    row_weights = torch.full((72000,), 1 / 72000, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, nll_sums, _ = linear_cross_entropy(
        hidden, weight, bias, labels, row_weights, [(0, 72000)], impl="triton", form=form
    )
    gradients = hidden.nbytes + 30523 * 768 * 4
    assert torch.cuda.max_memory_allocated() - before - gradients <= 2e9
    assert loss.item() == pytest.approx(nll_sums.item() / 72000, rel=1e-4)
    last = slice(-64, None)
    expected = F.cross_entropy(F.linear(hidden[last], weight, bias).float(), labels[last], reduction="sum")
    found = linear_cross_entropy(
        hidden, weight, bias, labels, row_weights, [(0, 71936), (71936, 72000)], impl="triton", form=form
    )[1][1]
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
