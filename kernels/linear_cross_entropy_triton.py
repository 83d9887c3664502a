"""Triton kernels of `linear_cross_entropy`: three matrix products a chunk, and few passes over its logits.

Form A: cuBLAS writes logits, one kernel reads them for the rows' sums, one turns them into gradients in place.
Form B: one kernel multiplies and stores E = exp(logits) in bf16, whose exponent range needs no offset, with the rows'
sums on the way; no logits are ever stored. E / S - onehot is the gradient, and 1 / S goes into the rows of the two
gradient products, so E is only read once more, for the gradient of the bias. A chunk with a row beyond LARGEST_LSE is
done again relative to the rows' highest logits. The device decides that itself: the second launch finds nothing to do.

Sums run in a fixed order, without atomics: two runs agree bit by bit.

Letters: N labelled rows; D channels; V vocabulary; K rows of one chunk; P vocabulary padded to a multiple of 128, the
row stride of the workspace; C column tiles of the product; S stripes of rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quincunx.kernels.launching import INTERPRETED
from quincunx.kernels.linear_cross_entropy import Form, Gradients
from quincunx.kernels.rounding_triton import WIDEN, round_to

# bf16 has all its digits from e^-87 to e^88. Within 60, E keeps those of a probability of e^-27 however low its row
# lies, and hidden times 1 / S those of a row that weighs 1e-12 of the heaviest however high it lies. At 80 it would be
# e^-7 and 1e-3, and beyond that words would vanish from E and from S with nothing to show for it.
LARGEST_LSE = tl.constexpr(60.0)
# The bias of pad columns: their E and their gradient are exactly 0 without a mask, whatever the row's other logits are.
PAD_BIAS = tl.constexpr(-1e30)
PADDING = 128
STRIPE = 512
"""Rows whose gradients of the bias one program sums."""


class Product(NamedTuple):
    """Tile of the product with exponentials, and what a program gets to compute it."""

    rows: int
    words: int
    channels: int
    num_warps: int
    num_stages: int
    descriptors: bool
    """Hopper's copy engine (TMA) instead of pointers."""


# By major compute capability; others take Ampere's. Both tables are predictions, to be confirmed on GPUs.
PRODUCTS = {
    8: Product(rows=128, words=128, channels=64, num_warps=8, num_stages=3, descriptors=False),
    9: Product(rows=128, words=256, channels=64, num_warps=8, num_stages=3, descriptors=True),
}
FORMS = {8: "A", 9: "B"}
INTERPRETED_PRODUCT = Product(rows=32, words=64, channels=32, num_warps=4, num_stages=1, descriptors=False)
GROUP = 8
"""Row tiles whose programs run side by side, so that tiles of the weight are read from the L2 cache."""
POINTWISE = {"BLOCK_ROWS": 16, "BLOCK_WORDS": 128}
SUMS = {"BLOCK_ROWS": 32, "BLOCK_TILES": 32}


@triton.jit(do_not_specialize=["num_rows"])
def _statistics_kernel(
    logits_KP,
    bias_P,
    labels_K,
    nll_K,
    correct_K,
    highest_K,
    inverse_sums_K,
    num_rows,
    NUM_WORDS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Form A: from BLOCK_ROWS rows of logits, still without bias, to the rows' results, highest logit, and 1 / S.

    S is the sum of exponentials relative to the highest logit.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    words = tl.arange(0, BLOCK_WORDS)
    row_starts = logits_KP + rows.to(tl.int64) * PADDED
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, PADDED, BLOCK_WORDS):
        logits = tl.load(row_starts[:, None] + (start + words)[None, :], inside[:, None], other=0.0).to(tl.float32)
        logits += tl.load(bias_P + start + words)[None, :]
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        highest = higher
    labels = tl.load(labels_K + rows, inside, other=0)
    known = inside & (labels >= 0) & (labels < NUM_WORDS)
    target = tl.load(row_starts + labels, known, other=float("nan")).to(tl.float32)
    target += tl.load(bias_P + labels, known, other=0.0)
    tl.store(nll_K + rows, tl.log(total) + (highest - target), inside)
    tl.store(correct_K + rows, target >= highest, inside)
    tl.store(highest_K + rows, highest, inside)
    tl.store(inverse_sums_K + rows, 1.0 / total, inside)


