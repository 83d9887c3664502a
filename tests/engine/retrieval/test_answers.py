"""Answer match, case by case by hand."""

import pytest

from quincunx.data_shards.errors import DataError
from quincunx.engine.retrieval.answers import answer_hits, answer_matcher, as_phrase
from quincunx.engine.retrieval.collection import make_collection


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("It was built in New York City.", ["new york"], True),
        ("It was built in New Yorkshire.", ["New York"], False),  # a part of a word is no match
        ("In the Newark of York", ["New York"], False),
        ("the new , york", ["new york"], False),  # punctuation is a token
        ("O'Brien's café", ["O'Brien"], True),
        ("the U.S. Army", ["U.S."], True),
        ("the US Army", ["U.S."], False),
        ("It cost $5.50 then", ["5.50"], True),
        ("It cost 15.50 then", ["5.50"], False),
        ("Cafe\u0301 de Paris", ["café"], True),  # NFD: composed and decomposed are one
        ("Cafe de Paris", ["café"], False),  # the mark counts
        ("a\u00a0b\u200bc", ["a b"], True),  # separators and control characters fall away
        ("14 July 1789", ["July 14, 1789", "14 july 1789"], True),
        ("anything", [""], False),
        ("anything", ["  "], False),
        ("anything", [], False),
        ("", ["x"], False),
        ("東京です", ["東京"], False),  # letters without spaces are one word
    ],
)
def test_an_answer_matches_as_a_run_of_whole_words(text, answers, expected):
    assert answer_matcher(answers)(text) is expected


def test_words_are_runs_of_letters_digits_and_marks_and_single_others():
    assert as_phrase("Ab-c2 (x_y)\tÉ!") == " ab - c2 ( x _ y ) e\u0301 ! "


def test_regular_expressions_ignore_case():
    assert answer_matcher([r"18\d\d", "nothing"], is_regex=True)("Born in 1879 in Ulm")
    matches = answer_matcher(["Ulm$"], is_regex=True)
    assert matches("born in ULM") and not matches("born in Ulmer")
    with pytest.raises(DataError, match="is not a regular expression"):
        answer_matcher(["("], is_regex=True)


def test_hits_count_questions_whose_best_passages_hold_an_answer():
    passages = make_collection(["a", "b", "c"], ["no", "the answer is Ulm", "Ulm"], "corpus")
    run = {"0": {"a": 3.0, "b": 2.0, "c": 1.0}, "1": {"a": 1.0, "b": 1.0}, "2": {"a": 1.0}}
    answers = {"0": ["Ulm"], "1": ["answer"], "2": ["Ulm"], "3": ["Ulm"]}
    found = answer_hits(run, answers, passages, (1, 2))
    assert found.means == {"AnswerHit@1": 0.0, "AnswerHit@2": 0.5}
    assert found.per_query["AnswerHit@2"] == {"0": 1.0, "1": 1.0, "2": 0.0, "3": 0.0}
    with pytest.raises(DataError, match=r"passages that corpus does not have \(first: x\)"):
        answer_hits({"0": {"x": 1.0}}, answers, passages)
