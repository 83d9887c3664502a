"""Enhanced-decoding attention in Triton: variable-length, one launch for all sequences of all decoders, no atomics.

Forward, then two backward kernels (dQ, and dK with dV: one kernel for all three spills registers), then two sums of dQ
in a fixed order, over the rows of a sequence (dh) and over the sequences at a position (dposition). The visibility of a
score element is hashed where it is needed.

Letters: T tokens of all sequences end to end, S sequences, H heads, C channels of a head, P rows of all position
tables; in kernels M rows (queries) and N columns (keys) of a tile, R rows of dQ added at a time, W channels of all
heads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from quincunx.kernels.rounding_triton import WIDEN, round_to

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _fold(key, value):
    """`enhanced_attention.fold` on uint32: two multiplications an element of the result."""
    x = key ^ (value * 0x9E3779B1)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _visible(rows, columns, sequence, start, length, rule):
    """Which of a sequence's columns its rows see, in the shape that `rows` and `columns` broadcast to.

    Columns beyond the sequence are never seen; rows beyond it are the caller's to drop.
    """
    keys, word_ids, keep_thresholds = rule
    real = columns < length
    words = tl.load(word_ids + start + columns, mask=real, other=0).to(tl.uint32, bitcast=True)
    thresholds = tl.load(keep_thresholds + start + columns, mask=real, other=0)
    row_keys = _fold(tl.load(keys + sequence).to(tl.uint32, bitcast=True), rows.to(tl.uint32))
    draws = (_fold(row_keys, words) >> 2).to(tl.int32, bitcast=True)
    return ((draws < thresholds) & (rows != columns)) | ((columns == 0) & (rows != 0))


@triton.jit
def _dot(a, b, accumulator):
    """accumulator + a b in float32; the interpreter's product of bf16 tiles is wrong."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _bounds(cu_seqlens, num_tiles):
    """This program's tile and sequence, where the sequence starts (int64) and how long it is."""
    sequence = tl.program_id(0) // num_tiles
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    return tl.program_id(0) % num_tiles, sequence, start.to(tl.int64), length


@triton.jit
def _load(x, first, stride, rows, length, C: tl.constexpr):
    """Rows [M, C] of this program's head, numbered from row `first` of `x`; zeros from `length` on."""
    places = x + first * stride + rows[:, None] * stride + tl.program_id(1) * C + tl.arange(0, C)
    return tl.load(places, mask=rows[:, None] < length, other=0.0)


