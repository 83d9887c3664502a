"""Word starts and tokens of every family of tokenizers, and where sentences start."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quincunx.data_shards.tokenizer import special_ids
from quincunx.data_shards.words import sentence_starts, tokenize

TEXTS = st.text(alphabet="ab Zé,.'-1°日本のไท\n\t[SEP]🙂ñ̃", max_size=60)


def words(tokenizer, text: str) -> list[str]:
    """The words of a text as its word starts cut it, by the last characters of their tokens."""
    tokens = tokenize(tokenizer, [text])[0]
    starts = np.flatnonzero(tokens.word_starts)
    ends = [*starts[1:], len(tokens.token_ids)]
    cuts = [0, *(int(tokens.ends[end - 1]) for end in ends)]
    return [text[a:b].strip() for a, b in pairwise(cuts)]


@pytest.mark.parametrize("family", ["roberta", "modernbert", "xlm_roberta"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dense retrieval, word-wide.", ["Dense", "retrieval", ",", "word", "-", "wide", "."]),
        ("quick (brown) fox", ["quick", "(", "brown", ")", "fox"]),
        ("jump  over", ["jump", "over"]),
        ("zebra🙂 naïve", ["zebra", "🙂", "naïve"]),
    ],
)
def test_words_end_at_spaces_and_punctuation_in_every_family(tokenizers, family, text, expected):
    assert [word for word in words(tokenizers[family], text) if word] == expected


def test_bert_words_are_those_of_its_own_pretokens(tokenizers):
    found = words(tokenizers["bert"], "Don't tokenise unbelievably 日本")
    assert found == ["Don", "'", "t", "tokenise", "unbelievably", "日", "本"]


@pytest.mark.parametrize("family", ["roberta", "modernbert", "xlm_roberta"])
def test_a_text_without_spaces_is_no_single_word(tokenizers, family):
    for text in ("京日はテ東で空の首書語しキ白す", "ไทยประเทศวรรคเขียนไม่เว้นโดยประเทศ"):
        tokens = tokenize(tokenizers[family], [text])[0]
        assert tokens.word_starts.sum() > len(text) / 6


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_no_word_starts_inside_a_character_of_several_byte_tokens(tokenizers, family):
    text = "鬱鬱 🙂x"  # characters that the training text lacks: three or four byte tokens each
    tokens = tokenize(tokenizers[family], [text])[0]
    assert len(tokens.token_ids) > 8
    assert [word for word in words(tokenizers[family], text) if word] == ["鬱", "鬱", "🙂", "x"]


@given(text=TEXTS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_are_the_tokenizers_own_and_starts_and_ends_are_sound(tokenizers, family, text):
    tokenizer = tokenizers[family]
    tokens = tokenize(tokenizer, [text])[0]
    assert tokens.token_ids.tolist() == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert len(tokens.token_ids) == len(tokens.word_starts) == len(tokens.ends)
    if len(tokens.token_ids):
        assert tokens.word_starts[0]
        assert (np.diff(tokens.ends) >= 0).all() and tokens.ends[-1] <= len(text)


def test_text_that_spells_special_tokens_gives_no_special_token(tokenizers, family):
    tokenizer = tokenizers[family]
    tokens = tokenize(tokenizer, ["a [MASK] b [SEP] c <mask> d </s> [CLS] <s> <pad>"])[0]
    specials = special_ids(tokenizer)
    assert not set(tokens.token_ids.tolist()) & (set(specials["all"]) - {specials["unk"]})


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
