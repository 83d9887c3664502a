"""The model card of an export: what the model is, what it was trained on, how to use it, its losses and their plot."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from quincunx.data_shards.setting import names_of
from quincunx.engine.run_folder import numbers, read_metrics
from quincunx.engine.settings import PretrainSettings

PLOT_FILE = "loss.png"
# Okabe and Ito's palette, told apart by colour-blind eyes too; one colour a task wherever tasks are drawn.
COLOURS = {
    "mlm": "#000000",
    "mkp": "#0072b2",
    "cmp": "#d55e00",
    "npr": "#009e73",
    "dor": "#cc79a7",
    "gor": "#e69f00",
    "retromae": "#56b4e9",
    "contrastive": "#0072b2",
    "kl": "#d55e00",
    "margin_mse": "#d55e00",
    "listwise": "#009e73",
    "r_drop": "#cc79a7",
    "cross_entropy": "#0072b2",
    "squared_error": "#0072b2",
}


def first_and_last(run_folder: Path, kind: str) -> tuple[dict[str, float], dict[str, float]] | None:
    """The first and the last record of `kind` ("held_out", "probe"), numbers and "step" only; None if there is none."""
    records = [
        {"step": record["step"], **numbers(record)} for record in read_metrics(run_folder) if record["kind"] == kind
    ]
    return (records[0], records[-1]) if records else None


def held_out_table(run_folder: Path) -> str:
    """Markdown: each task's held-out loss and accuracy before and after, beside its unigram; "" if none was taken."""
    ends = first_and_last(run_folder, "held_out")
    if ends is None:
        return ""
    first, last = ends
    rows = [
        f"| task | loss at step {first['step']} | loss at step {last['step']} | unigram | accuracy before | after |",
        "|---|---|---|---|---|---|",
    ]
    for task in (name.removeprefix("held_out/loss/") for name in last if name.startswith("held_out/loss/")):
        before, after = first.get(f"held_out/loss/{task}", float("nan")), last[f"held_out/loss/{task}"]
        right = [ends[at].get(f"held_out/accuracy/{task}", float("nan")) for at in (0, 1)]
        unigram = last[f"held_out/unigram/{task}"]
        rows.append(f"| {task} | {before:.3f} | {after:.3f} | {unigram:.3f} | {right[0]:.1%} | {right[1]:.1%} |")
    return "\n".join(rows)


def probe_table(run_folder: Path) -> str:
    """Markdown: the retrieval probe's measures before and after; "" where none was taken."""
    ends = first_and_last(run_folder, "probe")
    if ends is None:
        return ""
    first, last = ends
    rows = [f"| measure | step {first['step']} | step {last['step']} |", "|---|---|---|"]
    for name, title in (("probe/mrr@10", "MRR@10"), ("probe/ndcg@10", "nDCG@10")):
        rows.append(f"| {title} | {first[name]:.3f} | {last[name]:.3f} |")
    return "\n".join(rows)


def learned_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what was learned; folders and other facts of the machine stay private."""
    private = names_of(PretrainSettings, "machine", "data")
    return {name: value for name, value in settings.items() if name not in private}


def model_card(
    run_folder: Path, title: str, usage: str, step: int, dataset_ids: list[str], settings: dict[str, Any], plot: bool
) -> str:
    """README.md in the Hugging Face hub's format.

    title: the model's name. usage: a Markdown section with the code that loads this folder. step: optimizer steps done.
    dataset_ids: of the shard sets' manifests. settings: the run's, as settings.yaml has them; those that name this
    machine's folders stay out of the card. plot: whether loss.png stands beside the card.
    """
    import yaml

    metadata = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["dense-retrieval", "pre-training", "quincunx", *settings["tasks"]],
    }
    tasks = "masked language modelling"
    if settings["tasks"]:
        tasks += f" and {', '.join(settings['tasks'])}, with {settings['decoder']} decoders"
    scratch = " with random weights" if settings["from_scratch"] else ""
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {title}",
        f"A dense-retrieval encoder, pre-trained with quincunx for {step} steps of {settings['global_batch']} "
        f"passages, starting from `{settings['encoder']}`{scratch}. Tasks: {tasks}. It is pre-trained, not fine-tuned: "
        "train it on queries and passages before you judge its retrieval.",
        usage,
        "## Training data\n\nShard sets, by the digest of their manifest:\n\n"
        + "\n".join(f"- `{dataset_id}`" for dataset_id in dataset_ids),
    ]
    if table := held_out_table(run_folder):
        parts.append(
            "## Held-out losses\n\nNats per labelled token, on passages never trained on. A task's unigram is the "
            "cross-entropy of the same tokens under their frequencies in training; tasks label different words, so "
            f"compare a loss with its own unigram only.\n\n{table}"
        )
    if table := probe_table(run_folder):
        parts.append(
            f"## Retrieval probe\n\nExact search with [CLS] vectors by cosine, without fine-tuning.\n\n{table}"
        )
    if plot:
        parts.append(f"## Loss\n\n![Losses of every task over the run]({PLOT_FILE})")
    parts.append(f"## Settings\n\n```yaml\n{yaml.safe_dump(learned_settings(settings), sort_keys=False)}```")
    return "\n\n".join(parts) + "\n"


def curves(run_folder: Path, kind: str, prefix: str) -> dict[str, tuple[list[int], list[float]]]:
    """{TASK: (steps, values)} of every metric `prefix`TASK in the records of `kind`, steps ascending."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for record in read_metrics(run_folder):
        if record["kind"] == kind:
            for name, value in numbers(record).items():
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)][record["step"]] = value
    return {name: tuple(map(list, zip(*sorted(points.items()), strict=True))) for name, points in found.items()}


def plot_losses(run_folder: Path, path: Path) -> bool:
    """Writes a PNG: each task's training loss (thin), held-out loss (dots) and held-out unigram (dotted) over steps.

    Returns False, and writes nothing, where the run has recorded no loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    training = curves(run_folder, "train", "loss/")
    held_out = curves(run_folder, "held_out", "held_out/loss/")
    unigram = curves(run_folder, "held_out", "held_out/unigram/")
    tasks = [task for task in dict.fromkeys([*training, *held_out]) if task != "total"]
    if not tasks:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for task in tasks:
        colour = COLOURS.get(task, "#777777")
        axes.plot(*training.get(task, ([], [])), color=colour, linewidth=1, alpha=0.7)
        axes.plot(*held_out.get(task, ([], [])), color=colour, linewidth=1.5, marker="o", markersize=4, label=task)
        for level in unigram.get(task, ([], []))[1][-1:]:
            axes.axhline(level, color=colour, linewidth=1, linestyle=":")
    axes.set(
        xlabel="optimizer step",
        ylabel="loss, nats per labelled token or query",
        title="thin: training   dots: held out   dotted: unigram",
    )
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.2)
    axes.legend(ncols=len(tasks), fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
