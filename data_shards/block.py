"""One block of about 1,024 tokenised samples: the unit that shards store, check and read.

A sample is a passage and what belongs to it: generated queries and a generated continuation, either of which may be
missing. Token ids carry no [CLS] and no closing [SEP]. Everything is little-endian (docs/shards.md has an example):

    bytes   content
    8       magic b"QXBLOCK\\0"
    2       block version (1)
    2       bytes per token id: 2 if the vocabulary fits, else 4
    4       N, samples
    4       F, text fields (3: passage, queries, continuation)
    4       zero
    8       T, token ids of all texts
    4*F*N   lengths: tokens of each text, field by field; 0 = the sample has no such text
    2|4*T   token ids, field by field, within a field sample by sample
    T/8     one bit per token id, lowest bit first: this token starts a word
    N/8     one bit per sample: the next sample of this block is the next passage of the same document
    0..7    zeros up to a multiple of 8
    8       xxh3_64 of everything before
"""

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash

from quincunx.data_shards.errors import DataError

FIELDS = ("passage", "queries", "continuation")
MAGIC = b"QXBLOCK\0"
VERSION = 1
HEADER = struct.Struct("<8sHHIIIQ")
CHECKSUM_BYTES = 8


class Text(NamedTuple):
    """token_ids: integers [n]; word_starts: bool [n], True if a token is the first of a word."""

    token_ids: np.ndarray
    word_starts: np.ndarray


@dataclass(frozen=True, eq=False)
class Block:
    """A decoded block; the arrays are read-only views of the bytes it came from.

    token_ids    uint16|uint32 [T]
    lengths      int32 [F, N], row f = FIELDS[f]
    offsets      int64 [F, N + 1]: text f of sample i is token_ids[offsets[f, i] : offsets[f, i + 1]]
    word_starts  bool [T]
    has_next     bool [N]
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    word_starts: np.ndarray
    has_next: np.ndarray
    offsets: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        num_fields, num_samples = self.lengths.shape
        offsets = np.zeros((num_fields, num_samples + 1), np.int64)
        ends = np.cumsum(self.lengths, dtype=np.int64).reshape(num_fields, num_samples)
        offsets[:, 1:] = ends
        offsets[1:, 0] = ends[:-1, -1]
        object.__setattr__(self, "offsets", offsets)

    @property
    def num_samples(self) -> int:
        return self.lengths.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory the arrays hold, in bytes."""
        return sum(
            array.nbytes for array in (self.token_ids, self.lengths, self.offsets, self.word_starts, self.has_next)
        )

    def text(self, field_name: str, index: int) -> Text:
        """The text of sample `index`; a missing text has no tokens."""
        row = FIELDS.index(field_name)
        span = slice(self.offsets[row, index], self.offsets[row, index + 1])
        return Text(self.token_ids[span], self.word_starts[span])


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if every id of the vocabulary fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def decode_block(data: bytes, *, check: bool = True) -> Block:
    """Views into `data`, which must stay unchanged.

    check: compare the block's own checksum; leave it out if the caller has compared a digest of all of `data`.

    Raises:
        DataError: not a block, a newer block version, a wrong size, or a wrong checksum.
    """
    if len(data) < HEADER.size + CHECKSUM_BYTES:
        raise DataError(f"has only {len(data)} bytes, a block has at least {HEADER.size + CHECKSUM_BYTES}")
    magic, version, token_bytes, num_samples, num_fields, _, num_tokens = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DataError("does not start with the magic of a block")
    if version > VERSION:
        raise DataError(f"has block version {version}, this quincunx reads up to {VERSION}: update quincunx")
    if token_bytes not in (2, 4) or num_fields != len(FIELDS) or num_samples == 0:
        raise DataError("has a damaged header")
    word_start_bytes, has_next_bytes = -(-num_tokens // 8), -(-num_samples // 8)
    lengths_at = HEADER.size
    tokens_at = lengths_at + 4 * num_fields * num_samples
    word_starts_at = tokens_at + token_bytes * num_tokens
    has_next_at = word_starts_at + word_start_bytes
    size = has_next_at + has_next_bytes
    size += -size % 8 + CHECKSUM_BYTES
    if len(data) != size:
        raise DataError(f"has {len(data)} bytes, its header says {size}")
    if check and xxhash.xxh3_64_intdigest(memoryview(data)[:-8]) != struct.unpack("<Q", data[-8:])[0]:
        raise DataError("does not match its checksum")
    lengths = np.frombuffer(data, "<i4", num_fields * num_samples, lengths_at)
    if lengths.min() < 0 or int(lengths.sum(dtype=np.int64)) != num_tokens:
        raise DataError("has a damaged length table")
    word_starts = np.frombuffer(data, np.uint8, word_start_bytes, word_starts_at)
    has_next = np.frombuffer(data, np.uint8, has_next_bytes, has_next_at)
    return Block(
        token_ids=np.frombuffer(data, f"<u{token_bytes}", num_tokens, tokens_at),
        lengths=lengths.reshape(num_fields, num_samples),
        word_starts=np.unpackbits(word_starts, count=num_tokens, bitorder="little").view(bool),
        has_next=np.unpackbits(has_next, count=num_samples, bitorder="little").view(bool),
    )
