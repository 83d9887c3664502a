"""Makes the report of a chain: what each system reached on each split, how sure that is, the curves of the trainings.

    python launchers/report.py --chain chain_run

Reads SYSTEM.SPLIT.json with SYSTEM.SPLIT.jsonl (evaluate.py's --output and --per_query), and the run folders beside
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quincunx.data_shards.errors import DataError, exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of a report."""

    chain: str = setting(role="data")
    """Folder of the chain's evaluations and run folders."""
    output: str | None = None
    """Folder to write report.html, report.md and the plots into (default: CHAIN/report)."""


def main() -> None:
    settings = parse_settings(ReportSettings, __doc__.split("\n")[0])
    from quincunx.engine.retrieval.report import write_report

    chain = Path(settings.chain)
    results = read_chain(chain)
    if not results:
        raise DataError(f"{chain} holds no SYSTEM.SPLIT.json of evaluate.py: run the chain on, then make the report")
    parts, plots = [], {}
    for split, systems in results.items():
        parts += [f"## Results on {split}", results_table(systems), tests_table(systems)]
    parts += training_of(chain, plots)
    for path in write_report(Path(settings.output or chain / "report"), f"Retrieval chain {chain.name}", parts, plots):
        print(path)


def read_chain(chain: Path) -> dict[str, dict[str, tuple]]:
    """Split -> system -> (record, evaluation), systems in the order of their making."""
    from quincunx.engine.retrieval.evaluation import read_results

    results: dict[str, dict[str, tuple]] = {}
    for record in sorted(chain.glob("*.*.json"), key=lambda path: path.stat().st_mtime_ns):
        system, split = record.stem.split(".", 1)
        per_query = record.with_suffix(".jsonl")
        if per_query.exists():
            results.setdefault(split, {})[system] = read_results(record, per_query)
    return results


def results_table(systems: Mapping[str, tuple]) -> str:
    """Means with their intervals."""
    from quincunx.engine.retrieval.report import table

    first, evaluation = next(iter(systems.values()))
    rows = []
    for system, (record, _) in systems.items():
        found = record["measures"]
        cells = (f"{found[m]['mean']:.4f} [{found[m]['low']:.3f}, {found[m]['high']:.3f}]" for m in evaluation.means)
        rows.append([system, *cells])
    judged, method = first["queries"], first["interval"]["method"]
    note = f"{judged.get('judged', judged)} queries. In brackets the 95 % interval of the mean: {method}."
    return table(["system", *evaluation.means], rows, note)


def tests_table(systems: Mapping[str, tuple]) -> str:
    """Every system against the one before it and against the first, over the same queries."""
    from quincunx.engine.retrieval.evaluation import compare
    from quincunx.engine.retrieval.report import folded, table

    names, rows = list(systems), []
    for place, name in enumerate(names[1:], 1):
        for other in dict.fromkeys((names[place - 1], names[0])):
            for measure, test in compare(systems[name][1], systems[other][1]).items():
                difference = f"{test.difference:+.4f} [{test.low:+.3f}, {test.high:+.3f}]"
                p = f"{test.randomisation_p:.4f}"
                won = f"{test.wins}, {test.losses}, {test.ties}"
                rows.append([f"{name} against {other}", measure, difference, p, won])
    if not rows:
        return ""
    note = "Many tests are here: read a p near 0.05 with that in mind."
    header = ["systems", "measure", "difference, 95 % interval", "p (randomisation)", "won, lost, equal"]
    return folded("Each system against the one before and against the first", table(header, rows, note))


def training_of(chain: Path, plots: dict[str, str]) -> list[str]:
    """Loss and probe curves of every run folder, with first and last values."""
    from quincunx.engine.export import curves
    from quincunx.engine.retrieval.report import figure, table
    from quincunx.engine.retrieval.report_plots import plot_curves
    from quincunx.engine.run_folder import METRICS_FILE

    rows, losses, probes = [], {}, {}
    for run in sorted(
        (path.parent for path in chain.glob(f"*/{METRICS_FILE}")), key=lambda run: run.stat().st_ctime_ns
    ):
        found = {task: curve for task, curve in curves(run, "train", "loss/").items() if task != "total"}
        if found:
            losses[run.name] = found
        for measure, curve in curves(run, "probe", "probe/").items():
            probes.setdefault(measure, {})[run.name] = curve
        for task, (steps, values) in found.items():
            rows.append([run.name, task, f"{steps[-1]:,}", f"{values[0]:.3f}", f"{values[-1]:.3f}"])
    if not rows:
        return []
    parts = ["## Training", table(["run", "loss", "steps", "first", "last"], rows)]
    plots["losses"] = plot_curves(losses)
    parts.append(figure("losses", "Training losses by optimizer step; those of different stages are not comparable"))
    if probes:
        plots["probes"] = plot_curves(probes)
        parts.append(figure("probes", "Measures of the probe by optimizer step"))
    return parts


if __name__ == "__main__":
    exit_with_one_sentence(main)
