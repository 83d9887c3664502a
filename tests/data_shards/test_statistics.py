"""Document frequencies against a plain count of the same passages."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from quincunx.data_shards.hashing import word_slot
from quincunx.data_shards.shard_writer import Sample, StatisticsCounter, encode_block
from quincunx.data_shards.shards import Statistics, Text, decode_block

VOCAB_SIZE = 50


def random_text(rng: np.random.Generator) -> Text:
    size = int(rng.integers(1, 40))
    starts = rng.random(size) < 0.6
    starts[0] = True
    return Text(rng.integers(0, VOCAB_SIZE, size), starts)


def words(text: Text) -> list[tuple[int, ...]]:
    edges = [*np.flatnonzero(text.word_starts).tolist(), len(text.token_ids)]
    return [tuple(text.token_ids[a:b].tolist()) for a, b in pairwise(edges)]


def test_counts_equal_a_plain_count_over_the_passages():
    rng = np.random.default_rng(0)
    passages = [random_text(rng) for _ in range(300)]
    counter = StatisticsCounter(VOCAB_SIZE, 2**18)
    for start in range(0, 300, 60):  # queries do not count
        samples = [Sample(f"p{i}", passages[i], queries=random_text(rng)) for i in range(start, start + 60)]
        counter.add_block(decode_block(encode_block(samples, VOCAB_SIZE)))
    statistics = Statistics.from_bytes(counter.to_bytes())
    frequency = Counter(word for passage in passages for word in set(words(passage)))
    tokens = Counter(token for passage in passages for token in passage.token_ids.tolist())
    assert statistics.num_passages == 300
    assert statistics.token_counts.tolist() == [tokens[token] for token in range(VOCAB_SIZE)]

    def slot(word):
        return word_slot(np.array(word), 0, len(word), VOCAB_SIZE, 2**18)

    exact = sum(statistics.document_frequency[slot(word)] == count for word, count in frequency.items())
    assert exact >= 0.99 * len(frequency), "2**18 slots: about 1 word in 100 may share one"
    assert all(statistics.document_frequency[slot(word)] >= count for word, count in frequency.items())
    assert sum(map(int, statistics.document_frequency)) == sum(frequency.values())
    common, rare = frequency.most_common()[0][0], frequency.most_common()[-1][0]

    def idf(word):
        return statistics.idf[slot(word)]

    assert idf(rare) > idf(common) > 0
    assert idf(common) == pytest.approx(np.log(301 / (frequency[common] + 1)), rel=1e-6)


def test_bytes_are_the_same_for_any_split_into_parts():
    rng = np.random.default_rng(1)
    blocks = [
        decode_block(encode_block([Sample(f"p{i}", random_text(rng)) for i in range(20)], VOCAB_SIZE)) for _ in range(4)
    ]
    whole, parts = StatisticsCounter(VOCAB_SIZE, 1024), StatisticsCounter(VOCAB_SIZE, 1024)
    for block in blocks:
        whole.add_block(block)
    for pair in (blocks[2:], blocks[:2]):
        part = StatisticsCounter(VOCAB_SIZE, 1024)
        for block in pair:
            part.add_block(block)
        parts.add_statistics(Statistics.from_bytes(part.to_bytes()))
    assert whole.to_bytes() == parts.to_bytes()


def test_a_word_in_every_passage_stays_drawable():
    counter = StatisticsCounter(VOCAB_SIZE, 16)
    text = Text(np.array([7]), np.array([True]))
    counter.add_block(decode_block(encode_block([Sample(f"p{i}", text) for i in range(5)], VOCAB_SIZE)))
    assert Statistics.from_bytes(counter.to_bytes()).idf[7] == np.float32(0.01)
