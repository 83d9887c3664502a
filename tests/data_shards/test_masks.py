"""What one text hides: exact budgets of whole words, TF-IDF draws, thresholds with the promised probabilities."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quincunx.data_shards import masks
from quincunx.data_shards.hashing import ALWAYS, word_slot

VOCAB_SIZE, NUM_BUCKETS, SPECIAL_IDS = 200, 64, [0, 1, 2, 3]
IS_SPECIAL = np.isin(np.arange(VOCAB_SIZE), SPECIAL_IDS)
IDF = np.random.default_rng(0).uniform(0.01, 9, VOCAB_SIZE + NUM_BUCKETS).astype(np.float32)
STANDARD_DEVIATIONS = 5  # of a binomial count: exceeded by chance once in 1.7 million draws


@st.composite
def texts(draw) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, some of them special, and word starts that may forget the first word."""
    num_tokens = draw(st.integers(1, 60))
    token_ids = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=num_tokens, max_size=num_tokens))
    word_starts = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    return np.array(token_ids, np.int32), np.array(word_starts)


def split_words(token_ids: np.ndarray, word_starts: np.ndarray) -> tuple[np.ndarray, int]:
    begins = np.empty(len(token_ids) + 1, np.int32)
    num_words = masks.find_words(token_ids, word_starts, len(token_ids), IS_SPECIAL, begins)
    return begins[: num_words + 1], num_words


def weigh(token_ids: np.ndarray, begins: np.ndarray, num_words: int) -> np.ndarray:
    order, weights = np.empty(num_words, np.int64), np.empty(num_words)
    masks.keyword_weights(token_ids, begins, num_words, IDF, VOCAB_SIZE, order, weights)
    return weights


