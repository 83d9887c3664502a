"""What the demo ends with: the losses and the probe of its pre-training, and the table that says what it was worth.

    make demo        (recipes/chains/demo.sh, whose last stage this is)
    python launchers/demo.py --output demo_run

The exit code is 1 if pre-training did not pay.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.engine.export import curves
from quincunx.engine.retrieval.evaluation import Comparison, Evaluation, aligned, compare, evaluate, interval
from quincunx.engine.retrieval.trec import read_qrels, read_run
from quincunx.launchers.command_line import parse_settings

LABELS = {
    "bm25": "BM25, words alone",
    "random": "fine-tuned from random weights",
    "mlm": "fine-tuned from MLM alone",
    "ours": "fine-tuned from our pre-training",
    "untuned": "our pre-training, not fine-tuned",
}
TASKS = {
    "mlm": "encoder: masked words",
    "mkp": "keywords of the passage",
    "cmp": "what the encoder saw",
    "npr": "the next passage",
    "dor": "its query (summary line)",
}
MEASURE = "RR@10"
LEVEL = 0.01
"""Largest p of a significant difference."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of the demo's table."""

    output: str = setting("demo_run", role="data")
    """Folder of everything that the demo made."""


def print_learned(run_folder: Path) -> list[str]:
    """Held-out losses beside their unigrams, and the probe along the run; gives what failed."""
    losses, unigrams, right = (
        curves(run_folder, "held_out", f"held_out/{measure}/") for measure in ("loss", "unigram", "accuracy")
    )
    rows, failures = [["held-out loss, nats a token", "before", "after", "unigram", "right words, after"]], []
    for task, (_, values) in losses.items():
        loss, unigram = values[-1], unigrams[task][1][-1]
        cells = (f"{value:.2f}" for value in (values[0], loss, unigram))
        rows.append([f"{task}, {TASKS.get(task, '')}", *cells, f"{right[task][1][-1]:.1%}"])
        if not loss < unigram:
            failures.append(f"the held-out loss of {task} is {loss:.2f}, not below its unigram {unigram:.2f}")
    print("", *aligned(rows), sep="\n")
    print("unigram: the loss of a model that knows each word's frequency and ignores the context.")
    _, curve = curves(run_folder, "probe", "probe/")["mrr@10"]
    print("\nprobe, MRR@10 along the run: " + " ".join(f"{value:.3f}" for value in curve))
    print("Held-out summary lines search for their docstrings by [CLS] vectors, not fine-tuned yet; 1 is perfect.\n")
    if not curve[-1] >= 2 * curve[0]:
        failures.append(f"the probe is {curve[-1]:.3f} after pre-training, not twice the {curve[0]:.3f} before")
    return failures


def compare_systems(output: Path) -> tuple[dict[str, Evaluation], dict[str, Comparison]]:
    """(every system's values, ours against each of the others)."""
    qrels = read_qrels(output / "shards" / "probe" / "qrels" / "test.tsv")
    found = {name: evaluate(read_run(output / f"{name}.trec"), qrels, [MEASURE]) for name in LABELS}
    return found, {name: compare(found["ours"], other)[MEASURE] for name, other in found.items() if name != "ours"}


def print_worth(output: Path) -> list[str]:
    """MRR@10 of every system, how much more ours has, and what that is worth, in a sentence; gives what failed."""
    found, gains = compare_systems(output)
    judged = found["ours"].counts["judged"]
    rows = [[f"{judged} held-out queries", "MRR@10", "95 % interval", "ours minus it", "95 % interval", "p"]]
    for name, evaluation in found.items():
        low, high = interval(evaluation.per_query[MEASURE].values())
        more = ["", "", ""]
        if gain := gains.get(name):
            more = [f"{gain.difference:+.3f}", f"{gain.low:+.3f} to {gain.high:+.3f}", f"{p_of(gain):.1g}"]
        rows.append([LABELS[name], f"{evaluation.means[MEASURE]:.3f}", f"{low:.3f} to {high:.3f}", *more])
    print(*aligned(rows), sep="\n")
    print("p: the larger one of the paired t-test's and the randomisation test's, both two-sided.\n")
    print(sentence(gains))
    return [
        f"{LABELS['ours']} is not significantly better (p < {LEVEL}) than {LABELS[name]}"
        for name in ("random", "mlm")
        if not is_better(gains[name])
    ]


def p_of(gain: Comparison) -> float:
    return max(gain.t_test_p, gain.randomisation_p)


def is_better(gain: Comparison) -> bool:
    return gain.difference > 0 and p_of(gain) < LEVEL


def sentence(gains: Mapping[str, Comparison]) -> str:
    """What pre-training was worth here, whichever way the numbers fall."""

    def worth(name: str, what: str) -> str:
        doubt = "" if p_of(gains[name]) < LEVEL else f" (not significant, p = {p_of(gains[name]):.2g})"
        return f"{gains[name].difference:+.3f} MRR@10 over {what}{doubt}"

    return (
        f"After the same fine-tuning, on queries that no training has seen, our pre-training was worth\n"
        f"{worth('random', 'random weights')} and {worth('mlm', 'MLM alone')}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    out = parse_settings(DemoSettings, __doc__.split("\n")[0], argv).output
    failures = print_learned(Path(out) / "ours") + print_worth(Path(out))
    print(f"\nEverything lies in {out}/. Ask it yourself:")
    index = f"--embeddings {out}/ours.vectors --corpus {out}/shards/probe"
    print(f"  .venv/bin/python launchers/search.py --model {out}/ours.tuned/export/retriever {index} --interactive")
    print("Curves, settings and artifacts of the pre-training in a browser:")
    print(f"  .venv/bin/mlflow ui --backend-store-uri sqlite:///{out}/ours/mlflow.db")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    exit_with_one_sentence(main)
