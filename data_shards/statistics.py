"""Document frequencies and token counts of a shard set: what TF-IDF keywords and the unigram yardstick need.

Counted over the passages of the train split. A word made of one token has its own slot; a word of several tokens shares
one of 2**20 (by setting) slots by the hash of its token ids, so the table's size does not grow with the corpus:

    slot(word) = id                                              one token
               = vocab_size + hashing.word_hash(its ids) mod num_buckets   several
"""

import io
from dataclasses import dataclass, field

import numpy as np

from quincunx.data_shards.block import Block
from quincunx.data_shards.compiled import compiled
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.hashing import word_hash
from quincunx.data_shards.manifest import DEFAULT_NUM_BUCKETS

IDF_FLOOR = 0.01  # a word in every passage stays drawable, after all others


@dataclass(frozen=True, eq=False)
class Statistics:
    """Frequencies over `num_passages` training passages.

    token_counts        int64 [vocab_size]: occurrences of each token id in the passages
    document_frequency  uint32 [vocab_size + num_buckets]: passages that hold a word of the slot
    idf                 float32, same shape: max(log((num_passages + 1) / (df + 1)), 0.01)
    """

    num_passages: int
    token_counts: np.ndarray
    document_frequency: np.ndarray
    idf: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        ratio = (self.num_passages + 1) / (self.document_frequency.astype(np.float64) + 1)
        object.__setattr__(self, "idf", np.maximum(np.log(ratio), IDF_FLOOR).astype(np.float32))

    @property
    def vocab_size(self) -> int:
        return len(self.token_counts)

    @property
    def num_buckets(self) -> int:
        return len(self.document_frequency) - self.vocab_size

    def word_df(self, word_token_ids: np.ndarray) -> int:
        """Passages that hold this word (an upper bound for words of several tokens, which share slots)."""
        ids = np.ascontiguousarray(word_token_ids)
        return int(self.document_frequency[word_slot(ids, 0, len(ids), self.vocab_size, self.num_buckets)])

    def to_bytes(self) -> bytes:
        """statistics.npz; the same counts give the same bytes (stored members, zip's fixed date of 1980)."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            num_passages=np.int64(self.num_passages),
            token_counts=self.token_counts.astype("<i8"),
            document_frequency=self.document_frequency.astype("<u4"),
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> "Statistics":
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Statistics(int(arrays["num_passages"]), arrays["token_counts"], arrays["document_frequency"])


@compiled
def word_slot(token_ids, start, end, vocab_size, num_buckets):
    """Slot of the word token_ids[start:end] in `document_frequency` and `idf`; num_buckets is a power of two."""
    if end - start == 1:
        return np.int64(token_ids[start])
    return vocab_size + np.int64(word_hash(token_ids, start, end) & np.uint32(num_buckets - 1))


class StatisticsCounter:
    """Counts blocks of training passages; the order of the blocks does not matter."""

    def __init__(self, vocab_size: int, num_buckets: int = DEFAULT_NUM_BUCKETS):
        assert num_buckets > 0 and num_buckets & (num_buckets - 1) == 0, "num_buckets is a power of two"
        self.num_passages = 0
        self.num_buckets = num_buckets
        self.token_counts = np.zeros(vocab_size, np.int64)
        self.document_frequency = np.zeros(vocab_size + num_buckets, np.uint32)
        self._last_seen = np.full(vocab_size + num_buckets, -1, np.int64)

    def add_block(self, block: Block) -> None:
        _count_block(
            block.token_ids,
            block.word_starts,
            block.offsets[0],
            self.num_buckets,
            self.num_passages,
            self.token_counts,
            self.document_frequency,
            self._last_seen,
        )
        self.num_passages += block.num_samples

    def add_statistics(self, part: Statistics) -> None:
        self.num_passages += part.num_passages
        self.token_counts += part.token_counts
        self.document_frequency += part.document_frequency

    def result(self) -> Statistics:
        return Statistics(self.num_passages, self.token_counts, self.document_frequency)


@compiled
def _count_block(
    token_ids, word_starts, offsets, num_buckets, first_passage, token_counts, document_frequency, last_seen
):
    vocab_size = len(token_counts)
    for i in range(len(offsets) - 1):
        start, end = offsets[i], offsets[i + 1]
        word = start
        for j in range(start, end):
            token_counts[token_ids[j]] += 1
            if j + 1 == end or word_starts[j + 1]:
                slot = word_slot(token_ids, word, j + 1, vocab_size, num_buckets)
                if last_seen[slot] != first_passage + i:
                    last_seen[slot] = first_passage + i
                    document_frequency[slot] += 1
                word = j + 1


def load_statistics(data: bytes, path: str, vocab_size: int) -> Statistics:
    """Reads statistics.npz, whose digest the caller has compared.

    Raises:
        DataError: made for another vocabulary.
    """
    statistics = Statistics.from_bytes(data)
    if statistics.vocab_size != vocab_size:
        raise DataError(
            f"{path} counts a vocabulary of {statistics.vocab_size}, the manifest says {vocab_size}: build the "
            "shards again"
        )
    return statistics
