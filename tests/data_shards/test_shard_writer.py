"""What a shard set is written from: blocks, the manifest and its dataset id, statistics; and what of it is refused."""

import json
import struct
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.hashing import word_slot
from quincunx.data_shards.shard_writer import Sample, StatisticsCounter, encode_block, manifest_text
from quincunx.data_shards.shards import (
    FIELDS,
    SCHEMA_VERSION,
    BlockEntry,
    FileEntry,
    Manifest,
    ShardEntry,
    Statistics,
    Text,
    decode_block,
)

VOCAB_SIZES = [300, 2**16, 2**16 + 1, 250_002]


@st.composite
def texts(draw, vocab_size: int, min_size: int) -> Text:
    ids = draw(st.lists(st.integers(0, vocab_size - 1), min_size=min_size, max_size=20))
    starts = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return Text(np.array(ids, np.int64), np.array(starts, bool))


@st.composite
def sample_lists(draw) -> tuple[int, list[Sample]]:
    vocab_size = draw(st.sampled_from(VOCAB_SIZES))
    optional = st.none() | texts(vocab_size, 1)
    sample = st.builds(
        Sample, st.just("p"), texts(vocab_size, 1), queries=optional, continuation=optional, has_next=st.booleans()
    )
    return vocab_size, draw(st.lists(sample, min_size=1, max_size=12))


@given(sample_lists())
@settings(max_examples=200, deadline=None)
def test_decoding_gives_back_every_text_word_start_and_neighbour(drawn):
    vocab_size, samples = drawn
    block = decode_block(encode_block(samples, vocab_size))
    assert block.num_samples == len(samples)
    assert block.token_ids.dtype == (np.uint16 if vocab_size <= 2**16 else np.uint32)
    for i, sample in enumerate(samples):
        for name in FIELDS:
            expected = sample.texts.get(name)
            found = block.text(name, i)
            if expected is None:
                assert len(found.token_ids) == 0
            else:
                assert found.token_ids.tolist() == expected.token_ids.tolist()
                assert found.word_starts.tolist() == expected.word_starts.tolist()
        assert block.has_next[i] == (sample.has_next and i + 1 < len(samples))


def some_block() -> bytes:
    rng = np.random.default_rng(0)

    def text(size: int) -> Text:
        return Text(rng.integers(0, 30_000, size), rng.random(size) < 0.7)

    return encode_block([Sample(f"p{i}", text(i + 1), queries=text(3), has_next=True) for i in range(20)], 30_000)


def test_every_flipped_bit_and_every_cut_is_noticed():
    data = some_block()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(DataError):
            decode_block(bytes(damaged))
        with pytest.raises(DataError):
            decode_block(data[:position])
    with pytest.raises(DataError):
        decode_block(bytes(len(data)))


def test_a_block_of_a_newer_version_asks_for_an_update():
    data = bytearray(some_block())
    data[8] = 3
    with pytest.raises(DataError, match=r"block version 3.*update quincunx"):
        decode_block(bytes(data))


def test_the_layout_is_the_documented_one():
    """A block put together by hand from the table in docs/shards.md."""
    samples = [
        Sample("a", Text(np.array([7, 8, 9]), np.array([True, False, True])), has_next=True),
        Sample("b", Text(np.array([258]), np.array([True])), queries=Text(np.array([5]), np.array([True]))),
    ]
    expected = (
        b"QXBLOCK\0"
        + bytes([1, 0, 2, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0])
        + b"".join(struct.pack("<i", length) for length in (3, 1, 0, 1, 0, 0))
        + bytes([7, 0, 8, 0, 9, 0, 2, 1, 5, 0])
        + bytes([0b11101, 0b01])
        + bytes(4)
    )
    encoded = encode_block(samples, 300)
    assert encoded[:-8] == expected
    assert len(encoded) % 8 == 0


def test_an_empty_passage_and_an_id_beyond_the_vocabulary_are_refused_by_name():
    empty = Text(np.array([], np.int64), np.array([], bool))
    with pytest.raises(DataError, match="'lonely' has no tokens"):
        encode_block([Sample("lonely", empty)], 300)
    for bad in (300, -1):
        with pytest.raises(DataError, match=f"token id {bad} near passage 'p' is outside the vocabulary of 300"):
            encode_block([Sample("p", Text(np.array([bad]), np.array([True])))], 300)


