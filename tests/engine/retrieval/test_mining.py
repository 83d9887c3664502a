"""Mining on hand-made runs whose negatives can be told by eye."""

from collections import Counter

import pytest

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.setting import find_problems
from quincunx.engine.retrieval.candidates import Candidates
from quincunx.engine.retrieval.collection import make_collection
from quincunx.engine.retrieval.mining import MiningRules, TeacherScores, mine

PASSAGES = make_collection([f"p{n}" for n in range(40)], [f"text {n} of passage" for n in range(40)], "corpus")
QUERIES = make_collection(["q0", "q1", "q2"], ["first", "second", "third"], "queries")
QRELS = {"q0": {"p3": 1}, "q1": {"p1": 2, "p2": 1, "p4": 0}, "q2": {"p9": 1}}


def ranked(*numbers):
    return [f"p{number}" for number in numbers]


def mined(run, qrels=None, answers=None, teacher=None, passages=PASSAGES, **rules):
    """({query id: Candidates}, counts)."""
    counts = {}
    rules = MiningRules(**rules)
    assert not find_problems(rules)
    rows = mine(
        run, QRELS if qrels is None else qrels, QUERIES, passages, rules, counts, answers=answers, teacher=teacher
    )
    return {row.query_id: row for row in rows}, counts


def test_negatives_are_the_runs_passages_without_the_positives_best_first():
    found, counts = mined([("q0", ranked(7, 3, 5, 1)), ("q1", ranked(4, 2, 1, 0))])
    assert found["q0"] == Candidates("q0", ("p3",), ("p7", "p5", "p1"))
    assert found["q1"] == Candidates("q1", ("p1", "p2"), ("p4", "p0"))  # judged 0 is a negative
    assert counts["left_out_positives"] == 3 and counts["mined"] == 5 and counts["queries"] == 2
    assert counts["judged_queries_not_in_the_run"] == 1


def test_depth_skip_and_number_count_ranks_of_the_run():
    run = [("q0", ranked(7, 3, 5, 1, 8, 9, 10))]
    assert mined(run, depth=3)[0]["q0"].negatives == ("p7", "p5")
    found, counts = mined(run, depth=6, skip_top=3)
    assert found["q0"].negatives == ("p1", "p8", "p9") and counts["left_out_skipped_at_the_top"] == 2
    assert mined(run, num_negatives=2)[0]["q0"].negatives == ("p7", "p5")


def test_a_passage_relevant_below_the_threshold_is_neither_positive_nor_negative():
    found, counts = mined([("q1", ranked(1, 2, 4, 5))], relevant_from=2)
    assert found["q1"] == Candidates("q1", ("p1",), ("p4", "p5"))
    assert counts["left_out_partly_relevant"] == 1


def test_passages_with_an_answer_are_no_negatives():
    answers = {"q0": ["5 of", "nowhere"]}
    found, counts = mined([("q0", ranked(7, 5, 15, 1)), ("q2", ranked(5, 6))], answers=answers)
    assert found["q0"].negatives == ("p7", "p15", "p1")  # "15 of" is another word than "5 of"
    assert found["q2"].negatives == ("p5", "p6")
    assert counts["left_out_with_an_answer"] == 1 and counts["queries_without_answers"] == 1


@pytest.mark.parametrize(
    ("margin", "margin_from", "negatives"),
    [
        (0.0, "best", (6, 7, 8)),
        (3.0, "best", (7, 8)),
        (2.5, "best", (7, 8)),  # just the limit's score is left out
        (0.0, "worst", (7, 8)),
        (4.0, "worst", (8,)),
        (-1.5, "best", (5, 6, 7, 8)),
    ],
)
def test_the_teachers_margin_counts_from_the_best_or_worst_positive(margin, margin_from, negatives):
    scores = {"p1": 9.0, "p2": 6.0, "p5": 10.0, "p6": 6.5, "p7": 5.9, "p8": 1.0}
    rows = [
        Candidates("q1", ("p1", "p2"), ("p5", "p6", "p7", "p8"), scores),
        Candidates("q0", ("p3",), ("p4",), {"p3": 1.0, "p4": -9.0}),
    ]
    run = [("q0", ranked(4, 3)), ("q1", ranked(5, 6, 1, 7, 8))]  # in another order than the teacher's
    found, counts = mined(run, teacher=TeacherScores(rows, "scored"), margin=margin, margin_from=margin_from)
    assert found["q1"].negatives == tuple(ranked(*negatives))
    assert counts["left_out_above_the_teachers_margin"] == 4 - len(negatives)


def test_missing_teacher_scores_are_refused_with_their_number():
    rows = [Candidates("q0", ("p3",), ("p4",), {"p3": 2.0, "p4": 1.0}), Candidates("q1", ("p1", "p2"), (), {"p1": 1.0})]
    with pytest.raises(
        DataError, match=r"scored lacks the teacher's score of 3 candidates \(first: q0 p5, q1 p2, q1 p6"
    ):
        mined([("q0", ranked(4, 5)), ("q1", ranked(6))], teacher=TeacherScores(rows, "scored"))


