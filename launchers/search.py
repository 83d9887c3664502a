"""Searches a collection: a run for a file of queries, a prompt on the terminal, or a small web page.

    python launchers/search.py --model MODEL --embeddings EMBEDDINGS --queries data/scifact --output run.trec
    python launchers/search.py --method bm25 --corpus data/scifact --queries data/scifact --output bm25.trec
    python launchers/search.py --model MODEL --embeddings EMBEDDINGS --corpus data/scifact --interactive
    python launchers/search.py --model MODEL --embeddings EMBEDDINGS --corpus data/scifact --page 8080

See docs/search.md.
"""

import signal
from dataclasses import dataclass, fields
from typing import Literal

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.engine.retrieval.search import Finder, dense_finder, search_to_run
from quincunx.engine.retrieval.search_page import MAX_RESULTS
from quincunx.launchers.command_line import parse_settings

DEPTH_OF_A_RUN = 1000
DEPTH_FOR_A_PERSON = 10
RECALL_QUERIES = 100
RECALL_DEPTHS = (10, 100)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of a search."""

    method: Literal["dense", "bm25"] = "dense"
    """By the vectors of a model, or by words."""
    model: str | None = None
    """Dense: the retriever that made the embeddings."""
    embeddings: str | None = setting(None, role="data")
    """Dense: folder of encode.py."""
    corpus: str | None = setting(None, role="data")
    """Passages; needed by bm25, --interactive and --page, else only compared with the embeddings."""
    titles: bool = True
    """Titles belong to the passages' text, as they did in encode.py."""
    queries: str | None = setting(None, role="data")
    """Queries of the run: BEIR folder, tsv, JSONL or DPR json."""
    qrels: str | None = setting(None, role="data")
    """Search only for queries that these judgements name."""
    output: str | None = None
    """TREC run to write; a manifest goes beside it."""
    remake: bool = False
    """Make the output anew if it is there; what was there is moved aside."""
    depth: int | None = setting(None, low=1)
    """Passages a query (None: 1000 in a run, 10 for a person)."""
    index: str = "exact"
    """Dense: exact (torch), or a string of faiss's index_factory such as HNSW32 or IVF911,PQ96."""
    index_options: str = ""
    """faiss: index parameters, such as efSearch=256, or efConstruction=200,efSearch=256."""
    measure_recall: bool = True
    """faiss: print the recall against exact search on the first 100 queries of a run."""
    pooling: Literal["cls", "mean"] | None = None
    """Dense: as in encode.py; None: as the model says."""
    normalise: Literal["model", "yes", "no"] = "model"
    """Dense: as in encode.py."""
    max_tokens: int | None = setting(None, low=1)
    """Dense: longest query; longer ones are cut (None: the model's own limit)."""
    k1: float = setting(1.5, low=0)
    """bm25: how soon a repeated word stops counting."""
    b: float = setting(0.75, low=0, high=1)
    """bm25: how much long passages are held against."""
    interactive: bool = False
    """Ask for queries on the terminal."""
    page: int | None = setting(None, low=0, high=65535)
    """Port of a search page on this machine (0: a free one)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where queries are encoded and exact search runs."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the encoder; auto is bfloat16 (autocast) on a GPU and float32 elsewhere."""

    def contradictions(self) -> list[str]:
        """What is wrong with values that are each in range, as clauses."""
        problems = []
        person = self.interactive + (self.page is not None)
        if person + (self.output is not None) != 1:
            problems.append("give one of --output (results), --interactive and --page")
        for name in {"dense": ("model", "embeddings"), "bm25": ("corpus",)}[self.method]:
            if getattr(self, name) is None:
                problems.append(f"--method {self.method} needs --{name}")
        if person and self.corpus is None:
            problems.append("--interactive and --page print passages and need --corpus (the one that was encoded)")
        if self.page is not None and (self.depth or 0) > MAX_RESULTS:
            problems.append(f"depth is {self.depth}; the page shows at most {MAX_RESULTS} passages")
        if not person and self.queries is None:
            problems.append("--output needs --queries")
        dense = ("model", "embeddings", "index", "measure_recall", "pooling", "normalise", "max_tokens")
        idle = dense if self.method == "bm25" else ("k1", "b")
        if self.index == "exact":
            idle += ("index_options",)
        elif self.index.islower() and self.method == "dense":
            problems.append(f"index is {self.index}; give exact, or a string of faiss's such as HNSW32 or IVF911,PQ96")
        defaults = {field.name: field.default for field in fields(self)}
        for name in idle:
            if getattr(self, name) != defaults[name]:
                problems.append(f"{name} has no effect with --method {self.method} --index {self.index}: leave it out")
        return problems


