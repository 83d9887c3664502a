"""A person's search: a prompt on the terminal, and a local web page with a JSON answer beside it.

    /?q=...&k=10       results as a page, without scripts or anything from elsewhere
    /api?q=...&k=10    {"query", "model", "collection", "index", "seconds",
                       "results": [{"rank", "score", "id", "text"}]}

The page is bound to 127.0.0.1, and requests that name another host are refused: a web site cannot reach it by giving
its own name that address.
"""

import contextlib
import re
import socket
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.search import Finder

if TYPE_CHECKING:
    from fastapi import FastAPI

HOST = "127.0.0.1"
MAX_RESULTS, MAX_CHARACTERS = 100, 2000
TERMINAL_LINES = 3
TEMPLATE = Path(__file__).with_suffix(".html.jinja")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "frame-ancestors 'none'",
}


def ask(finder: Finder, query: str, depth: int) -> tuple[list[dict[str, Any]], float]:
    """(rank, score, id and text of the best passages for a query, seconds it took)."""
    begun = time.perf_counter()
    (scores,), (rows,) = finder.find([query], depth)
    seconds = time.perf_counter() - begun
    scores, rows = scores[rows >= 0].tolist(), rows[rows >= 0]
    found = zip(scores, finder.passages.ids(rows), finder.passages.texts(rows), strict=True)
    return [
        {"rank": n, "score": score, "id": id, "text": text} for n, (score, id, text) in enumerate(found, 1)
    ], seconds


def search_on_terminal(finder: Finder, depth: int) -> None:
    """Asks for queries until an empty line or the end of input; shows score, id and first words of each passage."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    print(f"{finder.model} over {finder.passages.name} ({len(finder.passages):,} passages). An empty line ends.")
    while line := _typed():
        query = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes that are no UTF-8
        results, seconds = ask(finder, query, depth)
        for result in results:
            print(f"\n{result['rank']:>3}  {result['score']:.4f}  {result['id']}")
            text = "".join(c if c.isprintable() else " " for c in result["text"])  # no escape sequence for the terminal
            shown = textwrap.shorten(text, 80 * TERMINAL_LINES, placeholder=" ...")
            print(textwrap.indent(textwrap.fill(shown, 84), "     "))
        print(f"\n{len(results)} passages in {1000 * seconds:.0f} ms\n")


def _typed() -> str:
    try:
        return input("query> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def make_app(finder: Finder, depth: int) -> "FastAPI":
    """The page; searches take turns. depth: at most MAX_RESULTS."""
    from fastapi import FastAPI, Query
    from fastapi.middleware.trustedhost import TrustedHostMiddleware
    from fastapi.responses import HTMLResponse, JSONResponse
    from jinja2 import Environment

    app, lock = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), threading.Lock()
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    environment = Environment(autoescape=True)
    environment.filters["marked"] = marked
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))

    def search(query: str, number: int) -> dict[str, Any]:
        query, results, seconds = query.strip()[:MAX_CHARACTERS], [], 0.0
        with lock:
            if query:
                results, seconds = ask(finder, query, number)
        return {"query": query, "results": results, "seconds": seconds}

    Number = Annotated[int, Query(ge=1, le=MAX_RESULTS)]

    @app.get("/")
    def page(q: str = "", k: Number = depth) -> HTMLResponse:
        shown = {"finder": finder, "depth": k, "choices": sorted({5, 10, 20, 50, k})}
        return HTMLResponse(template.render(**search(q, k), **shown), headers=HEADERS)

    @app.get("/api")
    def api(q: str = "", k: Number = depth) -> JSONResponse:
        about = {"model": finder.model, "collection": finder.passages.name, "index": finder.index}
        return JSONResponse(search(q, k) | about)

    return app


def marked(text: str, query: str, start: int, stop: int | None = None) -> Any:
    """Words `start` to `stop` of a text, escaped, those of the query with four letters or more marked."""
    from markupsafe import Markup

    words = {word.lower() for word in re.findall(r"\w{4,}", query)}
    pieces = re.split(r"(\w+)", " ".join(text.split()[start:stop]))
    return Markup("").join(
        Markup("<mark>{}</mark>").format(piece) if piece.lower() in words else piece for piece in pieces
    )


def serve_page(finder: Finder, port: int, depth: int) -> None:
    """Serves until Ctrl-C; port 0 takes a free one. Raises SettingsError for a port that cannot be bound."""
    import uvicorn

    app = make_app(finder, depth)
    with socket.socket() as bound:
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((HOST, port))
            bound.listen()  # so that who reads the address below can connect at once
        except OSError as error:
            raise SettingsError(f"cannot bind {HOST}:{port} ({error}): choose another --page") from None
        print(f"Search page: http://{HOST}:{bound.getsockname()[1]}/  (Ctrl-C ends)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])
