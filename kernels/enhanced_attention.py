"""Attention of RetroMAE's enhanced decoding over packed sequences: every row sees its own random draw of the columns.

Letters: T tokens of all sequences end to end, S sequences, G sequences of one length group, L longest sequence of a
group, H heads, C channels of a head, P rows of the position table (at least the longest sequence).
"""

import numpy as np
import torch

from quincunx.kernels.hashing import visibility
from quincunx.kernels.packed_attention import (
    PaddedGroups,
    connected_empty,
    host_bounds,
    length_groups,
    masked_softmax_attention,
)


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
) -> torch.Tensor:
    """Attention [T, H, C] of the queries h W_q + p_i W_q to the context stream (RetroMAE, Eq. 4 to 7); no dropout.

    The query of row i of sequence s is `h_query[s] + position_query[i]`: exact, because the query stream has neither
    LayerNorm nor dropout, and T query rows never pass a matrix product. `cu_seqlens` is int32 [S + 1].

    Row i sees column j where j == 0 and i != 0, or where j != i and hash(key, i, word(j)) < threshold(j):
    `keys_S` (int32 bits of a uint32), `word_ids_T` and `keep_thresholds_T` in [0, 2**30] (int32). Instead of these
    three, `explicit_visibility` bool [S, L, L] may say it (to replay published cases); it is taken as it is. A row that
    sees nothing gives zeros.
    """
    bounds = host_bounds(cu_seqlens)
    positions = torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))).to(k_THC.device)
    sequences = torch.from_numpy(np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))).to(k_THC.device)
    q_THC = h_query_SHC.index_select(0, sequences) + position_query_PHC.index_select(0, positions)
    return visible_attention(
        q_THC, k_THC, v_THC, cu_seqlens, keys_S, word_ids_T, keep_thresholds_T, explicit_visibility_SLL
    )


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
    outputs = []
    groups_qkv = zip(groups, padded.pad(q_THC), padded.pad(k_THC), padded.pad(v_THC), strict=True)
    for g, (members, q_GHLC, k_GHLC, v_GHLC) in enumerate(groups_qkv):
        members_G = torch.from_numpy(members).to(k_THC.device)
        length = k_GHLC.shape[2]
        if explicit_visibility_SLL is None:
            rows_GL = torch.arange(length, dtype=torch.int32, device=k_THC.device).expand(len(members), -1)
            visible_GLL = visibility(keys_S[members_G], rows_GL, words[g], thresholds[g])
        else:
            visible_GLL = explicit_visibility_SLL[members_G, :length, :length]
        if padded.real[g] is not None:
            visible_GLL = visible_GLL & padded.real[g][:, None, :]
        blind_GL1 = ~visible_GLL.any(-1, keepdim=True)
        mask_G1LL = (visible_GLL | blind_GL1)[:, None]
        output_GHLC = masked_softmax_attention(q_GHLC, k_GHLC, v_GHLC, mask_G1LL)
        outputs.append(output_GHLC.masked_fill(blind_GL1[:, None], 0))
    return padded.unpad(outputs)
