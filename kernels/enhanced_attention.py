"""Attention of RetroMAE's enhanced decoding over packed sequences: every row sees its own random draw of the columns.

Letters: T tokens of all sequences end to end, S sequences, G sequences of one length group, L longest sequence of a
group, H heads, C channels of a head, P rows of all position tables (each at least as long as its longest sequence).
"""

from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F

from quincunx.kernels.hashing import visibility
from quincunx.kernels.launching import Implementation, choose
from quincunx.kernels.packed_attention import (
    PaddedGroups,
    attend_by_group,
    connected_empty,
    host_bounds,
    length_groups,
)

TRITON_HEAD_SIZES = (32, 64, 128)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.compiler.disable
def enhanced_attention(
    h_query_SHC: torch.Tensor,
    position_query_PHC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THC: torch.Tensor,
    cu_seqlens: torch.Tensor,
    keys_S: torch.Tensor | None,
    word_ids_T: torch.Tensor | None,
    keep_thresholds_T: torch.Tensor | None,
    explicit_visibility_SLL: torch.Tensor | None = None,
    *,
    max_length: int | None = None,
    position_starts_S: torch.Tensor | None = None,
    impl: Implementation = "auto",
) -> torch.Tensor:
    """Attention [T, H, C] of the queries h W_q + p_i W_q to the context stream (RetroMAE, Eq. 4 to 7); no dropout.

    The query of row i of sequence s is `h_query[s] + position_query[position_starts[s] + i]`, rounded to the dtype:
    exact, because the query stream has neither LayerNorm nor dropout, and T query rows never pass a matrix product.
    `position_starts` (int32 [S], zeros by default) lets sequences of several decoders, each with a position table of
    its own in `position_query`, share a call. `cu_seqlens` is int32 [S + 1], from 0 to T; `max_length` its longest
    sequence, read from it by default (which waits for the device). `k` and `v` may be parts of one projection.

    Row i sees column j where j == 0 and i != 0, or where j != i and hash(key, i, word(j)) < threshold(j):
    `keys_S` (int32 bits of a uint32), `word_ids_T` and `keep_thresholds_T` in [0, 2**30] (int32). Instead of these
    three, `explicit_visibility` bool [S, L, L] may say it (to replay published cases); it is taken as it is. A row that
    sees nothing gives zeros. There is no dropout of attention weights: the visibility is the noise here.

    `impl` auto takes Triton's kernels on CUDA devices from Ampere on, for head sizes 32, 64 and 128 in bf16, fp16 and
    fp32. Results are repeatable bit for bit, and a sequence's output and dh, dK, dV do not depend on the others.

    Raises ValueError for inputs that do not fit each other. The values of tensors on a GPU are trusted, because reading
    them would wait for it.
    """
    num_sequences = len(h_query_SHC)
    if position_starts_S is None:
        position_starts_S = cu_seqlens.new_zeros(num_sequences)
    floats = {"h_query": h_query_SHC, "position_query": position_query_PHC, "k": k_THC, "v": v_THC}
    integers = {"cu_seqlens": cu_seqlens, "position_starts": position_starts_S}
    if explicit_visibility_SLL is None:
        integers |= {"keys": keys_S, "word_ids": word_ids_T, "keep_thresholds": keep_thresholds_T}
    _check_tensors(floats, integers, explicit_visibility_SLL)
    if max_length is None:
        max_length = int(cu_seqlens.diff().max()) if num_sequences else 0
    _check_lengths(cu_seqlens, position_starts_S, max_length, len(k_THC), len(position_query_PHC))
    if explicit_visibility_SLL is not None and explicit_visibility_SLL.shape[1] < max_length:
        _fail(
            f"explicit_visibility is {explicit_visibility_SLL.shape[1]} wide, the longest sequence {max_length}; pad it"
        )

    if _choose(impl, k_THC) == "torch" or not len(k_THC):
        return _attend_in_torch(
            *floats.values(),
            cu_seqlens,
            position_starts_S,
            keys_S,
            word_ids_T,
            keep_thresholds_T,
            explicit_visibility_SLL,
        )
    from quincunx.kernels.enhanced_attention_triton import attend

    if explicit_visibility_SLL is None:
        rule = keys_S, word_ids_T, keep_thresholds_T, None
    else:
        rule = None, None, None, pack_visibility(explicit_visibility_SLL)
    return attend(*floats.values(), cu_seqlens, position_starts_S, *rule, max_length)


