"""One evaluation, from files to a record: which queries count, every mean with its interval, a second run beside it.

The record is what launchers/evaluate.py writes as JSON (docs/evaluation.md) and what reports are made of.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quincunx.data_shards.artefact import file_digest, written_whole
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.engine.retrieval.answers import answer_hits
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.files import read_lines, refuse_input
from quincunx.engine.retrieval.judgements import (
    Qrels,
    Run,
    check_against,
    check_positives,
    read_answers,
    read_qrels,
    read_run,
    without_positives,
)
from quincunx.engine.retrieval.measures import (
    BOOTSTRAP_SEED,
    DEFAULT_MEASURES,
    LEVEL,
    RANDOMISATION_SEED,
    RESAMPLES,
    Comparison,
    Evaluation,
    compare,
    evaluate,
    intervals,
)

PER_QUERY_ENDINGS = (".jsonl", ".tsv")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What runs are judged by; at least one of qrels and answers.

    qrels              None: answers only
    relevant_from      lowest grade that counts as relevant for RR, AP, R, P, Success
    answers, passages  for answer match: answers by query id, and the passages without titles
    """

    qrels: Qrels | None = None
    measures: tuple[str, ...] = DEFAULT_MEASURES
    relevant_from: int = 1
    answers: Mapping[str, list[str]] | None = None
    passages: Collection | None = None
    answer_depths: tuple[int, ...] = (20, 100)
    answer_regex: bool = False


@dataclass(frozen=True)
class Result:
    """A run's evaluations (by qrels, by answers; over queries of their own) and whom they count."""

    evaluations: tuple[Evaluation, ...]
    counts: dict[str, int] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        return {name: mean for evaluation in self.evaluations for name, mean in evaluation.means.items()}

    def per_query(self) -> dict[str, dict[str, float]]:
        return {name: values for evaluation in self.evaluations for name, values in evaluation.per_query.items()}


def load_qrels(
    path: str,
    queries: Collection | None = None,
    passages: Collection | None = None,
    drop_unknown: bool = False,
    on_no_positives: str = "stop",
) -> tuple[Qrels, dict[str, int]]:
    """Qrels whose ids are known and whose queries have positives, and the counts of what was dropped.

    on_no_positives: a query that no passage of grade 1 or more is judged for can only count 0: stop refuses the file,
        keep counts it (as ir-measures does), drop leaves it out.

    Raises:
        DataError: unknown ids, queries without positives, or nothing left; see check_against, check_positives.
    """
    qrels = read_qrels(path)
    hint = ", or leave such lines out with --unknown_ids drop"
    qrels, dropped = check_against(qrels, queries, passages, path, drop_unknown, hint)
    counts = {"unknown_queries": dropped["queries"], "unknown_passages": dropped["passages"]}
    lacking = without_positives(qrels)
    if lacking and on_no_positives == "stop":
        check_positives(qrels, path, hint=", or choose --no_positives keep (they count 0) or drop")
    if lacking and on_no_positives == "drop":
        qrels = {query_id: grades for query_id, grades in qrels.items() if query_id not in set(lacking)}
        if not qrels:
            raise DataError(f"{path} judges no passage as relevant to any query: give other qrels")
    counts["queries_without_positives"] = len(lacking)
    return qrels, counts


