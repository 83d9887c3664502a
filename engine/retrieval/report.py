"""A report of a pipeline run: what each stage reached, how sure that is, how it got there, and what a person can read.

Everything is taken from the pipeline's folder (engine/retrieval/pipeline.py): recipe.json, the stamps, the results of
evaluate.py, the metrics of the trainings. The report is a list of blocks; report_page.py writes them as HTML and
Markdown.
"""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quincunx.data_shards.errors import DataError
from quincunx.engine.metrics_file import read_metrics
from quincunx.engine.model_card import curves
from quincunx.engine.retrieval.collection import read_passages, read_queries
from quincunx.engine.retrieval.files import read_lines
from quincunx.engine.retrieval.judgements import read_qrels
from quincunx.engine.retrieval.measures import Comparison, Evaluation, compare
from quincunx.engine.retrieval.pipeline import RECIPE_FILE, STAGES_FOLDER, minutes, read_json
from quincunx.engine.retrieval.report_blocks import Block, Code, Figure, Heading, Table, Text
from quincunx.engine.retrieval.report_examples import best_and_worst, example, rankings_of
from quincunx.engine.retrieval.report_plots import plot_curves, plot_differences

SYSTEM_NAMES = {
    "bm25": "BM25",
    "start": "encoder before fine-tuning",
    "retriever1": "retriever 1 (negatives of BM25)",
    "retriever2": "retriever 2 (mined negatives)",
    "reranker": "reranker over retriever 2",
    "distil": "distilled retriever",
}
TRAINED = ("pretrain", "retriever1", "retriever2", "reranker", "distil")


@dataclass(frozen=True)
class Result:
    """evaluate.py's result of one system on one split."""

    record: dict[str, Any]
    evaluation: Evaluation


@dataclass
class Chain:
    """What a pipeline's folder holds."""

    folder: Path
    recipe: dict[str, Any]
    """recipe.json"""
    stamps: dict[str, dict[str, Any]]
    """Stage -> stamp, of finished stages in the chain's order."""
    results: dict[str, dict[str, Result]] = field(default_factory=dict)
    """Split -> system -> result, in the recipe's order."""


def load_chain(folder: Path) -> Chain:
    """Reads what is finished. Raises DataError where the folder is no pipeline's, or nothing is evaluated yet."""
    folder = Path(folder)
    recipe = read_json(folder / RECIPE_FILE)
    if recipe is None or not {"stages", "evaluated", "systems"} <= recipe.keys():
        raise DataError(f"{folder} has no {RECIPE_FILE}: give the --output folder of launchers/pipeline.py")
    stamps = {}
    for name in recipe["stages"]:
        stamp = read_json(folder / STAGES_FOLDER / f"{name}.json")
        if stamp is not None and name != "report":
            stamps[name] = stamp
    chain = Chain(folder, recipe, stamps)
    for split in recipe["evaluated"]:
        found = {
            system: load_result(folder / f"evaluate.{system}.{split}")
            for system in recipe["systems"]
            if f"evaluate.{system}.{split}" in stamps
        }
        if found:
            chain.results[split] = found
    if not chain.results:
        raise DataError(f"{folder} has no finished evaluation yet: run the pipeline on, then make the report")
    return chain


def load_result(folder: Path) -> Result:
    """result.json and queries.jsonl of an evaluation. Raises DataError where they cannot be read."""
    record = read_json(folder / "result.json")
    if record is None or "measures" not in record:
        raise DataError(f"{folder / 'result.json'} is not evaluate.py's: run the pipeline again")
    per_query: dict[str, dict[str, float]] = {name: {} for name in record["measures"]}
    for line in read_lines(folder / "queries.jsonl"):
        query = json.loads(line)
        for name, value in query["values"].items():
            per_query[name][query["query_id"]] = value
    return Result(record, Evaluation({name: found["mean"] for name, found in record["measures"].items()}, per_query))


