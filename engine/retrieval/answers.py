"""Answer match as open-domain question answering reports it: does a passage contain an answer, as a run of words?

DPR's rule (Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question Answering", section 5): text and answer
are normalised to NFD, cut into words (letters, digits and marks) and single other characters, lower-cased; an answer
matches where its words follow each other in the text. The title is not searched.
"""

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import regex

from quincunx.data_shards.errors import DataError
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.evaluation import Evaluation, count_queries
from quincunx.engine.retrieval.trec import Run, best_first

WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def as_phrase(text: str) -> str:
    """Lower-cased words and single other characters of the NFD-normalised text, single spaces between and at both ends.

    No word holds a space, so that one phrase contains another where its words follow each other.
    """
    words = (word.lower() for word in WORD.findall(unicodedata.normalize("NFD", text)))
    return f" {' '.join(words)} "


_answer_phrase = lru_cache(maxsize=1 << 16)(as_phrase)


@lru_cache(maxsize=1 << 16)
def _answer_pattern(answer: str) -> Any:
    try:
        return regex.compile(
            unicodedata.normalize("NFD", answer), flags=regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
        )
    except regex.error as error:
        raise DataError(
            f"the answer {answer!r} is no regular expression ({error}): fix it or match plain text"
        ) from None


def has_answer(text: str, answers: Iterable[str], is_regex: bool = False) -> bool:
    """Whether the text contains one of the answers; an answer without any word matches nothing.

    is_regex: the answers are regular expressions (CuratedTREC's), searched without regard to case.
    """
    if is_regex:
        normal = unicodedata.normalize("NFD", text)
        return any(_answer_pattern(answer).search(normal) is not None for answer in answers)
    phrase = as_phrase(text)
    return any(wanted in phrase for answer in answers if (wanted := _answer_phrase(answer)).strip())


def answer_hits(
    run: Run,
    answers: Mapping[str, Sequence[str]],
    passages: Collection,
    depths: Sequence[int] = (20, 100),
    is_regex: bool = False,
) -> Evaluation:
    """AnswerHit@d for each depth d: is an answer in one of the best d passages (1 or 0), per question and on average.

    Equal scores are ordered by passage id. A question that the run does not answer counts 0.

    passages: read with titles=False.

    Raises:
        DataError: the run names a passage that is not there, or answers none of the questions.
    """
    counts = count_queries(run, answers)
    per_query: dict[str, dict[str, float]] = {f"AnswerHit@{depth}": {} for depth in depths}
    for query_id, wanted in answers.items():
        best = best_first(run.get(query_id, {}), max(depths))
        texts = map(passages.text_at, passages.known_rows(best, "passages", "the run"))
        ranks = (rank for rank, text in enumerate(texts, 1) if has_answer(text, wanted, is_regex))
        first = next(ranks, math.inf)
        for depth in depths:
            per_query[f"AnswerHit@{depth}"][query_id] = float(first <= depth)
    means = {name: sum(values.values()) / len(values) for name, values in per_query.items()}
    return Evaluation(means, per_query, counts)
