"""Judgements, runs and answers: TREC's, BEIR's and MS MARCO's files, and the answers and positives in DPR's.

The formats, one example line each, stand in docs/evaluation.md. Every complaint names file and line.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from quincunx.data_shards.durable import written_whole
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.records import BadRecordError, check_id, parse_lines, parse_objects
from quincunx.engine.retrieval.collection import Collection, make_collection
from quincunx.engine.retrieval.files import first_of, read_questions

Qrels = dict[str, dict[str, int]]
"""query id -> passage id -> grade; 0 or less: judged and not relevant"""
Run = dict[str, dict[str, float]]
"""query id -> passage id -> score, higher is better, in the order of the file"""
Value = TypeVar("Value", int, float, str)
RunRows = Iterable[tuple[str, Iterable[str], Iterable[float]]]
RUN = "run"
"""Kind of artefact."""
BEIR_HEADER = ["query-id", "corpus-id", "score"]
MAX_GRADE = 10**6
NO_RESULTS = "{} holds no results: give a run with at least one line"
UNKNOWN_IDS = ", or leave such lines out with --unknown_ids drop"


def read_qrels(path: str | Path) -> Qrels:
    """Judgements in BEIR's form (header, qid, pid, grade) or TREC's and MS MARCO's (qid, 0, pid, grade).

    Raises:
        DataError: no such file, a malformed line, one passage judged twice with two grades, or nothing in it.
    """
    qrels: Qrels = {}

    def add(line: str) -> None:
        columns = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        if not line.strip() or (columns == BEIR_HEADER and not qrels):
            return
        try:
            query_id, passage_id, grade = columns if len(columns) == 3 else (columns[0], *columns[2:])
            grade = int(grade)
            if abs(grade) > MAX_GRADE:
                raise ValueError
        except ValueError:
            raise BadRecordError(
                f"{line.strip()[:80]!r} is neither query, passage, grade nor query, 0, passage, grade with a whole "
                f"number up to {MAX_GRADE} as grade"
            ) from None
        if (before := qrels.setdefault(query_id, {}).setdefault(passage_id, grade)) != grade:
            raise BadRecordError(f"passage {passage_id} of query {query_id} is judged {grade} here and {before} before")

    for _ in parse_lines(path, add):
        pass
    if not qrels:
        raise DataError(f"{path} holds no judgements: give qrels with at least one line")
    return qrels


def check_qrels(
    qrels: Qrels,
    name: str,
    queries: Collection | None,
    passages: Collection | None,
    drop_unknown: bool,
    without_positives: str,
    hint: str,
) -> tuple[Qrels, dict[str, int]]:
    """Qrels whose ids are known (None: not compared) and whose queries have positives, and the counts of the others.

    without_positives: what to do with queries that no passage of grade 1 or more is judged for: stop refuses the file,
        keep leaves them in, drop leaves them out. hint: the choices besides stop, for the message.

    Raises:
        DataError: as check_against; queries without positives, or nothing left.
    """
    qrels, counts = check_against(qrels, queries, passages, name, drop_unknown)
    lacking = dict.fromkeys(query_id for query_id, grades in qrels.items() if max(grades.values(), default=0) < 1)
    if lacking and without_positives == "stop":
        raise DataError(
            f"{name} judges no passage as relevant to {len(lacking)} of {len(qrels)} queries {first_of(lacking)}: "
            f"remove these queries, or {hint}"
        )
    if without_positives == "drop":
        if len(lacking) == len(qrels):
            raise DataError(f"{name} judges no passage as relevant to any query: give other qrels")
        qrels = {query_id: grades for query_id, grades in qrels.items() if query_id not in lacking}
    return qrels, {**counts, "queries_without_positives": len(lacking)}


def write_qrels(path: str | Path, qrels: Qrels) -> None:
    """Writes qrels in BEIR's form, whole or not at all."""
    with written_whole(path) as file:
        file.write("\t".join(BEIR_HEADER) + "\n")
        for query_id, grades in qrels.items():
            file.writelines(f"{query_id}\t{passage_id}\t{grade}\n" for passage_id, grade in grades.items())