def make_blocks(chain: Chain) -> list[Block]:
    """The whole report."""
    recipe = chain.recipe
    blocks: list[Block] = [Heading(1, f"Retrieval chain “{recipe['recipe']}”"), Text(summary(chain))]
    for split, results in chain.results.items():
        blocks += [Heading(2, f"Results on {split}"), *results_of(split, results)]
    blocks += [Heading(2, "Training"), *training_of(chain)]
    split = next(iter(chain.results))
    blocks += against_bm25(chain, split)
    blocks += [Heading(2, "Data and models"), *ids_of(chain)]
    blocks += [Heading(2, "Settings"), *settings_of(chain)]
    blocks += [Heading(2, "Stages, time, versions"), *stages_of(chain)]
    return blocks


def summary(chain: Chain) -> str:
    """The outcome in two sentences: the last system against BM25 and against the first retriever, main measure."""
    split, results = next(iter(chain.results.items()))
    last = final_system(results)
    measure = next(iter(results[last].evaluation.means))
    found = results[last].record["measures"][measure]
    text = (
        f"On {split}, the {name_of(last)} has {measure_title(measure)} {found['mean']:.3f} "
        f"(95 % interval {found['low']:.3f} to {found['high']:.3f})"
    )
    for other in ("bm25", "retriever1"):
        if other in results and other != last:
            compared = compare(results[last].evaluation, results[other].evaluation)[measure]
            text += f"; against {name_of(other)} {signed(compared)}, {p_value(compared)}"
    seconds = sum(stamp["seconds"] for stamp in chain.stamps.values())
    return f"{text}. The {len(chain.stamps)} stages took {minutes(seconds)} (minutes:seconds) in all."


def final_system(results: dict[str, Result]) -> str:
    """The system that the chain is for: the last retriever that is trained, else the last of all."""
    order = ["distil", "retriever2", "retriever1", "reranker", "start", "bm25"]
    return next(system for system in order if system in results)


def results_of(split: str, results: dict[str, Result]) -> list[Block]:
    """The table of stages and measures, then each stage against the one before and against BM25."""
    measures = list(next(iter(results.values())).evaluation.means)
    rows = []
    for system, result in results.items():
        found = result.record["measures"]
        rows.append(
            [name_of(system)]
            + [f"{found[m]['mean']:.4f} [{found[m]['low']:.3f}, {found[m]['high']:.3f}]" for m in measures]
        )
    first = next(iter(results.values())).record
    note = (
        f"{first['queries']['judged']:,} queries. In brackets the 95 % interval of the mean: "
        f"{first['interval']['method']}, {first['interval']['resamples']:,} resamples."
    )
    if "reranker" in results:
        note += " The reranker only sees the top of retriever 2's ranking: its deeper recall ends there."
    blocks: list[Block] = [Table(["stage", *map(measure_title, measures)], rows, note)]
    systems = list(results)
    rows = []
    for system, before in zip(systems[1:], systems):
        compared = compare(results[system].evaluation, results[before].evaluation)
        against = {} if "bm25" not in results else compare(results[system].evaluation, results["bm25"].evaluation)
        for measure in measures:
            row = [name_of(system), measure_title(measure), name_of(before)]
            for found in (compared, against):
                row += [signed(found[measure]), tests(found[measure])] if found else ["", ""]
            rows.append(row)
    if rows:
        header = ["stage", "measure", "stage before", "difference", "p", "against BM25", "p"]
        note = (
            "Differences of means over the same queries with their 95 % interval; p of the randomisation test, in "
            "parentheses of the paired t-test. Many tests stand here: read a p near 0.05 with that in mind."
        )
        blocks.append(Table(header, rows, note, folded=f"Each stage against the one before and against BM25 ({split})"))
    return blocks


