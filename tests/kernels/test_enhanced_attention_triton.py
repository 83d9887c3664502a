"""The Triton kernels of enhanced_attention against float64 truth and eager torch; interpreted without a GPU."""

import pytest
import torch

from quincunx.data_shards.hashing import ALWAYS
from quincunx.kernels import enhanced_attention_triton as kernels
from quincunx.kernels.enhanced_attention import TRITON_HEAD_SIZES, draw30, enhanced_attention

# The interpreter warns of uint32 products that wrap, and computes lanes that nobody stores.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = ("output", "dh", "dposition", "dk", "dv")
RAGGED = (5, 1, 40, 2)


class Case:
    """Inputs of one call: k and v are halves of one projection, thresholds include never and always."""

    def __init__(self, device, dtype=torch.float32, lengths=RAGGED, head_size=32, heads=1, tables=1):
        generator = torch.Generator().manual_seed(sum(lengths) + head_size)

        def floats(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

        def integers(low, high, count):
            return torch.randint(low, high, (count,), generator=generator).to(device, torch.int32)

        total, self.max_length = sum(lengths), max(lengths)
        self.cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
        rows_of_a_table = self.max_length + 3
        self.h = floats(len(lengths), heads, head_size)
        self.position = floats(tables * rows_of_a_table, heads, head_size)
        self.kv = floats(total, 2 * heads * head_size)
        self.k, self.v = (half.unflatten(-1, (heads, head_size)) for half in self.kv.chunk(2, -1))
        self.position_starts = integers(0, tables, len(lengths)) * rows_of_a_table
        self.keys = integers(0, 2**31, len(lengths))
        self.keys[::2] |= -(2**31)
        self.words = integers(0, 2**16, total) // 3
        choices = torch.tensor([0, ALWAYS // 5, ALWAYS // 2, ALWAYS], dtype=torch.int32, device=device)
        self.thresholds = choices[integers(0, 4, total)]
        self.grad_output = floats(total, heads, head_size).detach()

    def run(self, impl="triton", dtype=None, max_length=None):
        """Output and the gradients of h, position, k and v."""
        dtype = dtype or self.h.dtype
        inputs = [x.detach().to(dtype).requires_grad_() for x in (self.h, self.position)]
        inputs += [self.k, self.v] if dtype == self.h.dtype else [x.to(dtype) for x in (self.k, self.v)]
        output = enhanced_attention(
            *inputs,
            self.cu_seqlens,
            self.keys,
            self.words,
            self.thresholds,
            max_length=max_length or self.max_length,
            position_starts_S=self.position_starts,
            impl=impl,
        )
        return output.detach(), *torch.autograd.grad(output, inputs, self.grad_output.to(dtype), retain_graph=True)

    def part(self, sequences):
        """The same with some of the sequences, in the order given."""
        part = Case.__new__(Case)
        part.__dict__.update(self.__dict__)
        parts = torch.arange(len(self.k), device=self.k.device).split(self.cu_seqlens.diff().tolist())
        tokens = torch.cat([parts[s] for s in sequences])
        for name in ("h", "keys", "position_starts"):
            setattr(part, name, getattr(self, name).detach()[sequences])
        for name in ("words", "thresholds", "grad_output"):
            setattr(part, name, getattr(self, name)[tokens])
        part.kv = self.kv.detach()[tokens].requires_grad_()
        part.k, part.v = (half.unflatten(-1, self.k.shape[1:]) for half in part.kv.chunk(2, -1))
        lengths = [0, *(len(parts[s]) for s in sequences)]
        part.cu_seqlens, part.max_length = torch.tensor(lengths).cumsum(0).to(self.cu_seqlens), max(lengths)
        return part


def assert_as_good_as_eager(case, highest_score=0):
    """At most three times eager's error from the truth: both are rounded sums of the same terms in another order.

    The backward's weights are 2 ** (score - log-sum-exp), so they may err by the rounding of that number besides.
    """
    rounding = torch.finfo(torch.float32).eps * highest_score
    found, eager, truth = case.run(), case.run("torch"), case.run("torch", torch.float64)
    for name, mine, other, true in zip(NAMES, found, eager, truth, strict=True):
        assert mine.dtype == case.h.dtype and mine.shape == true.shape and torch.isfinite(mine).all(), name
        error, allowed = (mine - true).norm(), 3 * (other - true).norm() + rounding * true.norm()
        assert 0 < error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def assert_equal(found, expected):
    for name, mine, other in zip(NAMES, found, expected, strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("head_size", TRITON_HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_output_and_gradients_err_no_more_than_eager_torch(device, dtype, head_size):
    """Lengths stand around the edges of the tiles, and sequences read three position tables."""
    tile = kernels.tiling(kernels._forward, dtype, head_size, capability=80)
    edges = [size + step for size in (tile.inner, tile.outer) for step in (-1, 0, 1)]
    case = Case(device, dtype, (1, 2, 0, *edges), head_size, heads=2 if head_size == 32 else 1, tables=3)
    assert not case.k.is_contiguous() and len(case.position_starts.unique()) > 1
    assert_as_good_as_eager(case)


def test_scores_of_hundreds_overflow_nowhere(device):
    case = Case(device, lengths=(5, 33))
    case.h.data *= 80
    q = case.h[1] + case.position[case.position_starts[1] :][:33]
    highest = torch.einsum("ihc,jhc->hij", q, case.k[5:]).abs().max().item() / 32**0.5
    assert highest > 128, "2 ** score must overflow float32"
    assert_as_good_as_eager(case, highest * 1.45)


def test_kernels_see_the_columns_of_the_hash(device):
    """One column more or less is off by far more; also where draws equal their thresholds: row 7 of sequence 0."""
    case = Case(device, lengths=(33, 1, 70, 0, 31))
    case.thresholds[:33] = draw30(case.keys[:1], torch.full_like(case.keys[:1], 7), case.words[:33])
    assert (case.keys < 0).any() and (case.keys > 0).any()
    assert {0, ALWAYS} <= set(case.thresholds.tolist())
    found = case.run()
    assert torch.equal(found[0][7], case.v[0]), "row 7 sees column 0 alone"
    for name, mine, other in zip(NAMES, found, case.run("torch"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)


def test_rows_that_see_nothing_give_zeros_and_no_gradient(device):
    case = Case(device, lengths=(1, 35))
    case.thresholds.zero_()
    output, grad_h, _, grad_k, grad_v = results = case.run()
    # Column 0 is all there is to see, and row 0 does not see itself.
    assert all(torch.isfinite(x).all() for x in results)
    assert (output[:2] == 0).all() and torch.equal(output[2:], case.v[1:2].expand(34, -1, -1))
    assert (grad_h[0] == 0).all() and (grad_k[0] == 0).all() and (grad_v[0] == 0).all() and (grad_v[2:] == 0).all()
    torch.testing.assert_close(grad_v[1], case.grad_output[2:].sum(0))


def test_two_runs_give_the_same_bits(device):
    case = Case(device, torch.bfloat16, lengths=(70, 9))
    assert_equal(case.run(), case.run())


def test_dposition_adds_more_sequences_than_a_step_takes(device):
    assert_as_good_as_eager(Case(device, lengths=(3,) * (kernels.SUM_SIZES["R"] + 5), tables=2))


@pytest.mark.parametrize("sequences", [[2], [2, 0, 1], [1, 3, 2]], ids=["alone", "first", "last"])
def test_a_sequence_does_not_depend_on_its_neighbours(device, sequences):
    """Not in a bit; nor on the length of the launch's longest sequence."""
    case = Case(device, torch.bfloat16, tables=2)
    part = case.part(sequences)
    place = sequences.index(2)
    whole, partial = case.run(), part.run(max_length=None if len(sequences) > 1 else 43)
    mine, theirs = slice(*case.cu_seqlens[2:4].tolist()), slice(*part.cu_seqlens[place : place + 2].tolist())
    for name, one, other in zip(NAMES, whole, partial, strict=True):
        if name == "dh":
            assert torch.equal(one[2], other[place])
        elif name != "dposition":
            assert torch.equal(one[mine], other[theirs]), name


@pytest.mark.parametrize(("dtype", "head_size"), [(torch.float64, 32), (torch.float32, 16)])
def test_what_the_kernels_do_not_take_runs_in_torch(device, dtype, head_size):
    case = Case(device, dtype, head_size=head_size)
    torch.testing.assert_close(case.run("auto"), case.run("torch"))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_long_sequences_err_no_more_than_the_twin(length):
    """Against the twin in float64; heads of 64 channels as BERT has."""
    case = Case("cuda", torch.bfloat16, lengths=(length, 33), head_size=64, heads=2)
    truth, ours, twin = case.run("torch", torch.float64), case.run(), case.run("torch")
    for name, exact, mine, other in zip(NAMES, truth, ours, twin, strict=True):
        assert (mine.double() - exact).norm() <= 3 * (other.double() - exact).norm(), name
