"""What a report is made of, and how it is written: one HTML page that needs nothing else, and Markdown with plots."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quincunx.data_shards.artefact import written_whole


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """How to read it, below it."""
    folded: str | None = None
    """Summary line of a table that opens on demand."""


@dataclass(frozen=True)
class Figure:
    name: str
    """File name of the plot beside the Markdown, without ending."""
    caption: str
    svg: str


@dataclass(frozen=True)
class Code:
    text: str
    folded: str


@dataclass(frozen=True)
class Example:
    query: str
    passage_id: str
    passage: str
    firsts: Sequence[tuple[str, str, str]]
    """(system, rank of the relevant passage, what it put first)"""


Block = Heading | Text | Table | Figure | Code | Example

STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --page: #ffffff; --soft: #5a606b; --line: #d9dce2; --band: #f5f6f8;
  --accent: #0b62a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --page: #15171b; --soft: #a4abb8; --line: #363b45;
  --band: #1d2026; --accent: #6db7f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .7rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
p { margin: .6rem 0; max-width: 46rem; }
.note { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number { white-space: nowrap; }
td small { color: var(--soft); font-size: .78rem; display: block; }
td.digest { font-family: ui-monospace, monospace; font-size: .8rem; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .88rem; }
details { margin: .7rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--band); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; font-size: .8rem;
  white-space: pre-wrap; }
article { background: var(--band); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  margin: .9rem 0; font-size: .92rem; }
article .query { font-weight: 600; font-size: 1.02rem; margin: 0 0 .4rem; }
article p { max-width: none; margin: .4rem 0; }
dl { margin: .6rem 0 0; }
dt { font-weight: 600; margin-top: .5rem; }
dt span { color: var(--soft); font-weight: 400; }
dd { margin: 0; }
@media (max-width: 600px) { figure svg { max-width: none; width: 34rem; }
  body { font-size: 15px; padding: 1rem .8rem 3rem; } h1 { font-size: 1.4rem; }
  article { padding: .7rem .8rem; } }
@media print { :root { --ink: #000; --page: #fff; --soft: #444; --line: #bbb; --band: #fff; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } h2 { break-after: avoid; } figure, article, tr {
  break-inside: avoid; } .scroll { overflow: visible; } table { font-size: .78rem; } }
"""
# Details open themselves for paper.
SCRIPT = "addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => d.open = true));"


def write_report(folder: Path, blocks: Sequence[Block]) -> list[Path]:
    """Writes report.html, then the plots and report.md; gives their paths."""
    folder = Path(folder)
    title = next(block.text for block in blocks if isinstance(block, Heading))
    page = folder / "report.html"
    with written_whole(page) as file:
        file.write(to_html(title, blocks))
    paths = [page]
    for block in blocks:
        if isinstance(block, Figure):
            paths.append(folder / f"{block.name}.svg")
            with written_whole(paths[-1]) as file:
                file.write(alone(block.svg))
    paths.append(folder / "report.md")
    with written_whole(paths[-1]) as file:
        file.write(to_markdown(blocks))
    return paths


def alone(svg: str) -> str:
    """A plot as a file of its own, which has no page to take its colours from: black on white."""
    return svg.replace("currentColor", "#000000").replace("<svg ", '<svg style="background:#fff" ', 1)


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """A page that needs nothing else: no scripts of others, no fonts, no images."""
    body = "\n".join(map(block_html, blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def block_html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Table):
        note = f'<p class="note">{html.escape(block.note)}</p>' if block.note else ""
        return folded_html(block.folded, table_html(block) + note)
    if isinstance(block, Figure):
        caption = html.escape(block.caption)
        svg = block.svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
        return f'<figure><div class="scroll">{svg}</div><figcaption>{caption}.</figcaption></figure>'
    if isinstance(block, Code):
        return folded_html(block.folded, f"<pre>{html.escape(block.text)}</pre>")
    firsts = "".join(
        f"<dt>{html.escape(system)} <span>— {html.escape(place)}</span></dt><dd>{html.escape(text)}</dd>"
        for system, place, text in block.firsts
    )
    return (
        f'<article><p class="query">{html.escape(block.query)}</p><p><span class="note">relevant, '
        f"{html.escape(block.passage_id)}:</span> {html.escape(block.passage)}</p>"
        '<p class="note">Where each system has the relevant passage, and what it put first:</p>'
        f"<dl>{firsts}</dl></article>"
    )


def folded_html(summary: str | None, content: str) -> str:
    return content if summary is None else f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def table_html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "".join(
        "<tr>" + "".join(cell_html(title, cell) for title, cell in zip(table.header, row)) + "</tr>\n"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'


def cell_html(title: str, cell: str) -> str:
    """A number with an interval gets the interval below it, small."""
    if title == "digest":
        return f'<td class="digest">{html.escape(cell)}</td>'
    if cell.endswith("]") and " [" in cell:
        number, interval = cell.split(" [", 1)
        return f'<td class="number">{html.escape(number)}<small>[{html.escape(interval)}</small></td>'
    return f"<td>{html.escape(cell)}</td>"


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(block_markdown, blocks)) + "\n"


def block_markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Table):
        lines = [markdown_row(block.header), "|" + "---|" * len(block.header), *map(markdown_row, block.rows)]
        table = "\n".join(lines) + (f"\n\n{block.note}" if block.note else "")
        return table if block.folded is None else f"{block.folded}:\n\n{table}"
    if isinstance(block, Figure):
        return f"![{block.caption}]({block.name}.svg)"
    if isinstance(block, Code):
        return f"{block.folded}:\n\n```\n{block.text.rstrip()}\n```"
    lines = [f"- **{block.query}**", f"  - relevant, {block.passage_id}: {block.passage}"]
    return "\n".join(lines + [f"  - {system} — {place}: {text}" for system, place, text in block.firsts])


def markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
