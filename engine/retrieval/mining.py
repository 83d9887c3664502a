"""Hard negatives: what a run ranks high and no judgement calls relevant, with the filters that keep false ones out.

A run is read query by query, so that a run of 500,000 queries and 200 passages each costs the memory of one query (and
of the ids seen). Random passages are a pure function of (seed, query id) and the corpus.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.setting import setting
from quincunx.engine.retrieval.answers import has_answer
from quincunx.engine.retrieval.candidates import Candidates
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.judgements import iterate_run

RANDOM_CODE = 0x6D696E65  # "mine": apart from the task codes of pre-training
MAX_NAMED = 3
MAX_DRAWS = 100
"""Random draws for each passage that is needed; a corpus that gives none in so many leaves the query short."""


@dataclass(frozen=True, kw_only=True)
class MiningRules:
    """What makes a passage of a run a negative."""

    depth: int = setting(200, low=1)
    """Ranks of the run that are looked at, positives counted."""
    skip_top: int = setting(0, low=0)
    """Ranks at the top that are left out, positives counted."""
    num_negatives: int | None = setting(None, low=1)
    """Most passages of the run that a query keeps, best first (None: all that are left)."""
    relevant_from: int = setting(1, low=1)
    """Lowest grade of a positive; passages judged relevant below it are neither positives nor negatives."""
    margin: float = 0.0
    """With teacher scores: a negative must score below the positive's score minus this."""
    margin_from: Literal["best", "worst"] = "best"
    """Which of a query's positives the margin counts from, by teacher score."""
    random_fill: int = setting(0, low=0)
    """A query with fewer negatives than this gets random passages up to it."""
    random_extra: int = setting(0, low=0)
    """Random passages that every query gets besides."""
    seed: int = setting(0, low=0, below=2**32)
    """Of the random passages."""
    drop_queries_without_positives: bool = False
    """Leaves out queries of the run that no positive is judged for (counted), instead of refusing the run."""
    drop_queries_without_negatives: bool = False
    """Leaves out queries that no negative is left of (counted), instead of refusing the settings."""
    unknown_ids: Literal["error", "drop"] = "error"
    """What is done about ids of the run and qrels that queries and corpus do not have; dropped ones are counted."""

    def contradictions(self) -> list[str]:
        """What is wrong with values that are each in range, as clauses."""
        if self.skip_top < self.depth:
            return []
        return [f"skip_top is {self.skip_top} and depth {self.depth}: give a depth beyond skip_top"]


