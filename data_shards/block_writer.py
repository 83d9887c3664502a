"""Encodes samples as one block (block.py), for whoever builds shards."""

import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from quincunx.data_shards.block import FIELDS, HEADER, MAGIC, VERSION, Text, token_dtype
from quincunx.data_shards.errors import DataError


@dataclass(frozen=True)
class Sample:
    """A passage and its companions; `has_next`: the next sample is the next passage of the same document."""

    passage_id: str
    passage: Text
    queries: Text | None = None
    continuation: Text | None = None
    has_next: bool = False


def encode_block(samples: list[Sample], vocab_size: int) -> bytes:
    """The bytes of one block; the same samples give the same bytes.

    Raises:
        DataError: a passage without tokens, or an id outside [0, vocab_size).
    """
    assert samples, "a block holds at least one sample"
    for sample in samples:
        if len(sample.passage.token_ids) == 0:
            raise DataError(f"passage {sample.passage_id!r} has no tokens: remove it from the corpus")
    missing = Text(np.empty(0, np.int64), np.empty(0, bool))
    texts = [getattr(sample, name) or missing for name in FIELDS for sample in samples]
    lengths = np.array([len(text.token_ids) for text in texts], "<i4")
    token_ids = np.concatenate([text.token_ids for text in texts])
    word_starts = np.concatenate([text.word_starts for text in texts])
    assert len(token_ids) == len(word_starts)
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        worst = int(token_ids.max() if token_ids.max() >= vocab_size else token_ids.min())
        raise DataError(
            f"token id {worst} near passage {samples[0].passage_id!r} is outside the vocabulary of {vocab_size}: "
            "give the tokenizer that made the ids"
        )
    has_next = np.array([sample.has_next for sample in samples], bool)
    has_next[-1] = False  # a neighbour is looked up in the same block
    dtype = token_dtype(vocab_size)
    header = HEADER.pack(MAGIC, VERSION, dtype.itemsize, len(samples), len(FIELDS), 0, len(token_ids))
    body = b"".join(
        [
            header,
            lengths.tobytes(),
            token_ids.astype(dtype).tobytes(),
            np.packbits(word_starts, bitorder="little").tobytes(),
            np.packbits(has_next, bitorder="little").tobytes(),
        ]
    )
    body += bytes(-len(body) % 8)
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
