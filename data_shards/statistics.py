"""Document frequencies and token counts of a shard set: what TF-IDF keywords and the unigram yardstick need.

Counted over the passages of the train split. A word made of one token has its own slot; a word of several tokens shares
one of 2**20 (by setting) slots by the hash of its token ids, so the table's size does not grow with the corpus:

    slot(word) = id                                              one token
               = vocab_size + hashing.word_hash(its ids) mod num_buckets   several
"""

import io
from dataclasses import dataclass, field

import numpy as np

from quincunx.data_shards.compiled import compiled
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.hashing import word_hash

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
