"""Documents to passages: sentences packed greedily, nothing thrown away.

The text of a document is its title and its paragraphs, joined by one space; it is tokenised as a whole and then only
cut, so that the passages' tokens in order are exactly the tokens of the text. A passage takes whole sentences while
they fit; a sentence longer than a passage starts a passage of its own and is cut at word starts; a single word longer
than a passage (a base64 blob) is cut inside.

A ready-made collection (passage_ids given) keeps its passages: each is title and paragraph, never joined with the next,
cut by the same rule if it is too long.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from quincunx.data_shards.records import Document, ReadReport
from quincunx.data_shards.words import Tokens, sentence_starts, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_SPECIAL = 2


@dataclass(frozen=True, eq=False)
class Passage:
    """One passage, n tokens, n at most max_tokens - 2 ([CLS] and [SEP] are not stored but counted).

    token_ids    int32 [n]
    word_starts  bool [n], the first always True
    text         its characters
    query        its natural query (a docstring's summary line), or ""
    """

    passage_id: str
    token_ids: np.ndarray
    word_starts: np.ndarray
    text: str
    query: str = ""


def text_parts(document: Document, with_titles: bool = True) -> list[list[str]]:
    """The texts that are tokenised, each in parts that one space joins; a sentence ends with its part.

    Running text is one text of title and paragraphs, a ready-made collection has one text of one part a passage.
    """
    title = [document.title] if with_titles and document.title else []
    if document.passage_ids:
        return [[" ".join([*title, paragraph])] for paragraph in document.paragraphs]
    return [[*title, *document.paragraphs]]


def cut_tokens(tokens: Tokens, boundaries: list[int], limit: int) -> list[tuple[int, int]]:
    """Token ranges [start, end) of the passages of one text; together they are [0, n).

    boundaries: characters at which a sentence starts. limit: maximum number of tokens of a range, 1 or more.
    """
    num_tokens = len(tokens.token_ids)
    # A token belongs to the sentence of its last character (a leading space is part of some tokens); a sentence that
    # starts inside a word, or between a lone space token and its letters, starts with that word.
    first_tokens = np.searchsorted(tokens.ends, np.asarray(boundaries), side="right")
    words = np.flatnonzero(tokens.word_starts)
    sentences = words[np.searchsorted(words, first_tokens, side="right") - 1]
    sentences[0] = 0
    ranges, start = [], 0
    while num_tokens - start > limit:
        end = _last_at_most(sentences, start + limit)
        if end <= start:
            end = _last_at_most(words, start + limit)
        if end <= start:
            end = start + limit
        ranges.append((start, end))
        start = end
    return [*ranges, (start, num_tokens)] if start < num_tokens else ranges


def _last_at_most(increasing: np.ndarray, limit: int) -> int:
    """The largest of the numbers that is at most `limit`; the first is 0."""
    return int(increasing[np.searchsorted(increasing, limit, side="right") - 1])


def split_documents(
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerFast",
    max_tokens: int,
    with_titles: bool = True,
    report: ReadReport | None = None,
) -> Iterator[tuple[Document, list[Passage]]]:
    """Every document with its passages, in order; a document without a token is given with none.

    Passage ids: the collection's own if it has them (with #0, #1... if a passage had to be cut), else the
    document's id with #0, #1... A query goes to the first piece of its paragraph.

    Args:
        max_tokens: maximum number of tokens of a passage, [CLS] and [SEP] counted, 3 or more.
        report: counts `empty_passages` (no token), `cut_passages` (of a collection, too long) and `cut_words`.
    """
    assert max_tokens > NUM_SPECIAL
    report = report or ReadReport()
    for document in documents:
        texts = text_parts(document, with_titles)
        tokenized = tokenize(tokenizer, [" ".join(parts) for parts in texts])
        passages: list[Passage] = []
        for k, (parts, tokens) in enumerate(zip(texts, tokenized)):
            passages += _cut_text(document, k, parts, tokens, max_tokens - NUM_SPECIAL, report)
        yield document, passages


def _cut_text(
    document: Document, k: int, parts: list[str], tokens: Tokens, limit: int, report: ReadReport
) -> list[Passage]:
    """The passages of the k-th text of a document."""
    if not len(tokens.token_ids):
        report.counts["empty_passages"] += 1
        return []
    text, collection = " ".join(parts), bool(document.passage_ids)
    bounds = [*accumulate((len(part) + 1 for part in parts[:-1]), initial=0), len(text)]
    sentences = [start + i for start, end in pairwise(bounds) for i in sentence_starts(text[start:end])]
    ranges = cut_tokens(tokens, sentences, limit)
    stem = document.passage_ids[k] if collection else document.doc_id
    report.counts["cut_passages"] += collection and len(ranges) > 1
    passages = []
    for number, (first, end) in enumerate(ranges):
        word_starts = tokens.word_starts[first:end].copy()
        report.counts["cut_words"] += not word_starts[0]
        word_starts[0] = True
        begin = int(tokens.ends[first - 1]) if first else 0
        stop = int(tokens.ends[end - 1]) if end < len(tokens.ends) else len(text)
        passages.append(
            Passage(
                passage_id=stem if collection and len(ranges) == 1 else f"{stem}#{number}",
                token_ids=tokens.token_ids[first:end],
                word_starts=word_starts,
                text=text[begin:stop].strip(),
                query=document.queries[k] if collection and document.queries and number == 0 else "",
            )
        )
    return passages
