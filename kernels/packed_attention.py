"""Bidirectional attention over packed sequences: no padding outside this file.

Letters: T tokens of all sequences end to end, S sequences, L tokens of one sequence, H heads, C channels of a head.
"""

import torch
import torch.nn.functional as F

from quincunx.kernels.launching import is_recent


def packed_attention(
    q_THC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THC: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of every token to all tokens of its own sequence: output [T, H, C], no dropout.

    `cu_seqlens` int32 [S + 1] bounds the sequences (longest: `max_length`). `window` w keeps keys at most w positions
    away (ModernBERT's local layers). `scale` is C ** -0.5 by default.

    On CUDA from Ampere on, in bf16 or fp16, this is torch's variable-length attention; elsewhere SDPA, one sequence
    after the other.
    """
    half = q_THC.dtype in (torch.float16, torch.bfloat16)
    if len(q_THC) and q_THC.is_cuda and half and is_recent(q_THC.device.index):
        from torch.nn.attention.varlen import varlen_attn

        # Named only where they say something: torch 2.10 has neither.
        extra = {} if window is None else {"window_size": (window, window)}
        if scale is not None and scale != q_THC.shape[-1] ** -0.5:
            extra["scale"] = scale
        rows = (x.contiguous() for x in (q_THC, k_THC, v_THC))
        return varlen_attn(*rows, cu_seqlens, cu_seqlens, max_length, max_length, **extra)
    lengths = cu_seqlens.diff().tolist()
    masks = [window_mask(length, window, q_THC.device) for length in lengths]
    return attend_each(q_THC, k_THC, v_THC, lengths, masks, scale)


@torch.compiler.disable
def attend_each(
    q_THC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THC: torch.Tensor,
    lengths: list[int],
    masks: list[torch.Tensor | None],
    scale: float | None = None,
) -> torch.Tensor:
    """Attention [T, H, C] of one sequence after the other, by their numbers of tokens.

    A mask is bool and broadcasts to [L, L] (None: everything is visible); every row must see something.
    """
    outputs = []
    split = zip(q_THC.split(lengths), k_THC.split(lengths), v_THC.split(lengths), masks, strict=True)
    for q, k, v, mask in split:
        if len(q):
            q_HLC, k_HLC, v_HLC = (x.transpose(0, 1)[None] for x in (q, k, v))
            attended = F.scaled_dot_product_attention(q_HLC, k_HLC, v_HLC, attn_mask=mask, scale=scale)
            outputs.append(attended[0].transpose(0, 1))
    # Of no tokens the output is empty, yet in the graph, so that every rank has gradients for every weight.
    return torch.cat(outputs) if outputs else q_THC + 0 * (k_THC.sum() + v_THC.sum())


def window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Bool [length, length], True at most `window` positions away from the diagonal; None if that is everywhere."""
    if window is None or window >= length - 1:
        return None
    positions = torch.arange(length, device=device)
    return (positions[:, None] - positions).abs() <= window