@triton.jit(do_not_specialize=["num_rows"])
def _exponentials_kernel(
    hidden_KD,
    weight_VD,
    exponentials_KP,
    bias_P,
    labels_K,
    sums_CK,
    maxima_CK,
    targets_K,
    highest_K,
    redo,
    num_rows,
    hidden_stride,
    weight_stride,
    NUM_WORDS: tl.constexpr,
    PADDED: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STORE: tl.constexpr,
    REDO: tl.constexpr,
):
    """Form B: E = exp(hidden @ weight.T + bias), every tile's row sums of E and row maxima of logits, labels' logits.

    With REDO, E is relative to the row's highest logit, and nothing happens unless `redo` is 1. Any number of programs.
    """
    sums_stride = num_rows.to(tl.int64)
    if REDO:
        num_rows *= tl.load(redo)
    num_row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    NUM_WORD_TILES: tl.constexpr = (PADDED + BLOCK_WORDS - 1) // BLOCK_WORDS
    for tile in range(tl.program_id(0), num_row_tiles * NUM_WORD_TILES, tl.num_programs(0)):
        first_row_tile = tile // (GROUP_ROWS * NUM_WORD_TILES) * GROUP_ROWS
        num_group_tiles = tl.minimum(num_row_tiles - first_row_tile, GROUP_ROWS)
        place = tile % (GROUP_ROWS * NUM_WORD_TILES)
        first_row = (first_row_tile + place % num_group_tiles) * BLOCK_ROWS
        word_tile = place // num_group_tiles
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        words = word_tile * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        inside = rows < num_rows

        logits = tl.zeros([BLOCK_ROWS, BLOCK_WORDS], tl.float32)
        for first_channel in range(0, NUM_CHANNELS, BLOCK_CHANNELS):
            if DESCRIPTORS:
                hidden = hidden_KD.load([first_row, first_channel])
                weight = weight_VD.load([word_tile * BLOCK_WORDS, first_channel])
            else:
                channels = first_channel + tl.arange(0, BLOCK_CHANNELS)
                left = (channels < NUM_CHANNELS)[None, :]
                hidden_at = hidden_KD + rows.to(tl.int64)[:, None] * hidden_stride + channels[None, :]
                weight_at = weight_VD + words.to(tl.int64)[:, None] * weight_stride + channels[None, :]
                hidden = tl.load(hidden_at, inside[:, None] & left, other=0.0)
                weight = tl.load(weight_at, (words < NUM_WORDS)[:, None] & left, other=0.0)
            if WIDEN:
                hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
            logits = tl.dot(hidden, weight.T, logits)

        logits += tl.load(bias_P + words, words < PADDED, other=PAD_BIAS)[None, :]
        at = word_tile * sums_stride + rows
        tl.store(maxima_CK + at, tl.max(logits, 1), inside)
        labels = tl.load(labels_K + rows, inside, other=-1)
        owned = (labels >= word_tile * BLOCK_WORDS) & (labels < (word_tile + 1) * BLOCK_WORDS)
        is_label = words[None, :] == labels.to(tl.int32)[:, None]
        tl.store(targets_K + rows, tl.sum(tl.where(is_label, logits, 0.0), 1), inside & owned)
        if REDO:
            logits -= tl.load(highest_K + rows, inside, other=0.0)[:, None]
        exponentials = tl.exp(logits)
        tl.store(sums_CK + at, tl.sum(exponentials, 1), inside)
        if STORE:
            exponentials = round_to(exponentials, tl.bfloat16)
            if DESCRIPTORS:
                exponentials_KP.store([first_row, word_tile * BLOCK_WORDS], exponentials)
            else:
                exponentials_at = exponentials_KP + rows.to(tl.int64)[:, None] * PADDED + words[None, :]
                tl.store(exponentials_at, exponentials, inside[:, None] & (words < PADDED)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    sums_CK,
    maxima_CK,
    targets_K,
    labels_K,
    nll_K,
    correct_K,
    highest_K,
    inverse_sums_K,
    label_gradients_K,
    redo_flags,
    redo,
    num_rows,
    NUM_WORDS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    REDO: tl.constexpr,
):
    """Form B: from the tiles' sums and maxima to the rows' results, 1 / S, and S times the label's gradient.

    Without REDO also to whether this program's rows call for it.
    """
    sums_stride = num_rows.to(tl.int64)
    if REDO:
        num_rows *= tl.load(redo)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, NUM_TILES, BLOCK_TILES):
        tiles = first + tl.arange(0, BLOCK_TILES)
        at = tiles[:, None] * sums_stride + rows[None, :]
        present = (tiles < NUM_TILES)[:, None] & inside[None, :]
        total += tl.sum(tl.load(sums_CK + at, present, other=0.0), 0)
        highest = tl.maximum(highest, tl.max(tl.load(maxima_CK + at, present, other=float("-inf")), 0))
    labels = tl.load(labels_K + rows, inside, other=0)
    known = inside & (labels >= 0) & (labels < NUM_WORDS)
    target = tl.load(targets_K + rows, known, other=float("nan"))
    tl.store(correct_K + rows, target >= highest, inside)
    if REDO:
        target -= highest
    else:
        tl.store(highest_K + rows, highest, inside)
        too_far = inside & ~(tl.abs(tl.log(total)) <= LARGEST_LSE)  # NaN is not
        tl.store(redo_flags + tl.program_id(0), tl.max(too_far.to(tl.int32), 0))
    tl.store(nll_K + rows, tl.log(total) - target, inside)
    tl.store(inverse_sums_K + rows, 1.0 / total, inside)
    tl.store(label_gradients_K + rows, tl.exp(target) - total, inside)


