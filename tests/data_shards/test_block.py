"""The block format: what is written is what is read, and nothing damaged is read."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.shard_writer import Sample, encode_block
from quincunx.data_shards.shards import FIELDS, Text, decode_block

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