def read_run(path: str | Path) -> Run:
    """A ranking in TREC's form: qid Q0 pid rank score tag. Ranks are not read: scores order a run, as in trec_eval.

    Raises:
        DataError: no such file, a malformed line, a passage twice for one query, a score that is not finite, or nothing
            in it.
    """
    run: Run = {}
    for place, (query_id, passage_id, score) in parse_lines(path, _parse_result):
        _add_result(run.setdefault(query_id, {}), place, query_id, passage_id, score)
    if not run:
        raise DataError(NO_RESULTS.format(path))
    return run


def _parse_result(line: str) -> tuple[str, str, float] | None:
    try:
        query_id, _, passage_id, _, score, _ = line.split()
        score = float(score)
    except ValueError:
        if not line.strip():
            return None
        raise BadRecordError(f"{line.strip()[:80]!r} is not query, Q0, passage, rank, score, tag") from None
    if score - score != 0.0:  # NaN or infinite
        raise BadRecordError(f"the score of passage {passage_id} for query {query_id} is {score}, not finite")
    return query_id, passage_id, score


def _add_result(scores: dict[str, float], place: str, query_id: str, passage_id: str, score: float) -> None:
    if passage_id in scores:
        raise DataError(f"{place}: passage {passage_id} occurs a second time for query {query_id}: remove one")
    scores[passage_id] = score


