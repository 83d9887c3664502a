"""The random draws of `data_shards/hashing.py` on torch tensors, equal bit for bit.

int32 tensors stand for uint32: multiplication wraps alike, and a right shift is made logical by masking.
Shape letters: S sequences, R rows (queries), L positions of a padded sequence.
"""

import torch


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _as_int32(constant: int) -> int:
    return constant - (1 << 32) if constant >= 1 << 31 else constant


def mix(x: torch.Tensor) -> torch.Tensor:
    """Scrambles 32 bits of every element; int32 in, int32 out."""
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
    columns_L = torch.arange(word_ids_SL.shape[1], dtype=torch.int32, device=word_ids_SL.device)
    rows_SR1 = rows_SR[:, :, None]
    draws_SRL = draw30(keys_S[:, None, None], rows_SR1, word_ids_SL[:, None, :])
    drawn_SRL = (draws_SRL < keep_thresholds_SL[:, None, :]) & (rows_SR1 != columns_L)
    return drawn_SRL | ((columns_L == 0) & (rows_SR1 != 0))
