"""Texts of a corpus as packed rows: tokenised once, sorted by length, cut into batches without padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from quincunx.data_shards.batches import PackedText

BATCH_TOKENS = 8192


def tokenise(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[np.ndarray]:
    """int32 [n] per text: [CLS], the text's tokens cut to max_tokens - 2, [SEP].

    tokenizer: a fast one of Hugging Face; whatever truncation and padding it was used with before is switched off.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:  # setting them changes what other threads share
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([cls, *encoding.ids[: max_tokens - 2], sep], np.int32) for encoding in encodings]


def batches_by_length(texts: Sequence[np.ndarray], batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
    """Indices (int64) of the texts, longest first, in batches of at most `batch_tokens` tokens, one text at least."""
    order = sorted(range(len(texts)), key=lambda index: (-len(texts[index]), index))
    batches: list[list[int]] = []
    tokens = 0
    for index in order:
        if not batches or tokens + len(texts[index]) > batch_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += len(texts[index])
    return [np.array(batch) for batch in batches]


def pack(texts: Sequence[np.ndarray]) -> PackedText:
    """The texts laid end to end; one at least."""
    cu_seqlens = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    return PackedText(input_ids=np.concatenate(texts), cu_seqlens=cu_seqlens)
