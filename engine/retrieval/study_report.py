"""The report of a study (launchers/study.py): tables, tests and plots of its cells, as HTML and Markdown.

Two tests compare a variant with another, both paired, both of the first measure. Over queries: Student's t-test, each
query's values averaged over the seeds first, so that a query counts once; Holm's correction ("A Simple Sequentially
Rejective Multiple Test Procedure", 1979) covers all comparisons of the report. Over seeds: the t-test of the seeds'
means, which few seeds make weak.
"""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quincunx.engine.retrieval.measures import interval, paired_t_test
from quincunx.engine.retrieval.report_blocks import Block, Figure, Heading, Table, Text, write_report
from quincunx.engine.retrieval.report_plots import plot_bars, plot_curves

Record = Mapping[str, Any]
Panels = dict[str, dict[str, list[tuple[float, float]]]]
"""Collection -> line -> points (x, y)"""


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
    measure = next(iter(first.records[seeds[0]]["measures"]))
    differences = first.per_query - second.per_query
    by_seed = np.subtract(first.means(measure), second.means(measure))
    low, high = interval(differences)
    return Test(
        difference=float(differences.mean()),
        low=low,
        high=high,
        queries_p=paired_t_test(differences),
        seeds_p=paired_t_test(by_seed),
    )


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
    collections = dict.fromkeys([*bm25, *(record["collection"] for record in records)])
    table: dict[str, dict[str, Row]] = {collection: {} for collection in collections}
    for variant in variants:
        for collection, rows in table.items():
            mine = {r["seed"]: r for r in records if (r["variant"], r["collection"]) == (variant, collection)}
            mine = {seed: record for seed, record in sorted(mine.items()) if "diverged" not in record}
            if mine:
                rows[variant] = Row(mine)
    blocks: list[Block] = [Heading(1, f"Study {name}"), Text(describe(records, num_cells))]
    measure = next((next(iter(record["measures"])) for record in records if "measures" in record), "")
    tests: dict[tuple[str, str, str], Test] = {}
    for collection, rows in table.items():
        for other in against:
            for variant in rows:
                is_new = other != variant and (collection, other, variant) not in tests
                if is_new and other in rows and rows[variant].records.keys() & rows[other].records.keys():
                    tests[collection, variant, other] = compare_rows(rows[variant], rows[other])
    tested = {key: test.queries_p for key, test in tests.items() if test.queries_p is not None}
    corrected = dict(zip(tested, holm([*tested.values()])))
    for collection, rows in table.items():
        if not rows:
            continue
        queries = len(next(iter(rows.values())).per_query)
        blocks += [Heading(2, f"{collection}, {queries} queries"), means_table(rows, bm25.get(collection))]
        bars = {variant: (row.per_query.mean(), *interval(row.per_query)) for variant, row in rows.items()}
        words = {"BM25": bm25[collection]["measures"][measure]["mean"]} if collection in bm25 else {}
        figure = plot_bars(bars, measure, words)
        blocks.append(
            Figure(f"{collection}-bars", f"{measure} on {collection} with 95 % intervals over queries", figure)
        )
        mine = [key for key in tests if key[0] == collection]
        if mine:
            blocks.append(tests_table({key[1:]: (tests[key], corrected.get(key)) for key in mine}, measure))
    blocks += curves(table, measure)
    if any(table.values()):
        blocks += [Heading(2, "Held-out losses of the pre-trainings"), losses_table(table)]
    return write_report(Path(output), blocks)


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


def means_table(rows: Mapping[str, Row], bm25: Record | None) -> Table:
    measures = list(next(iter(rows.values())).first["measures"])
    header = ["variant", "steps", "seeds", "MRR@10 before fine-tuning", *measures]
    body = []
    for variant, row in rows.items():
        before = [record["before"]["mrr@10"] for record in row.records.values()]
        cells = [with_spread(before), *(with_spread(row.means(measure)) for measure in measures)]
        body.append([variant, f"{row.step:,}", str(len(row.records)), *cells])
    if bm25 is not None:
        body.append(["BM25", "", "", "", *(f"{bm25['measures'][measure]['mean']:.3f}" for measure in measures)])
    return Table(header, body, "Steps of the pre-training. Measures: mean over seeds ± their standard deviation.")


