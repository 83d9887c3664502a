"""Answer match as open-domain question answering reports it: does a passage contain an answer, as a run of words?

DPR's rule (Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question Answering", section 5): text and answer
are normalised to NFD, cut into words (letters, digits and marks) and single other characters, lower-cased; an answer
matches where its words follow each other in the text. The title is not searched.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

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


def answer_matcher(answers: Iterable[str], is_regex: bool = False) -> Callable[[str], bool]:
    """Whether a text contains one of the answers, as a function of the text; an answer without any word matches none.

    is_regex: the answers are regular expressions (CuratedTREC's), searched without regard to case.

    Raises DataError for an answer that is no regular expression.
    """
    if is_regex:
        patterns = list(map(_compiled, answers))
        return lambda text: any(pattern.search(unicodedata.normalize("NFD", text)) for pattern in patterns)
    phrases = [phrase for phrase in map(as_phrase, answers) if phrase.strip()]

    def has_phrase(text: str) -> bool:
        own = as_phrase(text)
        return any(phrase in own for phrase in phrases)

    return has_phrase


def _compiled(answer: str) -> regex.Pattern:
    try:
        return regex.compile(unicodedata.normalize("NFD", answer), regex.IGNORECASE | regex.MULTILINE)
    except regex.error as error:
        raise DataError(
            f"the answer {answer!r} is not a regular expression ({error}): fix it, or leave out --answer_regex"
        ) from None


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
        matches = answer_matcher(wanted, is_regex)
        ranks = (rank for rank, text in enumerate(texts, 1) if matches(text))
        first = next(ranks, math.inf)
        for depth in depths:
            per_query[f"AnswerHit@{depth}"][query_id] = float(first <= depth)
    means = {name: sum(values.values()) / len(values) for name, values in per_query.items()}
    return Evaluation(means, per_query, counts)
