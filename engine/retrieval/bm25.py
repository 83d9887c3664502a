"""BM25 over a collection: bm25s' Lucene variant, English stop words, Snowball's English stemmer.

bm25s computes every term's score in every passage at indexing time (Lu, "BM25S: Orders of magnitude faster lexical
search via eager sparse scoring", 2024); a query is a sum of columns.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from quincunx.data_shards.errors import DataError
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.progress import FEW_QUERIES


def build(collection: Collection, k1: float = 1.5, b: float = 0.75) -> Any:
    """A bm25s.BM25 over every text of the collection (an empty one is in it and never found).

    Raises DataError if no text of the collection holds a word.
    """
    import bm25s

    shown = sys.stderr.isatty()
    tokens = bm25s.tokenize(collection.texts(), stopwords="en", stemmer=_stemmer(), show_progress=shown)
    if not tokens.vocab:
        raise DataError(f"no text of {collection.name} holds a word that is no stop word: BM25 has nothing to index")
    retriever = bm25s.BM25(k1=k1, b=b, method="lucene")
    retriever.index(tokens, show_progress=shown)
    return retriever


def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("english")


def search(retriever: Any, queries: Sequence[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32 [Q, depth], rows int64 [Q, depth]), best first, equal scores by row.

    A passage without a word of the query is no result; if there are fewer than `depth`, the rest is score 0, row -1.
    """
    import bm25s

    scores_QD = np.zeros((len(queries), depth), np.float32)
    rows_QD = np.full((len(queries), depth), -1, np.int64)
    found = min(depth, retriever.scores["num_docs"])
    if len(queries):
        words = bm25s.tokenize(list(queries), stopwords="en", stemmer=_stemmer(), show_progress=False, return_ids=False)
        rows, scores = retriever.retrieve(
            words, k=found, n_threads=os.cpu_count() or 1, show_progress=len(queries) >= FEW_QUERIES
        )
        order = np.lexsort((rows, -scores))  # bm25s leaves open in which order equal scores come
        rows_QD[:, :found] = np.take_along_axis(rows, order, 1)
        scores_QD[:, :found] = np.take_along_axis(scores, order, 1)
        rows_QD[scores_QD <= 0] = -1
    return scores_QD, rows_QD
