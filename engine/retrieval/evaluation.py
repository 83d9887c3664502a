"""A run measured against judgements: every mean with its interval, a second run beside it, and the record of it all.

Values are ir-measures' own; its command line on the same files prints the same. Intervals are percentile bootstraps
over queries; the tests between two runs are Student's paired t-test and Fisher's randomisation test (Smucker, Allan,
Carterette, "A Comparison of Statistical Significance Tests for Information Retrieval Evaluation", CIKM 2007). The
record is what launchers/evaluate.py writes as JSON (docs/evaluation.md) and what reports are made of.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import numpy as np

from quincunx.data_shards.durable import file_digest, written_whole
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.records import parse_objects
from quincunx.engine.retrieval.files import write_json_lines
from quincunx.engine.retrieval.trec import Qrels, Run

LEVEL = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 20_230_601
RANDOMISATION_SEED = 20_230_602
CHUNK_CELLS = 1 << 22


@dataclass(frozen=True)
class Evaluation:
    """A run's values.

    means      measure -> mean over the queries
    per_query  measure -> query id -> value
    counts     queries that are judged, answered, missing (judged, not in the run: they count 0) and unjudged (in the
               run, not judged: they do not count); of qrels too: below_relevant_from (no passage of that grade: RR, AP,
               R, P count 0)
    """

    means: dict[str, float]
    per_query: dict[str, dict[str, float]]
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same queries in one measure; differences are first minus second.

    low, high          95 % bootstrap interval of the mean difference
    t_test_p           two-sided paired t-test; None with fewer than two queries
    randomisation_p    two-sided sign-flip test of the mean difference, 10,000 draws
    wins losses ties   queries where the first is better, worse, equal
    """

    mean: float
    other_mean: float
    difference: float
    low: float
    high: float
    t_test_p: float | None
    randomisation_p: float
    wins: int
    losses: int
    ties: int


def find_measure(name: str, relevant_from: int = 1) -> Any:
    """The measure of ir-measures (str() gives its name there): MRR@10 is RR@10, MAP is AP, Recall@100 is R@100.

    relevant_from: the lowest grade that counts as relevant wherever a measure knows only relevant or not (RR, AP, R, P,
        Success; TREC DL: 2). nDCG uses the grades themselves. A name with a rel of its own keeps it.

    Raises:
        SettingsError: not a measure, or one that the installed ir-measures cannot compute.
    """
    import ir_measures

    try:
        measure = ir_measures.parse_measure(re.sub(r"^ndcg\b", "nDCG", name.strip()))
        if relevant_from != 1 and "rel" in measure.SUPPORTED_PARAMS and "rel" not in measure.params:
            measure = measure(rel=relevant_from)
        measure.validate_params()
        supported = measure.params.get("cutoff", 1) >= 1 and ir_measures.DefaultPipeline.supports(measure)
        supported = supported and not measure.NAME.startswith("Num")  # sums over queries: no mean, no interval
    except (ValueError, NameError, KeyError, TypeError, SyntaxError, AssertionError):
        supported = False
    if not supported:
        raise SettingsError(
            f"the measure {name!r} cannot be computed: give names of ir-measures like RR@10, nDCG@10, AP, R@100, P@10, "
            "Success@20, RR(rel=2)@10"
        )
    return measure


