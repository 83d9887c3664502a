"""What one text hides: exact budgets of whole words, TF-IDF draws, thresholds with the promised probabilities."""

from collections import Counter
from itertools import pairwise

import numpy as np
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


VOCABULARY = masks.Vocabulary(
    size=VOCAB_SIZE,
    cls_id=1,
    sep_id=2,
    mask_id=3,
    is_special=IS_SPECIAL,
    ordinary_ids=np.arange(4, VOCAB_SIZE, dtype=np.int32),
    idf=IDF,
    idf_starts=np.array([0, len(IDF)]),
)


def pack(token_ids: np.ndarray, word_starts: np.ndarray) -> tuple[masks.Packed, np.ndarray, np.ndarray]:
    """The text packed by itself, where its words begin (and n), and which of its tokens are ordinary."""
    lengths = np.array([len(token_ids)], np.int32)
    packed = masks.pack_texts(token_ids[None], word_starts[None], lengths, VOCABULARY)
    begins = np.searchsorted(packed.word_ids[1:-1], np.arange(packed.word_ids[-2] + 2))
    return packed, begins, packed.ordinary[1:-1]


def weigh(token_ids: np.ndarray, begins: np.ndarray) -> np.ndarray:
    return masks.keyword_weights(token_ids, begins, IDF, VOCAB_SIZE)


def hide(token_ids, word_starts, rate: float, by_keyword: bool, key: int) -> np.ndarray:
    """Hidden tokens (bool [n])."""
    packed, *_ = pack(token_ids, word_starts)
    keys, datasets = np.array([key], np.uint32), np.zeros(1, np.int16)
    return masks.hide_texts(packed, keys, datasets, rate, by_keyword, VOCABULARY)[1:-1]


@given(texts())
@settings(deadline=None)
def test_words_cover_the_text_and_a_special_token_stands_alone(text):
    token_ids, word_starts = text
    packed, begins, ordinary = pack(*text)
    assert packed.input_ids.tolist() == [1, *token_ids, 2] and packed.cu_seqlens.tolist() == [0, len(token_ids) + 2]
    assert np.array_equal(ordinary, ~IS_SPECIAL[token_ids])
    assert begins[0] == 0 and begins[-1] == len(token_ids) and (np.diff(begins) > 0).all()
    for i in range(1, len(token_ids)):
        beside_special = IS_SPECIAL[token_ids[i]] or IS_SPECIAL[token_ids[i - 1]]
        assert (i in begins) == (word_starts[i] or beside_special)


@given(texts(), st.floats(0.01, 0.99), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_the_budget_is_met_exactly_or_no_word_left_over_fits(text, rate, by_keyword, key):
    token_ids, word_starts = text
    hidden, (_, begins, _) = hide(token_ids, word_starts, rate, by_keyword, key), pack(*text)
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
    hidden = sum(hide(token_ids, np.ones(20, bool), 0.3, False, key).astype(int) for key in range(num_draws))
    assert hidden.sum() == 6 * num_draws
    bound = STANDARD_DEVIATIONS * (num_draws * 0.3 * 0.7) ** 0.5
    assert np.abs(hidden - 0.3 * num_draws).max() < bound


def test_a_keyword_draw_takes_the_first_word_by_its_share_of_the_tf_idf_weight():
    token_ids, num_draws = np.array([50, 60, 70, 50, 80, 90, 100, 110], np.int32), 20_000
    weights = weigh(token_ids, np.arange(9))
    hidden = sum(hide(token_ids, np.ones(8, bool), 0.125, True, key).astype(int) for key in range(num_draws))
    share = weights / weights.sum()  # the budget is one word, and the first of Efraimidis and Spirakis is drawn so
    assert hidden.sum() == num_draws
    assert (np.abs(hidden - share * num_draws) < STANDARD_DEVIATIONS * (num_draws * share * (1 - share)) ** 0.5).all()


@given(texts())
@settings(deadline=None)
def test_a_word_weighs_its_count_in_the_text_times_its_idf(text):
    token_ids, (_, begins, _) = text[0], pack(*text)
    slots = [word_slot(token_ids, begin, end, VOCAB_SIZE, NUM_BUCKETS) for begin, end in pairwise(begins)]
    counts = Counter(slots)
    assert weigh(token_ids, begins).tolist() == [counts[slot] * float(IDF[slot]) for slot in slots]


@given(texts(), st.floats(0.01, 0.99))
@settings(max_examples=300, deadline=None)
def test_keyword_thresholds_hide_the_rate_on_average_and_follow_the_weights(text, rate):
    token_ids, (packed, begins, _) = text[0], pack(*text)
    weights, special = weigh(token_ids, begins), IS_SPECIAL[token_ids]
    thresholds = masks.threshold_texts(packed, np.zeros(1, np.int16), rate, VOCABULARY)
    assert thresholds[0] == thresholds[-1] == ALWAYS
    thresholds = thresholds[1:-1]
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
    num_draws, ordinary_ids = 100_000, VOCABULARY.ordinary_ids
    packed, *_ = pack(np.full(num_draws, 77, np.int32), np.ones(num_draws, bool))
    written = masks.corrupt(packed, packed.ordinary, np.array([5], np.uint32), VOCABULARY)[1:-1]
    others = written[(written != 3) & (written != 77)]
    assert np.isin(others, ordinary_ids).all()
    one_in_all = 0.1 / len(ordinary_ids)  # a random token may be the token itself
    for count, share in (((written == 3).sum(), 0.8), ((written == 77).sum(), 0.1 + one_in_all)):
        assert abs(count - share * num_draws) < STANDARD_DEVIATIONS * (num_draws * share * (1 - share)) ** 0.5
    counts = np.bincount(others, minlength=VOCAB_SIZE)[ordinary_ids[ordinary_ids != 77]]
    expected, degrees = len(others) / len(counts), len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 5 * (2 * degrees) ** 0.5
