"""Enhanced-decoding attention against a dense oracle written from the rule, one row at a time."""

import numpy as np
import torch

from quincunx.data_shards.hashing import ALWAYS, draw30
from quincunx.kernels.enhanced_attention import enhanced_attention

LENGTHS = [2, 9, 3, 24, 23, 1, 5]
HEADS, CHANNELS = 2, 8


def make_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)

    def rows(count):
        return torch.randn(count, HEADS, CHANNELS, generator=generator, dtype=torch.float64).requires_grad_()

    total = sum(LENGTHS)
    tensors = [rows(len(LENGTHS)), rows(max(LENGTHS) + 3), rows(total), rows(total)]
    cu_seqlens = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    keys = rng.integers(-(2**31), 2**31, len(LENGTHS)).astype(np.int32)
    words = np.concatenate([np.minimum(np.arange(length) * 2 // 3, length) for length in LENGTHS]).astype(np.int32)
    thresholds = rng.choice([0, ALWAYS // 2, ALWAYS // 5, ALWAYS], total).astype(np.int32)
    return tensors, cu_seqlens, keys, words, thresholds


def visible_by_the_rule(keys, words, thresholds, cu_seqlens):
    """One bool [L, L] per sequence, from the numpy hash."""
    masks = []
    for s, key in enumerate(keys):
        start, length = int(cu_seqlens[s]), int(cu_seqlens[s + 1] - cu_seqlens[s])
        mask = np.zeros((length, length), bool)
        for i in range(length):
            for j in range(length):
                draw = draw30(np.uint32(int(key) & 0xFFFFFFFF), i, int(words[start + j]))
                mask[i, j] = (j == 0 and i != 0) or (j != i and draw < thresholds[start + j])
        masks.append(torch.from_numpy(mask))
    return masks


def oracle(h_query, position_query, k, v, cu_seqlens, masks):
    outputs = []
    for s, mask in enumerate(masks):
        own = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        q = h_query[s] + position_query[: len(mask)]
        scores = torch.einsum("ihc,jhc->hij", q, k[own]) / CHANNELS**0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        attention = torch.where(mask.any(-1)[:, None], scores.softmax(-1), torch.zeros((), dtype=scores.dtype))
        outputs.append(torch.einsum("hij,jhc->ihc", torch.nan_to_num(attention), v[own]))
    return torch.cat(outputs)


def assert_same(ours, theirs, tensors, rows):
    """`rows` see something; softmax over nothing has no gradient in the oracle either."""
    ours, theirs = ours[rows], theirs[rows]
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    probe = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(9))
    for mine, other in zip(
        torch.autograd.grad(ours, tensors, probe, retain_graph=True),
        torch.autograd.grad(theirs, tensors, probe),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_output_and_gradients_equal_the_dense_oracle():
    tensors, cu_seqlens, keys, words, thresholds = make_inputs()
    masks = visible_by_the_rule(keys, words, thresholds, cu_seqlens)
    sees = torch.cat([mask.any(-1) for mask in masks])
    assert 0 < int((~sees).sum()) < len(sees), "the case must hold blind rows too"
    ours = enhanced_attention(*tensors, cu_seqlens, *(torch.from_numpy(x) for x in (keys, words, thresholds)))
    assert_same(ours, oracle(*tensors, cu_seqlens, masks), tensors, sees)
    assert (ours[~sees] == 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(ours.sum(), tensors))


def test_an_explicit_mask_is_taken_as_it_is():
    tensors, cu_seqlens, *_ = make_inputs()
    longest = max(LENGTHS)
    explicit = torch.rand(len(LENGTHS), longest, longest, generator=torch.Generator().manual_seed(1)) < 0.5
    masks = [explicit[s, :length, :length] for s, length in enumerate(LENGTHS)]
    sees = torch.cat([mask.any(-1) for mask in masks])
    ours = enhanced_attention(*tensors, cu_seqlens, None, None, None, explicit)
    assert_same(ours, oracle(*tensors, cu_seqlens, masks), tensors, sees)
