"""Candidates: for each training query its positives, its mined negatives, and a teacher's scores of both.

Our file is JSONL or Parquet with a manifest beside it (files.py); SimLM's published JSONL is read too. One line:

    {"query_id": "q7", "positives": ["p3"], "negatives": ["p9", "p4"], "positive_scores": [8.1],
     "negative_scores": [2.5, null]}
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quincunx.data_shards.artefact import manifest_path, open_artefact, written_whole
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.records import BadRecordError, check_id
from quincunx.engine.retrieval.files import read_json_lines

KIND = "candidates"
ROWS_A_GROUP = 4096
MAX_NAMED = 3


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


def check_candidates(row: Candidates) -> None:
    """Raises BadRecordError: no positive, an id twice, a negative that is a positive, a score that is not finite."""
    if not row.positives:
        raise BadRecordError(f"the query {row.query_id!r} has no positive")
    ids = {*row.positives, *row.negatives}
    if len(ids) != len(row.positives) + len(row.negatives):
        both = sorted(set(row.positives) & set(row.negatives))
        if both:
            raise BadRecordError(f"the negative {both[0]!r} of the query {row.query_id!r} is one of its positives")
        raise BadRecordError(f"the query {row.query_id!r} has a candidate twice")
    if row.scores is not None:
        if not row.scores.keys() <= ids:
            foreign = next(id for id in row.scores if id not in ids)
            raise BadRecordError(f"the query {row.query_id!r} has a score for {foreign!r}, which is no candidate of it")
        if not all(map(math.isfinite, row.scores.values())):
            id = next(id for id, score in row.scores.items() if not math.isfinite(score))
            raise BadRecordError(f"the score of {id!r} for the query {row.query_id!r} is {row.scores[id]}")


def check_scores(rows: Iterable[Candidates], name: str) -> None:
    """Raises DataError where a teacher's score is missing for a candidate, with counts and the first three."""
    missing, queries, first = 0, 0, []
    for row in rows:
        scores = row.scores or {}
        lacking = [id for id in (*row.positives, *row.negatives) if id not in scores]
        missing += len(lacking)
        queries += bool(lacking)
        first += [f"{row.query_id} {id}" for id in lacking[: MAX_NAMED - len(first)]]
    if missing:
        raise DataError(
            f"{name} lacks the teacher's score of {missing} candidates of {queries} queries "
            f"(first: {', '.join(first)}): score the file with launchers/score.py"
        )


def check_negatives(rows: Iterable[Candidates], name: str) -> None:
    """Raises DataError where a query has no negative at all, with counts and the first three."""
    empty = [row.query_id for row in rows if not row.negatives]
    if empty:
        raise DataError(
            f"{name} has no negatives for {len(empty)} queries (first: {', '.join(empty[:MAX_NAMED])}): mine with more "
            "depth, weaker filters or random fill, or remove these queries"
        )


def write_candidates(path: str | Path, rows: Iterable[Candidates]) -> dict[str, int]:
    """Writes .jsonl or .parquet (by ending), whole or not at all; returns its counts.

    Raises:
        SettingsError: another ending, or a folder that cannot be written.
        DataError: no rows, or a row that check_candidates refuses, or a query twice; nothing is overwritten then.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise SettingsError(f"candidates cannot be written to {path}: give a name ending in .jsonl or .parquet")
    counts = dict.fromkeys(("queries", "positives", "negatives", "scores"), 0)
    checked = _counted(rows, str(path), counts)
    with written_whole(path, "wb") as file:
        if path.suffix == ".parquet":
            _write_parquet(file, checked)
        else:
            for record in checked:
                file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        if not counts["queries"]:
            raise DataError(f"no candidates to write to {path}: every query was left out, or there was none")
    return counts


def _counted(rows: Iterable[Candidates], name: str, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Each row as the record that is written, checked; `counts` is filled on the way."""
    seen = set()
    for row in rows:
        try:
            check_candidates(row)
        except BadRecordError as error:
            raise DataError(f"{name} is not written: {error}") from None
        if row.query_id in seen:
            raise DataError(f"{name} is not written: the query {row.query_id!r} comes twice")
        seen.add(row.query_id)
        counts["queries"] += 1
        counts["positives"] += len(row.positives)
        counts["negatives"] += len(row.negatives)
        record = {"query_id": row.query_id, "positives": list(row.positives), "negatives": list(row.negatives)}
        if row.scores is not None:
            counts["scores"] += len(row.scores)
            for side in ("positive", "negative"):
                record[f"{side}_scores"] = [_plain(row.scores.get(id)) for id in record[f"{side}s"]]
        yield record


