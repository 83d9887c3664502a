"""Tables of benchmarks/pretraining_helps.py: means and spreads over seeds, paired tests over queries."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from quincunx.engine.retrieval.measures import Evaluation, compare, measure_name

Cells = Mapping[str, Mapping[int, Mapping[str, Evaluation]]]
"""variant -> seed -> collection -> values"""


def over_seeds(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Each query's values averaged over the seeds, so that a query counts once in a test, whatever the seeds."""
    count = len(evaluations)
    per_query = {
        measure: {
            query_id: sum(evaluation.per_query[measure][query_id] for evaluation in evaluations) / count
            for query_id in values
        }
        for measure, values in evaluations[0].per_query.items()
    }
    means = {name: sum(evaluation.means[name] for evaluation in evaluations) / count for name in per_query}
    return Evaluation(means, per_query)


def summarise(cells: Cells, baselines: Sequence[str]) -> dict[str, Any]:
    """{"summary": {collection: {variant: ...}}} of the cells that are there.

    Of each measure: mean over seeds; spread, the sample standard deviation of the seeds' means (None for one seed); the
    seeds' means; and against every baseline that is there, the fields of measures.Comparison on over_seeds' values.
    """
    summary: dict[str, Any] = {}
    collections = dict.fromkeys(name for seeds in cells.values() for found in seeds.values() for name in found)
    for collection in collections:
        averaged = {
            variant: over_seeds([found[collection] for found in seeds.values()])
            for variant, seeds in cells.items()
            if seeds
        }
        summary[collection] = {}
        for variant, evaluation in averaged.items():
            others = [name for name in baselines if name in averaged and name != variant]
            tests = {name: compare(evaluation, averaged[name]) for name in others}
            rows = {}
            for measure in evaluation.means:
                values = {seed: found[collection].means[measure] for seed, found in cells[variant].items()}
                rows[measure] = {
                    "mean": statistics.fmean(values.values()),
                    "spread": statistics.stdev(values.values()) if len(values) > 1 else None,
                    "seeds": values,
                    "against": {name: asdict(compared[measure]) for name, compared in tests.items()},
                }
            queries = len(next(iter(evaluation.per_query.values())))
            summary[collection][variant] = {"queries": queries, "measures": rows}
    return {"baselines": list(baselines), "summary": summary}


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page: what was run, a table a collection, the tests, and the encoders before fine-tuning."""
    settings, machine, versions = results["settings"], results["machine"], results["versions"]
    parts = [
        f"# Does pre-training help? Table {results['table']}",
        "\n".join(
            [
                f"Commit {results['commit'][:12] or 'unknown'}"
                + (f" with {results['uncommitted']} uncommitted files" if results["uncommitted"] else "")
                + f"; {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
                f"OMP_NUM_THREADS {machine['threads']}.",
                ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
                f"Encoder {settings['encoder']}; pre-training {settings['steps']} steps "
                f"({_listed(settings['pretrain']) or 'defaults'}); fine-tuning {settings['finetune_steps']} steps "
                f"({_listed(settings['finetune']) or 'defaults'}), {settings['pooling']} pooling; seeds "
                f"{', '.join(map(str, settings['seeds']))} of both.",
                "Tasks: "
                + "; ".join(
                    f"{name}: {', '.join(variant['tasks']) if variant['tasks'] else 'no pre-training'}"
                    for name, variant in results["variants"].items()
                )
                + ".",
            ]
        ),
        "Mean over seeds ± sample standard deviation over seeds. Tests are paired over queries, each query's values "
        "averaged over seeds first: difference [95 % bootstrap interval], p of the t-test / of the randomisation test, "
        "not corrected for their number.",
    ]
    for collection, variants in results["summary"].items():
        bm25 = results["bm25"].get(collection, {})
        queries = next(iter(variants.values()))["queries"]
        parts.append(f"## {collection} ({queries} queries)\n\n{_means_table(variants, bm25)}")
        for baseline in results["baselines"]:
            if table := _tests_table(variants, baseline):
                parts.append(f"Against {baseline}:\n\n{table}")
    if results.get("untuned"):
        parts.append(
            "## Before fine-tuning\n\nFirst seed, test queries of the training collection. Cosine: mean over all pairs "
            f"of different passages.\n\n{_untuned_table(results['untuned'])}"
        )
    if results.get("losses"):
        parts.append(
            "## Held-out losses of the pre-training\n\nFirst seed, nats per labelled token, before > after.\n\n"
            + _losses_table(results["losses"])
        )
    return "\n\n".join(parts) + "\n"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _means_table(variants: Mapping[str, Any], bm25: Mapping[str, float]) -> str:
    measures = list(next(iter(variants.values()))["measures"])
    rows = [["variant", "seeds", *measures]]
    for name, variant in variants.items():
        cells = []
        for value in variant["measures"].values():
            spread = "" if value["spread"] is None else f" ± {value['spread']:.4f}"
            cells.append(f"{value['mean']:.4f}{spread}")
        rows.append([name, str(len(value["seeds"])), *cells])
    if bm25:
        rows.append(["BM25", "", *(f"{bm25[measure]:.4f}" for measure in measures)])
    return _table(rows)


def _tests_table(variants: Mapping[str, Any], baseline: str) -> str:
    rows = [["variant", *next(iter(variants.values()))["measures"]]]
    for name, variant in variants.items():
        tests = [value["against"].get(baseline) for value in variant["measures"].values()]
        if all(tests):
            rows.append(
                [name]
                + [
                    f"{test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}] "
                    f"{_p(test['t_test_p'])} / {_p(test['randomisation_p'])}"
                    for test in tests
                ]
            )
    return _table(rows) if len(rows) > 1 else ""


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.0005 else "<0.001"


def _untuned_table(untuned: Mapping[str, Any]) -> str:
    measure = measure_name("MRR@10")
    rows = [["variant", "MRR@10, [CLS]", "MRR@10, mean", "cosine, [CLS]", "cosine, mean"]]
    for name, poolings in untuned.items():
        cells = [
            f"{poolings[pooling][key]:.4f}" if pooling in poolings else "-"
            for key in (measure, "mean_cosine")
            for pooling in ("cls", "mean")
        ]
        rows.append([name, *cells])
    return _table(rows)


def _losses_table(losses: Mapping[str, Any]) -> str:
    tasks = list(dict.fromkeys(task for found in losses.values() for task in found))
    rows = [["variant", *tasks]]
    for name, found in losses.items():
        cells = [f"{found[task][0]:.3f} > {found[task][1]:.3f}" if task in found else "" for task in tasks]
        rows.append([name, *cells])
    return _table(rows)
