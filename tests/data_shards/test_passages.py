"""Passages: nothing lost, nothing too long, cut where sentences start."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quincunx.data_shards.passages import Passage, split_documents, text_parts
from quincunx.data_shards.records import Document, ReadReport
from quincunx.data_shards.words import tokenize


def split_document(document: Document, *given, **options) -> list[Passage]:
    return next(split_documents([document], *given, **options))[1]


SINGLE = ["fox", "Dog.", "naïve", "word-wide,", "Dr.", "10°C!", "日本語のテキスト。", "retrieval", "x" * 40, "🙂"]
WORDS = st.sampled_from([*SINGLE, "\n\n", "(see p. 3)"])
PARAGRAPHS = st.lists(WORDS, min_size=1, max_size=25).map(" ".join).filter(str.strip).map(str.strip)
DOCUMENTS = st.builds(
    lambda title, paragraphs, collection: Document(
        "doc", title, tuple(paragraphs), tuple(f"p{k}" for k in range(len(paragraphs))) if collection else ()
    ),
    st.sampled_from(["", "A title"]),
    st.lists(PARAGRAPHS, min_size=1, max_size=5),
    st.booleans(),
)


@given(document=DOCUMENTS, max_tokens=st.integers(3, 40), with_titles=st.booleans())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_passages_tokens_are_the_documents_and_none_is_too_long(
    tokenizers, family, document, max_tokens, with_titles
):
    tokenizer = tokenizers[family]
    passages = split_document(document, tokenizer, max_tokens, with_titles)
    whole = tokenize(tokenizer, [" ".join(parts) for parts in text_parts(document, with_titles)])
    assert np.concatenate([p.token_ids for p in passages]).tolist() == [t for text in whole for t in text.token_ids]
    assert all(1 <= len(p.token_ids) <= max_tokens - 2 for p in passages)
    assert all(p.word_starts[0] and len(p.word_starts) == len(p.token_ids) for p in passages)
    assert len({p.passage_id for p in passages}) == len(passages)


@given(document=DOCUMENTS, max_tokens=st.integers(16, 40))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_words_are_cut_only_where_one_is_longer_than_a_passage(tokenizers, family, document, max_tokens):
    tokenizer, report = tokenizers[family], ReadReport()
    ((_, passages),) = split_documents([document], tokenizer, max_tokens, report=report)
    texts = [" ".join(parts) for parts in text_parts(document)]
    starts = np.concatenate([tokens.word_starts for tokens in tokenize(tokenizer, texts)])
    longest = np.diff(np.flatnonzero(np.append(starts, True))).max()
    first_tokens = np.cumsum([0, *(len(p.token_ids) for p in passages[:-1])])
    assert report.counts["cut_words"] == (~starts[first_tokens]).sum()
    if longest <= max_tokens - 2:
        assert report.counts["cut_words"] == 0


def test_passages_are_whole_sentences_while_they_fit(bert):
    sentences = [f"Sentence number {k} has exactly nine words in it." for k in range(7)]  # 10 tokens each
    document = Document("d", "", (" ".join(sentences[:4]), " ".join(sentences[4:])))
    passages = split_document(document, bert, 2 + 35)
    assert [p.text for p in passages] == [" ".join(sentences[:3]), " ".join(sentences[3:6]), sentences[6]]
    assert [p.passage_id for p in passages] == ["d#0", "d#1", "d#2"]


def test_a_sentence_too_long_starts_its_own_passage_and_is_cut_between_words(bert):
    document = Document("d", "", ("Short one. " + "Unbelievably unbelievably " * 15 + "end. Last one.",))
    passages = split_document(document, bert, 2 + 20)
    assert passages[0].text == "Short one."
    assert passages[1].text.startswith("Unbelievably unbelievably")
    assert passages[-1].text.endswith("end. Last one.")
    assert all(
        set(p.text.split()) <= {"Short", "one.", "Unbelievably", "unbelievably", "end.", "Last"} for p in passages
    )


def test_titles_open_documents_and_every_passage_of_a_collection(bert):
    running = Document("d", "Heading", ("First.", "Second."))
    assert [p.text for p in split_document(running, bert, 64)] == ["Heading First. Second."]
    assert [p.text for p in split_document(running, bert, 64, with_titles=False)] == ["First. Second."]
    collection = Document("d", "Heading", ("First.", "Second."), ("17", "18"), ("", "which one?"))
    passages = split_document(collection, bert, 64)
    assert [(p.passage_id, p.text, p.query) for p in passages] == [
        ("17", "Heading First.", ""),
        ("18", "Heading Second.", "which one?"),
    ]


def test_a_long_passage_of_a_collection_is_cut_and_numbered_and_counted(bert):
    document = Document("x", "", ("One two three. " * 10, "One."), ("x", "y"), ("what?", ""))
    report = ReadReport()
    ((_, passages),) = split_documents([document], bert, 2 + 16, report=report)
    assert [p.passage_id for p in passages] == ["x#0", "x#1", "x#2", "y"]
    assert [p.query for p in passages] == ["what?", "", "", ""]
    assert report.counts["cut_passages"] == 1


def test_a_text_without_tokens_is_counted_and_gives_no_passage_and_one_token_is_enough(bert):
    documents = [Document("blank", "", ("\u200b\u00ad",)), Document("one", "", ("fox",))]
    report = ReadReport()
    split = {d.doc_id: passages for d, passages in split_documents(documents, bert, 3, report=report)}
    assert split["blank"] == [] and [p.token_ids.tolist() for p in split["one"]] == [
        bert.convert_tokens_to_ids(["fox"])
    ]
    assert report.counts["empty_passages"] == 1