def evaluate(run: Run, qrels: Qrels, measures: Sequence[str], relevant_from: int = 1) -> Evaluation:
    """Values of a run under ir-measures' names, per judged query and on average.

    A judged query that the run does not answer counts 0; a query without judgements does not count. relevant_from: as
    in find_measure.

    Raises:
        SettingsError: an unknown measure, or one that cannot be computed on these files.
        DataError: the run answers none of the judged queries, or no grade reaches relevant_from.
    """
    import ir_measures

    parsed = list(dict.fromkeys(find_measure(name, relevant_from) for name in measures))
    counts = count_queries(run, qrels)
    below = sum(max(grades.values()) < relevant_from for grades in qrels.values())
    if below == len(qrels) and relevant_from > 1:
        raise DataError(f"no passage has grade {relevant_from} or more: give a smaller relevant_from")
    try:
        found = ir_measures.calc(parsed, qrels, run)
    except (CalledProcessError, ZeroDivisionError) as error:
        raise SettingsError(
            f"ir-measures cannot compute all of {', '.join(map(str, parsed))} on these files ({error}): leave out the "
            "measure that fails"
        ) from None
    per_query: dict[str, dict[str, float]] = {str(measure): dict.fromkeys(qrels, 0.0) for measure in parsed}
    for value in found.per_query:
        assert value.query_id in qrels
        per_query[str(value.measure)][value.query_id] = float(value.value)
    return Evaluation(
        {str(measure): float(found.aggregated[measure]) for measure in parsed},
        per_query,
        {**counts, "below_relevant_from": below},
    )


def count_queries(run: Run, judged: Mapping[str, Any]) -> dict[str, int]:
    """An evaluation's counts. Raises DataError if the run answers none of the judged queries."""
    answered = len(judged.keys() & run.keys())
    if not answered:
        raise DataError(
            f"the run answers none of the {len(judged)} judged queries (its first is {next(iter(run), None)!r}, theirs "
            f"{next(iter(judged), None)!r}): give files of one set of queries"
        )
    missing, unjudged = len(judged) - answered, len(run) - answered
    return {"judged": len(judged), "answered": answered, "missing": missing, "unjudged": unjudged}