def _plain(score: Any) -> float | None:
    return None if score is None else float(score)


def _write_parquet(file: Any, records: Iterable[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    ids, scores = pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.float64())
    schema = pyarrow.schema(
        [("query_id", pyarrow.string()), ("positives", ids), ("negatives", ids)]
        + [("positive_scores", scores), ("negative_scores", scores)]
    )
    with parquet.ParquetWriter(file, schema) as writer:
        group = []
        for record in records:
            group.append(record)
            if len(group) == ROWS_A_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
                group = []
        writer.write_table(pyarrow.Table.from_pylist(group, schema))


def read_candidates(path: str | Path) -> list[Candidates]:
    """All of `iterate_candidates`.

    Raises:
        DataError: as there, and a file without any.
    """
    rows = list(iterate_candidates(path))
    if not rows:
        raise DataError(f"{path} holds no candidates: give a file with at least one query")
    return rows


def iterate_candidates(path: str | Path) -> Iterator[Candidates]:
    """The candidates of a file of ours or of SimLM's JSONL, in order; equal ids are one object.

    SimLM's {"query_id", "positives": {"doc_id": [..], "score": [..]}, "negatives": {...}} carries a score of its
    retriever or of its teacher: where all candidates have one, it is taken as the teacher's.

    Raises:
        DataError: no such file, one that its manifest does not match, a bad record (file and line), a query without
            positives or twice, a negative that is a positive.
    """
    path = Path(path)
    if manifest_path(path).exists():  # a file of ours
        open_artefact(path, KIND, single=True, verify=True)
    known: dict[str, str] = {}
    seen = set()
    is_parquet = path.suffix == ".parquet"
    for number, record in _parquet_records(path) if is_parquet else read_json_lines(path):
        where = f"{path}: row {number}" if is_parquet else f"{path}:{number}"
        try:
            row = parse_candidates(record, known)
            check_candidates(row)
            if row.query_id in seen:
                raise BadRecordError(f"the query {row.query_id!r} comes a second time")
        except BadRecordError as error:
            raise DataError(f"{where}: {error}; mend or remove the record") from None
        seen.add(row.query_id)
        yield row


def _parquet_records(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        batches = parquet.ParquetFile(path).iter_batches()
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}): make it again") from None


def parse_candidates(record: dict, known: dict[str, str]) -> Candidates:
    """One record of either shape; `known` holds the ids met so far, so that each is one object."""
    query_id = check_id(record.get("query_id"), "query_id")
    sides, scored = [], []
    for side in ("positive", "negative"):
        ids, scores = record.get(f"{side}s"), record.get(f"{side}_scores")
        if isinstance(ids, dict):  # SimLM's
            ids, scores = ids.get("doc_id"), ids.get("score")
        sides.append(_ids(ids, f"{side}s", known))
        if scores is not None and (not isinstance(scores, list) or len(scores) != len(sides[-1])):
            raise BadRecordError(f"{side}s and their scores are not two lists of one length")
        scored.append(scores)
    positives, negatives = sides
    is_simlm = isinstance(record.get("positives"), dict)
    if is_simlm:
        negatives, scored[1] = _without_repeats(negatives, scored[1])
        if not all(scores is not None and None not in scores for scores in scored):
            scored = [None, None]
    if scored[0] is None and scored[1] is None:
        return Candidates(query_id, positives, negatives)
    scored = [scores or [None] * len(ids) for scores, ids in zip(scored, (positives, negatives))]
    pairs = zip((*positives, *negatives), (*scored[0], *scored[1]), strict=True)
    try:
        return Candidates(
            query_id, positives, negatives, {id: float(score) for id, score in pairs if score is not None}
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRecordError(f"a score is no number ({error})") from None


def _ids(ids: Any, name: str, known: dict[str, str]) -> tuple[str, ...]:
    if not isinstance(ids, list):
        raise BadRecordError(f"{name} is {type(ids).__name__}, a list of passage ids is needed")
    if not all(type(id) is str for id in ids):
        ids = [check_id(id, f"an id of {name}") for id in ids]
    if "" in ids:
        raise BadRecordError(f"{name} holds an empty id")
    return tuple(map(known.setdefault, ids, ids))


def _without_repeats(ids: Sequence[str], scores: list | None) -> tuple[tuple[str, ...], list | None]:
    """Each id once, at its best place."""
    first: dict[str, Any] = {}
    for id, score in zip(ids, scores or [None] * len(ids)):
        first.setdefault(id, score)
    return tuple(first), None if scores is None else list(first.values())
