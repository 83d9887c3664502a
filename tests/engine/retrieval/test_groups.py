"""The draws: pure, without replacement, no positive among the negatives, every score at its candidate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quincunx.data_shards.errors import DataError
from quincunx.engine.retrieval.candidates import Candidates
from quincunx.engine.retrieval.collection import make_collection
from quincunx.engine.retrieval.examples import Groups

NUM_PASSAGES = 60
PASSAGES = make_collection([f"p{n}" for n in range(NUM_PASSAGES)], ["text"] * NUM_PASSAGES, "passages")


def make_groups(sizes: list[tuple[int, int]], *, with_scores=False, first=0, **options) -> Groups:
    """Query n has sizes[n] = (positives, negatives), some passages of 60; its score of passage p is 100 n + p."""
    candidates = []
    for n, (num_positives, num_negatives) in enumerate(sizes):
        rows = np.random.default_rng(first + n).permutation(NUM_PASSAGES)[: num_positives + num_negatives].tolist()
        ids = [f"p{row}" for row in rows]
        scores = {f"p{row}": 100.0 * (first + n) + row for row in rows} if with_scores else None
        candidates.append(Candidates(f"q{first + n}", tuple(ids[:num_positives]), tuple(ids[num_positives:]), scores))
    queries = make_collection([row.query_id for row in candidates], ["text"] * len(candidates), "queries")
    groups = Groups(candidates, queries, PASSAGES, with_scores=with_scores, **{"seed": 3, **options})
    groups.candidates = candidates
    return groups


def ids(rows: np.ndarray) -> list[str]:
    return [f"p{row}" for row in rows]


SIZES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 20)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, num_hard_negatives=st.integers(0, 12), seed=st.integers(-5, 2**40), epoch=st.integers(0, 50))
def test_a_group_is_a_positive_then_distinct_negatives_none_of_them_a_positive(sizes, num_hard_negatives, seed, epoch):
    groups = make_groups(sizes, num_hard_negatives=num_hard_negatives, seed=seed)
    sample_ids = np.arange(len(sizes))
    rows_BG, scores = groups.draw(np.full(len(sizes), epoch, np.int32), sample_ids)
    assert scores is None and rows_BG.dtype == np.int64 and rows_BG.shape == (len(sizes), 1 + num_hard_negatives)
    for row, group in zip(groups.candidates, rows_BG.tolist(), strict=True):
        positive, *negatives = ids(group)
        assert positive in row.positives
        assert not set(negatives) & set(row.positives)
        assert len(set(group)) == len(group)
        mined = set(negatives) & set(row.negatives)
        assert len(mined) == min(num_hard_negatives, len(row.negatives)), "mined ones first, random ones only to fill"
        assert set(negatives[: len(mined)]) == mined
    assert groups.num_filled == sum(num_negatives < num_hard_negatives for _, num_negatives in sizes)


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, num_hard_negatives=st.integers(1, 12), epoch=st.integers(0, 9), data=st.data())
def test_a_draw_does_not_depend_on_the_other_queries_nor_on_the_place_in_the_list(
    sizes, num_hard_negatives, epoch, data
):
    whole = make_groups(sizes, num_hard_negatives=num_hard_negatives)
    expected, _ = whole.draw(np.full(len(sizes), epoch), np.arange(len(sizes)))
    chosen = np.array(data.draw(st.permutations(range(len(sizes)))))
    again, _ = whole.draw(np.full(len(sizes), epoch), chosen)
    np.testing.assert_array_equal(again, expected[chosen])
    from_second = make_groups(sizes[1:], num_hard_negatives=num_hard_negatives, first=1) if sizes[1:] else whole
    start = int(bool(sizes[1:]))
    alone, _ = from_second.draw(np.array([epoch]), np.array([len(sizes) - 1 - start]))
    np.testing.assert_array_equal(alone[0], expected[-1])


@settings(deadline=None, max_examples=40)
@given(
    num_positives=st.integers(1, 6), num_negatives=st.integers(5, 20), group=st.integers(2, 6), start=st.integers(0, 99)
)
def test_no_candidate_comes_again_before_all_have_come(num_positives, num_negatives, group, start):
    """So over whole rounds all counts are equal, and each positive comes once in as many epochs as there are."""
    groups = make_groups([(num_positives, num_negatives)], num_hard_negatives=group - 1)
    rows_EG, _ = groups.draw(np.arange(0, num_positives * num_negatives), np.zeros(num_positives * num_negatives, int))
    assert set(np.unique(rows_EG[:, 0], return_counts=True)[1]) == {num_negatives}
    assert set(np.unique(rows_EG[:, 1:], return_counts=True)[1]) == {num_positives * (group - 1)}
    rows_EG, _ = groups.draw(np.arange(start, start + num_positives), np.zeros(num_positives, int))
    assert len(set(rows_EG[:, 0])) == num_positives


def test_epochs_go_through_the_whole_list_before_they_repeat_any_of_it():
    groups = make_groups([(1, 20)] * 8, num_hard_negatives=5)
    for n, row in enumerate(groups.candidates):
        rows_EG, _ = groups.draw(np.arange(4), np.full(4, n))
        assert sorted(ids(rows_EG[:, 1:].ravel())) == sorted(row.negatives)


def test_seeds_queries_and_epochs_draw_differently():
    groups = make_groups([(4, 40)] * 20, num_hard_negatives=5)
    zeros, rows = np.zeros(20, int), np.arange(20)
    one = groups.draw(zeros, rows)[0]
    other_epoch = groups.draw(zeros + 1, rows)[0]
    other_seed = make_groups([(4, 40)] * 20, num_hard_negatives=5, seed=4).draw(zeros, rows)[0]
    for other in (other_epoch, other_seed):
        assert (one != other).mean() > 0.7
    places = [groups.candidates[n].negatives.index(f"p{one[n, 1]}") for n in range(20)]
    assert len(set(places)) > 8, "the first draw stands at another place of each query's list"


def test_every_negative_of_a_list_is_as_likely_as_another():
    """4,000 draws of 1 of 10: a count's standard deviation is 19; allowed are five of them."""
    groups = make_groups([(1, 10)] * 4000, num_hard_negatives=1)
    rows = groups.draw(np.zeros(4000, int), np.arange(4000))[0]
    places = [row.negatives.index(f"p{drawn}") for row, drawn in zip(groups.candidates, rows[:, 1], strict=True)]
    counts = np.bincount(places, minlength=10)
    assert abs(counts - 400).max() < 95, counts