def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The measures of several evaluations of one run (by qrels, by answers), with the counts of the first."""
    means = {name: mean for evaluation in evaluations for name, mean in evaluation.means.items()}
    per_query = {name: values for evaluation in evaluations for name, values in evaluation.per_query.items()}
    return Evaluation(means, per_query, evaluations[0].counts)


def interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over queries: 10,000 resamples, always the same seed."""
    from scipy.stats import bootstrap

    values = np.fromiter(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    batch = max(1, CHUNK_CELLS // len(values))
    options = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "method": "percentile", "batch": batch}
    low, high = bootstrap((values,), np.mean, **options, rng=np.random.default_rng(BOOTSTRAP_SEED)).confidence_interval
    return float(low), float(high)


def paired_t_test(differences: np.ndarray) -> float | None:
    """Two-sided p of Student's paired t-test; 1 if all differences are 0, None with fewer than two queries."""
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return None
    if differences.std() == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(ttest_1samp(differences, 0).pvalue)


def randomisation_test(differences: np.ndarray) -> float:
    """Two-sided p of Fisher's randomisation test: 10,000 draws of random signs, all of them if there are fewer."""
    from scipy.stats import permutation_test

    def mean_difference(first, second, axis=-1):
        return (first - second).mean(axis)

    batch = max(1, CHUNK_CELLS // len(differences))
    options = {"permutation_type": "samples", "n_resamples": RESAMPLES, "vectorized": True, "batch": batch}
    rng = np.random.default_rng(RANDOMISATION_SEED)
    samples = (differences, np.zeros_like(differences))
    return float(permutation_test(samples, mean_difference, **options, rng=rng).pvalue)


def compare(first: Evaluation, second: Evaluation) -> dict[str, Comparison]:
    """Every measure of the first evaluation against the second's, over the same queries.

    Raises:
        DataError: the two are not of the same queries and measures.
    """
    compared = {}
    for name, values in first.per_query.items():
        if values.keys() != second.per_query.get(name, {}).keys():
            raise DataError("the two runs are not evaluated on the same queries and measures: give both the same qrels")
        differences = np.array([value - second.per_query[name][query] for query, value in values.items()])
        low, high = interval(differences)
        compared[name] = Comparison(
            mean=first.means[name],
            other_mean=second.means[name],
            difference=float(differences.mean()),
            low=low,
            high=high,
            t_test_p=paired_t_test(differences),
            randomisation_p=randomisation_test(differences),
            wins=int((differences > 0).sum()),
            losses=int((differences < 0).sum()),
            ties=int((differences == 0).sum()),
        )
    return compared


def make_record(
    evaluation: Evaluation, made_from: Mapping[str, str], relevant_from: int, other: Evaluation | None = None
) -> dict[str, Any]:
    """The evaluation as one JSON object.

    made_from: "run", "qrels", "compare", "answers" -> path; their digests are taken here.
    """
    drawn = {"level": LEVEL, "resamples": RESAMPLES, "seed": BOOTSTRAP_SEED}
    measures = {}
    for name, values in evaluation.per_query.items():
        low, high = interval(values.values())
        measures[name] = {"mean": evaluation.means[name], "low": low, "high": high}
    record: dict[str, Any] = {
        "files": {name: {"path": path, "digest": file_digest(path)} for name, path in made_from.items()},
        "queries": evaluation.counts,
        "relevant_from": relevant_from,
        "interval": {"method": "percentile bootstrap over queries", **drawn},
        "measures": measures,
    }
    if other is not None:
        record["comparison"] = {
            "queries": other.counts,
            "randomisation": {"draws": RESAMPLES, "seed": RANDOMISATION_SEED},
            "measures": {name: asdict(compared) for name, compared in compare(evaluation, other).items()},
        }
    return record


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
    text += ["", *aligned(rows)]
    if "comparison" in record:
        rows = [("against the other", "other", "difference", "95 % interval", "t-test p", "randomisation p", "+/-/=")]
        for name, value in record["comparison"]["measures"].items():
            t_test = "-" if value["t_test_p"] is None else f"{value['t_test_p']:.4f}"
            difference = (f"{value['difference']:+.4f}", f"{value['low']:+.4f} to {value['high']:+.4f}")
            won = f"{value['wins']}/{value['losses']}/{value['ties']}"
            other = f"{value['other_mean']:.4f}"
            rows.append((name, other, *difference, t_test, f"{value['randomisation_p']:.4f}", won))
        text += ["", *aligned(rows)]
    return "\n".join(text)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines for a terminal."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    return ["  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in rows]


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write_per_query(path: str | Path, evaluation: Evaluation, other: Evaluation | None = None) -> None:
    """One line a query with every measure (empty or absent if a measure does not judge the query).

    .jsonl: {"query_id", "values": {measure: value}, "other": {measure: value} with a second run}; .tsv: columns
    query_id, each measure, then "other MEASURE".
    """
    sides = {"values": evaluation.per_query} | ({"other": other.per_query} if other is not None else {})
    queries = dict.fromkeys(query_id for values in evaluation.per_query.values() for query_id in values)
    if Path(path).suffix == ".tsv":
        names = [name if side == "values" else f"other {name}" for side, of in sides.items() for name in of]
        columns = [values for of in sides.values() for values in of.values()]
        with written_whole(path) as file:
            file.write("\t".join(["query_id", *names]) + "\n")
            for query_id in queries:
                file.write("\t".join([query_id, *(str(values.get(query_id, "")) for values in columns)]) + "\n")
        return

    def judged(of: dict[str, dict[str, float]], query_id: str) -> dict[str, float]:
        return {name: values[query_id] for name, values in of.items() if query_id in values}

    lines = ({"query_id": id, **{side: judged(of, id) for side, of in sides.items()}} for id in queries)
    write_json_lines(path, lines)


def read_results(record_file: str | Path, per_query_file: str | Path) -> tuple[dict[str, Any], Evaluation]:
    """(record, values of every query) as evaluate.py wrote them. Raises DataError if it did not."""
    try:
        record = json.loads(Path(record_file).read_text(encoding="utf-8"))
        values: dict[str, dict[str, float]] = {name: {} for name in record["measures"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{record_file} was not written by evaluate.py: run evaluate.py again") from None
    for _, query in parse_objects(per_query_file, lambda record: record):
        for name, value in query["values"].items():
            values[name][query["query_id"]] = value
    return record, Evaluation({name: found["mean"] for name, found in record["measures"].items()}, values)