def open_finder(settings: SearchSettings) -> Finder:
    """Loads the model, embeddings, index and passages of a search."""
    from quincunx.engine.retrieval.collection import read_passages

    passages = read_passages(settings.corpus, titles=settings.titles) if settings.corpus is not None else None
    if settings.method == "bm25":
        from quincunx.engine.retrieval.bm25 import bm25_finder

        return bm25_finder(passages, settings.k1, settings.b)
    from quincunx.engine.ranks import device_and_precision, discover_environment
    from quincunx.engine.retrieval.dual_encoder import load_retriever
    from quincunx.engine.retrieval.embeddings import open_embeddings
    from quincunx.engine.retrieval.index import Index

    device, precision = device_and_precision(settings.device, settings.precision, discover_environment())
    retriever = load_retriever(
        settings.model,
        pooling=settings.pooling,
        normalise={"model": None, "yes": True, "no": False}[settings.normalise],
        max_tokens={"query": settings.max_tokens},
    )
    embeddings = open_embeddings(
        settings.embeddings,
        model_digest=retriever.digest,
        collection_digest=passages.digest if passages is not None else None,
    )
    index = Index(embeddings, settings.index, settings.index_options, device=device, report=print)
    return dense_finder(settings.model, retriever, embeddings, passages, index, device=device, precision=precision)


def main() -> None:
    settings = parse_settings(SearchSettings, __doc__.split("\n")[0])
    from quincunx.engine.retrieval.collection import make_collection, read_queries
    from quincunx.engine.retrieval.files import refuse_input
    from quincunx.engine.retrieval.trec import read_qrels

    if settings.output is None:
        from quincunx.engine.retrieval.search_page import search_on_terminal, serve_page

        finder, depth = open_finder(settings), settings.depth or DEPTH_FOR_A_PERSON
        if settings.page is not None:
            serve_page(finder, settings.page, depth)
        else:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the prompt quietly
            search_on_terminal(finder, depth)
        return
    refuse_input(settings.output, settings)
    queries, depth = read_queries(settings.queries), settings.depth or DEPTH_OF_A_RUN
    if settings.qrels is not None:
        rows = sorted(queries.known_rows(list(read_qrels(settings.qrels)), "queries", settings.qrels))
        queries = make_collection(queries.ids(rows), queries.texts(rows), queries.name)
    finder = open_finder(settings)
    lines = search_to_run(finder, queries, depth, settings.output, settings.remake)
    if lines is None:
        print(f"{settings.output} is there, made from these files by these settings: nothing to do")
        return
    print(f"{settings.output}: {len(queries):,} queries, {lines:,} results, {finder.model}, {finder.index}")
    if finder.find_exactly is not None and settings.measure_recall:
        from quincunx.engine.retrieval.index import recall_against_exact

        some = queries.texts(range(min(len(queries), RECALL_QUERIES)))
        rows_QK, exact_QK = (find(some, depth)[1] for find in (finder.find, finder.find_exactly))
        for first in sorted({*(k for k in RECALL_DEPTHS if k < depth), depth}):
            recall = recall_against_exact(rows_QK[:, :first], exact_QK[:, :first])
            print(f"  recall of the exact first {first} on {len(some)} queries: {recall:.4f}")


if __name__ == "__main__":
    exit_with_one_sentence(main)