def test_random_filling_is_fresh_each_epoch_and_spreads_over_the_collection():
    groups = make_groups([(2, 1)], num_hard_negatives=4)
    rows = groups.draw(np.arange(200), np.zeros(200, int))[0]
    assert (rows[:, 1] == rows[0, 1]).all()
    counts = np.bincount(rows[:, 2:].ravel(), minlength=NUM_PASSAGES)
    assert (counts > 0).sum() == NUM_PASSAGES - 3, "all but the two positives and the one mined negative"


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 20)), min_size=1, max_size=6),
    num_hard_negatives=st.integers(1, 12),
    epoch=st.integers(0, 9),
)
def test_teachers_scores_stand_at_their_candidates_and_short_lists_repeat(sizes, num_hard_negatives, epoch):
    groups = make_groups(sizes, num_hard_negatives=num_hard_negatives, with_scores=True)
    rows_BG, scores_BG = groups.draw(np.full(len(sizes), epoch), np.arange(len(sizes)))
    assert scores_BG.dtype == np.float32
    np.testing.assert_array_equal(scores_BG, 100 * np.arange(len(sizes))[:, None] + rows_BG)
    for row, group in zip(groups.candidates, rows_BG, strict=True):
        assert set(ids(group[1:])) <= set(row.negatives)
        assert len(set(group[1:])) == min(num_hard_negatives, len(row.negatives))


def test_all_positives_of_a_query_are_known_padded_to_one_width():
    groups = make_groups([(2, 5), (1, 5), (3, 5)], num_hard_negatives=2)
    positives_BP = groups.positives(np.array([1, 2]))
    assert positives_BP.shape == (2, 3) and positives_BP.dtype == np.int64
    assert ids(positives_BP[0, :1]) == list(groups.candidates[1].positives) and (positives_BP[0, 1:] == -1).all()
    assert ids(positives_BP[1]) == list(groups.candidates[2].positives)


def row(query="q0", positives=("p1",), negatives=("p2",), scores=None) -> Candidates:
    return Candidates(query, positives, negatives, scores)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no training query"),
        ([row(), row("q9")], {}, r"candidates names 1 queries that queries does not have \(first: q9\)"),
        ([row(negatives=("p2", "x", "y"))], {}, r"names 2 passages that passages does not have \(first: x, y\)"),
        ([row(scores={"p1": 1.0})], {"with_scores": True}, "lacks the teacher's score of 1 candidates"),
        ([row(negatives=(), scores={"p1": 1.0})], {"with_scores": True}, "no negatives for 1 queries"),
        ([row()], {"num_hard_negatives": 60}, "has 60 passages, too few to fill groups of 61"),
    ],
)
def test_candidates_that_cannot_be_trained_on_are_refused(rows, options, message):
    queries = make_collection(["q0"], ["text"], "queries")
    with pytest.raises(DataError, match=message):
        Groups(rows, queries, PASSAGES, **{"num_hard_negatives": 1, "seed": 0, **options})


def test_a_group_as_large_as_the_collection_is_filled():
    groups = make_groups([(1, 3)], num_hard_negatives=NUM_PASSAGES - 1)
    assert sorted(groups.draw(np.array([0]), np.array([0]))[0][0]) == list(range(NUM_PASSAGES))
