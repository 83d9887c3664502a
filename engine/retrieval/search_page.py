"""A person's search: a prompt on the terminal, and a small local web page with a JSON answer beside it.

The page is plain HTML from Python's own http.server, without scripts or anything from elsewhere. It answers this
machine only: bound to 127.0.0.1, and requests that name another host are refused (a web site cannot reach it by giving
its own name that address).

    /                  the text box
    /?q=...&k=10       results as a page
    /api?q=...&k=10    {"query", "model", "collection", "index", "seconds",
                       "results": [{"rank", "score", "id", "text"}]}
"""

import contextlib
import html
import json
import re
import sys
import textwrap
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TextIO
from urllib.parse import parse_qs, urlsplit

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.finding import Finder

HOST = "127.0.0.1"
OWN_NAMES = ("127.0.0.1", "localhost")
MOST_RESULTS = 100
MOST_CHARACTERS = 2000
WORDS_SHOWN = 60
"""Words of a passage that stand on the page before "more"."""
TERMINAL_LINES = 3


@dataclass(frozen=True)
class Result:
    """One passage found."""

    rank: int
    score: float
    id: str
    text: str


def ask(finder: Finder, query: str, depth: int) -> tuple[list[Result], float]:
    """(the best passages for a query, seconds it took)."""
    begun = time.perf_counter()
    scores, rows = finder.find([query], depth)
    seconds = time.perf_counter() - begun
    kept = rows[0] >= 0
    rows, scores = rows[0][kept], scores[0][kept]
    found = zip(scores.tolist(), finder.passages.ids_at(rows), finder.passages.texts(rows), strict=True)
    return [Result(rank, score, id, text) for rank, (score, id, text) in enumerate(found, 1)], seconds


def search_on_terminal(
    finder: Finder, depth: int, lines: Iterable[str] | None = None, out: TextIO = sys.stdout
) -> None:
    """Asks for queries until an empty line or the end of input; shows score, id and first words of each passage.

    lines: queries of another source than the keyboard.
    """
    print(
        f"{finder.model} over {finder.passages.name} ({len(finder.passages):,} passages). An empty line ends.", file=out
    )
    for line in _typed() if lines is None else lines:
        if not line.strip():
            break
        query = line.strip().encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes that are no UTF-8
        results, seconds = ask(finder, query, depth)
        for result in results:
            print(f"\n{result.rank:>3}  {result.score:.4f}  {result.id}", file=out)
            text = "".join(c if c.isprintable() else " " for c in result.text)  # no escape sequence for the terminal
            shown = textwrap.shorten(text, 80 * TERMINAL_LINES, placeholder=" ...")
            print(textwrap.indent(textwrap.fill(shown, 84), "     "), file=out)
        print(f"\n{len(results)} passages in {1000 * seconds:.0f} ms\n", file=out)