def with_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def tests_table(tests: Mapping[tuple[str, str], tuple[Test, float | None]], measure: str) -> Table:
    rows = [
        [
            f"{variant} against {other}",
            f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}]",
            as_p(test.queries_p),
            as_p(corrected),
            as_p(test.seeds_p),
        ]
        for (variant, other), (test, corrected) in tests.items()
    ]
    note = (
        "Paired t-tests over the seeds that both have: over queries (each averaged over seeds), and over seeds' means."
    )
    return Table(
        [measure, "difference, 95 % interval", "p over queries", "corrected by Holm", "p over seeds"], rows, note
    )


def as_p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def curves(table: Mapping[str, Mapping[str, Row]], measure: str) -> list[Block]:
    """The probe along the pre-training; fine-tuned quality by its steps and by training queries, where they vary."""
    blocks: list[Block] = []
    probes: Panels = {}
    by_step: Panels = {}
    by_share: Panels = {}
    for collection, rows in table.items():
        for variant, row in rows.items():
            found = [record["probe"] for record in row.records.values()]
            if len(found[0]["step"]) > 1 and row.step == found[0]["step"][-1]:
                values = np.mean([probe["mrr@10"] for probe in found], axis=0)
                probes.setdefault(collection, {})[variant] = list(zip(found[0]["step"], values))
            family = [name for name, other in rows.items() if other.pretraining == row.pretraining]
            line = os.path.commonprefix(family).rstrip("-_.")  # noqa: RUF071 - names, not paths
            shared = any(name.startswith(line) for name in rows if name not in family)  # by another family
            if not line or shared:
                line = family[0]
            for panels, place in ((by_step, row.step), (by_share, 100 * row.first["made_from"]["train_share"])):
                panels.setdefault(collection, {}).setdefault(line, []).append((place, row.per_query.mean()))
    if probes:
        caption = "MRR@10 of the probe, [CLS] without fine-tuning, mean over seeds"
        blocks += [Heading(2, "The probe along the pre-training"), Figure("probe", caption, plot_curves(lines(probes)))]
    if varies(by_step):
        figure = Figure("steps", f"{measure} after fine-tuning", plot_curves(lines(by_step)))
        blocks += [Heading(2, "Fine-tuned quality by steps of pre-training"), figure, prediction_table(table)]
    if varies(by_share):
        plot = plot_curves(lines(by_share), xlabel="per cent of the training queries", logarithmic=True)
        blocks += [Heading(2, "Fine-tuned quality by training queries"), Figure("queries", f"{measure}", plot)]
    return blocks


def lines(panels: Panels) -> dict[str, dict[str, tuple]]:
    return {
        panel: {name: tuple(zip(*sorted(points))) for name, points in found.items()} for panel, found in panels.items()
    }


def varies(panels: Panels) -> bool:
    """Whether a line has points at several places."""
    return any(len({x for x, _ in points}) > 1 for found in panels.values() for points in found.values())


def prediction_table(table: Mapping[str, Mapping[str, Row]]) -> Table:
    """How well the probe at a checkpoint predicts the fine-tuned quality: rank correlation over the checkpoints."""
    body = []
    for collection, rows in table.items():
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
    return Table(["collection", "seed", "Spearman's correlation of probe and fine-tuned", "checkpoints"], body)


def losses_table(table: Mapping[str, Mapping[str, Row]]) -> Table:
    rows = []
    for collection, found in table.items():
        for variant, row in found.items():
            for task, (before, after, unigram) in row.first["held_out"].items():
                rows.append([collection, variant, task, f"{before:.2f}", f"{after:.2f}", f"{unigram:.2f}"])
    header = ["collection", "variant", "task", "before", "after", "unigram"]
    return Table(header, rows, "First seed, nats per labelled token.", folded="Held-out losses beside their unigrams")