def load_answers(
    path: str, queries: Collection | None = None, drop_unknown: bool = False
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Answers of known queries, and the counts of what was dropped. Raises DataError as read_answers, check_against."""
    hint = ", or leave such lines out with --unknown_ids drop"
    answers, dropped = check_against(read_answers(path), queries, None, path, drop_unknown, hint)
    return answers, {"unknown_queries": dropped["queries"]}


def load_run(
    path: str,
    queries: Collection | None = None,
    passages: Collection | None = None,
    drop_unknown: bool = False,
    drop_identical: bool = False,
) -> tuple[Run, dict[str, int]]:
    """A run whose ids are known, and the counts of what was dropped. Raises DataError as read_run, check_against.

    drop_identical: without passages that have their query's id, as BEIR evaluates.
    """
    hint = ", or leave such lines out with --unknown_ids drop"
    run, dropped = check_against(read_run(path), queries, passages, path, drop_unknown, hint)
    counts = {"unknown_queries": dropped["queries"], "unknown_passages": dropped["passages"]}
    if drop_identical:
        counts["identical_ids"] = sum(scores.pop(query_id, None) is not None for query_id, scores in run.items())
    return run, counts


def judge(run: Run, judgement: Judgement) -> Result:
    """Every measure of one run.

    counts: judged, answered, missing (judged, not in the run: they count 0), unjudged (in the run, not judged: they do
        not count), below_relevant_from (no passage of that grade: RR, AP, R, P count 0).

    Raises: as measures.evaluate and answers.answer_hits; DataError where no grade reaches relevant_from.
    """
    evaluations = []
    if judgement.qrels is not None:
        evaluations.append(evaluate(run, judgement.qrels, judgement.measures, judgement.relevant_from))
    if judgement.answers is not None:
        assert judgement.passages is not None, "answer match reads passages"
        evaluations.append(
            answer_hits(run, judgement.answers, judgement.passages, judgement.answer_depths, judgement.answer_regex)
        )
    if not evaluations:
        raise SettingsError("nothing to judge by: give --qrels, or --answers with --corpus, or all of them")
    judged = judgement.qrels if judgement.qrels is not None else judgement.answers
    if judgement.answers is not None and judgement.answers.keys() != judged.keys():
        raise DataError(
            f"the qrels judge {len(judged)} queries and the answers are of {len(judgement.answers)}, of which "
            f"{len(judged.keys() & judgement.answers.keys())} are the same: give both of the same queries, or evaluate "
            "by one at a time"
        )
    answered = len(judged.keys() & run.keys())
    counts = {
        "judged": len(judged),
        "answered": answered,
        "missing": len(judged) - answered,
        "unjudged": len(run) - answered,
    }
    if judgement.qrels is not None:
        below = len(without_positives(judgement.qrels, judgement.relevant_from))
        if below == len(judgement.qrels) and judgement.relevant_from > 1:
            raise DataError(f"no passage is judged {judgement.relevant_from} or more: give a smaller relevant_from")
        counts["below_relevant_from"] = below
    return Result(tuple(evaluations), counts)


def make_record(
    result: Result, made_from: Mapping[str, str], relevant_from: int, other: Result | None = None
) -> dict[str, Any]:
    """The evaluation as one JSON object.

    made_from: "run", "qrels", "compare", "answers" -> path; their digests are taken here.
    """
    bounds = {name: pair for evaluation in result.evaluations for name, pair in intervals(evaluation).items()}
    record: dict[str, Any] = {
        "files": {name: {"path": path, "digest": file_digest(path)} for name, path in made_from.items()},
        "queries": result.counts,
        "relevant_from": relevant_from,
        "interval": {
            "method": "percentile bootstrap over queries",
            "level": LEVEL,
            "resamples": RESAMPLES,
            "seed": BOOTSTRAP_SEED,
        },
        "measures": {
            name: {"mean": mean, "low": bounds[name][0], "high": bounds[name][1]}
            for name, mean in result.means().items()
        },
    }
    if other is not None:
        record["comparison"] = {
            "queries": other.counts,
            "randomisation": {"draws": RESAMPLES, "seed": RANDOMISATION_SEED},
            "measures": {name: asdict(compared) for name, compared in compare_results(result, other).items()},
        }
    return record


def compare_results(result: Result, other: Result) -> dict[str, Comparison]:
    """measures.compare, evaluation by evaluation."""
    compared: dict[str, Comparison] = {}
    for mine, others in zip(result.evaluations, other.evaluations, strict=True):
        compared |= compare(mine, others)
    return compared


def format_table(record: Mapping[str, Any]) -> str:
    """The record as lines for a terminal."""
    queries = record["queries"]
    text = [
        f"queries: {queries['judged']} judged, {queries['answered']} answered, {queries['missing']} missing (count 0), "
        f"{queries['unjudged']} not judged (not counted)"
    ]
    below = queries.get("below_relevant_from", 0)
    if below:
        text.append(f"{below} queries have no passage of grade {record['relevant_from']} or more")
    rows = [("measure", "mean", "95 % interval")]
    rows += [
        (name, f"{value['mean']:.4f}", f"{value['low']:.4f} to {value['high']:.4f}")
        for name, value in record["measures"].items()
    ]
    text += ["", *_aligned(rows)]
    if "comparison" in record:
        rows = [("against the other", "other", "difference", "95 % interval", "t-test p", "randomisation p", "+/-/=")]
        for name, value in record["comparison"]["measures"].items():
            p = value["t_test_p"]
            rows.append(
                (
                    name,
                    f"{value['other_mean']:.4f}",
                    f"{value['difference']:+.4f}",
                    f"{value['low']:+.4f} to {value['high']:+.4f}",
                    "-" if p is None else f"{p:.4f}",
                    f"{value['randomisation_p']:.4f}",
                    f"{value['wins']}/{value['losses']}/{value['ties']}",
                )
            )
        text += ["", *_aligned(rows)]
    return "\n".join(text)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths)) for row in rows)
    ]


def check_outputs(output: str | None, per_query: str | None, inputs: Mapping[str, str]) -> None:
    """Raises SettingsError where an output has a wrong ending or is one of the inputs; called before any work."""
    if per_query is not None and Path(per_query).suffix not in PER_QUERY_ENDINGS:
        raise SettingsError(f"per_query is {per_query}: give a name ending in {' or '.join(PER_QUERY_ENDINGS)}")
    if output is not None and Path(output).suffix != ".json":
        raise SettingsError(f"output is {output}: give a name ending in .json")
    for written in filter(None, (output, per_query)):
        refuse_input(written, inputs)


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write_per_query(path: str | Path, result: Result, other: Result | None = None) -> None:
    """One line a query with every measure (empty or absent where a measure does not judge the query).

    .jsonl: {"query_id", "values": {measure: value}, "other": {measure: value} with a second run}; .tsv: columns
    query_id, each measure, then "other MEASURE".
    """
    mine, others = result.per_query(), other.per_query() if other is not None else {}
    queries = list(dict.fromkeys(query_id for values in mine.values() for query_id in values))
    with written_whole(path) as file:
        if Path(path).suffix == ".tsv":
            file.write("\t".join(["query_id", *mine, *(f"other {name}" for name in others)]) + "\n")
        for query_id in queries:
            values = {name: of[query_id] for name, of in mine.items() if query_id in of}
            beside = {name: of[query_id] for name, of in others.items() if query_id in of}
            if Path(path).suffix == ".tsv":
                cells = [*(values.get(name, "") for name in mine), *(beside.get(name, "") for name in others)]
                file.write("\t".join([query_id, *map(str, cells)]) + "\n")
            else:
                line = {"query_id": query_id, "values": values} | ({"other": beside} if other is not None else {})
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_results(record_file: str | Path, per_query_file: str | Path) -> tuple[dict[str, Any], Evaluation]:
    """(record, values of every query) as evaluate.py wrote them. Raises DataError if it did not."""
    try:
        record = json.loads(Path(record_file).read_text(encoding="utf-8"))
        values: dict[str, dict[str, float]] = {name: {} for name in record["measures"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{record_file} is not a record of evaluate.py: evaluate again") from None
    for line in read_lines(per_query_file):
        query = json.loads(line)
        for name, value in query["values"].items():
            values[name][query["query_id"]] = value
    return record, Evaluation({name: found["mean"] for name, found in record["measures"].items()}, values)