def stream_run(path: str | Path, depth: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """(query id, its `depth` best passage ids, best first; equal scores by id) of a TREC run, query by query.

    Raises:
        DataError: as judgements.iterate_run, or lines of one query apart from each other.
    """
    seen: set[str] = set()
    for number, query_id, scores in iterate_run(path):
        if query_id in seen:
            raise DataError(f"{path}:{number}: query {query_id} goes on after others: sort the run by query")
        seen.add(query_id)
        yield query_id, _best_first(scores, depth)


def _best_first(scores: dict[str, float], depth: int | None) -> list[str]:
    return sorted(scores, key=lambda id: (-scores[id], id))[:depth]


@dataclass
class Unfit:
    """Queries or passages that a rule has no answer for: how many, and the first few by name."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, *names: str) -> None:
        self.count += len(names)
        self.first += names[: MAX_NAMED - len(self.first)]

    def __str__(self) -> str:
        return f"(first: {', '.join(self.first)})"


class TeacherScores:
    """Teacher scores by query, read along with the run: a file in the run's order never stands in memory."""

    def __init__(self, rows: Iterable[Candidates], name: str):
        self.name = name
        self._rows = iter(rows)
        self._passed: dict[str, dict[str, float]] = {}

    def take(self, query_id: str) -> dict[str, float]:
        """The query's scores by passage id, once; empty where the file has none."""
        if query_id in self._passed:
            return self._passed.pop(query_id)
        for row in self._rows:
            if row.query_id == query_id:
                return row.scores or {}
            self._passed[row.query_id] = row.scores or {}
        return {}


def mine(
    run: Iterable[tuple[str, list[str]]],
    qrels: dict[str, dict[str, int]],
    queries: Collection,
    passages: Collection,
    rules: MiningRules,
    counts: dict[str, int],
    *,
    answers: dict[str, list[str]] | None = None,
    teacher: TeacherScores | None = None,
) -> Iterator[Candidates]:
    """The training queries of a run: positives in the qrels' order, negatives best first, random passages last.

    run: (query id, passage ids best first), as stream_run gives them. qrels: grades of passages that `passages` has.
    counts: filled on the way: how many queries and passages came in, were kept, and were left out by which rule.
    answers: by query id; a passage whose text contains one of the query's answers is no negative.
    teacher: scores of the positives and of every passage that is no negative by another rule already.

    Raises (after the last query, so that the counts are whole):
        DataError: unknown ids, queries without positives or without negatives, teacher scores missing.
    """
    counts.update(dict.fromkeys(COUNTED, 0))
    unfit = {name: Unfit() for name in ("queries", "passages", "positives", "negatives", "scores")}
    seen, empty = set(), set(passages.empty_rows.tolist())
    for query_id, ranked in run:
        counts["queries_of_the_run"] += 1
        if query_id not in queries:
            unfit["queries"].add(query_id)
            continue
        seen.add(query_id)
        grades = qrels.get(query_id, {})
        positives = tuple(id for id, grade in grades.items() if grade >= rules.relevant_from)
        if not positives:
            unfit["positives"].add(query_id)
            continue
        ranked = ranked[: rules.depth]
        rows = passages.rows(ranked)
        unfit["passages"].add(*(id for id, row in zip(ranked, rows, strict=True) if row < 0))
        scores = None if teacher is None else teacher.take(query_id)
        limit = _score_limit(query_id, positives, scores, rules, unfit["scores"])
        own_answers = None if answers is None else answers.get(query_id)
        counts["queries_without_answers"] += answers is not None and not own_answers
        negatives, left_out = [], []
        for rank, (id, row) in enumerate(zip(ranked, rows, strict=True), 1):
            if rules.num_negatives is not None and len(negatives) == rules.num_negatives:
                break
            if row < 0:
                continue
            reason = None
            if grades.get(id, 0) > 0:
                reason = "positives" if grades[id] >= rules.relevant_from else "partly_relevant"
            elif rank <= rules.skip_top:
                reason = "skipped_at_the_top"
            elif row in empty:
                reason = "without_text"
            elif own_answers and has_answer(passages.text_at(row), own_answers):
                reason = "with_an_answer"
            elif scores is not None and id not in scores:
                unfit["scores"].add(f"{query_id} {id}")
            elif limit is not None and scores[id] >= limit:
                reason = "above_the_teachers_margin"
            counts["passages_of_the_run"] += 1
            if reason is None:
                negatives.append(id)
            else:
                counts[f"left_out_{reason}"] += 1
                left_out.append(id)
        counts["mined"] += len(negatives)
        wanted = max(rules.random_fill - len(negatives), 0) + rules.random_extra
        taken = {*grades, *negatives, *left_out}
        random = _random_passages(passages, query_id, rules.seed, taken, empty, own_answers, wanted)
        counts["random"] += len(random)
        counts["random_missing"] += wanted - len(random)
        if not negatives and not random:
            unfit["negatives"].add(query_id)
            continue
        counts["queries"] += 1
        yield Candidates(query_id, positives, (*negatives, *random))
    counts["queries_unknown"], counts["passages_unknown"] = unfit["queries"].count, unfit["passages"].count
    counts["queries_without_positives"] = unfit["positives"].count
    counts["queries_without_negatives"] = unfit["negatives"].count
    counts["judged_queries_not_in_the_run"] = sum(
        query_id not in seen and max(grades.values(), default=0) >= rules.relevant_from
        for query_id, grades in qrels.items()
    )
    _refuse_unfit(unfit, rules, queries, passages, None if teacher is None else teacher.name)


COUNTED = (
    "queries",
    "mined",
    "random",
    "random_missing",
    "queries_of_the_run",
    "passages_of_the_run",
    "left_out_positives",
    "left_out_partly_relevant",
    "left_out_skipped_at_the_top",
    "left_out_without_text",
    "left_out_with_an_answer",
    "left_out_above_the_teachers_margin",
    "queries_without_answers",
)


def _score_limit(
    query_id: str, positives: tuple[str, ...], scores: dict[str, float] | None, rules: MiningRules, missing: Unfit
) -> float | None:
    """The teacher score at and above which a passage is no negative of this query."""
    if scores is None:
        return None
    unscored = [f"{query_id} {id}" for id in positives if id not in scores]
    missing.add(*unscored)
    if unscored:
        return None
    choose = max if rules.margin_from == "best" else min
    return choose(scores[id] for id in positives) - rules.margin


def _refuse_unfit(
    unfit: dict[str, Unfit], rules: MiningRules, queries: Collection, passages: Collection, teacher: str | None
) -> None:
    """Raises DataError for the first rule that has no answer for some query or passage and may not drop it."""
    if rules.unknown_ids == "error":
        for what, collection in (("queries", queries), ("passages", passages)):
            if unfit[what].count:
                raise DataError(
                    f"the run names {unfit[what].count} {what} that {collection.name} does not have {unfit[what]}: "
                    "give the files that belong together, or leave them out with --unknown_ids drop"
                )
    if unfit["positives"].count and not rules.drop_queries_without_positives:
        raise DataError(
            f"no positive of grade {rules.relevant_from} or more is judged for {unfit['positives'].count} queries of "
            f"the run {unfit['positives']}: give the qrels of these queries, or --drop_queries_without_positives"
        )
    if unfit["scores"].count:
        raise DataError(
            f"{teacher} lacks the teacher's score of {unfit['scores'].count} candidates {unfit['scores']}: score the "
            "candidates of this run at this depth with launchers/score.py"
        )
    if unfit["negatives"].count and not rules.drop_queries_without_negatives:
        raise DataError(
            f"no negative is left of {unfit['negatives'].count} queries {unfit['negatives']}: give more depth, weaker "
            "filters or --random_fill, or leave these queries out with --drop_queries_without_negatives"
        )


def _random_passages(
    passages: Collection,
    query_id: str,
    seed: int,
    taken: set[str],
    empty: set[int],
    answers: list[str] | None,
    wanted: int,
) -> list[str]:
    """`wanted` passages (fewer where the corpus has no more): not in `taken`, not empty, without an answer."""
    chosen: list[str] = []
    taken = set(taken)
    for row in _random_rows(seed, query_id, len(passages), MAX_DRAWS * wanted):
        if len(chosen) == wanted:
            break
        id = passages.id_at(row)
        if id not in taken and row not in empty and not (answers and has_answer(passages.text_at(row), answers)):
            taken.add(id)
            chosen.append(id)
    return chosen


def _random_rows(seed: int, query_id: str, num_passages: int, num_draws: int) -> Iterator[int]:
    """Rows drawn with replacement, by a stateless hash of (seed, query id, draw)."""
    from quincunx.data_shards.hashing import draw30, text_key

    query_hash = np.uint64(xxhash.xxh3_64_intdigest(query_id.encode())).astype(np.int64)
    key = text_key(np.uint32(seed), 0, query_hash, RANDOM_CODE)
    for draw in range(num_draws):
        yield int(draw30(key, draw, 0)) * num_passages >> 30
