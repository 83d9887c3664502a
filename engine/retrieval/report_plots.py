"""The report's plots as SVG that takes the page's text colour, so that it reads on light and on dark."""

import io
import itertools
from collections.abc import Mapping, Sequence

Curves = Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]]
"""Panel -> line -> (steps, values)"""
# Okabe and Ito's palette without black and yellow, each at 3:1 or better on white and on a dark page.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#4aa3df")
STYLES = ("-", "--", ":")
"""Of lines, once the colours are used up."""
INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
FEWEST_FOR_MARKERS = 30


def plot_curves(curves: Curves, xlabel: str = "optimizer step", logarithmic: bool = False) -> str:
    """SVG: one panel for each entry, side by side two in a row, lines over optimizer steps (or what xlabel says)."""
    pyplot = _pyplot()
    rows = -(-len(curves) // 2)
    columns = min(2, len(curves))
    lines = list(dict.fromkeys(line for panel in curves.values() for line in panel))
    looks = dict(zip(lines, itertools.cycle(pyplot.cycler(linestyle=STYLES) * pyplot.cycler(color=COLOURS))))
    many = len(lines) > len(COLOURS)  # one legend beside the panels
    height = max(2.7, 0.2 * len(lines) / rows) if many else 2.7
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.9 * columns, height * rows), squeeze=False)
    for place, (panel, (title, found)) in enumerate(zip(axes.flat, curves.items())):
        for line, (steps, values) in found.items():
            marker = "o" if len(steps) <= FEWEST_FOR_MARKERS else None
            panel.plot(steps, values, label=line, **looks[line], linewidth=1.6, marker=marker, markersize=3.5)
        panel.set_title(title, fontsize=10)
        if not many:
            panel.legend(fontsize=8, frameon=False)
        if logarithmic:
            panel.set_xscale("log")
        else:
            panel.xaxis.get_major_locator().set_params(integer=True)
        if place >= len(curves) - columns:
            panel.set_xlabel(xlabel, fontsize=9)
        _tidy(panel)
    for panel in axes.flat[len(curves) :]:
        panel.set_visible(False)
    if many:
        shown = {label: line for panel in axes.flat for line, label in zip(*panel.get_legend_handles_labels())}
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        figure.legend(shown.values(), shown.keys(), **beside, fontsize=8, frameon=False)
    return _svg(figure)


def plot_bars(bars: Mapping[str, tuple[float, float, float]], measure: str, lines: Mapping[str, float]) -> str:
    """SVG: a horizontal bar for each (value, low, high) with its interval, and a dashed line for each of `lines`."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(7.8, 0.9 + 0.32 * len(bars)))
    values = [value for value, _, _ in bars.values()]
    errors = [[value - low for value, low, _ in bars.values()], [high - value for value, _, high in bars.values()]]
    panel.barh(list(bars), values, xerr=errors, color=COLOURS[0], ecolor=INK, error_kw={"linewidth": 1, "capsize": 2})
    for number, (name, value) in enumerate(lines.items(), 1):
        panel.axvline(value, color=COLOURS[number], linestyle="--", linewidth=1.4, label=name)
    panel.invert_yaxis()
    panel.set_axisbelow(True)
    panel.set_xlabel(measure, fontsize=9)
    if lines:
        panel.legend(fontsize=8, frameon=False)
    _tidy(panel)
    return _svg(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
            "svg.fonttype": "none",
            "svg.hashsalt": "quincunx",
            "font.size": 9,
            "font.family": "sans-serif",
        }
    )
    return pyplot


def _tidy(panel) -> None:
    panel.grid(alpha=0.25, color=INK, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def _svg(figure) -> str:
    from matplotlib import pyplot

    figure.tight_layout()
    buffer = io.StringIO()
    how = {"transparent": True, "bbox_inches": "tight", "metadata": {"Date": None, "Creator": None}}
    figure.savefig(buffer, format="svg", **how)
    pyplot.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
