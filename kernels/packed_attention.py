"""Bidirectional attention over packed sequences: no padding outside this file.

Letters: T tokens of all sequences end to end, R query rows (R = T unless only some rows ask), S sequences, L tokens of
one sequence, H heads, C channels of a head.
"""

import torch
import torch.nn.functional as F

from quincunx.kernels.launching import is_recent


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

    On CUDA from Ampere on, in bf16 or fp16, this is torch's variable-length attention; elsewhere SDPA, one sequence
    after the other.
    """
    if query_cu_seqlens is None:
        query_cu_seqlens, max_queries = cu_seqlens, max_length
    else:
        assert window is None, "a window needs queries at every token"
    half = q_RHC.dtype in (torch.float16, torch.bfloat16)
    if len(q_RHC) and q_RHC.is_cuda and half and is_recent(q_RHC.device.index):
        from torch.nn.attention.varlen import varlen_attn

        # Named only where they say something: torch 2.10 has neither.
        extra = {} if window is None else {"window_size": (window, window)}
        if scale is not None and scale != q_RHC.shape[-1] ** -0.5:
            extra["scale"] = scale
        rows = (x.contiguous() for x in (q_RHC, k_THC, v_THC))
        return varlen_attn(*rows, query_cu_seqlens, cu_seqlens, max_queries, max_length, **extra)
    lengths = cu_seqlens.diff().tolist()
    num_queries = lengths if query_cu_seqlens is cu_seqlens else query_cu_seqlens.diff().tolist()
    masks = [window_mask(length, window, q_RHC.device) for length in lengths]
    return attend_each(q_RHC, k_THC, v_THC, num_queries, lengths, masks, scale)


@torch.compiler.disable
def attend_each(
    q_RHC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THC: torch.Tensor,
    num_queries: list[int],
    lengths: list[int],
    masks: list[torch.Tensor | None],
    scale: float | None = None,
) -> torch.Tensor:
    """Attention [R, H, C] of one sequence after the other, by their numbers of query rows and of tokens.

    A mask is bool and broadcasts to [queries, keys] (None: everything is visible); every row must see something.
    """
    outputs = []
    split = zip(q_RHC.split(num_queries), k_THC.split(lengths), v_THC.split(lengths), masks, strict=True)
    for q, k, v, mask in split:
        if len(q):
            q_HRC, k_HLC, v_HLC = (x.transpose(0, 1)[None] for x in (q, k, v))
            attended = F.scaled_dot_product_attention(q_HRC, k_HLC, v_HLC, attn_mask=mask, scale=scale)
            outputs.append(attended[0].transpose(0, 1))
    # Of no query rows the output is empty, yet in the graph, so that every rank has gradients for every weight.
    return torch.cat(outputs) if outputs else q_RHC + 0 * (k_THC.sum() + v_THC.sum())


def window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Bool [length, length], True at most `window` positions away from the diagonal; None if that is everywhere."""
    if window is None or window >= length - 1:
        return None
    positions = torch.arange(length, device=device)
    return (positions[:, None] - positions).abs() <= window
