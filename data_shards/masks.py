"""Which words of a text are hidden: texts laid end to end, and the compiled draws over them.

Masked texts have exact budgets, enhanced decoding has keep thresholds. A word is hidden whole or not at all. Special
tokens ([SEP] between queries) are words of their own that are never hidden and never labelled. Formulas with their
sources: docs/stream.md.

Letters: R rows of a batch, L columns of a table, S packed texts, T their tokens with [CLS] and [SEP]; n tokens of one
text without these two, W words of it; D datasets.
"""

import math
from typing import NamedTuple

import numpy as np

from quincunx.data_shards.hashing import ALWAYS, compiled, draw30, text_key, word_slot

# BERT's corruption: of the hidden tokens 80 % become [MASK], 10 % a random token, 10 % stay (Devlin et al. 2019, 3.1).
MASK_BELOW = ALWAYS * 8 // 10
RANDOM_BELOW = ALWAYS * 9 // 10


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


class Packed(NamedTuple):
    """Texts laid end to end, each as [CLS] ... [SEP]."""

    input_ids: np.ndarray
    """int32 [T]"""
    cu_seqlens: np.ndarray
    """int32 [S + 1], where each text starts; the last entry is T."""
    rows: np.ndarray
    """int64 [S], the rows of the batch that have the text."""
    word_ids: np.ndarray
    """int32 [T], number of the token's word in its text; 0 at [CLS] and [SEP]."""
    ordinary: np.ndarray
    """bool [T], the token may be hidden, and is worth a label."""


@compiled
def pack_texts(tokens, starts, lengths, vocabulary):
    """The texts of all rows that have one; a word begins where `starts` says, and beside a special token.

    tokens: integers [R, L], ids without [CLS] and closing [SEP]. starts: bool [R, L], the token is the first of a word.
    lengths: int32 [R], 0 where the row has no text; what lies beyond a length is not read.
    """
    rows = np.flatnonzero(lengths)
    cu_seqlens = np.zeros(len(rows) + 1, np.int32)
    cu_seqlens[1:] = np.cumsum(lengths[rows] + 2)
    input_ids = np.empty(cu_seqlens[-1], np.int32)
    word_ids, ordinary = np.zeros_like(input_ids), np.zeros(len(input_ids), np.bool_)
    for s in range(len(rows)):
        row, first = rows[s], cu_seqlens[s]
        input_ids[first], input_ids[cu_seqlens[s + 1] - 1] = vocabulary.cls_id, vocabulary.sep_id
        word = -1
        for i in range(lengths[row]):
            at = first + 1 + i
            input_ids[at] = tokens[row, i]
            ordinary[at] = not vocabulary.is_special[input_ids[at]]
            word += starts[row, i] or not ordinary[at] or not ordinary[at - 1]
            word_ids[at] = word
    return Packed(input_ids, cu_seqlens, rows, word_ids, ordinary)


@compiled
def text_keys(seeds, epochs, sample_ids, code):
    """uint32 [R], `text_key` of each row."""
    keys = np.empty(len(seeds), np.uint32)
    for r in range(len(keys)):
        keys[r] = text_key(seeds[r], epochs[r], sample_ids[r], code)
    return keys


@compiled
def keyword_weights(token_ids, begins, idf, vocab_size):
    """TF-IDF of each word, float64 [W]: how often it stands in this text, times its idf in the corpus.

    idf: float32 [vocab_size + num_buckets], `Statistics.idf`. A word that stands twice has its full weight at both
    places.
    """
    num_words = len(begins) - 1
    by_slot, weights = np.empty(num_words, np.int64), np.empty(num_words)
    for w in range(num_words):
        by_slot[w] = word_slot(token_ids, begins[w], begins[w + 1], vocab_size, len(idf) - vocab_size) << 32 | w
    by_slot.sort()
    first = 0
    for end in range(1, num_words + 1):
        slot = by_slot[first] >> 32
        if end == num_words or by_slot[end] >> 32 != slot:
            for word in by_slot[first:end]:
                weights[word & 0xFFFFFFFF] = (end - first) * np.float64(idf[slot])
            first = end
    return weights


