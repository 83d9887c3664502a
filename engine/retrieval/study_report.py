"""The records of a study's cells (launchers/study.py), and their report: tables, tests and plots, as HTML and Markdown.

Two tests compare a variant with another, both paired, both of the first measure. Over queries: Student's t-test, each
query's values averaged over the seeds first, so that a query counts once; Holm's correction ("A Simple Sequentially
Rejective Multiple Test Procedure", 1979) covers all comparisons of the report. Over seeds: the t-test of the seeds'
means, which few seeds make weak.
"""

import contextlib
import itertools
import json
import math
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
from typing import Any

import numpy as np

from quincunx.engine.export import curves as curves_of
from quincunx.engine.retrieval.evaluation import interval, paired_t_test, read_results
from quincunx.engine.retrieval.report import figure, folded, table, write_report
from quincunx.engine.retrieval.report_plots import plot_bars, plot_curves

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
    def pretraining(self) -> str:
        """What the pre-training was, but for its seed."""
        return json.dumps({**self.first["made_from"]["pretrain"], "seed": None}, sort_keys=True)

    @property
    def per_query(self) -> np.ndarray:
        """float64 [queries], the first measure averaged over seeds."""
        return np.mean([record["per_query"] for record in self.records.values()], axis=0)

    def means(self, measure: str) -> list[float]:
        return [record["measures"][measure]["mean"] for record in self.records.values()]


@dataclass(frozen=True)
class Test:
    """A variant against another; differences are first minus second."""

    difference: float
    low: float
    high: float
    queries_p: float | None
    """None with fewer than two queries."""
    seeds_p: float | None
    """None with fewer than two seeds."""