@triton.jit
def _store(x, first, rows, length, value, C: tl.constexpr):
    """Writes what `_load` would read from a contiguous [T, H, C]."""
    stride = tl.num_programs(1) * C
    places = x + first * stride + rows[:, None] * stride + tl.program_id(1) * C + tl.arange(0, C)
    tl.store(places, round_to(value, x.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def _load_queries(h_query, position_query, h_stride, position_stride, sequence, first, rows, length, C: tl.constexpr):
    """h + position [M, C] of this program's head: a float32 sum rounded to the tensors' dtype, as torch rounds it."""
    h_C = tl.load(h_query + sequence.to(tl.int64) * h_stride + tl.program_id(1) * C + tl.arange(0, C))
    position_MC = _load(position_query, first, position_stride, rows, length, C)
    return round_to(h_C.to(tl.float32) + position_MC.to(tl.float32), position_MC.dtype)


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def _forward(
    h_query,
    position_query,
    k,
    v,
    cu_seqlens,
    position_starts,
    keys,
    word_ids,
    keep_thresholds,
    output,
    lse,
    h_stride,
    position_stride,
    k_stride,
    v_stride,
    num_tiles,
    num_tokens,
    C: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Output, and base-2 log-sum-exp [H, T], of one tile of rows."""
    rule = keys, word_ids, keep_thresholds
    tile, sequence, start, length = _bounds(cu_seqlens, num_tiles)
    if tile * M >= length:
        return
    rows_M = tile * M + tl.arange(0, M)
    table = tl.load(position_starts + sequence)
    q_MC = _load_queries(h_query, position_query, h_stride, position_stride, sequence, table, rows_M, length, C)
    # Below every score yet finite: a row that has seen nothing so far subtracts it from -inf without a NaN.
    largest_M = tl.full([M], -1e30, tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    output_MC = tl.zeros([M, C], tl.float32)
    for first_column in range(0, length, N):
        columns_N = first_column + tl.arange(0, N)
        k_NC = _load(k, start, k_stride, columns_N, length, C)
        v_NC = _load(v, start, v_stride, columns_N, length, C)
        scores_MN = _dot(q_MC, tl.trans(k_NC), tl.zeros([M, N], tl.float32)) * (C**-0.5 * LOG2_E)
        visible_MN = _visible(rows_M[:, None], columns_N[None, :], sequence, start, length, rule)
        scores_MN = tl.where(visible_MN, scores_MN, float("-inf"))
        larger_M = tl.maximum(largest_M, tl.max(scores_MN, 1))
        shrink_M = tl.exp2(largest_M - larger_M)
        weights_MN = tl.exp2(scores_MN - larger_M[:, None])
        sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
        output_MC = _dot(round_to(weights_MN, v_NC.dtype), v_NC, output_MC * shrink_M[:, None])
        largest_M = larger_M
    # A row that sees nothing gives 0 / 1; every weight of its backward is masked, whatever its log-sum-exp.
    sum_M = tl.where(sum_M == 0, 1.0, sum_M)
    _store(output, start, rows_M, length, output_MC / sum_M[:, None], C)
    places_M = tl.program_id(1) * num_tokens + start + rows_M
    tl.store(lse + places_M, largest_M + tl.log2(sum_M), mask=rows_M < length)


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def _backward_queries(
    h_query,
    position_query,
    k,
    v,
    cu_seqlens,
    position_starts,
    keys,
    word_ids,
    keep_thresholds,
    output,
    grad_output,
    lse,
    delta,
    grad_q,
    h_stride,
    position_stride,
    k_stride,
    v_stride,
    num_tiles,
    num_tokens,
    C: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """dQ of one tile of rows, and its delta [H, T] = sum over channels of output and its gradient."""
    rule = keys, word_ids, keep_thresholds
    tile, sequence, start, length = _bounds(cu_seqlens, num_tiles)
    if tile * M >= length:
        return
    rows_M = tile * M + tl.arange(0, M)
    table = tl.load(position_starts + sequence)
    q_MC = _load_queries(h_query, position_query, h_stride, position_stride, sequence, table, rows_M, length, C)
    width = tl.num_programs(1) * C
    output_MC = _load(output, start, width, rows_M, length, C)
    grad_output_MC = _load(grad_output, start, width, rows_M, length, C)
    delta_M = tl.sum(output_MC.to(tl.float32) * grad_output_MC.to(tl.float32), 1)
    places_M = tl.program_id(1) * num_tokens + start + rows_M
    tl.store(delta + places_M, delta_M, mask=rows_M < length)
    lse_M = tl.load(lse + places_M, mask=rows_M < length, other=float("inf"))
    grad_q_MC = tl.zeros([M, C], tl.float32)
    for first_column in range(0, length, N):
        columns_N = first_column + tl.arange(0, N)
        k_NC = _load(k, start, k_stride, columns_N, length, C)
        v_NC = _load(v, start, v_stride, columns_N, length, C)
        scores_MN = _dot(q_MC, tl.trans(k_NC), tl.zeros([M, N], tl.float32)) * (C**-0.5 * LOG2_E)
        visible_MN = _visible(rows_M[:, None], columns_N[None, :], sequence, start, length, rule)
        weights_MN = tl.where(visible_MN, tl.exp2(scores_MN - lse_M[:, None]), 0.0)
        grad_weights_MN = _dot(grad_output_MC, tl.trans(v_NC), tl.zeros([M, N], tl.float32))
        grad_scores_MN = weights_MN * (grad_weights_MN - delta_M[:, None])
        grad_q_MC = _dot(round_to(grad_scores_MN, k_NC.dtype), k_NC, grad_q_MC)
    _store(grad_q, start, rows_M, length, grad_q_MC * C**-0.5, C)


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def _backward_keys_values(
    h_query,
    position_query,
    k,
    v,
    cu_seqlens,
    position_starts,
    keys,
    word_ids,
    keep_thresholds,
    grad_output,
    lse,
    delta,
    grad_k,
    grad_v,
    h_stride,
    position_stride,
    k_stride,
    v_stride,
    num_tiles,
    num_tokens,
    C: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """dK and dV of one tile of columns. Scores stand transposed, [N, M]: no product has to turn its left factor."""
    rule = keys, word_ids, keep_thresholds
    tile, sequence, start, length = _bounds(cu_seqlens, num_tiles)
    if tile * N >= length:
        return
    columns_N = tile * N + tl.arange(0, N)
    table = tl.load(position_starts + sequence)
    k_NC = _load(k, start, k_stride, columns_N, length, C)
    v_NC = _load(v, start, v_stride, columns_N, length, C)
    grad_k_NC = tl.zeros([N, C], tl.float32)
    grad_v_NC = tl.zeros([N, C], tl.float32)
    for first_row in range(0, length, M):
        rows_M = first_row + tl.arange(0, M)
        q_MC = _load_queries(h_query, position_query, h_stride, position_stride, sequence, table, rows_M, length, C)
        grad_output_MC = _load(grad_output, start, tl.num_programs(1) * C, rows_M, length, C)
        places_M = tl.program_id(1) * num_tokens + start + rows_M
        lse_M = tl.load(lse + places_M, mask=rows_M < length, other=float("inf"))
        delta_M = tl.load(delta + places_M, mask=rows_M < length, other=0.0)
        scores_NM = _dot(k_NC, tl.trans(q_MC), tl.zeros([N, M], tl.float32)) * (C**-0.5 * LOG2_E)
        visible_NM = _visible(rows_M[None, :], columns_N[:, None], sequence, start, length, rule)
        weights_NM = tl.where(visible_NM, tl.exp2(scores_NM - lse_M[None, :]), 0.0)
        grad_v_NC = _dot(round_to(weights_NM, v_NC.dtype), grad_output_MC, grad_v_NC)
        grad_weights_NM = _dot(v_NC, tl.trans(grad_output_MC), tl.zeros([N, M], tl.float32))
        grad_scores_NM = weights_NM * (grad_weights_NM - delta_M[None, :])
        grad_k_NC = _dot(round_to(grad_scores_NM, q_MC.dtype), q_MC, grad_k_NC)
    _store(grad_k, start, columns_N, length, grad_k_NC * C**-0.5, C)
    _store(grad_v, start, columns_N, length, grad_v_NC, C)


@triton.jit
def _sum_rows(grad_q, cu_seqlens, grad_h, width, R: tl.constexpr, W: tl.constexpr):
    """dh [S, width]: dQ summed over the rows of one sequence, from its first to its last."""
    sequence = tl.program_id(0).to(tl.int64)
    channels_W = tl.program_id(1) * W + tl.arange(0, W)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    sum_W = tl.zeros([W], tl.float32)
    for first_row in range(start, end, R):
        rows_R1 = first_row + tl.arange(0, R)[:, None]
        mask_RW = (rows_R1 < end) & (channels_W < width)
        grad_RW = tl.load(grad_q + rows_R1.to(tl.int64) * width + channels_W, mask=mask_RW, other=0.0)
        sum_W += tl.sum(grad_RW.to(tl.float32), 0)
    tl.store(grad_h + sequence * width + channels_W, round_to(sum_W, grad_h.dtype.element_ty), mask=channels_W < width)


@triton.jit(do_not_specialize=["num_sequences"])
def _sum_sequences(
    grad_q, cu_seqlens, position_starts, grad_position, width, num_sequences, R: tl.constexpr, W: tl.constexpr
):
    """dposition [P, width]: dQ summed over the sequences that have a row at one position, in their order."""
    position = tl.program_id(0)
    channels_W = tl.program_id(1) * W + tl.arange(0, W)
    sum_W = tl.zeros([W], tl.float32)
    for first_sequence in range(0, num_sequences, R):
        sequences_R = first_sequence + tl.arange(0, R)
        real_R = sequences_R < num_sequences
        start_R = tl.load(cu_seqlens + sequences_R, mask=real_R, other=0)
        end_R = tl.load(cu_seqlens + sequences_R + 1, mask=real_R, other=0)
        rows_R = start_R + position - tl.load(position_starts + sequences_R, mask=real_R, other=0)
        mask_RW = ((rows_R >= start_R) & (rows_R < end_R))[:, None] & (channels_W < width)
        grad_RW = tl.load(grad_q + rows_R.to(tl.int64)[:, None] * width + channels_W, mask=mask_RW, other=0.0)
        sum_W += tl.sum(grad_RW.to(tl.float32), 0)
    places_W = grad_position + position.to(tl.int64) * width + channels_W
    tl.store(places_W, round_to(sum_W, grad_position.dtype.element_ty), mask=channels_W < width)


class Tiling(NamedTuple):
    """How a kernel cuts a sequence, and how it is launched."""

    outer: int
    """Rows of a tile of the forward and of dQ, columns of one of dK and dV: a program owns these."""
    inner: int
    """Columns, or rows, that it goes through at a time."""
    num_warps: int
    num_stages: int


SUM_SIZES = {"R": 64, "W": 64}


def tiling(kernel: triton.JITFunction, dtype: torch.dtype, head_size: int, capability: int) -> Tiling:
    """The static launch table: what compiles without spills, for passages of mostly 64 to 144 tokens.

    `capability` is 80 for Ampere, 90 for Hopper.
    """
    if dtype == torch.float32:  # Products without tensor cores hold whole rows of their operands in registers.
        outer, inner = (16, 32) if head_size == 128 else (32, 16)
        if head_size == 128 and kernel is _backward_queries:
            inner = 16
        return Tiling(outer, inner, num_warps=8, num_stages=1)
    if head_size == 128:
        return Tiling(outer=64, inner=32, num_warps=8, num_stages=2)
    crowded = kernel is _backward_keys_values and head_size == 64 and capability < 90
    return Tiling(outer=64, inner=16 if crowded else 32, num_warps=4, num_stages=2)


class Attention(torch.autograd.Function):
    """`enhanced_attention.enhanced_attention` of at least one token: its tensors as `_launch` has them, and max_length.

    Saves its inputs, the output and the log-sum-exp [H, T]; everything else is computed again in the backward.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, ctx.max_length = arguments
        _assert_layouts(inputs)
        k_THC = inputs[2]
        output_THC = k_THC.new_empty(k_THC.shape)
        lse_HT = k_THC.new_empty(k_THC.shape[1], k_THC.shape[0], dtype=torch.float32)
        _launch(_forward, inputs, (output_THC, lse_HT), ctx.max_length)
        ctx.save_for_backward(*inputs, output_THC, lse_HT)
        return output_THC

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output_THC):
        *inputs, output_THC, lse_HT = ctx.saved_tensors
        h_query_SHC, position_query_PHC, _, _, cu_seqlens, position_starts_S = inputs[:6]
        grad_output_THC = grad_output_THC.contiguous()
        delta_HT = torch.empty_like(lse_HT)
        grad_q_THC, grad_k_THC, grad_v_THC = (torch.empty_like(output_THC) for _ in range(3))
        _launch(_backward_queries, inputs, (output_THC, grad_output_THC, lse_HT, delta_HT, grad_q_THC), ctx.max_length)
        _launch(
            _backward_keys_values, inputs, (grad_output_THC, lse_HT, delta_HT, grad_k_THC, grad_v_THC), ctx.max_length
        )
        width = output_THC.shape[1] * output_THC.shape[2]
        blocks = triton.cdiv(width, SUM_SIZES["W"])
        grad_h_SHC, grad_position_PHC = (x.new_empty(x.shape) for x in (h_query_SHC, position_query_PHC))
        _sum_rows[len(grad_h_SHC), blocks](grad_q_THC, cu_seqlens, grad_h_SHC, width, **SUM_SIZES)
        _sum_sequences[len(grad_position_PHC), blocks](
            grad_q_THC, cu_seqlens, position_starts_S, grad_position_PHC, width, len(grad_h_SHC), **SUM_SIZES
        )
        return grad_h_SHC, grad_position_PHC, grad_k_THC, grad_v_THC, *(None,) * 6


def _assert_layouts(inputs: list[torch.Tensor]) -> None:
    """What the kernels cannot see: they read through pointers and strides. `inputs` are as `_launch` has them."""
    floats, integers = inputs[:4], inputs[4:]
    h_query_SHC, position_query_PHC, k_THC, v_THC = floats
    (num_sequences, *head_shape), num_tokens = h_query_SHC.shape, len(k_THC)
    assert len({x.dtype for x in floats}) == 1, [x.dtype for x in floats]
    assert len({x.device for x in inputs}) == 1, [x.device for x in inputs]
    assert list(position_query_PHC.shape[1:]) == head_shape and v_THC.shape == k_THC.shape == (num_tokens, *head_shape)
    # Heads stand side by side; rows may be apart, as in parts of one projection.
    assert all(x.stride(-1) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) for x in floats)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in integers)
    lengths = [num_sequences + 1, num_sequences, num_sequences, num_tokens, num_tokens]
    assert [len(x) for x in integers] == lengths, [len(x) for x in integers]


def _capability(device: torch.device) -> int:
    """80 for Ampere, 90 for Hopper; the interpreter takes Ampere's tiles."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def _launch(kernel: triton.JITFunction, inputs: list, others: tuple, max_length: int) -> None:
    """Runs an attention kernel on every tile of every head.

    inputs: h_query, position_query, k, v, cu_seqlens, position_starts, keys, word_ids, keep_thresholds.
    """
    k_THC = inputs[2]
    num_tokens, num_heads, head_size = k_THC.shape
    tile = tiling(kernel, k_THC.dtype, head_size, _capability(k_THC.device))
    num_tiles = triton.cdiv(max_length, tile.outer)
    rows, columns = (tile.inner, tile.outer) if kernel is _backward_keys_values else (tile.outer, tile.inner)
    kernel[len(inputs[0]) * num_tiles, num_heads](
        *inputs,
        *others,
        *(x.stride(0) for x in inputs[:4]),
        num_tiles,
        num_tokens,
        C=head_size,
        M=rows,
        N=columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
