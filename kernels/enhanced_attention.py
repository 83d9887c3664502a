"""Attention of RetroMAE's enhanced decoding over packed sequences: every row sees its own random draw of the columns.

Letters: T tokens of all sequences end to end, S sequences, L longest sequence, H heads, C channels of a head, P rows of
all position tables (each at least as long as its longest sequence), R rows (queries) of a padded sequence.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from quincunx.kernels.launching import Implementation, choose
from quincunx.kernels.packed_attention import attend_each

TRITON_HEAD_SIZES = (32, 64, 128)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_MASK = 2**22
"""Elements of a mask that torch's twin makes at once."""


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
    three, `explicit_visibility` bool [S, L, L] may say it, to replay published cases; it is taken as it is, by torch. A
    row that sees nothing gives zeros. Attention weights have no dropout; the random visibility plays that role.

    `impl` auto takes Triton's kernels on CUDA devices from Ampere on, for head sizes 32, 64 and 128 in bf16, fp16 and
    fp32. Results are repeatable bit for bit, and a sequence's output and dh, dK, dV do not depend on the others.

    The kernels assert shapes, dtypes and layouts; values are trusted, because reading them would wait for the device.
    """
    num_sequences = len(h_query_SHC)
    if position_starts_S is None:
        position_starts_S = cu_seqlens.new_zeros(num_sequences)
    if max_length is None:
        max_length = int(cu_seqlens.diff().max()) if num_sequences else 0
    floats = (h_query_SHC, position_query_PHC, k_THC, v_THC)
    rule = (keys_S, word_ids_T, keep_thresholds_T)
    assert max_length <= len(position_query_PHC), f"{max_length} positions, {len(position_query_PHC)} in the table"
    fits = k_THC.shape[-1] in TRITON_HEAD_SIZES and k_THC.dtype in TRITON_DTYPES
    assert fits or impl != "triton", f"the kernels take no heads of {k_THC.shape[-1]} channels in {k_THC.dtype}"
    explicit = explicit_visibility_SLL is not None
    if explicit or not fits or not len(k_THC) or choose(impl, k_THC.device) == "torch":
        # The twin of the Triton kernels forms all T queries.
        sequences_S = torch.arange(num_sequences, device=k_THC.device)
        sequences_T = torch.repeat_interleave(sequences_S, cu_seqlens.diff())
        positions_T = torch.arange(len(k_THC), device=k_THC.device) + (position_starts_S - cu_seqlens[:-1])[sequences_T]
        q_THC = h_query_SHC.index_select(0, sequences_T) + position_query_PHC.index_select(0, positions_T)
        return visible_attention(q_THC, k_THC, v_THC, cu_seqlens, *rule, explicit_visibility_SLL)
    from quincunx.kernels.enhanced_attention_triton import Attention

    with torch.cuda.device_of(k_THC):  # Triton launches on the current device.
        return Attention.apply(*floats, cu_seqlens, position_starts_S, *rule, max_length)


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
    lengths = cu_seqlens.diff().tolist()
    at_once = max(1, LARGEST_MASK // max([1, *lengths]) ** 2)
    masks, blind = [], []
    for start in range(0, len(lengths), at_once):
        part = slice(start, start + at_once)
        if explicit_visibility_SLL is None:
            words_SL, thresholds_SL = (
                pad_sequence(x_T.split(lengths)[part], batch_first=True) for x_T in (word_ids_T, keep_thresholds_T)
            )
            rows_SL = torch.arange(words_SL.shape[1], dtype=torch.int32, device=words_SL.device).expand_as(words_SL)
            visible_SLL = visibility(keys_S[part], rows_SL, words_SL, thresholds_SL)
        else:
            visible_SLL = explicit_visibility_SLL[part]
        for visible_LL, length in zip(visible_SLL, lengths[part], strict=True):
            own_LL = visible_LL[:length, :length]
            blind.append(~own_LL.any(-1))
            masks.append(own_LL | blind[-1][:, None])
    attended_THC = attend_each(q_THC, k_THC, v_THC, lengths, masks)
    return attended_THC.masked_fill(torch.cat(blind)[:, None, None], 0) if blind else attended_THC


# The random draws of data_shards/hashing.py on torch tensors, equal bit for bit. int32 stands for uint32:
# multiplication wraps alike, and a right shift is made logical by masking.


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _as_int32(constant: int) -> int:
    return constant - (1 << 32) if constant >= 1 << 31 else constant


def mix(x: torch.Tensor) -> torch.Tensor:
    """Scrambles the 32 bits of every element."""
    x = x ^ _shift_right(x, 16)
    x = x * _as_int32(0x7FEB352D)
    x = x ^ _shift_right(x, 15)
    x = x * _as_int32(0x846CA68B)
    return x ^ _shift_right(x, 16)


def fold(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Folds `value` into `key`, elementwise with broadcasting; int32."""
    return mix(key ^ (value * _as_int32(0x9E3779B1)))


def draw30(key: torch.Tensor, row: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """Uniform draws in [0, 2**30), elementwise with broadcasting; int32."""
    return _shift_right(fold(fold(key, row), word), 2)


def visibility(
    keys_S: torch.Tensor, rows_SR: torch.Tensor, word_ids_SL: torch.Tensor, keep_thresholds_SL: torch.Tensor
) -> torch.Tensor:
    """Which columns each row of enhanced decoding sees, bool [S, R, L] (RetroMAE section 3.3, Eq. 7).

    visible(i, j) = (j == 0 and i != 0) or (j != i and draw30(key, i, word(j)) < threshold(j)): the sentence vector in
    column 0 always, a row's own token never, the others by a draw per row and whole word. All inputs int32: `keys_S`
    one key a sequence, `rows_SR` positions of the rows ([CLS] = 0), `word_ids_SL` and `keep_thresholds_SL` by column,
    padded columns with threshold 0 (never seen).
    """
    assert all(x.dtype == torch.int32 for x in (keys_S, rows_SR, word_ids_SL, keep_thresholds_SL)), (
        "hashes wrap at 32 bits"
    )
    columns_L = torch.arange(word_ids_SL.shape[1], dtype=torch.int32, device=word_ids_SL.device)
    rows_SR1 = rows_SR[:, :, None]
    draws_SRL = draw30(keys_S[:, None, None], rows_SR1, word_ids_SL[:, None, :])
    drawn_SRL = (draws_SRL < keep_thresholds_SL[:, None, :]) & (rows_SR1 != columns_L)
    return drawn_SRL | ((columns_L == 0) & (rows_SR1 != 0))
