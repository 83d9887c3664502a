"""Enhanced-decoding attention against a dense oracle written from the rule, one row at a time."""

import numpy as np
import pytest
import torch

from quincunx.data_shards.hashing import ALWAYS, draw30
from quincunx.kernels.enhanced_attention import enhanced_attention, pack_visibility

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


def test_a_sequence_does_not_depend_on_its_neighbours():
    tensors, cu_seqlens, keys, words, thresholds = make_inputs()
    rule = [torch.from_numpy(x) for x in (keys, words, thresholds)]
    before = enhanced_attention(*tensors, cu_seqlens, *rule)
    own = slice(int(cu_seqlens[3]), int(cu_seqlens[4]))
    changed = [x.detach().clone() for x in tensors]
    changed[0][:3] += 1
    for x in changed[2:]:
        x[: own.start] -= 2
        x[own.stop :] *= 5
    after = enhanced_attention(*changed, cu_seqlens, *rule)
    assert torch.equal(before[own], after[own])
    assert not torch.equal(before[own.stop :], after[own.stop :])


def test_no_sequences_stay_in_the_graph():
    tensors = [torch.zeros(n, HEADS, CHANNELS, requires_grad=True) for n in (0, 4, 0, 0)]
    none = torch.zeros(0, dtype=torch.int32)
    output = enhanced_attention(*tensors, torch.zeros(1, dtype=torch.int32), none, none, none)
    gradients = torch.autograd.grad(output.sum(), tensors)
    assert output.shape == (0, HEADS, CHANNELS) and all((gradient == 0).all() for gradient in gradients)


def test_decoders_with_tables_of_their_own_may_share_a_call():
    """The second decoder's table stands first: position_starts says whose is whose."""
    first, cu_seqlens, *rule = make_inputs(seed=1)
    second, _, *other_rule = make_inputs(seed=2)
    rule, other_rule = ([torch.from_numpy(x) for x in one] for one in (rule, other_rule))
    apart = [enhanced_attention(*first, cu_seqlens, *rule), enhanced_attention(*second, cu_seqlens, *other_rule)]
    together = enhanced_attention(
        torch.cat([first[0], second[0]]),
        torch.cat([second[1], first[1]]),
        *(torch.cat([one, other]) for one, other in zip(first[2:], second[2:], strict=True)),
        torch.cat([cu_seqlens, cu_seqlens[-1] + cu_seqlens[1:]]),
        *(torch.cat([one, other]) for one, other in zip(rule, other_rule, strict=True)),
        position_starts_S=torch.tensor([len(second[1])] * len(LENGTHS) + [0] * len(LENGTHS), dtype=torch.int32),
    )
    leaves = first + second
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-12, atol=1e-12)
    probe = torch.randn(together.shape, dtype=together.dtype, generator=torch.Generator().manual_seed(9))
    for mine, other in zip(
        torch.autograd.grad(together, leaves, probe), torch.autograd.grad(torch.cat(apart), leaves, probe), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_packing_puts_column_j_in_bit_j_of_its_word():
    visible = torch.rand(2, 37, 37, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[0, 0] = True
    packed = pack_visibility(visible)
    assert packed.shape == (2, 37, 2) and packed[0, 0].tolist() == [-1, 31]
    columns = torch.arange(37)
    assert torch.equal((packed[:, :, columns // 32] >> (columns % 32) & 1).bool(), visible)


WRONG = {
    "a dtype of its own": ({"v": torch.Tensor.half}, "dtypes are .* must be one of bf16, fp16, fp32 and fp64"),
    "integers": (dict.fromkeys(("h", "position", "k", "v"), torch.Tensor.long), "must be one of bf16, fp16, fp32"),
    "int64 keys": ({"keys": torch.Tensor.long}, "keys is torch.int64 .* must be contiguous int32"),
    "every second word": ({"words": lambda x: x.repeat_interleave(2)[::2]}, r"word_ids .* must be contiguous int32"),
    "no keys": ({"keys": lambda x: None}, "keys not given; give keys, word_ids and keep_thresholds, or explicit"),
    "another device": ({"k": lambda x: x.to("meta")}, "k meta, .* move them to one device"),
    "a short v": ({"v": lambda x: x[1:]}, r"v has shape \[66, 2, 8\]; .* must have \[67, 2, 8\]"),
    "other heads": ({"position": lambda x: x[:, :1]}, r"position_query has shape \[27, 1, 8\]"),
    "a missing key": ({"keys": lambda x: x[1:]}, r"keys has shape \[6\]; .* must have \[7\]"),
    "channels apart": ({"k": lambda x: x.mT.contiguous().mT}, "k has shape .* heads must lie side by side"),
    "heads apart": ({"k": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)}, "heads must lie side by side"),
    "not from 0": ({"cu_seqlens": lambda x: x + 1}, r"cu_seqlens is \[1, .* must rise from 0 to the 67 tokens"),
    "falling": ({"cu_seqlens": lambda x: x[[0, 2, 1, 3, 4, 5, 6, 7]]}, "cu_seqlens is .* must rise from 0"),
    "not to T": ({"cu_seqlens": lambda x: x.clamp(max=66)}, "must rise from 0 to the 67 tokens"),
    "a short table": ({"position": lambda x: x[:23]}, "position_query has 23 rows, the longest sequence 24"),
    "starts too late": (
        {"position_starts": lambda x: x + 4},
        "position_starts are .* must lie within the 27 rows of position_query",
    ),
    "max_length": ({"max_length": lambda x: 23}, "max_length is 23, the longest sequence has 24; give that or None"),
    "an integer mask": ({"explicit": lambda x: x.int()}, "explicit_visibility is torch.int32; it must be bool"),
    "a small mask": ({"explicit": lambda x: x[:, :23, :23]}, "explicit_visibility is 23 wide, the longest sequence 24"),
    "half a mask": ({"explicit": lambda x: x[:, :23]}, r"explicit_visibility has shape \[7, 23, 24\]"),
    "impl": ({"impl": lambda x: "cuda"}, "implementation 'cuda' is not known; give auto, triton or torch"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_inputs_that_do_not_fit_are_refused(changes, message):
    """Given, allowed and remedy, before anything runs."""
    tensors, cu_seqlens, *rule = make_inputs()
    given = dict(zip(("h", "position", "k", "v"), tensors, strict=True))
    given |= dict(zip(("keys", "words", "thresholds"), map(torch.from_numpy, rule), strict=True))
    given |= {"cu_seqlens": cu_seqlens, "position_starts": torch.zeros(len(LENGTHS), dtype=torch.int32)}
    given |= {"max_length": max(LENGTHS), "impl": "auto", "explicit": None}
    if "explicit" in changes:
        given["explicit"] = torch.ones(len(LENGTHS), max(LENGTHS), max(LENGTHS), dtype=torch.bool)
    given |= {name: change(given[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        enhanced_attention(
            *(given[name] for name in ("h", "position", "k", "v", "cu_seqlens", "keys", "words", "thresholds")),
            given["explicit"],
            max_length=given["max_length"],
            position_starts_S=given["position_starts"],
            impl=given["impl"],
        )
