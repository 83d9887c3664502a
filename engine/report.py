"""Reports: Markdown with plots beside it, and the same as one HTML page that needs nothing else."""

import base64
import html
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from quincunx.data_shards.durable import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_suffix(".html.jinja")
# Okabe and Ito's palette without black and yellow, each at 3:1 or better on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#4aa3df")
LOOKS = [{"linestyle": style, "color": colour} for style in ("-", "--", ":") for colour in COLOURS]
FEWEST_FOR_MARKERS = 30
PLOT_STYLE = {
    "font.size": 9, "axes.titlesize": 10, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 3.5,
    "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.5, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "svg.fonttype": "none", "svg.hashsalt": "quincunx",
}  # fmt: skip
Curves = Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]]
"""Panel -> line -> (steps, values)"""


class Report:
    """A report in the making."""

    def __init__(self, title: str):
        self.title = title
        self.parts = [f"# {title}"]
        self.plots: dict[str, str] = {}

    def add(self, *parts: str) -> None:
        """Adds paragraphs of Markdown."""
        self.parts += parts

    def add_plot(self, name: str, svg: str, caption: str) -> None:
        self.plots[f"{name}.svg"] = svg
        self.parts.append(f"![{caption}]({quote(name)}.svg)")

    def write(self, folder: Path) -> list[Path]:
        """Writes report.html, report.md and the plots; gives their paths."""
        from jinja2 import Environment
        from markdown_it import MarkdownIt

        def with_plot(image: re.Match) -> str:
            data = base64.b64encode(self.plots[unquote(image[1])].encode()).decode()
            source = f'src="data:image/svg+xml;base64,{data}" alt="{image[2]}"'
            return f"<figure><img {source}><figcaption>{image[2]}.</figcaption></figure>"

        text = "\n\n".join(self.parts) + "\n"
        body = MarkdownIt("commonmark").enable("table").render(text)
        body = re.sub(r'<p><img src="([^"]+)" alt="([^"]*)" /></p>', with_plot, body)
        template = Environment(autoescape=False).from_string(TEMPLATE.read_text(encoding="utf-8"))
        page = template.render(title=html.escape(self.title), body=body)
        content = {"report.html": page, "report.md": text, **self.plots}
        for name, written in content.items():
            with written_whole(folder / name) as file:
                file.write(written)
        return [folder / name for name in content]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A Markdown table; the note says how to read it."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    text = "\n".join(lines)
    return f"{text}\n\n{note}" if note else text


def plot_curves(curves: Curves, xlabel: str = "optimizer step", logarithmic: bool = False) -> str:
    """SVG of draw_curves."""
    return _svg(draw_curves(curves, xlabel, logarithmic))


def draw_curves(curves: Curves, xlabel: str = "optimizer step", logarithmic: bool = False) -> "Figure":
    """A panel for each entry, two in a row, and one legend for all of their lines."""
    lines = list(dict.fromkeys(line for panel in curves.values() for line in panel))
    looks = dict(zip(lines, itertools.cycle(LOOKS)))
    rows, columns, shown = -(-len(curves) // 2), min(2, len(curves)), {}
    figure = _figure(3.9 * columns + 1.8, max(2.7 * rows, 0.2 * len(lines)))
    for place, (title, found) in enumerate(curves.items(), 1):
        panel = figure.add_subplot(rows, columns, place, title=title)
        for line, (steps, values) in found.items():
            marker = "o" if len(steps) <= FEWEST_FOR_MARKERS else None
            (shown[line],) = panel.plot(steps, values, marker=marker, **looks[line])
        if logarithmic:
            panel.set_xscale("log")
        else:
            panel.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel(xlabel, fontsize=9)
    figure.legend(shown.values(), shown.keys(), loc="outside right center")
    return figure


def plot_bars(bars: Mapping[str, tuple[float, float, float]], measure: str, lines: Mapping[str, float]) -> str:
    """SVG: a horizontal bar for each (value, low, high) with its interval, and a dashed line for each of `lines`."""
    figure = _figure(7.8, 0.9 + 0.32 * len(bars))
    panel = figure.add_subplot(xlabel=measure)
    values = [value for value, _, _ in bars.values()]
    errors = [[value - low for value, low, _ in bars.values()], [high - value for value, _, high in bars.values()]]
    panel.barh(list(bars), values, xerr=errors, color=COLOURS[0], error_kw={"linewidth": 1, "capsize": 2})
    for (name, value), colour in zip(lines.items(), COLOURS[1:]):
        panel.axvline(value, color=colour, linestyle="--", label=name)
    panel.invert_yaxis()
    if lines:
        panel.legend()
    return _svg(figure)


def _figure(width: float, height: float) -> "Figure":
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(PLOT_STYLE)
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: "Figure") -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