def stream_run(path: str | Path, depth: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """(query id, its `depth` best passage ids, best first; equal scores by id) of a TREC run, query by query.

    Raises:
        DataError: as read_run, or lines of one query apart from each other.
    """
    seen: set[str] = set()
    for query_id, lines in groupby(parse_lines(path, _parse_result), lambda line: line[1][0]):
        scores: dict[str, float] = {}
        for place, result in lines:
            if query_id in seen:
                raise DataError(f"{place}: query {query_id} continues after other queries: sort the run by query")
            _add_result(scores, place, *result)
        seen.add(query_id)
        yield query_id, best_first(scores, depth)
    if not seen:
        raise DataError(NO_RESULTS.format(path))


def best_first(scores: Mapping[str, float], depth: int | None) -> list[str]:
    """The `depth` best ids (None: all), equal scores by id."""
    return sorted(scores, key=lambda id: (-scores[id], id))[:depth]


def write_run(path: str | Path, rows: RunRows, tag: str) -> dict[str, int]:
    """Writes a TREC run, whole or not at all, best first (equal scores by passage id); returns its counts.

    rows: (query id, passage ids, scores); scores are written in the shortest decimals that give the same number back:
        float32 stays float32's.

    Raises DataError for a score that is not finite or an id with white space; nothing is written.
    """
    num_results, seen = 0, set()
    with written_whole(path) as file:
        for query_id, passage_ids, scores in rows:
            passage_ids, scores = list(passage_ids), np.asarray(scores)
            assert query_id not in seen and len(set(passage_ids)) == len(passage_ids)
            ids = [query_id, *passage_ids]
            if len(" ".join(ids).split()) != len(ids):
                bad = next(id for id in ids if len(id.split()) != 1)
                raise DataError(
                    f"the run is not written: TREC's format has no place for the id {bad!r} with white space"
                )
            if not np.isfinite(scores).all():
                raise DataError(f"the run is not written: a score of query {query_id} is not finite")
            seen.add(query_id)
            texts = scores.astype(str).tolist()  # numpy's shortest decimals that give the same number back
            results = sorted(zip((-scores).tolist(), passage_ids, texts, strict=True))
            file.writelines(
                f"{query_id} Q0 {id} {rank} {text} {tag}\n" for rank, (_, id, text) in enumerate(results, 1)
            )
            num_results += len(results)
    return {"queries": len(seen), "results": num_results}


def check_against(
    rows: dict[str, dict[str, Value]],
    queries: Collection | None,
    passages: Collection | None,
    name: str,
    drop: bool = False,
) -> tuple[dict[str, dict[str, Value]], dict[str, int]]:
    """Compares the ids of qrels, a run or answers with those of their collections (None: not compared).

    drop: leave unknown ids out.

    Returns:
        (rows without what is unknown, {"unknown_queries", "unknown_passages": how many lines were left out}); a query
        of which nothing is left goes too.

    Raises:
        DataError: an unknown id that may not be dropped, with counts, the first three and the remedy; nothing is left.
    """

    def find_unknown(ids: list[str], collection: Collection | None, what: str) -> set[str]:
        if collection is None:
            return set()
        if not drop:
            collection.known_rows(ids, what, name, UNKNOWN_IDS)
            return set()
        return {id for id, row in zip(ids, collection.rows(ids), strict=True) if row < 0}

    unknown = find_unknown(list(rows), queries, "queries")
    counts = {"unknown_queries": len(unknown), "unknown_passages": 0}
    rows = {query_id: values for query_id, values in rows.items() if query_id not in unknown}
    named = list(dict.fromkeys(id for values in rows.values() for id in values)) if passages is not None else []
    if unknown := find_unknown(named, passages, "passages"):
        counts["unknown_passages"] = sum(id in unknown for values in rows.values() for id in values)
        known = {q: {id: v for id, v in values.items() if id not in unknown} for q, values in rows.items()}
        rows = {query_id: values for query_id, values in known.items() if values}
    if not rows:
        raise DataError(f"{name} names no query and passage of these collections: give the files that belong together")
    return rows, counts


def read_dpr(path: str | Path) -> tuple[Collection, dict[str, list[str]], Qrels | None]:
    """A DPR file (NQ, TriviaQA), .json or .csv: (queries, answers by query id, qrels of its positives).

    The query ids are "0", "1", ... in the order of the file; positives are ids (passage_id or psg_id) of the DPR
    Wikipedia passages. Files of questions only (test files) give no qrels.

    Raises:
        DataError: not such a file, record named.
    """
    questions, answers, qrels = [], {}, {}

    def add(record: dict) -> None:
        contexts, query_id = record.get("positive_ctxs"), str(len(questions))
        if contexts is not None:
            if not isinstance(contexts, list) or not all(isinstance(context, dict) for context in contexts):
                raise BadRecordError("positive_ctxs is not a list of objects")
            ids = (context.get("passage_id", context.get("psg_id")) for context in contexts)
            qrels[query_id] = {check_id(id, "passage_id in positive_ctxs"): 1 for id in ids}
        answers[query_id] = _answers(record)
        questions.append(record["question"])

    for _ in read_questions(path, add):
        pass
    return make_collection(answers, questions, str(path)), answers, qrels or None


def _answers(record: Mapping[str, Any]) -> list[str]:
    answers = record.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise BadRecordError("answers is not a list of strings")
    return answers


def read_answers(path: str | Path) -> dict[str, list[str]]:
    """Answers by query id: DPR's .json and .csv (ids "0", "1", ...), or JSONL {"query_id" or "_id", "answers": [..]}.

    Raises:
        DataError: not such a file, a record without a list of answers, or a query twice.
    """
    if not str(path).removesuffix(".gz").endswith(".jsonl"):
        return read_dpr(path)[1]
    answers: dict[str, list[str]] = {}

    def add(record: dict) -> None:
        query_id = check_id(record.get("query_id", record.get("_id")), "query_id")
        if query_id in answers:
            raise BadRecordError(f"the query {query_id} comes a second time")
        answers[query_id] = _answers(record)

    for _ in parse_objects(path, add):
        pass
    if not answers:
        raise DataError(f"{path} holds no answers: give a file with at least one question")
    return answers
