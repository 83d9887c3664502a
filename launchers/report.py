"""Makes the report of a chain: what each system reached on each split, how sure that is, the curves of the trainings.

    python launchers/report.py --chain chain_run

Reads SYSTEM.SPLIT.json with SYSTEM.SPLIT.jsonl (evaluate.py's --output and --per_query), and the run folders beside
them.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quincunx.data_shards.errors import DataError, exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.engine.export import curves
from quincunx.engine.report import Report, plot_curves, table
from quincunx.engine.retrieval.evaluation import compare, read_results
from quincunx.engine.run_folder import METRICS_FILE
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
    chain = Path(settings.chain)
    splits: dict[str, dict[str, tuple]] = defaultdict(dict)
    for file in sorted(chain.glob("*.*.json"), key=lambda path: path.stat().st_mtime_ns):  # as they were made
        system, split = file.stem.split(".", 1)
        if file.with_suffix(".jsonl").exists():
            splits[split][system] = read_results(file, file.with_suffix(".jsonl"))
    if not splits:
        raise DataError(f"{chain} holds no SYSTEM.SPLIT.json of evaluate.py: run the chain on, then make the report")
    report = Report(f"Retrieval chain {chain.name}")
    for split, systems in splits.items():
        report.add(f"## Results on {split}", results_table(systems))
        if len(systems) > 1:
            report.add("Each system against the one before and against the first:", tests_table(systems))
    add_trainings(report, chain)
    for path in report.write(Path(settings.output or chain / "report")):
        print(path)


def results_table(systems: Mapping[str, tuple]) -> str:
    """Means with their intervals, of system -> (record, evaluation)."""
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
    """Paired tests, over the same queries, of system -> (record, evaluation)."""
    names, rows = list(systems), []
    for place, name in enumerate(names[1:], 1):
        for other in dict.fromkeys((names[place - 1], names[0])):
            for measure, test in compare(systems[name][1], systems[other][1]).items():
                difference = f"{test.difference:+.4f} [{test.low:+.3f}, {test.high:+.3f}]"
                won = f"{test.wins}, {test.losses}, {test.ties}"
                rows.append([f"{name} against {other}", measure, difference, f"{test.randomisation_p:.4f}", won])
    header = ["systems", "measure", "difference, 95 % interval", "p (randomisation)", "won, lost, equal"]
    return table(header, rows, "Many tests are here: read a p near 0.05 with that in mind.")


def add_trainings(report: Report, chain: Path) -> None:
    """Loss and probe curves of every run folder, with first and last values."""
    rows, losses, probes = [], {}, defaultdict(dict)
    files = [file for file in chain.glob(f"*/{METRICS_FILE}") if ".old-" not in file.parent.name]
    for file in sorted(files, key=lambda path: path.parent.stat().st_ctime_ns):
        run = file.parent
        found = {task: curve for task, curve in curves(run, "train", "loss/").items() if task != "total"}
        if found:
            losses[run.name] = found
        for task, (steps, values) in found.items():
            rows.append([run.name, task, f"{steps[-1]:,}", f"{values[0]:.3f}", f"{values[-1]:.3f}"])
        for measure, curve in curves(run, "probe", "probe/").items():
            probes[measure][run.name] = curve
    if losses:
        caption = "Training losses by optimizer step; those of different stages are not comparable"
        report.add("## Training", table(["run", "loss", "steps", "first", "last"], rows))
        report.add_plot("losses", plot_curves(losses), caption)
    if probes:
        report.add_plot("probes", plot_curves(probes), "Measures of the probe by optimizer step")


if __name__ == "__main__":
    exit_with_one_sentence(main)
