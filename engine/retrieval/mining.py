"""Hard negatives: what a run ranks high and no judgement calls relevant, with the filters that keep false ones out.

A run is read query by query, so that a run of 500,000 queries and 200 passages each costs the memory of one query (and
of the ids seen). Random passages are a pure function of (seed, query id) and the corpus.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

import numpy as np
import xxhash

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.setting import setting
from quincunx.engine.retrieval.answers import answer_matcher
from quincunx.engine.retrieval.candidates import Candidates
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.files import first_of
from quincunx.engine.retrieval.trec import UNKNOWN_IDS

RANDOM_CODE = 0x6D696E65  # "mine": apart from the task codes of pre-training
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
    """Maximum number of passages of the run that a query keeps, best first (None: all that are left)."""
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
    unfit: dict[str, list[str]] = {name: [] for name in ("queries", "passages", "positives", "negatives", "scores")}
    seen, empty = set(), set(passages.empty_rows.tolist())
    for query_id, ranked in run:
        counts["queries_of_the_run"] += 1
        if query_id not in queries:
            unfit["queries"].append(query_id)
            continue
        seen.add(query_id)
        grades = qrels.get(query_id, {})
        positives = tuple(id for id, grade in grades.items() if grade >= rules.relevant_from)
        if not positives:
            unfit["positives"].append(query_id)
            continue
        scores, limit = None if teacher is None else teacher.take(query_id), None
        if scores is not None:
            unscored = [f"{query_id} {id}" for id in positives if id not in scores]
            unfit["scores"] += unscored
            if not unscored:
                choose = max if rules.margin_from == "best" else min
                limit = choose(scores[id] for id in positives) - rules.margin
        own_answers = None if answers is None else answers.get(query_id)
        counts["queries_without_answers"] += answers is not None and not own_answers
        has_answer = answer_matcher(own_answers or ())
        negatives, left_out = [], []
        ranked = ranked[: rules.depth]
        for rank, (id, row) in enumerate(zip(ranked, passages.rows(ranked), strict=True), 1):
            if row < 0:
                unfit["passages"].append(id)
                continue
            if len(negatives) == rules.num_negatives:
                continue
            reason = None
            if grades.get(id, 0) > 0:
                reason = "positives" if grades[id] >= rules.relevant_from else "partly_relevant"
            elif rank <= rules.skip_top:
                reason = "skipped_at_the_top"
            elif row in empty:
                reason = "without_text"
            elif own_answers and has_answer(passages.text_at(row)):
                reason = "with_an_answer"
            elif scores is not None and id not in scores:
                unfit["scores"].append(f"{query_id} {id}")
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
        random: dict[str, None] = {}
        for row in islice(_random_rows(query_id, rules.seed, len(passages)), MAX_DRAWS * wanted):
            if len(random) == wanted:
                break
            id = passages.id_at(row)
            if id in taken or row in empty or (own_answers and has_answer(passages.text_at(row))):
                continue
            random[id] = None
        counts["random"] += len(random)
        counts["random_missing"] += wanted - len(random)
        if not negatives and not random:
            unfit["negatives"].append(query_id)
            continue
        counts["queries"] += 1
        yield Candidates(query_id, positives, (*negatives, *random))
    counts["queries_unknown"], counts["passages_unknown"] = len(unfit["queries"]), len(unfit["passages"])
    counts["queries_without_positives"] = len(unfit["positives"])
    counts["queries_without_negatives"] = len(unfit["negatives"])
    counts["judged_queries_not_in_the_run"] = sum(
        query_id not in seen and max(grades.values(), default=0) >= rules.relevant_from
        for query_id, grades in qrels.items()
    )
    _refuse_unfit(unfit, rules, queries, passages, teacher)


COUNTED = (
    "queries", "mined", "random", "random_missing", "queries_of_the_run", "passages_of_the_run", "left_out_positives",
    "left_out_partly_relevant", "left_out_skipped_at_the_top", "left_out_without_text", "left_out_with_an_answer",
    "left_out_above_the_teachers_margin", "queries_without_answers",
)  # fmt: skip


def _refuse_unfit(
    unfit: dict[str, list[str]],
    rules: MiningRules,
    queries: Collection,
    passages: Collection,
    teacher: TeacherScores | None,
) -> None:
    """Raises DataError for the first rule that has no answer for some query or passage and may not drop it."""
    if rules.unknown_ids == "error":
        queries.known_rows(unfit["queries"], "queries", "the run", UNKNOWN_IDS)
        passages.known_rows(unfit["passages"], "passages", "the run", UNKNOWN_IDS)
    named = {name: first_of(ids) for name, ids in unfit.items()}
    number = {name: len(ids) for name, ids in unfit.items()}
    if unfit["positives"] and not rules.drop_queries_without_positives:
        raise DataError(
            f"no positive of grade {rules.relevant_from} or more is judged for {number['positives']} queries of the "
            f"run {named['positives']}: give the qrels of these queries, or --drop_queries_without_positives"
        )
    if unfit["scores"]:
        raise DataError(
            f"{teacher.name} lacks the teacher's score of {number['scores']} candidates {named['scores']}: score the "
            "candidates of this run at this depth with launchers/score.py"
        )
    if unfit["negatives"] and not rules.drop_queries_without_negatives:
        raise DataError(
            f"no negative is left of {number['negatives']} queries {named['negatives']}: give more depth, weaker "
            "filters or --random_fill, or leave these queries out with --drop_queries_without_negatives"
        )


def _random_rows(query_id: str, seed: int, num_passages: int) -> Iterator[int]:
    """Rows of passages without end, drawn with replacement by a stateless hash of (seed, query id, draw)."""
    from quincunx.data_shards.hashing import draw30, text_key

    query_hash = np.uint64(xxhash.xxh3_64_intdigest(query_id.encode())).astype(np.int64)
    key = text_key(np.uint32(seed), 0, query_hash, RANDOM_CODE)
    for draw in count():
        yield int(draw30(key, draw, 0)) * num_passages >> 30
