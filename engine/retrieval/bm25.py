"""BM25 over a collection: bm25s' Lucene variant, English stop words, Snowball's English stemmer.

bm25s computes every term's score in every passage at indexing time (Lu, "BM25S: Orders of magnitude faster lexical
search via eager sparse scoring", 2024); a query is a sum of columns.
"""

import os
import sys

import numpy as np

from quincunx.data_shards.errors import DataError
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.progress import FEW_QUERIES
from quincunx.engine.retrieval.search import Finder


def bm25_finder(passages: Collection, k1: float, b: float) -> Finder:
    """BM25 over the passages, indexed here and now; one without a word of the query, or without text, is no result.

    Raises DataError if no passage holds a word.
    """
    import bm25s
    import Stemmer

    words = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english")}
    shown = sys.stderr.isatty()
    tokens = bm25s.tokenize(passages.texts(), **words, show_progress=shown)
    if not tokens.vocab:
        raise DataError(f"no text of {passages.name} holds a word that is no stop word: BM25 has nothing to index")
    retriever = bm25s.BM25(k1=k1, b=b, method="lucene")
    retriever.index(tokens, show_progress=shown)

    def find(queries: list[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
        scores_QD = np.zeros((len(queries), depth), np.float32)
        rows_QD = np.full((len(queries), depth), -1, np.int64)
        found = min(depth, len(passages))
        asked = bm25s.tokenize(queries, **words, show_progress=False, return_ids=False)
        rows, scores = retriever.retrieve(
            asked, k=found, n_threads=os.cpu_count() or 1, show_progress=len(queries) >= FEW_QUERIES
        )
        order = np.lexsort((rows, -scores))  # bm25s leaves open in which order equal scores come
        rows_QD[:, :found] = np.take_along_axis(rows, order, 1)
        scores_QD[:, :found] = np.take_along_axis(scores, order, 1)
        rows_QD[scores_QD <= 0] = -1
        return scores_QD, rows_QD

    made_from = {"method": "bm25", "k1": k1, "b": b, "collection": passages.digest}
    return Finder(find, passages, passages.ids(), f"BM25 (k1 {k1}, b {b})", "bm25", made_from)
