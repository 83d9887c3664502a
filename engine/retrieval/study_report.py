"""The records of a study's cells (launchers/study.py), and their report: tables, tests and plots, as HTML and Markdown.

Two tests compare a variant with another, both paired, both of the first measure. Over queries: Student's t-test, each
query's values averaged over the seeds first, so that a query counts once; Holm's correction ("A Simple Sequentially
Rejective Multiple Test Procedure", 1979) covers all comparisons of the report. Over seeds: the t-test of the seeds'
means, which few seeds make weak.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quincunx.engine.export import curves as curves_of
from quincunx.engine.report import Curves, Report, plot_bars, plot_curves, table
from quincunx.engine.retrieval.evaluation import interval, paired_t_test, read_results

PACKAGES = ("quincunx", "torch", "transformers", "deepspeed", "bm25s", "ir-measures")
Record = Mapping[str, Any]


def results_of(folder: Path) -> dict[str, Any]:
    """{"measures": {name: {mean, low, high}}, "per_query": the first measure's values in the order of query ids}."""
    record, evaluation = read_results(folder / "result.json", folder / "queries.jsonl")
    values = next(iter(evaluation.per_query.values()))
    return {"measures": record["measures"], "per_query": [round(values[query], 6) for query in sorted(values)]}


def read_pretraining(run_folder: Path) -> dict[str, Any]:
    """The probe's curves, held-out losses [before, after, unigram] and the median rate, of a pre-training's metrics."""
    curve = partial(curves_of, run_folder)
    probe: dict[str, list] = {"step": []}
    for name, (steps, values) in curve("probe", "probe/").items():
        probe |= {"step": steps, name: [round(value, 4) for value in values]}
    losses, unigrams = curve("held_out", "held_out/loss/"), curve("held_out", "held_out/unigram/")
    held_out = {
        task: [round(value, 4) for value in (values[0], values[-1], unigrams[task][1][-1])]
        for task, (_, values) in losses.items()
    }
    _, rates = curve("train", "passages_per_second").get("", ([], []))
    rate = round(sorted(rates)[len(rates) // 2], 1) if rates else None
    return {"probe": probe, "held_out": held_out, "passages_per_second": rate}


def describe_code() -> dict[str, Any]:
    """Commit and versions that a result was made with."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    found = {"commit": commit or None, "python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@dataclass(frozen=True)
class Row:
    """A variant on one collection, over its seeds."""

    records: Mapping[int, Record]
    """Seed -> record, of cells that did not diverge; at least one."""

    @property
    def first(self) -> Record:
        return next(iter(self.records.values()))

    @property
    def step(self) -> int:
        """Step of the pre-training that is fine-tuned."""
        return self.first["made_from"]["at_step"] or self.first["made_from"]["pretrain"]["steps"]

    @property
    def measure(self) -> str:
        """The first measure, which is tested and drawn."""
        return next(iter(self.first["measures"]))

    @property
    def per_query(self) -> np.ndarray:
        """float64 [queries], the first measure averaged over seeds."""
        return np.mean([record["per_query"] for record in self.records.values()], axis=0)

    def means(self, measure: str) -> list[float]:
        return [record["measures"][measure]["mean"] for record in self.records.values()]


class Test(NamedTuple):
    """A variant against another; differences are first minus second."""

    difference: float
    low: float
    high: float
    queries_p: float | None
    """None with fewer than two queries."""
    seeds_p: float | None
    """None with fewer than two seeds."""


Rows = Mapping[str, Mapping[str, Row]]
"""Collection -> variant -> row."""
Tests = Mapping[tuple[str, str, str], Test]
"""(collection, variant, the one that it is tested against) -> test."""


def compare_rows(first: Row, second: Row) -> Test:
    """Both tests of two variants on one collection, over the seeds that both have (at least one)."""
    seeds = [seed for seed in first.records if seed in second.records]
    first, second = (Row({seed: row.records[seed] for seed in seeds}) for row in (first, second))
    differences = first.per_query - second.per_query
    by_seed = np.subtract(first.means(first.measure), second.means(first.measure))
    ps = (paired_t_test(differences), paired_t_test(by_seed))
    return Test(float(differences.mean()), *interval(differences), *ps)


def compare_all(found: Rows, against: Sequence[str]) -> Tests:
    """Every variant against each of `against`; a pair is tested once."""
    tests: dict[tuple[str, str, str], Test] = {}
    for collection, rows in found.items():
        for other, variant in itertools.product(against, rows):
            is_new = variant != other and (collection, other, variant) not in tests
            if is_new and other in rows and rows[variant].records.keys() & rows[other].records.keys():
                tests[collection, variant, other] = compare_rows(rows[variant], rows[other])
    return tests


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order, corrected = np.argsort(p_values, kind="stable"), np.zeros(len(p_values))
    factors = np.arange(len(p_values), 0, -1)
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, factors * np.asarray(p_values)[order]))
    return corrected.tolist()


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation; None if one of the two does not vary."""
    from scipy.stats import spearmanr

    varies = len(set(first)) > 1 and len(set(second)) > 1
    return float(spearmanr(first, second).statistic) if varies else None


def make_report(
    output: Path,
    name: str,
    variants: Sequence[str],
    against: Sequence[str],
    records: Sequence[Record],
    bm25: Mapping[str, Record],
    num_cells: int,
) -> list[Path]:
    """Writes report.html, report.md and the plots into `output`; gives their paths.

    variants: in the table's order. records: of finished cells, diverged ones too. bm25: collection -> its record.
    """
    seeds: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
    for record in sorted(records, key=lambda record: record["seed"]):
        if "diverged" not in record:
            seeds[record["collection"], record["variant"]][record["seed"]] = record
    collections = dict.fromkeys([*bm25, *(record["collection"] for record in records)])
    found = {c: {v: Row(seeds[c, v]) for v in variants if (c, v) in seeds} for c in collections}
    found = {collection: rows for collection, rows in found.items() if rows}
    report = Report(f"Study {name}")
    report.add(describe(records, num_cells))
    if found:
        tests = compare_all(found, against)
        for collection, rows in found.items():
            add_collection(report, collection, rows, bm25.get(collection), tests)
        add_curves(report, found)
        report.add("## Held-out losses of the pre-trainings", losses_table(found))
    return report.write(output)


def describe(records: Sequence[Record], num_cells: int) -> str:
    """How much of the study is there, and what it was made with."""
    diverged = [f"{r['collection']} {r['variant']} seed {r['seed']}" for r in records if "diverged" in r]
    text = f"{len(records)} of {num_cells} cells."
    if diverged:
        text += f" Diverged, and left out of every table: {'; '.join(diverged)}."
    codes = [record["code"] for record in records if "code" in record]
    commits = sorted({str(code["commit"])[:12] for code in codes})
    torch = sorted({code.get("torch", "?") for code in codes})
    return text + f" Commits {', '.join(commits)}; torch {', '.join(torch)}." if codes else text


def add_collection(report: Report, collection: str, rows: Mapping[str, Row], bm25: Record | None, tests: Tests) -> None:
    """A collection's means, bars and tests."""
    measures = [*next(iter(rows.values())).first["measures"]]
    values = {variant: row.per_query for variant, row in rows.items()}
    report.add(f"## {collection}, {len(next(iter(values.values())))} queries", means_table(rows, measures, bm25))
    bars = {variant: (found.mean(), *interval(found)) for variant, found in values.items()}
    words = {"BM25": bm25["measures"][measures[0]]["mean"]} if bm25 else {}
    caption = f"{measures[0]} on {collection} with 95 % intervals over queries"
    report.add_plot(f"{collection}-bars", plot_bars(bars, measures[0], words), caption)
    if any(key[0] == collection for key in tests):
        report.add(tests_table(collection, tests, measures[0]))


def means_table(rows: Mapping[str, Row], measures: Sequence[str], bm25: Record | None) -> str:
    body = []
    for variant, row in rows.items():
        before = [record["before"]["mrr@10"] for record in row.records.values()]
        cells = [with_spread(before), *(with_spread(row.means(measure)) for measure in measures)]
        body.append([variant, f"{row.step:,}", str(len(row.records)), *cells])
    if bm25 is not None:
        body.append(["BM25", "", "", "", *(f"{bm25['measures'][measure]['mean']:.3f}" for measure in measures)])
    header = ["variant", "steps", "seeds", "MRR@10 before fine-tuning", *measures]
    return table(header, body, "Steps of the pre-training. Measures: mean over seeds ± their standard deviation.")


def with_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def tests_table(collection: str, tests: Tests, measure: str) -> str:
    """A collection's tests, corrected for all of the report."""
    tested = {key: test.queries_p for key, test in tests.items() if test.queries_p is not None}
    corrected = dict(zip(tested, holm([*tested.values()])))
    body = []
    for key, test in tests.items():
        if key[0] == collection:
            difference = f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}]"
            ps = map(as_p, (test.queries_p, corrected.get(key), test.seeds_p))
            body.append([f"{key[1]} against {key[2]}", difference, *ps])
    header = [measure, "difference, 95 % interval", "p over queries", "corrected by Holm", "p over seeds"]
    over = "over queries (each averaged over seeds), and over seeds' means"
    return table(header, body, f"Paired t-tests over the seeds that both have: {over}.")


def as_p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def add_curves(report: Report, found: Rows) -> None:
    """The probe along the pre-training; fine-tuned quality by its steps and by training queries, if they vary."""
    probes, by_step, by_share = (defaultdict(dict) for _ in range(3))
    for collection, rows in found.items():
        for variant, row in rows.items():
            curves = [record["probe"] for record in row.records.values()]
            steps = curves[0]["step"]
            if len(steps) > 1 and row.step == steps[-1]:
                probes[collection][variant] = steps, np.mean([curve["mrr@10"] for curve in curves], axis=0)
        for line, family in families(rows).items():
            means = [row.per_query.mean() for row in family]
            shares = [100 * row.first["made_from"]["train_share"] for row in family]
            by_step[collection][line] = tuple(zip(*sorted(zip([row.step for row in family], means))))
            by_share[collection][line] = tuple(zip(*sorted(zip(shares, means))))
    if probes:
        report.add("## The probe along the pre-training")
        report.add_plot("probe", plot_curves(probes), "MRR@10 of the probe, [CLS] without fine-tuning, mean over seeds")
    if varies(by_step):
        report.add("## Fine-tuned quality by steps of pre-training")
        report.add_plot("steps", plot_curves(by_step), f"{row.measure} after fine-tuning")
        report.add(prediction_table(found))
    if varies(by_share):
        plot = plot_curves(by_share, xlabel="per cent of the training queries", logarithmic=True)
        report.add("## Fine-tuned quality by training queries")
        report.add_plot("queries", plot, row.measure)


def families(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Variants that share a pre-training but for its seed, under what their names share, or the first one's name."""
    by_pretraining = defaultdict(list)
    for variant, row in rows.items():
        settings = {**row.first["made_from"]["pretrain"], "seed": None}
        by_pretraining[json.dumps(settings, sort_keys=True)].append(variant)
    named = {}
    for family in by_pretraining.values():
        line = os.path.commonprefix(family).rstrip("-_.")  # noqa: RUF071 - names, not paths
        if not line or any(name.startswith(line) for name in rows if name not in family):
            line = family[0]
        named[line] = [rows[variant] for variant in family]
    return named


def varies(curves: Curves) -> bool:
    """Whether a line has points at several places."""
    return any(len(set(places)) > 1 for lines in curves.values() for places, _ in lines.values())


def prediction_table(found: Rows) -> str:
    """How well the probe at a checkpoint predicts the fine-tuned quality: rank correlation over the checkpoints."""
    body = []
    for collection, rows in found.items():
        by_seed = defaultdict(list)
        for row in rows.values():
            for seed, record in row.records.items():
                probe = dict(zip(record["probe"]["step"], record["probe"].get("mrr@10", ())))
                tuned = record["measures"][row.measure]["mean"]
                by_seed[seed] += [(probe[row.step], tuned)] if row.step in probe else []
        for seed, pairs in sorted(by_seed.items()):
            value = spearman(*zip(*pairs)) if pairs else None
            body.append([collection, str(seed), "-" if value is None else f"{value:.2f}", str(len(pairs))])
    return table(["collection", "seed", "Spearman's correlation of probe and fine-tuned", "checkpoints"], body)


def losses_table(found: Rows) -> str:
    body = [
        [collection, variant, task, *(f"{loss:.2f}" for loss in losses)]
        for collection, rows in found.items()
        for variant, row in rows.items()
        for task, losses in row.first["held_out"].items()
    ]
    header = ["collection", "variant", "task", "before", "after", "unigram"]
    return "Held-out losses beside their unigrams:\n\n" + table(header, body, "First seed, nats per labelled token.")