def compare_rows(first: Row, second: Row) -> Test:
    """Both tests of two variants on one collection, over the seeds that both have (at least one)."""
    seeds = [seed for seed in first.records if seed in second.records]
    first, second = (Row({seed: row.records[seed] for seed in seeds}) for row in (first, second))
    measure = next(iter(first.first["measures"]))
    differences = first.per_query - second.per_query
    by_seed = np.subtract(first.means(measure), second.means(measure))
    ps = (paired_t_test(differences), paired_t_test(by_seed))
    return Test(float(differences.mean()), *interval(differences), *ps)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation; None where one of the two does not vary."""
    from scipy.stats import spearmanr

    found = float(spearmanr(first, second).statistic) if len(set(first)) > 1 and len(set(second)) > 1 else math.nan
    return None if math.isnan(found) else found


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
    found: dict[str, dict[str, Row]] = {}
    for collection in dict.fromkeys([*bm25, *(record["collection"] for record in records)]):
        rows = found[collection] = {}
        for variant in variants:
            mine = [r for r in records if (r["variant"], r["collection"]) == (variant, collection)]
            if kept := {r["seed"]: r for r in sorted(mine, key=lambda r: r["seed"]) if "diverged" not in r}:
                rows[variant] = Row(kept)
    measure = next((next(iter(record["measures"])) for record in records if "measures" in record), "")
    tests: dict[tuple[str, str, str], Test] = {}
    for collection, rows in found.items():
        for other, variant in itertools.product(against, rows):
            is_new = other != variant and (collection, other, variant) not in tests
            if is_new and other in rows and rows[variant].records.keys() & rows[other].records.keys():
                tests[collection, variant, other] = compare_rows(rows[variant], rows[other])
    tested = {key: test.queries_p for key, test in tests.items() if test.queries_p is not None}
    corrected = dict(zip(tested, holm([*tested.values()])))
    parts, plots = [describe(records, num_cells)], {}
    for collection, rows in found.items():
        if not rows:
            continue
        queries = len(next(iter(rows.values())).per_query)
        bars = {variant: (row.per_query.mean(), *interval(row.per_query)) for variant, row in rows.items()}
        words = {"BM25": bm25[collection]["measures"][measure]["mean"]} if collection in bm25 else {}
        plots[f"{collection}-bars"] = plot_bars(bars, measure, words)
        parts += [
            f"## {collection}, {queries} queries",
            means_table(rows, bm25.get(collection)),
            figure(f"{collection}-bars", f"{measure} on {collection} with 95 % intervals over queries"),
        ]
        mine = [key for key in tests if key[0] == collection]
        if mine:
            parts.append(tests_table({key[1:]: (tests[key], corrected.get(key)) for key in mine}, measure))
    parts += curves(found, measure, plots)
    if any(found.values()):
        parts += ["## Held-out losses of the pre-trainings", losses_table(found)]
    return write_report(Path(output), f"Study {name}", parts, plots)


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


def means_table(rows: Mapping[str, Row], bm25: Record | None) -> str:
    measures = list(next(iter(rows.values())).first["measures"])
    header = ["variant", "steps", "seeds", "MRR@10 before fine-tuning", *measures]
    body = []
    for variant, row in rows.items():
        before = [record["before"]["mrr@10"] for record in row.records.values()]
        cells = [with_spread(before), *(with_spread(row.means(measure)) for measure in measures)]
        body.append([variant, f"{row.step:,}", str(len(row.records)), *cells])
    if bm25 is not None:
        body.append(["BM25", "", "", "", *(f"{bm25['measures'][measure]['mean']:.3f}" for measure in measures)])
    return table(header, body, "Steps of the pre-training. Measures: mean over seeds ± their standard deviation.")


def with_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def tests_table(tests: Mapping[tuple[str, str], tuple[Test, float | None]], measure: str) -> str:
    rows = []
    for (variant, other), (test, corrected) in tests.items():
        difference = f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}]"
        ps = map(as_p, (test.queries_p, corrected, test.seeds_p))
        rows.append([f"{variant} against {other}", difference, *ps])
    header = [measure, "difference, 95 % interval", "p over queries", "corrected by Holm", "p over seeds"]
    over = "over queries (each averaged over seeds), and over seeds' means"
    return table(header, rows, f"Paired t-tests over the seeds that both have: {over}.")


def as_p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def curves(found: Mapping[str, Mapping[str, Row]], measure: str, plots: dict[str, str]) -> list[str]:
    """The probe along the pre-training; fine-tuned quality by its steps and by training queries, if they vary."""
    panels = {kind: defaultdict(lambda: defaultdict(list)) for kind in ("probe", "steps", "queries")}
    for collection, rows in found.items():
        for variant, row in rows.items():
            curve = [record["probe"] for record in row.records.values()]
            if len(curve[0]["step"]) > 1 and row.step == curve[0]["step"][-1]:
                values = np.mean([probe["mrr@10"] for probe in curve], axis=0)
                panels["probe"][collection][variant] += zip(curve[0]["step"], values)
            family = [name for name, other in rows.items() if other.pretraining == row.pretraining]
            line = os.path.commonprefix(family).rstrip("-_.")  # noqa: RUF071 - names, not paths
            if not line or any(name.startswith(line) for name in rows if name not in family):  # another family has it
                line = family[0]
            panels["steps"][collection][line].append((row.step, row.per_query.mean()))
            share = 100 * row.first["made_from"]["train_share"]
            panels["queries"][collection][line].append((share, row.per_query.mean()))

    def plot(kind: str, **options: Any) -> None:
        plots[kind] = plot_curves(
            {
                panel: {line: tuple(zip(*sorted(points))) for line, points in lines.items()}
                for panel, lines in panels[kind].items()
            },
            **options,
        )

    def varies(kind: str) -> bool:
        """Whether a line has points at several places."""
        return any(len(dict(points)) > 1 for lines in panels[kind].values() for points in lines.values())

    parts: list[str] = []
    if panels["probe"]:
        plot("probe")
        caption = "MRR@10 of the probe, [CLS] without fine-tuning, mean over seeds"
        parts += ["## The probe along the pre-training", figure("probe", caption)]
    if varies("steps"):
        plot("steps")
        caption = f"{measure} after fine-tuning"
        parts += ["## Fine-tuned quality by steps of pre-training", figure("steps", caption), prediction_table(found)]
    if varies("queries"):
        plot("queries", xlabel="per cent of the training queries", logarithmic=True)
        parts += ["## Fine-tuned quality by training queries", figure("queries", measure)]
    return parts


def prediction_table(found: Mapping[str, Mapping[str, Row]]) -> str:
    """How well the probe at a checkpoint predicts the fine-tuned quality: rank correlation over the checkpoints."""
    body = []
    for collection, rows in found.items():
        for seed in sorted({seed for row in rows.values() for seed in row.records}):
            pairs = []
            for row in rows.values():
                if seed in row.records:
                    record, step = row.records[seed], row.step
                    probe = dict(zip(record["probe"]["step"], record["probe"].get("mrr@10", ())))
                    if step in probe:
                        pairs.append((probe[step], next(iter(record["measures"].values()))["mean"]))
            value = spearman(*zip(*pairs)) if pairs else None
            body.append([collection, str(seed), "-" if value is None else f"{value:.2f}", str(len(pairs))])
    return table(["collection", "seed", "Spearman's correlation of probe and fine-tuned", "checkpoints"], body)


def losses_table(found: Mapping[str, Mapping[str, Row]]) -> str:
    body = []
    for collection, rows in found.items():
        for variant, row in rows.items():
            for task, (before, after, unigram) in row.first["held_out"].items():
                body.append([collection, variant, task, f"{before:.2f}", f"{after:.2f}", f"{unigram:.2f}"])
    header = ["collection", "variant", "task", "before", "after", "unigram"]
    losses = table(header, body, "First seed, nats per labelled token.")
    return folded("Held-out losses beside their unigrams", losses)