def pack_visibility(visible_SLL: torch.Tensor) -> torch.Tensor:
    """Bool [S, L, L] as int32 [S, L, ceil(L / 32)]: column j is bit j % 32 of word j // 32, unused bits are 0."""
    length = visible_SLL.shape[-1]
    bits_SLL = F.pad(visible_SLL.to(torch.int32), (0, -length % 32))
    shifts_32 = torch.arange(32, dtype=torch.int32, device=visible_SLL.device)
    return (bits_SLL.unflatten(-1, (-1, 32)) << shifts_32).sum(-1, dtype=torch.int32)


def _fail(what: str) -> NoReturn:
    raise ValueError(f"enhanced_attention: {what}")


def _check_tensors(
    floats: dict[str, torch.Tensor], integers: dict[str, torch.Tensor | None], explicit_SLL: torch.Tensor | None
) -> None:
    """Dtypes, devices, shapes and layout."""
    absent = [name for name, x in integers.items() if x is None]
    if absent:
        _fail(f"{', '.join(absent)} not given; give keys, word_ids and keep_thresholds, or explicit_visibility")
    for name, x in floats.items():
        if x.dtype != floats["k"].dtype or x.dtype not in (*TRITON_DTYPES, torch.float64):
            given = ", ".join(f"{other} {y.dtype}" for other, y in floats.items())
            _fail(f"dtypes are {given}; they must be one of bf16, fp16, fp32 and fp64, cast them")
        if x.ndim != 3 or x.stride(-1) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2]):
            _fail(
                f"{name} has shape {list(x.shape)} and strides {x.stride()}; heads must lie side by side in [rows, "
                "heads, channels], call contiguous()"
            )
    for name, x in integers.items():
        if x.dtype != torch.int32 or not x.is_contiguous():
            _fail(f"{name} is {x.dtype} with strides {x.stride()}; it must be contiguous int32, convert it")
    if explicit_SLL is not None and explicit_SLL.dtype != torch.bool:
        _fail(f"explicit_visibility is {explicit_SLL.dtype}; it must be bool, compare it to 0")
    tensors = floats | integers | ({} if explicit_SLL is None else {"explicit_visibility": explicit_SLL})
    if len({x.device for x in tensors.values()}) > 1:
        given = ", ".join(f"{name} {x.device}" for name, x in tensors.items())
        _fail(f"tensors are on {given}; move them to one device")

    (num_sequences, *head_shape), num_tokens = floats["h_query"].shape, len(floats["k"])
    allowed = {
        "position_query": (len(floats["position_query"]), *head_shape),
        "k": (num_tokens, *head_shape),
        "v": (num_tokens, *head_shape),
        "cu_seqlens": (num_sequences + 1,),
        "position_starts": (num_sequences,),
        "keys": (num_sequences,),
        "word_ids": (num_tokens,),
        "keep_thresholds": (num_tokens,),
    }
    if explicit_SLL is not None:
        allowed["explicit_visibility"] = (num_sequences, *explicit_SLL.shape[-1:] * 2)
    for name, x in tensors.items():
        if name in allowed and x.shape != allowed[name]:
            _fail(
                f"{name} has shape {list(x.shape)}; for h_query {list(floats['h_query'].shape)} and k "
                f"{list(floats['k'].shape)} it must have {list(allowed[name])}"
            )


