"""Bidirectional attention over packed sequences: no padding outside this file.

Letters: T tokens of all sequences end to end, R query rows (R = T unless only some rows ask), S sequences, G sequences
of one length group, L longest sequence of a group, H heads, C channels of a head.
"""

import numpy as np
import torch
import torch.nn.functional as F

# A group holds sequences at least this share of its longest, so at most 1 / 0.75^2 of its scores are padding; and no
# more score elements than this, so that a mask never grows with the batch (4 Mi bools, 16 MB as int32 hashes).
SHORTEST_SHARE_OF_A_GROUP = 0.75
LARGEST_GROUP = 2**22
# Longest sequence whose scores are kept for the backward pass on a CPU; longer ones take SDPA, which recomputes them.
LONGEST_PLAIN = 512


def packed_attention(
    q_RHC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THC: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    query_cu_seqlens: torch.Tensor | None = None,
    max_queries: int | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of every query row to all tokens of its own sequence: output [R, H, C], no dropout.

    `cu_seqlens` int32 [S + 1] bounds the sequences of k and v (longest: `max_length`). Queries are the same tokens
    unless `query_cu_seqlens` [S + 1] (longest: `max_queries`) says which rows belong to which sequence. `window` w
    keeps keys at most w positions away (ModernBERT's local layers; needs queries = tokens). `scale` is C ** -0.5 by
    default.

    On CUDA in bf16 or fp16 this is torch's variable-length attention; elsewhere sequences are grouped by length, padded
    inside, and given to SDPA (a Python loop over packed sequences is slow on a CPU).
    """
    if query_cu_seqlens is None:
        query_cu_seqlens, max_queries = cu_seqlens, max_length
    elif window is not None:
        raise ValueError("packed_attention: a window needs queries at every token; give no query_cu_seqlens")
    if not len(q_RHC):
        return connected_empty(q_RHC, k_THC, v_THC)
    if q_RHC.is_cuda and q_RHC.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q_RHC, k_THC, v_THC, cu_seqlens, max_length, query_cu_seqlens, max_queries, window, scale)
    return _padded(q_RHC, k_THC, v_THC, cu_seqlens, query_cu_seqlens, window, scale)


def _varlen(q_RHC, k_THC, v_THC, cu_seqlens, max_length, query_cu_seqlens, max_queries, window, scale):
    from torch.nn.attention.varlen import varlen_attn

    # Named only where they say something: torch 2.10 has neither.
    extra = {} if window is None else {"window_size": (window, window)}
    if scale is not None and scale != q_RHC.shape[-1] ** -0.5:
        extra["scale"] = scale
    q_RHC, k_THC, v_THC = q_RHC.contiguous(), k_THC.contiguous(), v_THC.contiguous()
    return varlen_attn(q_RHC, k_THC, v_THC, query_cu_seqlens, cu_seqlens, max_queries, max_length, **extra)


@torch.compiler.disable
def _padded(q_RHC, k_THC, v_THC, cu_seqlens, query_cu_seqlens, window, scale):
    key_bounds = host_bounds(cu_seqlens)
    query_bounds = key_bounds if query_cu_seqlens is cu_seqlens else host_bounds(query_cu_seqlens)
    groups = length_groups(np.diff(key_bounds), np.diff(query_bounds))
    keys = PaddedGroups(key_bounds, groups, q_RHC.device)
    queries = keys if query_bounds is key_bounds else PaddedGroups(query_bounds, groups, q_RHC.device)
    outputs = []
    for q_GHLC, k_GHLC, v_GHLC, real_GL in zip(
        queries.pad(q_RHC), keys.pad(k_THC), keys.pad(v_THC), keys.real, strict=True
    ):
        num_keys = k_GHLC.shape[2]
        mask = None if real_GL is None else real_GL[:, None, None, :]
        if window is not None and window < num_keys - 1:
            position = torch.arange(num_keys, device=q_GHLC.device)
            near = ((position[:, None] - position[None, :]).abs() <= window)[None, None]
            mask = near if mask is None else mask & near
            # A padded row far from every real column would see nothing; it may see itself, nobody reads it.
            mask = mask | (position[:, None] == position[None, :])
        outputs.append(masked_softmax_attention(q_GHLC, k_GHLC, v_GHLC, mask, scale))
    return queries.unpad(outputs)


def masked_softmax_attention(
    q_GHRC: torch.Tensor,
    k_GHLC: torch.Tensor,
    v_GHLC: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of padded groups, [G, H, R, C]; `visible` broadcasts to [G, H, R, L], every row must see something.

    On a CPU short float32 sequences in training take plain matrix products: as fast there as SDPA's flash kernel, whose
    exponential has 20 bits (its gradients of MASTER's reference case were 1.3e-4 off the published code's, these 3e-5).
    Without a backward pass SDPA is faster.
    """
    is_half = q_GHRC.dtype in (torch.float16, torch.bfloat16)
    if q_GHRC.is_cuda or is_half or k_GHLC.shape[2] > LONGEST_PLAIN or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q_GHRC, k_GHLC, v_GHLC, attn_mask=visible, scale=scale)
    scale = q_GHRC.shape[-1] ** -0.5 if scale is None else scale
    scores_GHRL = (q_GHRC * scale) @ k_GHLC.transpose(-1, -2)
    if visible is not None:
        scores_GHRL += torch.zeros_like(visible, dtype=scores_GHRL.dtype).masked_fill_(~visible, float("-inf"))
    return scores_GHRL.softmax(-1) @ v_GHLC


def connected_empty(q_RHC: torch.Tensor, k_THC: torch.Tensor, v_THC: torch.Tensor) -> torch.Tensor:
    """The attention of no query rows: empty, yet in the graph, so that every rank has gradients for every weight."""
    return q_RHC + 0 * (k_THC.sum() + v_THC.sum())


def host_bounds(cu_seqlens: torch.Tensor) -> np.ndarray:
    """cu_seqlens as int64 on the host."""
    return cu_seqlens.cpu().numpy().astype(np.int64)


def length_groups(lengths: np.ndarray, num_queries: np.ndarray) -> list[np.ndarray]:
    """Sequence numbers grouped by similar length, longest first; sequences without query rows are in no group."""
    order = np.argsort(-lengths, kind="stable")
    order = order[(num_queries[order] > 0) & (lengths[order] > 0)]
    groups: list[np.ndarray] = []
    start = 0
    for end in range(1, len(order) + 1):
        longest = lengths[order[start]]
        if (
            end == len(order)
            or lengths[order[end]] < SHORTEST_SHARE_OF_A_GROUP * longest
            or (end - start + 1) * longest * longest > LARGEST_GROUP
        ):
            groups.append(order[start:end])
            start = end
    return groups


class PaddedGroups:
    """The way from packed rows [R, H, C] to padded groups [G, H, L, C] and back, each one gather.

    A plain `x[index]` has a scatter-add as its gradient, serial on a CPU; here every packed row stands in one place of
    one group, so its gradient is a gather too. Padding repeats the last row of its sequence: finite, to be masked by
    the caller, without gradient. `real` holds, per group, the bool mask [G, L] of real rows, or None where all are.
    """

    def __init__(self, bounds: np.ndarray, groups: list[np.ndarray], device: torch.device):
        starts, lengths = bounds[:-1], np.diff(bounds)
        self.num_rows = int(bounds[-1])
        self.shapes, self.real = [], []
        sources, reals = [], []
        for sequences in groups:
            length = lengths[sequences][:, None]
            column = np.arange(length.max())[None, :]
            sources.append((starts[sequences][:, None] + np.minimum(column, length - 1)).reshape(-1))
            real = column < length
            reals.append(real.reshape(-1))
            self.shapes.append(real.shape)
            self.real.append(None if real.all() else torch.from_numpy(real).to(device))
        source, real = np.concatenate(sources), np.concatenate(reals)
        # Sequences of one length, or of few, longest first: every row is where it should be, nothing needs to move.
        self.in_place = np.array_equal(source, np.arange(self.num_rows))
        self.source = torch.from_numpy(source).to(device)
        self.real_places = torch.from_numpy(np.flatnonzero(real)).to(device)
        self.real_rows = torch.from_numpy(source[real]).to(device)

    def pad(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """[R, H, C] -> [G, H, L, C] for every group."""
        padded = rows if self.in_place else _Gather.apply(rows, self.source, self.real_places, self.real_rows)
        parts = padded.split([num * length for num, length in self.shapes])
        return [
            part.view(*shape, *rows.shape[1:]).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def pad_columns(self, values: torch.Tensor) -> list[torch.Tensor]:
        """[R] -> [G, L] for every group, 0 at padding; no gradient."""
        flat = torch.zeros(len(self.source), dtype=values.dtype, device=values.device)
        flat[self.real_places] = values[self.real_rows]
        parts = flat.split([num * length for num, length in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def unpad(self, groups: list[torch.Tensor]) -> torch.Tensor:
        """[G, H, L, C] of every group -> [R, H, C]."""
        flat = torch.cat([group.transpose(1, 2).flatten(0, 1) for group in groups])
        if self.in_place:
            return flat
        place_of_row = torch.empty(self.num_rows, dtype=torch.int64, device=flat.device)
        place_of_row[self.real_rows] = self.real_places
        return _Gather.apply(flat, place_of_row, self.real_rows, self.real_places)


class _Gather(torch.autograd.Function):
    """rows[index]; only the outputs at `read` carry a gradient, to the rows `written`, each of them written once."""

    @staticmethod
    def forward(ctx, rows, index, read, written):
        ctx.save_for_backward(read, written)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):
        read, written = ctx.saved_tensors
        rows_gradient = gradient.new_zeros(ctx.num_rows, *gradient.shape[1:])
        rows_gradient.index_copy_(0, written, gradient.index_select(0, read))
        return rows_gradient, None, None, None
