"""The compiled loops that write packed texts with their masks: one for masked texts, one for enhanced decoding.

Letters: R samples, L table columns, S sequences of the packed text, T its tokens, M labelled tokens, D datasets.
"""

from typing import NamedTuple

import numpy as np

from quincunx.data_shards.hashing import ALWAYS, compiled, text_key
from quincunx.data_shards.masks import (
    COMPLEMENT,
    KEYWORD,
    UNIFORM,
    corrupted,
    find_words,
    hide_words,
    keyword_thresholds,
    keyword_weights,
)

PASSAGE, NEXT, QUERIES, CONTINUATION = 0, 1, 2, 3
"""First index of the tables of `Texts`."""
TEXT_INDEX = {"passage": PASSAGE, "next": NEXT, "queries": QUERIES, "continuation": CONTINUATION}


class Texts(NamedTuple):
    """Texts of R samples in tables, gathered from blocks; a text that is missing has length 0."""

    tokens: np.ndarray
    """uint16 or uint32 [4, R, L], ids without [CLS] and closing [SEP]; undefined beyond the text's length."""
    starts: np.ndarray
    """bool [4, R, L], the token is the first of a word."""
    lengths: np.ndarray
    """int32 [4, R]"""
    datasets: np.ndarray
    """int16 [R]"""
    seeds: np.ndarray
    """int64 [R], seed of the sample's dataset."""
    epochs: np.ndarray
    """int32 [R]"""
    sample_ids: np.ndarray
    """int64 [R]"""


class Vocabulary(NamedTuple):
    """What the loops need to know about token ids."""

    size: int
    cls_id: int
    sep_id: int
    mask_id: int
    is_special: np.ndarray
    """bool [size], ids that are never hidden nor labelled."""
    ordinary_ids: np.ndarray
    """int32, ids that may replace a hidden token."""
    idf: np.ndarray
    """float32, `Statistics.idf` of all datasets, end to end."""
    idf_starts: np.ndarray
    """int64 [D + 1], where each dataset's begins."""


@compiled
def pack_masked(texts, vocabulary, text, code, corruption_code, draw, rate, only_mask, is_encoder, hidden):
    """Writes one text of every sample with hidden words corrupted, each as [CLS] ... [SEP].

    Returns input_ids int32 [T], cu_seqlens int32 [S + 1], samples int32 [S], label_positions and labels int32 [M].
    hidden: bool [R, L], the tokens of the passage that the encoder does not see. With `is_encoder` it is written here,
    and samples without a text stay as empty sequences; else it is read (by COMPLEMENT) and they are left out.
    """
    cu_seqlens, sample_of = _sequence_starts(texts.lengths[text], is_encoder)
    num_sequences, limit = len(sample_of), texts.tokens.shape[2]
    input_ids = np.empty(cu_seqlens[num_sequences], np.int32)
    label_positions, labels = np.empty_like(input_ids), np.empty_like(input_ids)
    begins, weights = np.empty(limit + 1, np.int32), np.empty(limit)
    slots, table = _keyword_scratch(limit)
    priorities, own_hidden = np.empty(limit, np.int64), np.empty(limit, np.bool_)
    num_labels = 0
    for s in range(num_sequences):
        r = sample_of[s]
        token_ids, length = texts.tokens[text, r], texts.lengths[text, r]
        if draw == COMPLEMENT:
            for i in range(length):
                own_hidden[i] = not hidden[r, i] and not vocabulary.is_special[token_ids[i]]
        else:
            num_words = find_words(token_ids, texts.starts[text, r], length, vocabulary.is_special, begins)
            if draw == KEYWORD:
                idf = _idf_of(vocabulary, texts.datasets[r])
                keyword_weights(token_ids, begins, num_words, idf, vocabulary.size, slots, table, weights)
            key = text_key(texts.seeds[r], texts.epochs[r], texts.sample_ids[r], code)
            hide_words(
                token_ids, begins, num_words, vocabulary.is_special, rate, draw, key, weights, priorities, own_hidden
            )
        key = text_key(texts.seeds[r], texts.epochs[r], texts.sample_ids[r], corruption_code)
        first = cu_seqlens[s] + 1
        input_ids[first - 1] = vocabulary.cls_id
        for i in range(length):
            written = token_ids[i]
            if own_hidden[i]:
                label_positions[num_labels] = first + i
                labels[num_labels] = written
                num_labels += 1
                written = corrupted(written, 1 + i, key, only_mask, vocabulary.mask_id, vocabulary.ordinary_ids)
            input_ids[first + i] = written
            if is_encoder:
                hidden[r, i] = own_hidden[i]
        input_ids[first + length] = vocabulary.sep_id
    return input_ids, cu_seqlens, sample_of, label_positions[:num_labels], labels[:num_labels]


