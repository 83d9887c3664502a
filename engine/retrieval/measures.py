"""Measures of a run against judgements, as ir-measures computes them, and how sure their means and differences are.

Every value is ir-measures' own; its command line on the same files prints the same. Intervals are percentile bootstraps
over queries; the tests between two runs are Student's paired t-test and Fisher's randomisation test (Smucker, Allan,
Carterette, "A Comparison of Statistical Significance Tests for Information Retrieval Evaluation", CIKM 2007).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from subprocess import CalledProcessError
from typing import Any

import numpy as np

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.engine.retrieval.judgements import Qrels, Run

DEFAULT_MEASURES = ("MRR@10", "nDCG@10", "MAP", "R@50", "R@100", "R@1000")
ALIASES = {"MRR": "RR", "MAP": "AP", "Recall": "R", "Precision": "P", "NDCG": "nDCG", "ndcg": "nDCG"}
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
    """

    means: dict[str, float]
    per_query: dict[str, dict[str, float]]


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


def measure_name(name: str, relevant_from: int = 1) -> str:
    """The name ir-measures uses: MRR@10 is RR@10, MAP is AP, Recall@100 is R@100.

    relevant_from: the lowest grade that counts as relevant wherever a measure knows only relevant or not (RR, AP, R, P,
        Success; TREC DL: 2). nDCG uses the grades themselves. A name with a rel of its own keeps it.

    Raises:
        SettingsError: not a measure, or one that the installed ir-measures cannot compute.
    """
    return str(_measure(name, relevant_from))


def _measure(name: str, relevant_from: int) -> Any:
    import ir_measures

    word = re.match(r"\w+", name)
    plain = name.strip()
    if word and word[0] in ALIASES:
        plain = ALIASES[word[0]] + plain[len(word[0]) :]
    try:
        measure = ir_measures.parse_measure(plain)
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

    A judged query that the run does not answer counts 0; a query without judgements does not count.

    Raises:
        SettingsError: an unknown measure, or none.
        DataError: the run answers none of the judged queries.
    """
    import ir_measures

    if not measures:
        raise SettingsError("no measures are given: give at least one, like nDCG@10")
    parsed = list(dict.fromkeys(_measure(name, relevant_from) for name in measures))
    if not run.keys() & qrels.keys():
        raise DataError(
            f"the run answers none of the {len(qrels)} judged queries (its first is {next(iter(run), None)!r}, theirs "
            f"{next(iter(qrels), None)!r}): give the run and the qrels of one set of queries"
        )
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
    return Evaluation({str(measure): float(found.aggregated[measure]) for measure in parsed}, per_query)


def interval(per_query: Mapping[str, float] | Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over queries: 10,000 resamples, always the same seed."""
    from scipy.stats import bootstrap

    values = np.fromiter(per_query.values() if isinstance(per_query, Mapping) else per_query, np.float64)
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    batch = max(1, CHUNK_CELLS // len(values))
    options = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "method": "percentile", "batch": batch}
    low, high = bootstrap((values,), np.mean, **options, rng=np.random.default_rng(BOOTSTRAP_SEED)).confidence_interval
    return float(low), float(high)


def intervals(evaluation: Evaluation) -> dict[str, tuple[float, float]]:
    """`interval` of every measure."""
    return {name: interval(values) for name, values in evaluation.per_query.items()}


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
    names = list(first.per_query)
    if any(first.per_query[name].keys() != second.per_query.get(name, {}).keys() for name in names):
        raise DataError("the two runs are not evaluated on the same queries and measures: give both the same qrels")
    compared = {}
    for name, values in first.per_query.items():
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
