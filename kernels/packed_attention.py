"""Bidirectional attention over packed sequences: no padding outside this file.

Letters: T tokens of all sequences end to end, R query rows (R = T unless only some rows ask), S sequences, G sequences
of one length group, L longest sequence of a group, H heads, C channels of a head.
"""

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from quincunx.kernels.launching import is_recent

# A group holds sequences at least this share of its longest, so at most 1 / 0.75^2 of its scores are padding; and no
# more score elements than this, so that a mask never grows with the batch (4 Mi bools, 16 MB as int32 hashes).
SHORTEST_SHARE_OF_A_GROUP = 0.75
LARGEST_GROUP = 2**22


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

    On CUDA from Ampere on, in bf16 or fp16, this is torch's variable-length attention; elsewhere SDPA over
    groups of sequences of similar length.
    """
    if query_cu_seqlens is None:
        query_cu_seqlens, max_queries = cu_seqlens, max_length
    elif window is not None:
        raise ValueError("packed_attention: a window needs queries at every token; give no query_cu_seqlens")
    if not len(q_RHC):
        return connected_empty(q_RHC, k_THC, v_THC)
    if q_RHC.is_cuda and q_RHC.dtype in (torch.float16, torch.bfloat16) and is_recent(q_RHC.device.index):
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
    lengths, num_queries = np.diff(key_bounds), np.diff(query_bounds)
    groups = length_groups(lengths, num_queries)
    keys = PaddedGroups(key_bounds, groups, q_RHC.device)
    queries = keys if query_bounds is key_bounds else PaddedGroups(query_bounds, groups, q_RHC.device)
    visible = []
    for (_, num_keys), real_GL in zip(keys.shapes, keys.real, strict=True):
        mask = None if real_GL is None else real_GL[:, None, None, :]
        if window is not None and window < num_keys - 1:
            position = torch.arange(num_keys, device=q_RHC.device)
            near = ((position[:, None] - position[None, :]).abs() <= window)[None, None]
            mask = near if mask is None else mask & near
            # A padded row far from every real column would see nothing; it may see itself, nobody reads it.
            mask = mask | (position[:, None] == position[None, :])
        visible.append(mask)
    return attend_by_group(q_RHC, k_THC, v_THC, queries, keys, visible, scale=scale)


def attend_by_group(
    q_RHC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THC: torch.Tensor,
    queries: "PaddedGroups",
    keys: "PaddedGroups",
    visible: list[torch.Tensor | None],
    blind: list[torch.Tensor | None] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention [R, H, C] of one group after the other; both `PaddedGroups` hold the same sequences.

    `visible` has a bool mask a group that broadcasts to [G, H, queries, keys] (None: everything); every row must see
    something. Rows in `blind`, broadcasting to [G, H, queries, 1], give zeros all the same.
    """
    blind = blind or [None] * len(visible)
    scale = q_RHC.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    padded = zip(queries.pad(q_RHC), keys.pad(k_THC), keys.pad(v_THC), visible, blind, strict=True)
    for q_GHRC, k_GHLC, v_GHLC, mask, blind_GHR1 in padded:
        output_GHRC = F.scaled_dot_product_attention(q_GHRC, k_GHLC, v_GHLC, attn_mask=mask, scale=scale)
        outputs.append(output_GHRC if blind_GHR1 is None else output_GHRC.masked_fill(blind_GHR1, 0))
    return queries.unpad(outputs)


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
    """The way from packed rows [R, H, C] to padded groups [G, H, L, C] and back.

    `real` holds, per group, the bool mask [G, L] of real rows, or None where all are.
    """

    def __init__(self, bounds: np.ndarray, groups: list[np.ndarray], device: torch.device):
        starts, lengths = bounds[:-1], np.diff(bounds)
        self.num_rows = int(bounds[-1])
        self.device = device
        self.shapes, self.real = [], []
        self._sources: list[np.ndarray] = []
        self._is_real: list[np.ndarray] = []
        for sequences in groups:
            length = lengths[sequences][:, None]
            column = np.arange(length.max())[None, :]
            self._sources.append((starts[sequences][:, None] + np.minimum(column, length - 1)).reshape(-1))
            is_real = column < length
            self._is_real.append(is_real.reshape(-1))
            self.shapes.append(is_real.shape)
            self.real.append(None if is_real.all() else torch.from_numpy(is_real).to(device))

    @cached_property
    def _indices(self) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
        """For all groups end to end: the row each place takes, the real places, their rows, the place of each row.

        The first is None where every row is where it should be: sequences of one length, or of few, longest first.
        """
        source, is_real = np.concatenate(self._sources), np.concatenate(self._is_real)
        real_places = np.flatnonzero(is_real)
        place_of_row = np.zeros(self.num_rows, np.int64)
        place_of_row[source[is_real]] = real_places
        tensors = [torch.from_numpy(x).to(self.device) for x in (source, real_places, source[is_real], place_of_row)]
        return (None if np.array_equal(source, np.arange(self.num_rows)) else tensors[0], *tensors[1:])

    def pad(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """[R, H, C] -> [G, H, L, C] for every group.

        A plain `x[index]` has a scatter-add as its gradient, serial on a CPU; here every packed row stands in one place
        of one group, so its gradient is a gather too. Padding repeats the last row of its sequence: finite, to be
        masked by the caller, without gradient.
        """
        source, real_places, real_rows, _ = self._indices
        padded = rows if source is None else _Gather.apply(rows, source, real_places, real_rows)
        parts = padded.split([num * length for num, length in self.shapes])
        return [
            part.view(*shape, *rows.shape[1:]).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def pad_columns(self, values: torch.Tensor) -> list[torch.Tensor]:
        """[R] -> [G, L] for every group, 0 at padding; no gradient."""
        _, real_places, real_rows, _ = self._indices
        flat = torch.zeros(sum(num * length for num, length in self.shapes), dtype=values.dtype, device=values.device)
        flat[real_places] = values[real_rows]
        parts = flat.split([num * length for num, length in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def unpad(self, groups: list[torch.Tensor]) -> torch.Tensor:
        """[G, H, L, C] of every group -> [R, H, C]."""
        flat = torch.cat([group.transpose(1, 2).flatten(0, 1) for group in groups])
        source, real_places, real_rows, place_of_row = self._indices
        return flat if source is None else _Gather.apply(flat, place_of_row, real_rows, real_places)


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
