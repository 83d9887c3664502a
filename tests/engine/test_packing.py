"""Texts become packed rows: tokenised as the Hugging Face tokenizer does, every one in one batch."""

import numpy as np
import pytest

from quincunx.data_shards.tokenizer_training import train_wordpiece
from quincunx.engine.packing import batches_by_length, pack, tokenise


@pytest.mark.parametrize("max_tokens", [5, 40])
def test_tokens_are_the_tokenizers_own_whatever_it_was_used_for_before(max_tokens):
    texts = ["one two three four five six", "seven", "", "eight nine ten " * 20]
    tokenizer = train_wordpiece(texts, 60)
    tokenizer(texts, truncation=True, max_length=3, padding="max_length")  # leaves both switched on in the backend
    rows = tokenise(texts, tokenizer, max_tokens)
    assert [row.tolist() for row in rows] == tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    assert all(row.dtype == np.int32 for row in rows)


def test_batches_hold_every_text_once_within_the_budget_longest_first():
    lengths = [5, 90, 17, 17, 40, 8, 64, 33]
    batches = batches_by_length([np.zeros(length, np.int32) for length in lengths], batch_tokens=80)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or sum(lengths[index] for index in batch) <= 80 for batch in batches)
    assert batches_by_length([]) == []


def test_packed_texts_lie_end_to_end():
    text = pack([np.array([1, 2, 3], np.int32), np.array([4], np.int32)])
    assert text.input_ids.tolist() == [1, 2, 3, 4] and text.cu_seqlens.tolist() == [0, 3, 4]