def hide(token_ids, word_starts, rate: float, draw: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Hidden tokens (bool [n]) and where words begin."""
    begins, num_words = split_words(token_ids, word_starts)
    weights = weigh(token_ids, begins, num_words)
    priorities, hidden = np.empty(num_words, np.int64), np.empty(len(token_ids), bool)
    masks.hide_words(token_ids, begins, num_words, IS_SPECIAL, rate, draw, key, weights, priorities, hidden)
    return hidden, begins


@given(texts())
@settings(deadline=None)
def test_words_cover_the_text_and_a_special_token_stands_alone(text):
    token_ids, word_starts = text
    begins, _ = split_words(*text)
    assert begins[0] == 0 and begins[-1] == len(token_ids) and (np.diff(begins) > 0).all()
    for i in range(1, len(token_ids)):
        beside_special = IS_SPECIAL[token_ids[i]] or IS_SPECIAL[token_ids[i - 1]]
        assert (i in begins) == (word_starts[i] or beside_special)


@given(texts(), st.floats(0.01, 0.99), st.sampled_from([masks.UNIFORM, masks.KEYWORD]), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_the_budget_is_met_exactly_or_no_word_left_over_fits(text, rate, draw, key):
    token_ids, word_starts = text
    hidden, begins = hide(token_ids, word_starts, rate, draw, key)
    num_ordinary = int((~IS_SPECIAL[token_ids]).sum())
    budget = min(num_ordinary, max(1, int(rate * num_ordinary + 0.5)))
    assert not hidden[IS_SPECIAL[token_ids]].any()
    assert hidden.sum() <= budget
    for begin, end in pairwise(begins):
        assert hidden[begin:end].all() or not hidden[begin:end].any(), "a word is hidden whole or not at all"
        if not hidden[begin] and not IS_SPECIAL[token_ids[begin]]:
            assert end - begin > budget - hidden.sum(), "a word left over would still have fitted"


def test_a_uniform_draw_hides_every_word_equally_often():
    token_ids, num_draws = np.arange(10, 30, dtype=np.int32), 20_000
    hidden = sum(hide(token_ids, np.ones(20, bool), 0.3, masks.UNIFORM, key)[0].astype(int) for key in range(num_draws))
    assert hidden.sum() == 6 * num_draws
    bound = STANDARD_DEVIATIONS * (num_draws * 0.3 * 0.7) ** 0.5
    assert np.abs(hidden - 0.3 * num_draws).max() < bound


def test_a_keyword_draw_takes_the_first_word_by_its_share_of_the_tf_idf_weight():
    token_ids, num_draws = np.array([50, 60, 70, 50, 80, 90, 100, 110], np.int32), 20_000
    begins, num_words = split_words(token_ids, np.ones(8, bool))
    weights = weigh(token_ids, begins, num_words)
    hidden = sum(
        hide(token_ids, np.ones(8, bool), 0.125, masks.KEYWORD, key)[0].astype(int) for key in range(num_draws)
    )
    share = weights / weights.sum()  # the budget is one word, and the first of Efraimidis and Spirakis is drawn so
    assert hidden.sum() == num_draws
    assert (np.abs(hidden - share * num_draws) < STANDARD_DEVIATIONS * (num_draws * share * (1 - share)) ** 0.5).all()


@given(texts())
@settings(deadline=None)
def test_a_word_weighs_its_count_in_the_text_times_its_idf(text):
    token_ids = text[0]
    begins, num_words = split_words(*text)
    slots = [word_slot(token_ids, begins[w], begins[w + 1], VOCAB_SIZE, NUM_BUCKETS) for w in range(num_words)]
    counts = Counter(slots)
    assert weigh(token_ids, begins, num_words).tolist() == [counts[slot] * float(IDF[slot]) for slot in slots]


@given(texts(), st.floats(0.01, 0.99))
@settings(max_examples=300, deadline=None)
def test_keyword_thresholds_hide_the_rate_on_average_and_follow_the_weights(text, rate):
    token_ids = text[0]
    begins, num_words = split_words(*text)
    weights, thresholds = weigh(token_ids, begins, num_words), np.empty(len(token_ids), np.int32)
    masks.keyword_thresholds(token_ids, begins, num_words, IS_SPECIAL, rate, weights, thresholds)
    special = IS_SPECIAL[token_ids]
    assert (thresholds[special] == ALWAYS).all()
    assert ((thresholds >= 0) & (thresholds <= ALWAYS)).all()
    probability = 1 - thresholds / ALWAYS
    rounding = len(token_ids) / ALWAYS
    assert abs(probability.sum() - rate * (~special).sum()) < 1e-9 * len(token_ids) + rounding
    by_word, ordinary = probability[begins[:-1]], ~special[begins[:-1]]
    assert np.array_equal(np.repeat(by_word, np.diff(begins)), probability), "one threshold for all tokens of a word"
    free = ordinary & (by_word < 1)
    if free.any():
        c = by_word[free] / weights[free]
        assert np.ptp(c) < 1e-6 * c.max() + 2 / ALWAYS / weights[free].min()
        assert (weights[ordinary & ~free] * c.max() > 1 - 1e-6).all()


def test_hidden_tokens_are_written_as_mask_random_or_themselves_80_10_10():
    ordinary_ids, num_draws = np.arange(4, VOCAB_SIZE, dtype=np.int32), 100_000
    written = np.array([masks.corrupted(77, 5, key, False, 3, ordinary_ids) for key in range(num_draws)])
    others = written[(written != 3) & (written != 77)]
    assert np.isin(others, ordinary_ids).all()
    one_in_all = 0.1 / len(ordinary_ids)  # a random token may be the token itself
    for count, share in (((written == 3).sum(), 0.8), ((written == 77).sum(), 0.1 + one_in_all)):
        assert abs(count - share * num_draws) < STANDARD_DEVIATIONS * (num_draws * share * (1 - share)) ** 0.5
    counts = np.bincount(others, minlength=VOCAB_SIZE)[ordinary_ids[ordinary_ids != 77]]
    expected, degrees = len(others) / len(counts), len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 5 * (2 * degrees) ** 0.5


def test_the_mask_setting_writes_only_mask():
    assert {masks.corrupted(77, 5, key, True, 3, np.arange(4, 200, dtype=np.int32)) for key in range(1000)} == {3}


@pytest.mark.parametrize(
    ("rate", "num_ordinary", "budget"), [(0.3, 0, 0), (0.3, 1, 1), (0.3, 10, 3), (0.5, 5, 3), (0.01, 20, 1)]
)
def test_a_budget_is_the_rounded_share_and_at_least_one_token(rate, num_ordinary, budget):
    assert masks.mask_budget(rate, num_ordinary) == budget
