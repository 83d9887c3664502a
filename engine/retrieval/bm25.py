"""BM25 over a collection: bm25s' Lucene variant, English stop words, Snowball's English stemmer.

bm25s computes every term's score in every passage at indexing time (Lu, "BM25S: Orders of magnitude faster lexical
search via eager sparse scoring", 2024); a query is a sum of columns. The sum and the choice of the best are done here,
so that equal scores are ordered by row, queries without a known word give no results, and depth may exceed the
collection. Much work is shared by one process a core, which map the same index from files.
"""

import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.progress import FEW_QUERIES, progress_bar

QUERIES_AT_ONCE = 64
"""Queries that a process takes at a time."""
START_SECONDS = 600
MUCH_WORK = 2**34
"""Queries times passages from which processes are started: minutes of one core."""


@dataclass(frozen=True)
class BM25Index:
    """A built index; see build and search."""

    retriever: Any
    """bm25s.BM25"""
    count: int
    """passages"""


def build(collection: Collection, k1: float = 1.5, b: float = 0.75) -> BM25Index:
    """Indexes every text of the collection (an empty one is in it and never found).

    Raises:
        SettingsError: k1 below 0 or b outside 0 to 1.
        DataError: no text of the collection holds a word.
    """
    if not k1 >= 0 or not 0 <= b <= 1:
        raise SettingsError(f"BM25 with k1 {k1} and b {b}: give k1 of 0 or more and b from 0 to 1")
    import bm25s

    shown = sys.stderr.isatty()
    tokens = bm25s.tokenize(collection.texts(), stopwords="en", stemmer=_stemmer(), show_progress=shown)
    if not tokens.vocab:
        raise DataError(f"no text of {collection.name} holds a word that is no stop word: BM25 has nothing to index")
    retriever = bm25s.BM25(k1=k1, b=b, method="lucene")
    retriever.index(tokens, show_progress=shown)
    return BM25Index(retriever, len(collection))


def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("english")


def search(
    index: BM25Index, queries: Sequence[str], depth: int, processes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32 [Q, depth], rows int64 [Q, depth]), best first, equal scores by row.

    A passage without a word of the query is no result; where there are fewer than `depth`, the rest is score 0, row -1.

    processes: how many share the queries (None: one a core where that saves minutes, else none but this one).
    """
    if depth < 1:
        raise SettingsError(f"depth is {depth}: give a whole number from 1")
    if processes is None:
        processes = (os.cpu_count() or 1) if len(queries) * index.count >= MUCH_WORK else 1
    pieces = [list(queries[start : start + QUERIES_AT_ONCE]) for start in range(0, len(queries), QUERIES_AT_ONCE)]
    scores_QD = np.zeros((len(queries), depth), np.float32)
    rows_QD = np.full((len(queries), depth), -1, np.int64)
    done = 0
    with (
        _searching(index, min(processes, len(pieces))) as found,
        progress_bar(len(queries), "BM25", "query", show=len(queries) >= FEW_QUERIES) as bar,
    ):
        for scores, rows in found(pieces, depth):
            scores_QD[done : done + len(rows)], rows_QD[done : done + len(rows)] = scores, rows
            done += len(rows)
            bar.update(len(rows))
    return scores_QD, rows_QD


@contextmanager
def _searching(index: BM25Index, processes: int) -> Iterator[Callable]:
    """(pieces, depth) -> the results of each piece, in order."""
    if processes <= 1:
        yield lambda pieces, depth: (_search(index, piece, depth) for piece in pieces)
        return
    context = get_context("spawn")
    all_started = context.Barrier(processes)
    with tempfile.TemporaryDirectory(prefix="bm25-", ignore_cleanup_errors=True) as folder:
        index.retriever.save(folder, show_progress=False)
        pool = ProcessPoolExecutor(processes, context, _open_index, (folder, index.count, all_started))
        try:
            list(pool.map(_wait_for_all, range(processes)))
            shutil.rmtree(folder)  # mapped files stay as long as they are used: a kill leaves nothing behind
            yield lambda pieces, depth: pool.map(_search_opened, pieces, itertools.repeat(depth))
        finally:
            pool.shutdown(cancel_futures=True)


def _open_index(folder: str, count: int, all_started: Barrier) -> None:
    """Opens a process's own index; ends the process when the one that started it is gone."""
    import bm25s

    global _opened, _all_started
    _all_started = all_started
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the process that started this one
    _opened = BM25Index(bm25s.BM25.load(folder, mmap=True, show_progress=False), count)


def _wait_for_all(_: int) -> None:
    """Keeps a process from taking a second such call, so that every process starts."""
    _all_started.wait(START_SECONDS)


def _search_opened(queries: list[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
    return _search(_opened, queries, depth)


def _search(index: BM25Index, queries: list[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
    import bm25s

    scores_QD = np.zeros((len(queries), depth), np.float32)
    rows_QD = np.full((len(queries), depth), -1, np.int64)
    words = bm25s.tokenize(queries, stopwords="en", stemmer=_stemmer(), show_progress=False, return_ids=False)
    matrix = index.retriever.scores
    scores_N = np.zeros(index.count, np.float32)
    for q, query in enumerate(words):
        scores_N[:] = 0
        for term in index.retriever.get_tokens_ids(query):
            column = slice(matrix["indptr"][term], matrix["indptr"][term + 1])
            scores_N[matrix["indices"][column]] += matrix["data"][column]  # a passage stands once in a column
        rows = best_rows(scores_N, depth)
        rows_QD[q, : len(rows)] = rows
        scores_QD[q, : len(rows)] = scores_N[rows]
    return scores_QD, rows_QD


def best_rows(scores_N: np.ndarray, depth: int) -> np.ndarray:
    """int64, the rows of the `depth` largest positive scores, best first, equal scores by row."""
    rows = np.flatnonzero(scores_N > 0)
    found = scores_N[rows]
    if len(rows) > depth:
        last = np.partition(found, len(rows) - depth)[len(rows) - depth]
        above, equal = rows[found > last], rows[found == last]
        rows = np.concatenate([above, equal[: depth - len(above)]])
        found = scores_N[rows]
        order = np.lexsort((rows, -found))
    else:
        order = np.argsort(-found, kind="stable")
    return rows[order]