@triton.jit(do_not_specialize=["num_rows"])
def _gradient_kernel(
    workspace_KP,
    bias_P,
    labels_K,
    row_values_K,
    inverse_sums_K,
    row_factors_K,
    bias_gradient_SP,
    num_rows,
    PADDED: tl.constexpr,
    ROWS_OF_STRIPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    EXPONENTIALS: tl.constexpr,
):
    """Turns BLOCK_WORDS columns of a stripe of rows into gradients, in place, and adds up the bias's.

    Form A: logits to softmax - onehot; a row's value is its highest logit. Form B (EXPONENTIALS): S times that, so only
    the label's entry changes, to the row's value.
    """
    words = tl.program_id(0) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    stripe = tl.program_id(1)
    bias = tl.load(bias_P + words)[None, :]
    sums = tl.zeros([BLOCK_ROWS, BLOCK_WORDS], tl.float32)
    last = tl.minimum((stripe + 1) * ROWS_OF_STRIPE, num_rows)
    for first in range(stripe * ROWS_OF_STRIPE, last, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        inside = rows < last
        is_label = words[None, :] == tl.load(labels_K + rows, inside, other=-1)[:, None]
        row_values = tl.load(row_values_K + rows, inside, other=float("inf"))[:, None]
        at = workspace_KP + rows.to(tl.int64)[:, None] * PADDED + words[None, :]
        stored = tl.load(at, inside[:, None], other=0.0).to(tl.float32)
        if EXPONENTIALS:
            gradient = tl.where(is_label, row_values, stored)
            changed = is_label
        else:
            inverse_sums = tl.load(inverse_sums_K + rows, inside, other=0.0)[:, None]
            gradient = tl.exp(stored + bias - row_values) * inverse_sums - is_label.to(tl.float32)
            changed = inside[:, None]
        tl.store(at, round_to(gradient, workspace_KP.dtype.element_ty), changed)
        sums += gradient * tl.load(row_factors_K + rows, inside, other=0.0)[:, None]
    at = bias_gradient_SP + stripe * PADDED + words
    tl.store(at, tl.load(at) + tl.sum(sums, 0))


def run_chunks(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor,
    labels_N: torch.Tensor,
    chunk_rows: int,
    nll_N: torch.Tensor,
    correct_N: torch.Tensor,
    gradients: Gradients | None,
    form: Form,
) -> None:
    """Fills `nll`, `correct` (bool) and, where wanted, `gradients`: see `linear_cross_entropy._run_chunks`."""
    num_rows, num_words = len(hidden_ND), len(weight_VD)
    if num_rows == 0:
        return
    chunk_rows = min(chunk_rows, num_rows)
    if form == "auto":
        form = FORMS[_family(hidden_ND.device)] if hidden_ND.dtype == torch.bfloat16 else "A"
    num_pads = -num_words % PADDING
    bias_P = F.pad(bias_V.float(), (0, num_pads), value=PAD_BIAS.value)
    labels_N = labels_N.contiguous()
    workspace_KP = None
    if form == "A" or gradients is not None:
        # The pads are the row stride's: matrix products see the first V columns, at rows aligned for fast loads.
        workspace_KP = hidden_ND.new_empty(chunk_rows, num_words + num_pads)
        workspace_KP[:, num_words:] = 0
    if gradients is not None:
        bias_gradient_SP = bias_P.new_zeros(triton.cdiv(chunk_rows, STRIPE), len(bias_P))
    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, num_rows))
        hidden_KD, labels_K, results = hidden_ND[rows], labels_N[rows], (nll_N[rows], correct_N[rows])
        chunk_KP = None if workspace_KP is None else workspace_KP[: len(hidden_KD)]
        if form == "A":
            torch.mm(hidden_KD, weight_VD.T, out=chunk_KP[:, :num_words])
            row_values_K, inverse_sums_K = _statistics(chunk_KP, bias_P, labels_K, *results, num_words)
        else:
            row_values_K, inverse_sums_K = _exponentials(hidden_KD, weight_VD, bias_P, labels_K, *results, chunk_KP)
        if gradients is None:
            continue
        row_factors_K1 = gradients.row_factors_N1[rows]
        if form == "B":
            row_factors_K1 *= inverse_sums_K[:, None]
        grid = len(bias_P) // POINTWISE["BLOCK_WORDS"], triton.cdiv(len(hidden_KD), STRIPE)
        _gradient_kernel[grid](
            chunk_KP,
            bias_P,
            labels_K,
            row_values_K,
            inverse_sums_K,
            row_factors_K1,
            bias_gradient_SP,
            len(hidden_KD),
            num_warps=4,
            PADDED=len(bias_P),
            ROWS_OF_STRIPE=STRIPE,
            EXPONENTIALS=form == "B",
            **POINTWISE,
        )
        gradient_KV = chunk_KP[:, :num_words]
        weighted_KD = (hidden_KD * row_factors_K1).to(hidden_KD.dtype)
        if hidden_KD.dtype == torch.float32:
            gradients.weight_VD.addmm_(gradient_KV.T, weighted_KD)
        else:
            gradients.weight_VD.add_(gradient_KV.T @ weighted_KD)
        torch.mm(gradient_KV, weight_VD, out=gradients.hidden_ND[rows])
    if gradients is not None:
        gradients.bias_V.copy_(bias_gradient_SP.sum(0)[:num_words])


