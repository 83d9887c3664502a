"""Candidates: for each training query its positives, its mined negatives, and a teacher's scores of both.

Our file is JSONL with a manifest beside it; SimLM's published JSONL, and Parquet of the same fields, are read too. One
line:

    {"query_id": "q7", "positives": ["p3"], "negatives": ["p9", "p4"], "positive_scores": [8.1],
     "negative_scores": [2.5, null]}
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quincunx.data_shards.artefact import manifest_path, open_artefact
from quincunx.data_shards.durable import written_whole
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.records import BadRecordError, check_id, parse_objects
from quincunx.engine.retrieval.files import first_of

CANDIDATES = "candidates"
ENDING = ".jsonl"


@dataclass(frozen=True)
class Candidates:
    """One training query.

    positives   passage ids, at least one
    negatives   passage ids, best (hardest) first, none of them a positive
    scores      teacher score by passage id, of positives and negatives, or None; `check_scores` wants every one
    """

    query_id: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    scores: dict[str, float] | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """Positives, then negatives."""
        return (*self.positives, *self.negatives)


def check_scores(rows: Iterable[Candidates], name: str) -> None:
    """Raises DataError if a teacher's score is missing for a candidate, with counts and the first three."""
    missing = [(row.query_id, id) for row in rows for id in row.ids if id not in (row.scores or {})]
    if missing:
        raise DataError(
            f"{name} lacks the teacher's score of {len(missing)} candidates of {len({query for query, _ in missing})} "
            f"queries {first_of(map(' '.join, missing))}: score the file with launchers/score.py"
        )


def check_negatives(rows: Iterable[Candidates], name: str) -> None:
    """Raises DataError if a query has no negative at all, with counts and the first three."""
    empty = [row.query_id for row in rows if not row.negatives]
    if empty:
        raise DataError(
            f"{name} has no negatives for {len(empty)} queries {first_of(empty)}: mine with more depth, weaker filters "
            "or random fill, or remove these queries"
        )


def write_candidates(path: Path, rows: Iterable[Candidates]) -> dict[str, int]:
    """Writes JSONL, whole or not at all; returns its counts.

    Raises DataError if there are no rows; nothing is overwritten then.
    """
    counts = dict.fromkeys(("queries", "positives", "negatives", "scores"), 0)

    with written_whole(path) as file:
        for row in rows:
            assert row.positives and len(set(row.ids)) == len(row.ids)
            counts["queries"] += 1
            counts["positives"] += len(row.positives)
            counts["negatives"] += len(row.negatives)
            record = {"query_id": row.query_id, "positives": list(row.positives), "negatives": list(row.negatives)}
            if row.scores is not None:
                counts["scores"] += len(row.scores)
                for side in ("positive", "negative"):
                    scores = (row.scores.get(id) for id in record[f"{side}s"])
                    record[f"{side}_scores"] = [None if score is None else float(score) for score in scores]
            file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
        if not counts["queries"]:
            raise DataError(f"no candidates to write to {path}: every query was left out, or there was none")
    return counts


def iterate_candidates(path: str | Path) -> Iterator[Candidates]:
    """The candidates of a file of ours or of SimLM's JSONL, in order; equal ids are one object.

    SimLM's {"query_id", "positives": {"doc_id": [..], "score": [..]}, "negatives": {...}} carries a score of its
    retriever or of its teacher: if all candidates have one, it is taken as the teacher's.

    Raises:
        DataError: no such file, one that its manifest does not match, a bad record (file and line), a query without
            positives or twice, a negative that is a positive.
    """
    if manifest_path(path).exists():  # a file of ours
        open_artefact(path, CANDIDATES, single=True, verify=True)
    known: dict[str, str] = {}
    seen = set()

    def parse(record: dict) -> Candidates:
        row = parse_candidates(record, known)
        if row.query_id in seen:
            raise BadRecordError(f"the query {row.query_id!r} comes a second time")
        seen.add(row.query_id)
        return row

    for _, row in parse_objects(path, parse):
        yield row


def parse_candidates(record: dict, known: dict[str, str]) -> Candidates:
    """One record of either shape; `known` holds the ids met so far, so that each is one object.

    Raises BadRecordError, too if no positive is in it, an id is in it twice, or a score is not finite.
    """
    query_id = check_id(record.get("query_id"), "query_id")
    sides, found = [], {}
    for side in ("positive", "negative"):
        ids, scores = record.get(f"{side}s"), record.get(f"{side}_scores")
        is_simlm = isinstance(ids, dict)
        if is_simlm:
            ids, scores = ids.get("doc_id"), ids.get("score")
        ids = _parse_ids(ids, f"{side}s", known)
        if scores is None:
            scores = [None] * len(ids)
        elif not isinstance(scores, list) or len(scores) != len(ids):
            raise BadRecordError(f"{side}s and their scores are not two lists of one length")
        sides.append(tuple(dict.fromkeys(ids)) if is_simlm else ids)  # SimLM's have some twice: the better place counts
        found |= dict(zip(reversed(ids), reversed(scores)))
    if is_simlm and None in found.values():  # of some candidates only
        found = {}
    try:
        scores = {id: float(score) for id, score in found.items() if score is not None}
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRecordError(f"a score is no number ({error})") from None
    row = Candidates(query_id, *sides, scores or None)
    if not row.positives:
        raise BadRecordError(f"the query {query_id!r} has no positive")
    if len(set(row.ids)) != len(row.ids):
        if both := sorted(set(row.positives) & set(row.negatives)):
            raise BadRecordError(f"the negative {both[0]!r} of the query {query_id!r} is one of its positives")
        raise BadRecordError(f"the query {query_id!r} has a candidate twice")
    for id, score in scores.items():
        if not math.isfinite(score):
            raise BadRecordError(f"the score of {id!r} for the query {query_id!r} is {score}")
    return row


def _parse_ids(ids: Any, name: str, known: dict[str, str]) -> tuple[str, ...]:
    if not isinstance(ids, list):
        raise BadRecordError(f"{name} is {type(ids).__name__}, a list of passage ids is needed")
    if not all(type(id) is str for id in ids):
        ids = [check_id(id, f"an id of {name}") for id in ids]
    if "" in ids:
        raise BadRecordError(f"{name} holds an empty id")
    return tuple(map(known.setdefault, ids, ids))
