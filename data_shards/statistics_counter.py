"""Counts the statistics of a shard set (statistics.py) while it is built, and writes statistics.npz."""

import io

import numpy as np

from quincunx.data_shards.block import Block
from quincunx.data_shards.compiled import compiled
from quincunx.data_shards.manifest import DEFAULT_NUM_BUCKETS
from quincunx.data_shards.statistics import Statistics, word_slot


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