def _family(device: torch.device) -> int:
    """Major compute capability whose table entries run on `device`."""
    if INTERPRETED or torch.version.hip is not None:
        return 8
    major = torch.cuda.get_device_capability(device)[0]
    return major if major in PRODUCTS else 8


def _statistics(logits_KP, bias_P, labels_K, nll_K, correct_K, num_words) -> tuple[torch.Tensor, torch.Tensor]:
    """Form A: fills `nll` and `correct`; the rows' highest logits, and 1 / S."""
    highest_K, inverse_sums_K = (bias_P.new_empty(len(labels_K)) for _ in range(2))
    _statistics_kernel[(triton.cdiv(len(labels_K), POINTWISE["BLOCK_ROWS"]),)](
        logits_KP,
        bias_P,
        labels_K,
        nll_K,
        correct_K,
        highest_K,
        inverse_sums_K,
        len(labels_K),
        num_warps=4,
        NUM_WORDS=num_words,
        PADDED=len(bias_P),
        **POINTWISE,
    )
    return highest_K, inverse_sums_K


def _exponentials(
    hidden_KD, weight_VD, bias_P, labels_K, nll_K, correct_K, exponentials_KP
) -> tuple[torch.Tensor, torch.Tensor]:
    """Form B: fills `nll`, `correct` and, unless None, `exponentials`; S times the labels' gradients, and 1 / S."""
    product = _product(hidden_KD, weight_VD)
    num_rows, num_words = len(hidden_KD), len(weight_VD)
    num_word_tiles = triton.cdiv(len(bias_P), product.words)
    num_tiles = triton.cdiv(num_rows, product.rows) * num_word_tiles
    num_row_programs = triton.cdiv(num_rows, SUMS["BLOCK_ROWS"])
    sums_CK, maxima_CK = (bias_P.new_empty(num_word_tiles, num_rows) for _ in range(2))
    targets_K, highest_K, inverse_sums_K, label_gradients_K = (bias_P.new_empty(num_rows) for _ in range(4))
    redo_flags = labels_K.new_empty(num_row_programs, dtype=torch.int32)
    operands = [hidden_KD, weight_VD, exponentials_KP]
    if product.descriptors:
        tiles = [product.rows, product.channels], [product.words, product.channels], [product.rows, product.words]
        operands = [x if x is None else TensorDescriptor.from_tensor(x, tile) for x, tile in zip(operands, tiles)]

    def launch(num_programs: int, redo: torch.Tensor | None) -> None:
        _exponentials_kernel[(num_programs,)](
            *operands,
            bias_P,
            labels_K,
            sums_CK,
            maxima_CK,
            targets_K,
            highest_K,
            redo,
            num_rows,
            hidden_KD.stride(0),
            weight_VD.stride(0),
            num_warps=product.num_warps,
            num_stages=product.num_stages,
            NUM_WORDS=num_words,
            PADDED=len(bias_P),
            NUM_CHANNELS=hidden_KD.shape[1],
            BLOCK_ROWS=product.rows,
            BLOCK_WORDS=product.words,
            BLOCK_CHANNELS=product.channels,
            GROUP_ROWS=GROUP,
            DESCRIPTORS=product.descriptors,
            STORE=exponentials_KP is not None,
            REDO=redo is not None,
        )
        _rows_kernel[(num_row_programs,)](
            sums_CK,
            maxima_CK,
            targets_K,
            labels_K,
            nll_K,
            correct_K,
            highest_K,
            inverse_sums_K,
            label_gradients_K,
            redo_flags,
            redo,
            num_rows,
            num_warps=4,
            NUM_WORDS=num_words,
            NUM_TILES=num_word_tiles,
            **SUMS,
            REDO=redo is not None,
        )

    launch(num_tiles, redo=None)
    launch(min(num_tiles, _num_processors(hidden_KD.device)), redo=redo_flags.amax())
    return label_gradients_K, inverse_sums_K


def _product(hidden_KD: torch.Tensor, weight_VD: torch.Tensor) -> Product:
    """The architecture's, unless its copy engine cannot read the tensors.

    It wants rows at multiples of 16 bytes, and a parameter that DeepSpeed laid into a flat buffer can start anywhere.
    """
    product = INTERPRETED_PRODUCT if INTERPRETED else PRODUCTS[_family(hidden_KD.device)]
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in (hidden_KD, weight_VD))
    return product if aligned or not product.descriptors else PRODUCTS[8]


def _num_processors(device: torch.device) -> int:
    """Programs that run at the same time, at one a multiprocessor."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
