"""One search interface for BM25 and dense retrieval, and the runs written by it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quincunx.data_shards.artefact import artefact
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.files import in_groups
from quincunx.engine.retrieval.trec import RUN, write_run

if TYPE_CHECKING:
    from quincunx.engine.retrieval.dual_encoder import Retriever
    from quincunx.engine.retrieval.embeddings import Embeddings
    from quincunx.engine.retrieval.index import Index

QUERIES_AT_ONCE = 2**15
"""Large collections pass through the memory, or into a GPU's, once for so many queries."""


@dataclass(frozen=True)
class Finder:
    """A search that is ready for questions."""

    find: Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]
    """(queries, depth) -> (scores [Q, depth], rows [Q, depth]), best first, row -1 where there are no more"""
    passages: Collection | None
    """None if only ids are needed"""
    passage_ids: list[str]
    """by row"""
    model: str
    """What searches, for a reader"""
    index: str
    made_from: dict[str, Any]
    """All that decides the results, as a run's manifest says"""
    find_exactly: Callable[[list[str], int], tuple[np.ndarray, np.ndarray]] | None = None
    """As find, but exact; None if find is"""


def dense_finder(
    name: str,
    retriever: "Retriever",
    embeddings: "Embeddings",
    passages: Collection | None,
    index: "Index",
    **encoding: Any,
) -> Finder:
    """Search by the vectors of a retriever. encoding: device, precision and batch_tokens of encode_texts."""
    from quincunx.engine.retrieval.dual_encoder import encode_texts
    from quincunx.engine.retrieval.index import Index

    def finding(index: Index) -> Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]:
        return lambda queries, depth: index.search(encode_texts(retriever, queries, "query", **encoding), depth)

    made_from = {
        "method": "dense",
        "model": retriever.digest,
        "collection": embeddings.manifest["collection_digest"],
        "embeddings": {key: embeddings.manifest[key] for key in ("dtype", "max_tokens", "precision")},
        "index": index.described(),
        "max_query_tokens": retriever.max_tokens["query"],
        "precision": encoding.get("precision", "float32"),
    }
    return Finder(
        finding(index),
        passages,
        embeddings.ids(),
        f"{name} ({retriever.digest})",
        index.kind,
        made_from,
        finding(Index(embeddings, device=index.device)) if index.approximate else None,
    )


def search_to_run(finder: Finder, queries: Collection, depth: int, output: str | Path, remake: bool) -> int | None:
    """Searches for every query and writes a TREC run with a manifest beside it; returns its lines.

    None: the run is there already. Raises as artefact.
    """
    made_from = finder.made_from | {"queries": queries.digest, "depth": depth}

    def results() -> Iterator[tuple[str, list[str], np.ndarray]]:
        for some in in_groups(range(len(queries)), QUERIES_AT_ONCE):
            for id, scores, rows in zip(queries.ids(some), *finder.find(queries.texts(some), depth), strict=True):
                found = rows >= 0
                yield id, [finder.passage_ids[row] for row in rows[found]], scores[found]

    with artefact(output, RUN, made_from, single=True, remake=remake) as work:
        if work is None:
            return None
        work.details = write_run(work.made(), results(), finder.index)
        return work.details["results"]