def training_of(chain: Chain) -> list[Block]:
    """Loss and probe curves of every stage that trains, with first and last values."""
    blocks: list[Block] = []
    rows, losses, probes = [], {}, {}
    for stage in (name for name in TRAINED if name in chain.stamps):
        folder = chain.folder / stage
        found = {task: curve for task, curve in curves(folder, "train", "loss/").items() if task != "total"}
        if found:
            losses[stage] = found
        for measure, curve in curves(folder, "probe", "probe/").items():
            probes.setdefault(measure, {})[stage] = curve
        for task, (steps, values) in found.items():
            rows.append([stage, task, f"{steps[-1]:,}", f"{values[0]:.3f}", f"{values[-1]:.3f}", str(starts(folder))])
    if not rows:
        return [Text("No stage of this chain was trained.")]
    blocks.append(Table(["stage", "loss", "steps", "first", "last", "starts"], rows))
    blocks.append(Figure("losses", "Training losses over optimizer steps, stage by stage", plot_curves(losses)))
    if probes:
        blocks.append(Figure("probes", "The probe's measures over the steps of each stage", plot_curves(probes)))
    blocks.append(
        Text(
            "Losses of different stages and tasks are not comparable: they are means over different candidates. "
            "“Starts” counts how often the training was started or resumed."
        )
    )
    return blocks


def starts(run_folder: Path) -> int:
    """How often a run was started or resumed."""
    events = (record.get("event") for record in read_metrics(run_folder) if record["kind"] == "event")
    return sum(event in ("started", "resumed") for event in events)


def against_bm25(chain: Chain, split: str) -> list[Block]:
    """Queries won and lost by every system against BM25, their sorted differences, and some of them to read."""
    results = chain.results[split]
    if "bm25" not in results or len(results) < 2:
        return []
    last = final_system(results)
    measure = next(iter(results[last].evaluation.means))
    base = results["bm25"].evaluation
    rows, differences = [], {}
    for system in (name for name in results if name != "bm25"):
        compared = compare(results[system].evaluation, base)[measure]
        rows.append([name_of(system), str(compared.wins), str(compared.losses), str(compared.ties)])
        mine, theirs = results[system].evaluation.per_query[measure], base.per_query[measure]
        differences[system] = {query_id: value - theirs[query_id] for query_id, value in mine.items()}
    title = measure_title(measure)
    caption = f"{title} minus BM25's, query by query, sorted; below: how many queries differ by how much"
    plot = plot_differences({name_of(name): sorted(found.values()) for name, found in differences.items()}, title)
    return [
        Heading(2, f"Against BM25, query by query ({split}, {title})"),
        Table(["stage", "won", "lost", "equal"], rows),
        Figure("differences", caption, plot),
        *examples_of(chain, split, last, differences[last]),
    ]


def examples_of(chain: Chain, split: str, system: str, differences: dict[str, float]) -> list[Block]:
    """The queries that the system won and lost most clearly: query, relevant passage, what each system put first."""
    won, lost = best_and_worst(differences)
    qrels_file = chain.folder / f"split.{split}" / "qrels.tsv"
    if not (won or lost) or not qrels_file.exists():
        return []
    qrels = read_qrels(qrels_file)
    queries = read_queries(chain.folder / f"split.{split}" / "queries.jsonl")
    passages = read_passages(chain.recipe["splits"][split]["corpus"], titles=chain.recipe["data"]["titles"])
    relevant_from = chain.recipe["splits"][split].get("relevant_from", 1)
    rankings = {
        name_of(name): rankings_of(result.record["files"]["run"]["path"], {*won, *lost})
        for name, result in chain.results[split].items()
    }
    blocks: list[Block] = []
    for title, chosen in ((f"Won by the {name_of(system)}", won), (f"Lost by the {name_of(system)}", lost)):
        if chosen:
            blocks.append(Heading(3, title))
            blocks += [example(id, queries, passages, qrels[id], rankings, relevant_from) for id in chosen]
    return blocks