@compiled
def pack_enhanced(texts, vocabulary, text, code, draw, rate, hidden):
    """Writes one text of every sample that has it for enhanced decoding: uncorrupted, every ordinary token labelled.

    Returns what `pack_masked` does, then keys int32 [S], word_ids int32 [T], keep_thresholds int32 [T].
    hidden: as in `pack_masked`, read.
    """
    cu_seqlens, sample_of = _sequence_starts(texts.lengths[text], False)
    num_sequences, limit = len(sample_of), texts.tokens.shape[2]
    input_ids = np.empty(cu_seqlens[num_sequences], np.int32)
    label_positions, labels = np.empty_like(input_ids), np.empty_like(input_ids)
    word_ids, thresholds = np.zeros_like(input_ids), np.full_like(input_ids, ALWAYS)
    keys = np.empty(num_sequences, np.uint32)
    begins, weights = np.empty(limit + 1, np.int32), np.empty(limit)
    slots, table = _keyword_scratch(limit)
    uniform_threshold = np.int32((1.0 - rate) * ALWAYS + 0.5)
    num_labels = 0
    for s in range(num_sequences):
        r, first = sample_of[s], cu_seqlens[s] + 1
        token_ids, length = texts.tokens[text, r], texts.lengths[text, r]
        own_thresholds = thresholds[first : first + length]
        keys[s] = text_key(texts.seeds[r], texts.epochs[r], texts.sample_ids[r], code)
        num_words = find_words(token_ids, texts.starts[text, r], length, vocabulary.is_special, begins)
        if draw == KEYWORD:
            idf = _idf_of(vocabulary, texts.datasets[r])
            keyword_weights(token_ids, begins, num_words, idf, vocabulary.size, slots, table, weights)
            keyword_thresholds(token_ids, begins, num_words, vocabulary.is_special, rate, weights, own_thresholds)
        input_ids[first - 1] = vocabulary.cls_id
        for w in range(num_words):
            for i in range(begins[w], begins[w + 1]):
                input_ids[first + i] = token_ids[i]
                word_ids[first + i] = w
                if vocabulary.is_special[token_ids[i]]:
                    continue
                label_positions[num_labels] = first + i
                labels[num_labels] = token_ids[i]
                num_labels += 1
                if draw == UNIFORM:
                    own_thresholds[i] = uniform_threshold
                elif draw == COMPLEMENT:
                    own_thresholds[i] = ALWAYS if hidden[r, i] else 0
        input_ids[first + length] = vocabulary.sep_id
    return (
        input_ids,
        cu_seqlens,
        sample_of,
        label_positions[:num_labels],
        labels[:num_labels],
        keys.view(np.int32),
        word_ids,
        thresholds,
    )


@compiled
def _sequence_starts(lengths, keep_empty):
    """cu_seqlens int32 [S + 1] of the texts with [CLS] and [SEP], and each one's sample, int32 [S]."""
    cu_seqlens, sample_of = np.zeros(len(lengths) + 1, np.int32), np.empty(len(lengths), np.int32)
    count = 0
    for r in range(len(lengths)):
        if lengths[r] or keep_empty:
            sample_of[count] = r
            cu_seqlens[count + 1] = cu_seqlens[count] + lengths[r] + 2
            count += 1
    return cu_seqlens[: count + 1], sample_of[:count]


@compiled
def _idf_of(vocabulary, dataset):
    return vocabulary.idf[vocabulary.idf_starts[dataset] : vocabulary.idf_starts[dataset + 1]]


@compiled
def _keyword_scratch(limit):
    """`slots` and `table` of `keyword_weights` for texts of at most `limit` words; the table stays half empty."""
    size = 1
    while size < 2 * limit:
        size *= 2
    return np.empty(limit, np.int64), np.empty((2, size), np.int64)