def test_random_fill_depends_on_seed_and_query_alone_and_takes_no_judged_or_mined_passage():
    alone, counts = mined([("q1", ranked(5, 1, 4))], random_fill=30)
    assert len(alone["q1"].negatives) == 30 and counts["random"] == 28 and counts["mined"] == 2
    together, _ = mined([("q0", ranked(8)), ("q1", ranked(5, 1, 4)), ("q2", ranked(1))], random_fill=30)
    assert together["q1"] == alone["q1"]
    assert mined([("q1", ranked(5, 1, 4))], random_fill=30, seed=1)[0] != alone
    assert together["q0"].negatives[1:] != together["q1"].negatives[2:]
    for row in together.values():
        assert len({*row.positives, *row.negatives}) == len(row.positives) + len(row.negatives)
        assert not {id for id, grade in QRELS[row.query_id].items() if grade > 0} & set(row.negatives)


def test_what_a_rule_left_out_does_not_come_back_at_random():
    scores = {f"p{n}": 5.0 if n == 30 else 0.0 for n in range(40)} | {"p1": 1.0, "p2": 1.0}
    teacher = TeacherScores([Candidates("q1", ("p1", "p2"), tuple(scores)[3:], scores)], "scored")
    run = [("q1", ranked(20, 21, 22, 30, 31))]
    found, counts = mined(run, teacher=teacher, skip_top=3, random_fill=100)
    assert counts["left_out_skipped_at_the_top"] == 3 and counts["left_out_above_the_teachers_margin"] == 1
    assert found["q1"].negatives[0] == "p31" and not {"p20", "p21", "p22", "p30"} & set(found["q1"].negatives)
    assert len(found["q1"].negatives) == 40 - 3 - 4  # all that are neither judged nor left out


def test_random_passages_are_spread_over_the_corpus():
    """400 queries draw 10 of 40 passages: each passage is drawn 100 times on average, and 60 would be 4.6 sigma off."""
    ids = [f"q{n}" for n in range(400)]
    queries = make_collection(ids, ids, "queries")
    rows = mine(
        [(id, ["p0"]) for id in ids], {id: {"p39": 1} for id in ids}, queries, PASSAGES,
        MiningRules(random_extra=10), {},
    )  # fmt: skip
    drawn = Counter(id for row in rows for id in row.negatives[1:])
    assert set(drawn) == {f"p{n}" for n in range(1, 39)}
    assert min(drawn.values()) > 60 and max(drawn.values()) < 150


def test_extra_random_passages_come_besides_and_avoid_answers():
    answers = {"q0": [f"text {n}" for n in range(10, 40)]}
    found, counts = mined([("q0", ranked(7, 5))], answers=answers, random_extra=6, random_fill=1)
    assert found["q0"].negatives[:2] == ("p7", "p5") and len(found["q0"].negatives) == 8
    assert set(found["q0"].negatives[2:]) <= set(ranked(*range(10)))
    found, counts = mined([("q0", ranked(7, 5))], answers=answers, random_extra=30)
    assert counts["random"] == 7 and counts["random_missing"] == 23  # ten without an answer, three of them taken


def test_queries_without_positives_are_refused_or_dropped():
    run = [("q0", ranked(7)), ("q2", ranked(1))]
    qrels = {"q0": {"p3": 1}, "q2": {"p9": 0}}
    with pytest.raises(DataError, match=r"grade 1 or more is judged for 1 queries of the run \(first: q2\)"):
        mined(run, qrels)
    found, counts = mined(run, qrels, drop_queries_without_positives=True)
    assert list(found) == ["q0"] and counts["queries_without_positives"] == 1


def test_queries_without_negatives_are_refused_filled_or_dropped():
    run = [("q0", ranked(3)), ("q2", ranked(1))]
    with pytest.raises(DataError, match=r"no negative is left of 1 queries \(first: q0\)"):
        mined(run)
    found, counts = mined(run, drop_queries_without_negatives=True)
    assert list(found) == ["q2"] and counts["queries_without_negatives"] == 1
    assert len(mined(run, random_fill=2)[0]["q0"].negatives) == 2


def test_unknown_ids_of_the_run_are_refused_or_dropped():
    run = [("q0", ["p7", "x1", "p5", "x2"]), ("other", ["p1"])]
    with pytest.raises(DataError, match=r"the run names 1 queries that queries does not have \(first: other\)"):
        mined(run)
    with pytest.raises(DataError, match=r"the run names 2 passages that corpus does not have \(first: x1, x2\)"):
        mined(run[:1])
    found, counts = mined(run, unknown_ids="drop")
    assert found["q0"].negatives == ("p7", "p5")
    assert counts["queries_unknown"] == 1 and counts["passages_unknown"] == 2


def test_rules_out_of_range_are_refused():
    for rules, message in (({"skip_top": 200}, "skip_top is 200 and depth 200"), ({"seed": -1}, "seed is -1")):
        assert message in find_problems(MiningRules(**rules))[0]


def test_passages_without_text_are_no_negatives_mined_or_drawn():
    texts = ["", " \t", "\u200b", *(f"text {n}" for n in range(3, 40))]
    passages = make_collection([f"p{n}" for n in range(40)], texts, "corpus")
    found, counts = mined([("q0", ranked(0, 7, 1, 2, 5))], passages=passages, random_fill=36)
    assert found["q0"].negatives[:2] == ("p7", "p5") and counts["left_out_without_text"] == 3
    assert not {"p0", "p1", "p2"} & set(found["q0"].negatives) and len(found["q0"].negatives) > 20