def _typed() -> Iterable[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    while True:
        try:
            yield input("query> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def make_server(finder: Finder, port: int, depth: int) -> ThreadingHTTPServer:
    """The page's server, bound and not yet running; port 0 takes a free one.

    Raises SettingsError where the port is taken, or depth is beyond MOST_RESULTS.
    """
    if depth > MOST_RESULTS:
        raise SettingsError(f"--depth is {depth}, the page shows at most {MOST_RESULTS} passages: give that or less")

    class Handler(_PageHandler):
        pass

    Handler.finder, Handler.depth, Handler.lock = finder, depth, threading.Lock()
    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(f"--page {port}: port {port} of {HOST} is not to be had ({error}); give another") from None


def serve_page(finder: Finder, port: int, depth: int) -> None:
    """Serves until Ctrl-C."""
    with make_server(finder, port, depth) as server:
        print(f"Search page: http://{HOST}:{server.server_address[1]}/  (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


class _PageHandler(BaseHTTPRequestHandler):
    """Answers one request; searches take turns."""

    finder: Finder
    depth: int
    lock: threading.Lock
    server_version = "quincunx"

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if re.sub(r":\d+$", "", self.headers.get("Host", "")) not in OWN_NAMES:
            self.answer(403, "text/plain", "This page answers 127.0.0.1 and localhost only.\n")
        elif address.path not in ("/", "/api"):
            self.answer(404, "text/plain", "There is / and /api?q=...\n")
        else:
            given = parse_qs(address.query)
            query = given.get("q", [""])[0].strip()[:MOST_CHARACTERS]
            wanted = given.get("k", [str(self.depth)])[0]
            depth = min(max(int(wanted), 1), MOST_RESULTS) if re.fullmatch(r"\d{1,6}", wanted) else self.depth
            results, seconds = [], 0.0
            if query:
                with self.lock:
                    results, seconds = ask(self.finder, query, depth)
            if address.path == "/api":
                content = answer_json(self.finder, query, results, seconds)
                self.answer(200, "application/json", json.dumps(content, ensure_ascii=False) + "\n")
            else:
                self.answer(200, "text/html", page(self.finder, query, depth, results, seconds))

    def answer(self, status: int, kind: str, content: str) -> None:
        body = content.encode("utf-8", errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """No line a request."""


def answer_json(finder: Finder, query: str, results: list[Result], seconds: float) -> dict[str, Any]:
    """What /api gives."""
    return {
        "query": query,
        "model": finder.model,
        "collection": finder.passages.name,
        "index": finder.index,
        "seconds": seconds,
        "results": [asdict(result) for result in results],
    }


def page(finder: Finder, query: str, depth: int, results: list[Result], seconds: float) -> str:
    """The whole page as HTML."""
    escape = html.escape
    body = ""
    if query:
        count = f"{len(results)} passage{'s' * (len(results) != 1)}" if results else "No passage found"
        body = f'<p class="took" role="status">{count} in {1000 * seconds:.0f} ms</p>'
        words = {word.lower() for word in re.findall(r"\w{4,}", query)}
        body += "<ol>" + "".join(_item(result, words) for result in results) + "</ol>"
    chosen = "".join(
        f"<option{' selected' * (number == depth)}>{number}</option>" for number in sorted({5, 10, 20, 50, depth})
    )
    return PAGE.format(
        title=escape(query or "Search"),
        query=escape(query, quote=True),
        options=chosen,
        focus="" if query else " autofocus",
        model=escape(finder.model),
        collection=escape(finder.passages.name),
        count=f"{len(finder.passages):,}",
        index=escape(finder.index),
        body=body,
    )


def _item(result: Result, words: set[str]) -> str:
    parts = result.text.split()
    shown = _marked(" ".join(parts[:WORDS_SHOWN]), words)
    if len(parts) > WORDS_SHOWN:
        rest = _marked(" ".join(parts[WORDS_SHOWN:]), words)
        shown += f"<details><summary>more</summary>{rest}</details>"
    head = f'<span class="score">{result.score:.4f}</span> <code>{html.escape(result.id)}</code>'
    return f'<li><article><h2>{head}</h2><div class="text">{shown or "<em>empty</em>"}</div></article></li>'


def _marked(text: str, words: set[str]) -> str:
    """Escaped text, the query's words marked."""
    pieces = re.split(r"(\w+)", text)
    return "".join(
        f"<mark>{html.escape(piece)}</mark>" if piece.lower() in words else html.escape(piece) for piece in pieces
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - quincunx</title>
<link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; --ink: #1c2330; --soft: #5a6577; --line: #d9dee7; --paper: #fbfbfa; --card: #fff;
  --accent: #1f5fae; --mark: #fff0b3; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e8ef; --soft: #9aa5b6; --line: #333c4a; --paper: #14181f;
  --card: #1b212b; --accent: #7fb2f0; --mark: #55491a; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 46rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }}
h1 {{ font-size: 1.1rem; margin: 0 0 .8rem; }}
form {{ display: flex; gap: .5rem; }}
input, select, button {{ font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem; padding: .55rem .7rem; }}
input {{ flex: 1; min-width: 0; }}
button {{ background: var(--accent); border-color: var(--accent); color: var(--paper); cursor: pointer; }}
:focus-visible {{ outline: 3px solid var(--accent); outline-offset: 1px; }}
.about, .took {{ color: var(--soft); font-size: .875rem; margin: .6rem 0; overflow-wrap: anywhere; }}
ol {{ list-style: none; margin: 0; padding: 0; counter-reset: rank; }}
li {{ counter-increment: rank; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  margin: .7rem 0; padding: .7rem .9rem; }}
h2 {{ display: flex; gap: .7rem; align-items: baseline; font-size: .875rem; font-weight: 400; margin: 0 0 .3rem;
  color: var(--soft); }}
h2::before {{ content: counter(rank); font-weight: 700; color: var(--ink); }}
.score {{ font-variant-numeric: tabular-nums; color: var(--accent); }}
code {{ font-size: .8125rem; overflow-wrap: anywhere; }}
.text {{ overflow-wrap: anywhere; }}
mark {{ background: var(--mark); color: inherit; border-radius: .2rem; }}
summary {{ color: var(--accent); cursor: pointer; width: max-content; }}
@media (max-width: 30rem) {{ form {{ flex-wrap: wrap; }} input {{ flex-basis: 100%; }} button {{ flex: 1; }} }}
</style>
</head>
<body>
<header>
<h1>Search</h1>
<form action="/" method="get" role="search">
<input type="search" name="q" value="{query}" placeholder="Type a query" aria-label="Query" accesskey="s"
  autocomplete="off" required{focus}>
<select name="k" aria-label="How many passages">{options}</select>
<button>Search</button>
</form>
<p class="about">{model} &middot; {collection}, {count} passages &middot; {index}</p>
</header>
<main>{body}</main>
</body>
</html>
"""
