"""The loss plot of a run, drawn from its metrics.jsonl."""

from collections import defaultdict
from pathlib import Path

from quincunx.engine.metrics_file import numbers, read_metrics

# Okabe and Ito's palette, told apart by colour-blind eyes too; one colour a task wherever tasks are drawn.
COLOURS = {
    "mlm": "#000000",
    "mkp": "#0072b2",
    "cmp": "#d55e00",
    "npr": "#009e73",
    "dor": "#cc79a7",
    "gor": "#e69f00",
    "retromae": "#56b4e9",
}


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
        ylabel="loss, nats per labelled token",
        title="thin: training   dots: held out   dotted: unigram",
    )
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.2)
    axes.legend(ncols=len(tasks), fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