def _check_lengths(
    cu_seqlens: torch.Tensor, position_starts_S: torch.Tensor, max_length: int, num_tokens: int, num_positions: int
) -> None:
    """Values, as far as the host can see them."""
    if max_length > num_positions:
        _fail(f"position_query has {num_positions} rows, the longest sequence {max_length}; give a longer table")
    if cu_seqlens.device.type != "cpu" or len(cu_seqlens) == 1:
        return
    lengths_S = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens or lengths_S.min() < 0:
        _fail(f"cu_seqlens is {cu_seqlens.tolist()}; it must rise from 0 to the {num_tokens} tokens, sum the lengths")
    if lengths_S.max() > max_length:
        _fail(f"max_length is {max_length}, the longest sequence has {int(lengths_S.max())}; give that or None")
    ends_S = position_starts_S + lengths_S
    if position_starts_S.min() < 0 or ends_S.max() > num_positions:
        _fail(
            f"position_starts are {position_starts_S.tolist()}; every sequence's rows must lie within the "
            f"{num_positions} rows of position_query"
        )


def _choose(impl: Implementation, k_THC: torch.Tensor) -> str:
    """`launching.choose`, and torch for tensors that the Triton kernels do not take."""
    chosen, head_size = choose(impl, k_THC.device), k_THC.shape[-1]
    if chosen == "triton" and (head_size not in TRITON_HEAD_SIZES or k_THC.dtype not in TRITON_DTYPES):
        if impl == "triton":
            _fail(
                f"triton cannot run heads of {head_size} channels in {k_THC.dtype}; it takes 32, 64 and 128 in bf16, "
                "fp16 and fp32, set kernels to auto or torch"
            )
        return "torch"
    return chosen


def _attend_in_torch(
    h_query_SHC: torch.Tensor,
    position_query_PHC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THC: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_starts_S: torch.Tensor,
    *visibility: torch.Tensor | None,
) -> torch.Tensor:
    """The twin of the Triton kernels: forms T queries and groups the sequences by length on the host."""
    bounds = host_bounds(cu_seqlens)
    lengths = np.diff(bounds)
    sequences_T = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(k_THC.device)
    rows_T = torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)).to(k_THC.device)
    positions_T = rows_T + position_starts_S.index_select(0, sequences_T)
    q_THC = h_query_SHC.index_select(0, sequences_T) + position_query_PHC.index_select(0, positions_T)
    return visible_attention(q_THC, k_THC, v_THC, cu_seqlens, *visibility)


@torch.compiler.disable
def visible_attention(
    q_THC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THC: torch.Tensor,
    cu_seqlens: torch.Tensor,
    keys_S: torch.Tensor | None,
    word_ids_T: torch.Tensor | None,
    keep_thresholds_T: torch.Tensor | None,
    explicit_visibility_SLL: torch.Tensor | None = None,
) -> torch.Tensor:
    """`enhanced_attention` with its queries given in full, [T, H, C]: for a query stream that is not h + position."""
    bounds = host_bounds(cu_seqlens)
    lengths = np.diff(bounds)
    groups = length_groups(lengths, lengths)
    if not groups:
        return connected_empty(q_THC, k_THC, v_THC)
    padded = PaddedGroups(bounds, groups, k_THC.device)
    if explicit_visibility_SLL is None:
        words, thresholds = padded.pad_columns(word_ids_T), padded.pad_columns(keep_thresholds_T)
    masks, blind = [], []
    for g, members in enumerate(groups):
        members_G = torch.from_numpy(members).to(k_THC.device)
        length = padded.shapes[g][1]
        if explicit_visibility_SLL is None:
            rows_GL = torch.arange(length, dtype=torch.int32, device=k_THC.device).expand(len(members), -1)
            visible_GLL = visibility(keys_S[members_G], rows_GL, words[g], thresholds[g])
        else:
            visible_GLL = explicit_visibility_SLL[members_G, :length, :length]
        if padded.real[g] is not None:
            visible_GLL = visible_GLL & padded.real[g][:, None, :]
        blind_GL1 = ~visible_GLL.any(-1, keepdim=True)
        masks.append((visible_GLL | blind_GL1)[:, None])
        blind.append(blind_GL1[:, None])
    return attend_by_group(q_THC, k_THC, v_THC, padded, padded, masks, blind)
