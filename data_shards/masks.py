"""Which words of a text are hidden: exact budgets for masked texts, keep thresholds for enhanced decoding.

Everything here works on one text, token ids without [CLS] and [SEP], and is called from the loops of packer.py. A word
is hidden whole or not at all. Special tokens ([SEP] between queries) are words of their own that are never hidden and
never labelled. Formulas with their sources: docs/stream.md.

Letters: n tokens of the text, W words; the arrays may be longer than that, since they are reused from text to text.
"""

import math

import numpy as np

from quincunx.data_shards.hashing import ALWAYS, compiled, draw30, mix, word_slot

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
def keyword_weights(token_ids, begins, num_words, idf, vocab_size, slots, table, weights):
    """Writes TF-IDF to weights[0..W): how often the word stands in this text, times its idf in the corpus.

    idf: float32 [vocab_size + num_buckets], `Statistics.idf`. slots: int64 scratch [W]. table: int64 scratch [2, H], H
    a power of two above W. A word that stands twice has its full weight at both places.
    """
    num_buckets, last = len(idf) - vocab_size, table.shape[1] - 1
    table[0] = -1
    for w in range(num_words):
        slot = word_slot(token_ids, begins[w], begins[w + 1], vocab_size, num_buckets)
        at = np.int64(mix(slot)) & last
        while table[0, at] != slot and table[0, at] != -1:
            at = (at + 1) & last
        if table[0, at] == -1:
            table[0, at], table[1, at] = slot, 0
        table[1, at] += 1
        slots[w] = at
    for w in range(num_words):
        weights[w] = table[1, slots[w]] * np.float64(idf[table[0, slots[w]]])


@compiled
def _sort(values):
    """Ascending, in place; the words of a text are few, and insertion takes half the time of numba's quicksort."""
    if len(values) > 128:
        values.sort()
        return
    for n in range(1, len(values)):
        value, at = values[n], n
        while at > 0 and values[at - 1] > value:
            values[at] = values[at - 1]
            at -= 1
        values[at] = value


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
    _sort(order)
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
