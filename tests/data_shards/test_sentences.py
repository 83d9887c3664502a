"""Where sentences start."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quincunx.data_shards.sentences import sentence_starts


def sentences(text: str) -> list[str]:
    starts = [*sentence_starts(text), len(text)]
    return [text[start:end].strip() for start, end in pairwise(starts)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One ends. Another begins! A third? Yes.", ["One ends.", "Another begins!", "A third?", "Yes."]),
        ("Dr. Smith met J. R. Jones. They spoke.", ["Dr. Smith met J. R. Jones.", "They spoke."]),
        ("It costs 3.14 or more, e.g. Five. Next.", ["It costs 3.14 or more, e.g. Five.", "Next."]),
        ("See Fig. 3 of Smith et al. It shows this.", ["See Fig. 3 of Smith et al. It shows this."]),
        ("The U.S. Army left. It rained.", ["The U.S. Army left.", "It rained."]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("version 2.0 is out. use it", ["version 2.0 is out. use it"]),
        ("a title\n\na paragraph without a mark", ["a title", "a paragraph without a mark"]),
        (
            "東京は首都です。大阪は違います。「はい。」終わり",
            ["東京は首都です。", "大阪は違います。", "「はい。」", "終わり"],
        ),
        ("Это дом. Там сад. Ёж спит.", ["Это дом.", "Там сад.", "Ёж спит."]),
        ("هل هذا بيت؟ نعم.", ["هل هذا بيت؟", "نعم."]),
        ("यह घर है। वह बाग है।", ["यह घर है।", "वह बाग है।"]),
        ("Ends with space.  ", ["Ends with space."]),
        ("", []),
    ],
)
def test_sentences_start_where_a_reader_would_put_them(text: str, expected: list[str]):
    assert sentences(text) == expected


@given(st.text(alphabet="aB .!?\n。\"'()1é日", max_size=80))
def test_starts_are_increasing_indices_from_zero(text: str):
    starts = sentence_starts(text)
    assert starts == sorted(set(starts))
    assert (starts[0] == 0 and starts[-1] < len(text)) if text else starts == []
