"""Reports: Markdown with plots beside it, and the same as one HTML page that needs nothing else."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from quincunx.data_shards.durable import written_whole

TEMPLATE = Path(__file__).with_suffix(".html.jinja")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A Markdown table; the note says how to read it."""
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{text}\n\n{note}" if note else text


def folded(summary: str, text: str) -> str:
    """Text that opens on demand."""
    return f"<details><summary>{html.escape(summary)}</summary>\n\n{text}\n\n</details>"


def figure(name: str, caption: str) -> str:
    """The plot NAME.svg."""
    return f"![{caption}]({name}.svg)"


def write_report(folder: Path, title: str, parts: Sequence[str], plots: Mapping[str, str]) -> list[Path]:
    """Writes report.html, report.md and the plots (name -> SVG); gives their paths."""
    from jinja2 import Environment
    from markdown_it import MarkdownIt

    def inline(found: re.Match) -> str:
        svg = plots[found[1]].replace("<svg ", f'<svg role="img" aria-label="{found[2]}" ', 1)
        return f'<figure><div class="scroll">{svg}</div><figcaption>{found[2]}.</figcaption></figure>'

    text = "\n\n".join([f"# {title}", *parts]) + "\n"
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    body = re.sub(r'<p><img src="([^"]+)\.svg" alt="([^"]*)" /></p>', inline, body)
    page = (
        Environment(autoescape=False)
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(title=html.escape(title), body=body)
    )
    content = {"report.html": page, "report.md": text, **{f"{name}.svg": alone(svg) for name, svg in plots.items()}}
    for name, written in content.items():
        with written_whole(folder / name) as file:
            file.write(written)
    return [folder / name for name in content]


def alone(svg: str) -> str:
    """A plot as a file of its own, which has no page to take its colours from: black on white."""
    return svg.replace("currentColor", "#000000").replace("<svg ", '<svg style="background:#fff" ', 1)
