"""Packed attention, sequence by sequence, against SDPA on each sequence alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quincunx.kernels.packed_attention import packed_attention

LENGTHS = [3, 17, 1, 40, 2, 16, 39]


def make_inputs(lengths=LENGTHS, heads=2, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), heads, channels)
    rows = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    return rows, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def alone(q, k, v, mask=None):
    """Attention of one sequence [L, H, C]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def by_sequence(rows, cu_seqlens, window=None):
    outputs = []
    for i in range(len(cu_seqlens) - 1):
        own = slice(*cu_seqlens[i : i + 2])
        position = torch.arange(own.stop - own.start)
        mask = None if window is None else (position[:, None] - position).abs() <= window
        outputs.append(alone(*(x[own] for x in rows), mask))
    return torch.cat(outputs)


def assert_same(ours, theirs, rows):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    probe = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(9))
    for mine, other in zip(
        torch.autograd.grad(ours, rows, probe), torch.autograd.grad(theirs, rows, probe), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("window", [None, 0, 1, 5, 100])
def test_output_and_gradients_are_those_of_each_sequence_alone(window):
    rows, cu_seqlens = make_inputs()
    ours = packed_attention(*rows, cu_seqlens, max(LENGTHS), window=window)
    assert_same(ours, by_sequence(rows, cu_seqlens, window=window), rows)