@compiled
def hide_words(begins, ordinary, rate, key, weights):
    """Draws whole words of one text without replacement up to the budget: bool [n], True where hidden.

    begins: integers [W + 1], where each word begins, and n. ordinary: bool [n]. weights: float64 [W], or empty for a
    uniform draw.

    The budget is the rate's share of the ordinary tokens, halves rounded up, at least 1. With u = (draw + 1/2) / 2**30,
    words come in ascending order of -log(u) / weight (Efraimidis and Spirakis 2006), in a uniform draw of u itself; one
    that would overflow the budget is skipped. So the budget is met exactly, or no word left over is short enough.
    """
    words = np.flatnonzero(ordinary[begins[:-1]])
    priorities = np.empty(len(words), np.int64)
    for n in range(len(words)):
        bits = np.int64(draw30(key, 0, words[n]))
        if len(weights):
            # float32 keeps the last bit of log out of the order, so that machines agree; a positive float's bits
            # order as the float does
            race = np.float32(-math.log((bits + 0.5) / ALWAYS) / weights[words[n]])
            bits = np.int64(race.view(np.int32))
        priorities[n] = bits << 32 | words[n]
    priorities.sort()
    hidden = np.zeros(len(ordinary), np.bool_)
    budget = max(1, math.floor(rate * np.count_nonzero(ordinary) + 0.5))
    for priority in priorities:
        begin, end = begins[priority & 0xFFFFFFFF], begins[(priority & 0xFFFFFFFF) + 1]
        if end - begin <= budget:
            budget -= end - begin
            hidden[begin:end] = True
    return hidden


@compiled
def keyword_thresholds(begins, ordinary, rate, weights):
    """Keep thresholds of one text, int32 [n], whose words are hidden with probability pi_w = min(1, c weight_w).

    c solves sum(pi_w length_w) = rate n over the text's ordinary tokens, exactly: words whose probability reaches 1 are
    fixed there and c is solved again for the rest, until none is added.
    """
    words = np.flatnonzero(ordinary[begins[:-1]])
    to_hide = rate * np.count_nonzero(ordinary)
    c = 0.0
    while True:
        fixed, mass = 0, 0.0
        for w in words:
            length = begins[w + 1] - begins[w]
            if c * weights[w] >= 1.0:
                fixed += length
            else:
                mass += weights[w] * length
        solved = (to_hide - fixed) / mass if mass > 0.0 else c
        if solved <= c:
            break
        c = solved
    thresholds = np.full(len(ordinary), ALWAYS, np.int32)
    for w in words:
        thresholds[begins[w] : begins[w + 1]] = math.floor((1.0 - min(1.0, c * weights[w])) * ALWAYS + 0.5)
    return thresholds


@compiled
def hide_texts(texts, keys, datasets, rate, by_keyword, vocabulary):
    """bool [T], the tokens hidden by `hide_words`. keys: uint32 [S]. datasets: int16 [S], each text's dataset."""
    hidden = np.zeros(len(texts.input_ids), np.bool_)
    for s in range(len(keys)):
        low, high, begins, weights = _words_of(texts, s, datasets[s], by_keyword, vocabulary)
        hidden[low:high] = hide_words(begins, texts.ordinary[low:high], rate, keys[s], weights)
    return hidden


@compiled
def threshold_texts(texts, datasets, rate, vocabulary):
    """int32 [T], `keyword_thresholds` of every text; 2**30 at [CLS] and [SEP]. datasets: int16 [S]."""
    thresholds = np.full(len(texts.input_ids), ALWAYS, np.int32)
    for s in range(len(datasets)):
        low, high, begins, weights = _words_of(texts, s, datasets[s], True, vocabulary)
        thresholds[low:high] = keyword_thresholds(begins, texts.ordinary[low:high], rate, weights)
    return thresholds


@compiled
def _words_of(texts, s, dataset, by_keyword, vocabulary):
    """Where text s lies between [CLS] and [SEP], where its words begin, and their weights (empty if not by keyword)."""
    low, high = texts.cu_seqlens[s] + 1, texts.cu_seqlens[s + 1] - 1
    word_ids = texts.word_ids[low:high]
    begins = np.zeros(word_ids[-1] + 2, np.int64)
    for i in range(len(word_ids)):
        begins[word_ids[i] + 1] = i + 1
    if not by_keyword:
        return low, high, begins, np.empty(0)
    idf = vocabulary.idf[vocabulary.idf_starts[dataset] : vocabulary.idf_starts[dataset + 1]]
    return low, high, begins, keyword_weights(texts.input_ids[low:high], begins, idf, vocabulary.size)


@compiled
def corrupt(texts, hidden, keys, vocabulary):
    """input_ids int32 [T] with BERT's corruption: a hidden token becomes [MASK], one of `ordinary_ids`, or stays.

    hidden: bool [T]. keys: uint32 [S].
    """
    input_ids = texts.input_ids.copy()
    for s in range(len(keys)):
        first = texts.cu_seqlens[s]
        for at in range(first, texts.cu_seqlens[s + 1]):
            if hidden[at]:
                chance = draw30(keys[s], at - first, 0)
                if chance < MASK_BELOW:
                    input_ids[at] = vocabulary.mask_id
                elif chance < RANDOM_BELOW:
                    choice = np.int64(draw30(keys[s], at - first, 1)) * len(vocabulary.ordinary_ids) >> 30
                    input_ids[at] = vocabulary.ordinary_ids[choice]
    return input_ids
