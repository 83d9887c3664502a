"""BM25 over a collection: bm25s' Lucene variant, English stop words, Snowball's English stemmer.

bm25s computes every term's score in every passage at indexing time (Lu, "BM25S: Orders of magnitude faster lexical
search via eager sparse scoring", 2024); a query is a sum of columns.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.progress import FEW_QUERIES


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


def search(index: BM25Index, queries: Sequence[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32 [Q, depth], rows int64 [Q, depth]), best first, equal scores by row.

    A passage without a word of the query is no result; if there are fewer than `depth`, the rest is score 0, row -1.
    """
    import bm25s

    scores_QD = np.zeros((len(queries), depth), np.float32)
    rows_QD = np.full((len(queries), depth), -1, np.int64)
    found = min(depth, index.count)
    if len(queries):
        words = bm25s.tokenize(list(queries), stopwords="en", stemmer=_stemmer(), show_progress=False, return_ids=False)
        rows, scores = index.retriever.retrieve(
            words, k=found, n_threads=os.cpu_count() or 1, show_progress=len(queries) >= FEW_QUERIES
        )
        order = np.lexsort((rows, -scores))  # bm25s leaves open in which order equal scores come
        rows_QD[:, :found] = np.take_along_axis(rows, order, 1)
        scores_QD[:, :found] = np.take_along_axis(scores, order, 1)
        rows_QD[scores_QD <= 0] = -1
    return scores_QD, rows_QD
