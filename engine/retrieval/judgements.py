"""Judgements and rankings: qrels, runs, negatives files of MS MARCO, and the questions, answers and passages of DPR.

The formats, one example line each, stand in docs/evaluation.md. Every complaint names file and line.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from quincunx.data_shards.artefact import written_whole
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.records import BadRecordError, check_id
from quincunx.engine.retrieval.candidates import Candidates, read_candidates
from quincunx.engine.retrieval.collection import Collection, make_collection
from quincunx.engine.retrieval.files import read_json_lines, read_lines
from quincunx.engine.retrieval.questions import read_questions

Qrels = dict[str, dict[str, int]]
"""query id -> passage id -> grade; 0 or less: judged and not relevant"""
Run = dict[str, dict[str, float]]
"""query id -> passage id -> score, higher is better, in the order of the file"""
Value = TypeVar("Value", int, float)
RunRows = Iterable[tuple[str, Iterable[str], Iterable[float]]]
BEIR_HEADER = ["query-id", "corpus-id", "score"]
QRELS_STYLES = ("trec", "beir")
MAX_NAMED = 3
MAX_GRADE = 10**6


def read_qrels(path: str | Path) -> Qrels:
    """Judgements in BEIR's form (header, qid, pid, grade) or TREC's and MS MARCO's (qid, 0, pid, grade).

    Raises:
        DataError: no such file, a malformed line, one passage judged twice with two grades, or nothing in it.
    """
    qrels: Qrels = {}
    for number, line in enumerate(read_lines(path), 1):
        columns = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        if not line.strip() or (number == 1 and columns == BEIR_HEADER):
            continue
        try:
            query_id, passage_id, grade = columns if len(columns) == 3 else (columns[0], *columns[2:])
            grade = int(grade)
            if abs(grade) > MAX_GRADE:
                raise ValueError
        except ValueError:
            raise DataError(
                f"{path}:{number}: {line.strip()[:80]!r} is neither query, passage, grade nor query, 0, passage, grade "
                f"with a whole number up to {MAX_GRADE} as grade: mend or remove the line"
            ) from None
        if qrels.setdefault(query_id, {}).setdefault(passage_id, grade) != grade:
            raise DataError(
                f"{path}:{number}: passage {passage_id} of query {query_id} is judged {grade} here and "
                f"{qrels[query_id][passage_id]} before: keep one of the lines"
            )
    if not qrels:
        raise DataError(f"{path} holds no judgements: give qrels with at least one line")
    return qrels


def write_qrels(path: str | Path, qrels: Qrels, style: str = "trec") -> None:
    """Writes qrels, whole or not at all; style trec (qid 0 pid grade) or beir (tab-separated with a header)."""
    if style not in QRELS_STYLES:
        raise SettingsError(f"the style of qrels {style!r} is not known: give one of {', '.join(QRELS_STYLES)}")
    with written_whole(path) as file:
        if style == "beir":
            file.write("\t".join(BEIR_HEADER) + "\n")
        for query_id, grades in qrels.items():
            if style == "trec":
                _check_plain_ids([query_id, *grades], str(path))
            for passage_id, grade in grades.items():
                columns = (
                    (query_id, passage_id, str(grade)) if style == "beir" else (query_id, "0", passage_id, str(grade))
                )
                file.write(("\t" if style == "beir" else " ").join(columns) + "\n")


def read_run(path: str | Path) -> Run:
    """A ranking in TREC's form: qid Q0 pid rank score tag. Ranks are not read: scores order a run, as in trec_eval.

    Raises:
        DataError: as iterate_run, and a passage twice for one query whose lines stand apart.
    """
    run: Run = {}
    for number, query_id, scores in iterate_run(path):
        earlier = run.setdefault(query_id, scores)
        if earlier is not scores:
            if both := earlier.keys() & scores.keys():
                what = f"passage {min(both)} stands a second time for query {query_id}"
                raise DataError(f"{path}:{number}: {what}: remove one of them")
            earlier.update(scores)
    return run


def iterate_run(path: str | Path) -> Iterator[tuple[int, str, dict[str, float]]]:
    """(first line, query id, score by passage id) of each stretch of lines of one query in a TREC run, in order.

    Raises:
        DataError: no such file, a malformed line, a passage twice for one query, a score that is not finite, or nothing
            in it.
    """
    current, first, scores = None, 1, {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            query_id, _, passage_id, _, score, _ = line.split()
            score = float(score)
        except ValueError:
            if not line.strip():
                continue
            raise DataError(
                f"{path}:{number}: {line.strip()[:80]!r} is not query, Q0, passage, rank, score, tag: mend or remove "
                "the line"
            ) from None
        if query_id != current:
            if current is not None:
                yield first, current, scores
            current, first, scores = query_id, number, {}
        if score - score != 0.0:  # NaN or infinite
            raise DataError(
                f"{path}:{number}: the score of passage {passage_id} for query {query_id} is {score}: finite scores "
                "are needed, make the run again"
            )
        if passage_id in scores:
            raise DataError(
                f"{path}:{number}: passage {passage_id} stands a second time for query {query_id}: remove one of them"
            )
        scores[passage_id] = score
    if current is None:
        raise DataError(f"{path} holds no results: give a run with at least one line")
    yield first, current, scores


def write_run(path: str | Path, run: Run | RunRows, tag: str) -> int:
    """Writes a TREC run, whole or not at all, best first (equal scores by passage id); returns the lines written.

    run: a Run, or an iterable of (query id, passage ids, scores), so that millions of lines need not stand in memory.
        Scores are written in the shortest decimals that give the same number back: float32 stays float32's.

    Raises:
        DataError: a query or passage twice, a score that is not finite, or an id with white space; nothing is written.
    """
    rows = (
        ((query_id, scores.keys(), scores.values()) for query_id, scores in run.items())
        if isinstance(run, dict)
        else run
    )
    lines, seen = 0, set()
    if len(tag.split()) != 1:
        raise SettingsError(f"the tag of a run is {tag!r}: give a word without white space")
    with written_whole(path) as file:
        for query_id, passage_ids, scores in rows:
            passage_ids, scores = list(passage_ids), np.asarray(list(scores))
            scores = scores if scores.dtype.kind == "f" else scores.astype(np.float64)
            _check_plain_ids([query_id, *passage_ids], str(path))
            if query_id in seen or len(set(passage_ids)) != len(passage_ids):
                what = "the query comes twice" if query_id in seen else "a passage comes twice"
                raise DataError(f"the run {path} is not written: for query {query_id} {what}")
            seen.add(query_id)
            if not np.isfinite(scores).all():
                raise DataError(f"the run {path} is not written: a score of query {query_id} is not finite")
            texts = scores.astype(str).tolist()  # numpy's shortest decimals that give the same number back
            results = sorted(zip((-scores).tolist(), passage_ids, texts, strict=True))
            file.writelines(
                f"{query_id} Q0 {id} {rank} {text} {tag}\n" for rank, (_, id, text) in enumerate(results, 1)
            )
            lines += len(results)
    return lines


def _check_plain_ids(ids: list[str], path: str) -> None:
    if len(" ".join(ids).split()) != len(ids):
        bad = next(id for id in ids if len(id.split()) != 1)
        raise DataError(
            f"{path} is not written: the id {bad!r} has white space or is empty, TREC's format has no place for it"
        )


def check_against(
    rows: dict[str, dict[str, Value]],
    queries: Collection | None,
    passages: Collection | None,
    name: str,
    drop: bool = False,
    hint: str = "",
) -> tuple[dict[str, dict[str, Value]], dict[str, int]]:
    """Compares the ids of qrels or of a run with those of their collections (None: not compared).

    hint: how to drop them, where a launcher has a setting for it; ends the message.

    Returns:
        (rows without what is unknown, {"queries", "passages": how many lines each were left out}); a query of which
        nothing is left goes too.

    Raises:
        DataError: an unknown id and drop is False, with counts, the first three and the remedy; or nothing is left.
    """
    bad_queries: set[str] = set()
    if queries is not None:
        bad_queries = {id for id, row in zip(rows, queries.rows(rows)) if row < 0}
        if bad_queries and not drop:
            _refuse("queries", [id for id in rows if id in bad_queries], len(rows), name, queries.name, hint)
    counts = {"queries": len(bad_queries), "passages": 0}
    kept = {id: values for id, values in rows.items() if id not in bad_queries}
    if passages is not None:
        named = list(dict.fromkeys(id for values in kept.values() for id in values))
        unknown = {id for id, row in zip(named, passages.rows(named)) if row < 0}
        if unknown and not drop:
            _refuse("passages", [id for id in named if id in unknown], len(named), name, passages.name, hint)
        if unknown:
            counts["passages"] = sum(id in unknown for values in kept.values() for id in values)
            kept = {q: {id: v for id, v in values.items() if id not in unknown} for q, values in kept.items()}
            kept = {query_id: values for query_id, values in kept.items() if values}
    if not kept:
        raise DataError(f"{name} names no query and passage of these collections: give the files that belong together")
    return kept, counts


def _refuse(what: str, unknown: list[str], total: int, name: str, collection: str, hint: str) -> None:
    raise DataError(
        f"{name} names {len(unknown)} {what} (of {total}) that {collection} does not have (first: "
        f"{', '.join(unknown[:MAX_NAMED])}): give the files that belong together{hint}"
    )


def without_positives(qrels: Qrels, relevant_from: int = 1) -> list[str]:
    """The queries that no passage of grade `relevant_from` or more is judged for."""
    return [query_id for query_id, grades in qrels.items() if max(grades.values(), default=0) < relevant_from]


def check_positives(qrels: Qrels, name: str, relevant_from: int = 1, hint: str = "") -> None:
    """Raises DataError where a query has no positive, with counts and the first three; hint ends the message."""
    lacking = without_positives(qrels, relevant_from)
    if lacking:
        raise DataError(
            f"{name} judges no passage with grade {relevant_from} or more for {len(lacking)} of {len(qrels)} queries "
            f"(first: {', '.join(lacking[:MAX_NAMED])}): remove these queries{hint}"
        )


def read_triples(path: str | Path) -> list[Candidates]:
    """MS MARCO's triples of ids (qid, positive pid, negative pid, tab-separated) by query, in the order of the file.

    Raises:
        DataError: a malformed line, a negative that is a positive of its query, or nothing in the file.
    """
    queries: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    known: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            query_id, positive, negative = line.split()
        except ValueError:
            if not line.strip():
                continue
            raise DataError(
                f"{path}:{number}: {line.strip()[:80]!r} is not query, positive, negative: mend or remove the line"
            ) from None
        positives, negatives = queries.setdefault(query_id, ({}, {}))
        positives[known.setdefault(positive, positive)] = None
        negatives[known.setdefault(negative, negative)] = None
        if positive in negatives or negative in positives:
            both = positive if positive in negatives else negative
            raise DataError(
                f"{path}:{number}: passage {both} of query {query_id} is a positive and a negative: remove one of them"
            )
    if not queries:
        raise DataError(f"{path} holds no triples: give a file with at least one line")
    return [
        Candidates(query_id, tuple(positives), tuple(negatives)) for query_id, (positives, negatives) in queries.items()
    ]


def read_negatives(path: str | Path) -> list[Candidates]:
    """Negatives by the file's ending: triples of ids (.tsv, .txt), or candidates (.jsonl, .parquet: ours, SimLM's)."""
    name = Path(path).name.removesuffix(".gz")
    return read_triples(path) if name.endswith((".tsv", ".txt")) else read_candidates(path)


def read_dpr_json(path: str | Path, drop: bool = False) -> tuple[Collection, dict[str, list[str]], list[Candidates]]:
    """A DPR training or dev file (NQ, TriviaQA): (queries, answers by query id, candidates).

    The query ids are "0", "1", ... in the order of the file. Negatives are hard_negative_ctxs, then negative_ctxs;
    positives and negatives are ids (passage_id or psg_id) of the DPR Wikipedia passages. Files of questions only
    (test files) give no candidates.

    drop: leaves out questions without positives (TriviaQA has them: candidates has fewer queries then) and negatives
        that are positives, instead of refusing the file.

    Raises:
        DataError: not such a file, record named; and what `drop` would leave out.
    """
    questions, answers, candidates = [], {}, []
    known: dict[str, str] = {}
    for number, (question, record) in enumerate(read_questions(path)):
        query_id = str(number)
        try:
            questions.append(question)
            answers[query_id] = _answers(record)
            if "positive_ctxs" not in record:
                continue
            positives = _context_ids(record, "positive_ctxs", known)
            negatives = _context_ids(record, "hard_negative_ctxs", known) | _context_ids(record, "negative_ctxs", known)
            both = positives.keys() & negatives.keys()
            if not drop and not positives:
                raise BadRecordError("the question has no positive passage")
            if not drop and both:
                raise BadRecordError(f"the negative passage {min(both)} is one of the positives")
        except BadRecordError as error:
            raise DataError(f"{path}: record {number + 1}: {error}; mend or drop such records") from None
        if positives:
            candidates.append(Candidates(query_id, tuple(positives), tuple(id for id in negatives if id not in both)))
    return make_collection(answers.keys(), questions, str(path)), answers, candidates


def _context_ids(record: Mapping[str, Any], field: str, known: dict[str, str]) -> dict[str, None]:
    contexts = record.get(field) or []
    if not isinstance(contexts, list) or not all(isinstance(context, dict) for context in contexts):
        raise BadRecordError(f"{field} is not a list of objects")
    found = {}
    for context in contexts:
        id = check_id(context.get("passage_id", context.get("psg_id")), f"passage_id in {field}")
        found[known.setdefault(id, id)] = None
    return found


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
    answers: dict[str, list[str]] = {}
    for where, query_id, record in _answer_records(Path(path)):
        try:
            if query_id is None:
                query_id = check_id(record.get("query_id", record.get("_id")), "query_id")
            if query_id in answers:
                raise BadRecordError(f"the query {query_id} comes a second time")
            answers[query_id] = _answers(record)
        except BadRecordError as error:
            raise DataError(f"{where}: {error}; mend or remove the record") from None
    if not answers:
        raise DataError(f"{path} holds no answers: give a file with at least one question")
    return answers


def _answer_records(path: Path) -> Iterator[tuple[str, str | None, dict]]:
    """(where, query id or None for "in the record", record)."""
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        for number, (_, record) in enumerate(read_questions(path)):
            yield f"{path}: record {number + 1}", str(number), record
        return
    for number, record in read_json_lines(path):
        yield f"{path}:{number}", None, record
