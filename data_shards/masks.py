"""Which words of a text are hidden, and the compiled loops that write packed texts with their masks.

Masked texts have exact budgets, enhanced decoding has keep thresholds. A word is hidden whole or not at all. Special
tokens ([SEP] between queries) are words of their own that are never hidden and never labelled. Formulas with their
sources: docs/stream.md.

Letters: n tokens of one text without [CLS] and [SEP], W words; arrays may be longer than that, since they are reused
from text to text. R samples, L table columns, S sequences of the packed text, T its tokens, M labelled tokens, D
datasets.
"""

import math
from typing import NamedTuple

import numpy as np

from quincunx.data_shards.hashing import ALWAYS, compiled, draw30, text_key, word_slot

UNIFORM, KEYWORD, COMPLEMENT = 0, 1, 2
"""How words are drawn (`tasks.TaskKind.draw`), as numbers for compiled code."""
DRAWS = {"uniform": UNIFORM, "keyword": KEYWORD, "complement": COMPLEMENT}

# BERT's corruption: of the hidden tokens 80 % become [MASK], 10 % a random token, 10 % stay (Devlin et al. 2019, 3.1).
MASK_BELOW = ALWAYS * 8 // 10
RANDOM_BELOW = ALWAYS * 9 // 10


@compiled
def find_words(token_ids, word_starts, num_tokens, is_special, begins):
    """Writes where each word begins to begins[0..W], begins[W] = n, and returns W. A special token is a word."""
    num_words, after_special = 0, True
    for i in range(num_tokens):
        special = is_special[token_ids[i]]
        if word_starts[i] or special or after_special:
            begins[num_words] = i
            num_words += 1
        after_special = special
    begins[num_words] = num_tokens
    return num_words


@compiled
def count_ordinary(token_ids, num_tokens, is_special):
    """Tokens of the text that may be hidden."""
    count = 0
    for i in range(num_tokens):
        count += not is_special[token_ids[i]]
    return count


@compiled
def mask_budget(rate, num_ordinary):
    """Tokens to hide: the rate's share, halves rounded up, at least 1; 0 only where there is nothing to hide."""
    return min(num_ordinary, max(1, math.floor(rate * num_ordinary + 0.5)))


@compiled
def keyword_weights(token_ids, begins, num_words, idf, vocab_size, order, weights):
    """Writes TF-IDF to weights[0..W): how often the word stands in this text, times its idf in the corpus.

    idf: float32 [vocab_size + num_buckets], `Statistics.idf`. order: int64 scratch. A word that stands twice has its
    full weight at both places.
    """
    num_buckets = len(idf) - vocab_size
    for w in range(num_words):
        order[w] = word_slot(token_ids, begins[w], begins[w + 1], vocab_size, num_buckets) << 32 | w
    by_slot = order[:num_words]
    by_slot.sort()
    first = 0
    for n in range(num_words):
        slot = by_slot[n] >> 32
        if n + 1 == num_words or by_slot[n + 1] >> 32 != slot:
            for same in by_slot[first : n + 1]:
                weights[same & 0xFFFFFFFF] = (n + 1 - first) * np.float64(idf[slot])
            first = n + 1


@compiled
def hide_words(token_ids, begins, num_words, is_special, rate, draw, key, weights, priorities, hidden):
    """Draws whole words without replacement up to the budget and sets hidden[0..n) (bool).

    Words come in descending order of log(u) / weight (Efraimidis and Spirakis 2006), which for equal weights is a
    uniform draw; one that would overflow the budget is skipped. So the budget is met exactly, or no word left
    over is short enough. priorities: int64 scratch.
    """
    num_drawn = 0
    for w in range(num_words):
        for i in range(begins[w], begins[w + 1]):
            hidden[i] = False
        if not is_special[token_ids[begins[w]]]:
            bits = np.int64(draw30(key, 0, w))
            if draw == KEYWORD:
                # float32 keeps the last bit of log out of the order, so that machines agree; a positive float's
                # bits order as the float does
                race = np.float32(-math.log((bits + 0.5) / ALWAYS) / weights[w])
                bits = np.int64(race.view(np.int32))
            priorities[num_drawn] = bits << 32 | w
            num_drawn += 1
    order = priorities[:num_drawn]
    order.sort()
    budget = mask_budget(rate, count_ordinary(token_ids, begins[num_words], is_special))
    for n in range(num_drawn):
        w = order[n] & 0xFFFFFFFF
        length = begins[w + 1] - begins[w]
        if length <= budget:
            budget -= length
            for i in range(begins[w], begins[w + 1]):
                hidden[i] = True
            if budget == 0:
                break


@compiled
def keyword_thresholds(token_ids, begins, num_words, is_special, rate, weights, thresholds):
    """Writes keep thresholds of words that are hidden with probability pi_w = min(1, c weight_w), int32 [n].

    c solves sum(pi_w length_w) = rate n over the text's ordinary tokens, exactly: words whose probability reaches 1 are
    fixed there and c is solved again for the rest, until none is added.
    """
    num_tokens = begins[num_words]
    to_hide = rate * count_ordinary(token_ids, num_tokens, is_special)
    c = 0.0
    while True:
        fixed, mass = 0, 0.0
        for w in range(num_words):
            if not is_special[token_ids[begins[w]]]:
                length = begins[w + 1] - begins[w]
                if c * weights[w] >= 1.0:
                    fixed += length
                else:
                    mass += weights[w] * length
        solved = (to_hide - fixed) / mass if mass > 0.0 else c
        if solved <= c:
            break
        c = solved
    for w in range(num_words):
        keep = ALWAYS
        if not is_special[token_ids[begins[w]]]:
            keep = np.int64(math.floor((1.0 - min(1.0, c * weights[w])) * ALWAYS + 0.5))
        for i in range(begins[w], begins[w + 1]):
            thresholds[i] = keep


@compiled
def corrupted(token_id, position, key, only_mask, mask_id, ordinary_ids):
    """What a hidden token is written as: [MASK], a token drawn uniformly from `ordinary_ids`, or itself.

    position: that in the sequence ([CLS] = 0). only_mask: always [MASK] (setting `corruption = mask`).
    """
    if only_mask:
        return mask_id
    chance = draw30(key, position, 0)
    if chance < MASK_BELOW:
        return mask_id
    if chance < RANDOM_BELOW:
        return ordinary_ids[np.int64(draw30(key, position, 1)) * len(ordinary_ids) >> 30]
    return token_id


PASSAGE, NEXT = 0, 1
"""The first two texts in the tables of `Texts`: of the sample, and of the next passage of its document."""


class Texts(NamedTuple):
    """K texts of each of R samples in tables, gathered from blocks; a text that is missing has length 0."""

    tokens: np.ndarray
    """uint16 or uint32 [K, R, L], ids without [CLS] and closing [SEP]; undefined beyond the text's length."""
    starts: np.ndarray
    """bool [K, R, L], the token is the first of a word."""
    lengths: np.ndarray
    """int32 [K, R]"""
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
    order, own_hidden = np.empty(limit, np.int64), np.empty(limit, np.bool_)
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
                keyword_weights(token_ids, begins, num_words, idf, vocabulary.size, order, weights)
            key = text_key(texts.seeds[r], texts.epochs[r], texts.sample_ids[r], code)
            hide_words(token_ids, begins, num_words, vocabulary.is_special, rate, draw, key, weights, order, own_hidden)
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
    order = np.empty(limit, np.int64)
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
            keyword_weights(token_ids, begins, num_words, idf, vocabulary.size, order, weights)
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