def ids_of(chain: Chain) -> list[Block]:
    """Digests of what came from outside and of every model and file of candidates that was made."""
    rows: dict[tuple[str, str], list[str]] = {}
    for stage, stamp in chain.stamps.items():
        if stage.startswith("split."):
            for role, digest in stamp["inputs"].items():
                rows[stage, role] = [f"{role} of {stage.removeprefix('split.')}", source_of(stamp, role), digest]
    models = chain.recipe["models"]
    given = [["encoder", models["encoder"]], ["reranker's start", models["reranker"] or models["encoder"]]]
    made = []
    for stage, stamp in chain.stamps.items():
        if stage in TRAINED or stage.startswith(("mine.", "score", "shards")):
            made += [[stage, path, digest] for path, digest in stamp["outputs"].items()]
    blocks: list[Block] = [
        Table(["data", "file", "digest"], list(rows.values())),
        Table(["started from", "model"], given),
        Table(["stage", "made", "digest"], made),
    ]
    counts = []
    for stage in chain.stamps:
        manifest = read_json(chain.folder / stage / "negatives.jsonl.manifest.json")
        if manifest is not None:
            counts += [[stage, key.replace("_", " "), f"{value:,}"] for key, value in mined_counts(manifest).items()]
    if counts:
        blocks.append(Table(["mining", "what", "number"], counts, folded="What mining kept and left out"))
    return blocks


def mined_counts(manifest: dict[str, Any]) -> dict[str, int]:
    found = manifest["made_by"].get("mining") or manifest["counts"]
    return {key: value for key, value in found.items() if isinstance(value, int)}


def source_of(stamp: dict[str, Any], role: str) -> str:
    """The word after `--role` in a stage's command."""
    words = stamp["command"]
    return words[words.index(f"--{role}") + 1] if f"--{role}" in words else ""


def settings_of(chain: Chain) -> list[Block]:
    import yaml

    written = {key: chain.recipe[key] for key in ("data", "models", "splits") if chain.recipe.get(key)} | chain.recipe[
        "sections"
    ]
    title = "The recipe of the last start (below: what each stage ran with)"
    blocks: list[Block] = [Code(yaml.safe_dump(written, sort_keys=False), folded=title)]
    for stage in (name for name in TRAINED if name in chain.stamps):
        text = yaml.safe_dump(chain.stamps[stage]["settings"], sort_keys=False)
        blocks.append(Code(text, folded=f"Every setting of {stage} that decides what is learned"))
    return blocks


def stages_of(chain: Chain) -> list[Block]:
    rows = [
        [stage, minutes(stamp["seconds"]), str(stamp["attempts"]), stamp["reason"], stamp["finished"]]
        for stage, stamp in chain.stamps.items()
    ]
    unfinished = [name for name in chain.recipe["stages"] if name not in chain.stamps and name != "report"]
    blocks: list[Block] = [
        Table(["stage", "time", "attempts", "why it ran", "finished"], rows, folded="Stages and their time"),
        Text(
            "Time is that of the last attempt, in minutes and seconds, start of the process included."
            + (f" Not finished: {', '.join(unfinished)}." if unfinished else "")
        ),
    ]
    versions: dict[str, dict[str, None]] = {}
    for stamp in chain.stamps.values():
        for package, version in stamp["versions"].items():
            versions.setdefault(package, {})[version] = None
    blocks.append(Table(["package", "version"], [[package, ", ".join(found)] for package, found in versions.items()]))
    commands = "\n".join(shlex.join(stamp["command"]) for stamp in chain.stamps.values())
    blocks.append(Code(commands, folded="Every command"))
    return blocks


def measure_title(name: str) -> str:
    """ir-measures' RR and AP by the names that papers use."""
    return re.sub(r"^RR\b", "MRR", re.sub(r"^AP\b", "MAP", name))


def name_of(system: str) -> str:
    return SYSTEM_NAMES.get(system, system)


def signed(compared: Comparison) -> str:
    return f"{compared.difference:+.4f} [{compared.low:+.3f}, {compared.high:+.3f}]"


def p_value(compared: Comparison) -> str:
    p = compared.randomisation_p
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def tests(compared: Comparison) -> str:
    t_test = compared.t_test_p
    beside = "" if t_test is None else " (< 0.001)" if t_test < 0.001 else f" ({t_test:.3f})"
    return p_value(compared).removeprefix("p ").removeprefix("= ") + beside