MANIFEST = Manifest(
    tokenizer_digest="ab" * 16,
    tokenizer_files=(FileEntry("tokenizer.json", 10, "cd" * 16),),
    vocab_size=300,
    special_ids={"cls": 1, "sep": 2, "mask": 3, "pad": 0, "unk": None, "all": [0, 1, 2, 3]},
    max_tokens=144,
    fields={"train": {"passage": 3, "next": 1, "queries": 0, "continuation": 0}, "heldout": {"passage": 0}},
    shards=(
        ShardEntry(
            "train-00000-000.tar", "train", 10240, 3, "ef" * 16, (BlockEntry(512, 99, 3, "01" * 8, 1536, 5, "02" * 8),)
        ),
    ),
    statistics=FileEntry("statistics.npz", 20, "34" * 16),
    sources=(FileEntry("köln.jsonl", 30, "56" * 16),),
    settings={"tasks": 1, "held_out_share": 0.01},
    counts={"documents": 2},
)


TEXT = manifest_text(MANIFEST)


def test_reading_gives_back_what_was_written_and_the_dataset_id_follows_every_part_of_it():
    assert Manifest.from_json(TEXT, "m") == MANIFEST
    block = replace(MANIFEST.shards[0].blocks[0], digest="ff" * 8)
    others = [
        replace(MANIFEST, max_tokens=145),
        replace(MANIFEST, tokenizer_digest="00" * 16),
        replace(MANIFEST, sources=()),
        replace(MANIFEST, shards=(replace(MANIFEST.shards[0], blocks=(block,)),)),
    ]
    assert len({manifest.dataset_id for manifest in [MANIFEST, *others]}) == 1 + len(others)


def without_a_digest() -> str:
    content = json.loads(TEXT)
    del content["shards"][0]["digest"]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("", "m is damaged"),
        (TEXT[:200], "m is damaged"),
        (without_a_digest(), "m is damaged"),
        ("[]", "m is not a quincunx manifest"),
        ('{"format": "other"}', "m is not a quincunx manifest"),
        (TEXT.replace('"max_tokens": 144', '"max_tokens": 512'), "m does not match its own dataset id"),
        (
            json.dumps({"format": "quincunx-shards", "schema_version": SCHEMA_VERSION + 1, "new": 1}),
            f"schema version {SCHEMA_VERSION + 1}, this quincunx reads up to .* update",
        ),
    ],
)
def test_a_manifest_that_is_foreign_cut_edited_or_newer_is_refused(text, refusal):
    with pytest.raises(DataError, match=refusal):
        Manifest.from_json(text, "m")


def random_text(rng: np.random.Generator) -> Text:
    size = int(rng.integers(1, 40))
    starts = rng.random(size) < 0.6
    starts[0] = True
    return Text(rng.integers(0, 50, size), starts)


def words(text: Text) -> list[tuple[int, ...]]:
    edges = [*np.flatnonzero(text.word_starts).tolist(), len(text.token_ids)]
    return [tuple(text.token_ids[a:b].tolist()) for a, b in pairwise(edges)]


def test_counts_equal_a_plain_count_over_the_passages():
    rng = np.random.default_rng(0)
    passages = [random_text(rng) for _ in range(300)]
    counter = StatisticsCounter(50, 2**18)
    for start in range(0, 300, 60):  # queries do not count
        samples = [Sample(f"p{i}", passages[i], queries=random_text(rng)) for i in range(start, start + 60)]
        counter.add_block(decode_block(encode_block(samples, 50)))
    statistics = Statistics.from_bytes(counter.to_bytes())
    frequency = Counter(word for passage in passages for word in set(words(passage)))
    tokens = Counter(token for passage in passages for token in passage.token_ids.tolist())
    assert statistics.num_passages == 300
    assert statistics.token_counts.tolist() == [tokens[token] for token in range(50)]

    def slot(word):
        return word_slot(np.array(word), 0, len(word), 50, 2**18)

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
    blocks = [decode_block(encode_block([Sample(f"p{i}", random_text(rng)) for i in range(20)], 50)) for _ in range(4)]
    whole, parts = StatisticsCounter(50, 1024), StatisticsCounter(50, 1024)
    for block in blocks:
        whole.add_block(block)
    for pair in (blocks[2:], blocks[:2]):
        part = StatisticsCounter(50, 1024)
        for block in pair:
            part.add_block(block)
        parts.add_statistics(Statistics.from_bytes(part.to_bytes()))
    assert whole.to_bytes() == parts.to_bytes()


def test_a_word_in_every_passage_stays_drawable():
    counter = StatisticsCounter(50, 16)
    text = Text(np.array([7]), np.array([True]))
    counter.add_block(decode_block(encode_block([Sample(f"p{i}", text) for i in range(5)], 50)))
    assert Statistics.from_bytes(counter.to_bytes()).idf[7] == np.float32(0.01)
