"""BM25 over a collection: bm25s' Lucene variant, English stop words, Snowball's English stemmer.

bm25s computes every term's score in every passage at indexing time (Lu, "BM25S: Orders of magnitude faster lexical
search via eager sparse scoring", 2024); a query is a sum of columns. The sum and the choice of the best are done here,
so that equal scores are ordered by row, queries without a known word give no results, and depth may exceed the
collection.

An index folder holds bm25s' files and manifest.json, written last: collection digest, count, k1, b, files with digests.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.files import file_digest

KIND = "bm25"
SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
PROGRESS_QUERIES = 500


@dataclass(frozen=True)
class BM25Index:
    """A built or loaded index; see build, load, search."""

    retriever: Any
    """bm25s.BM25"""
    count: int
    k1: float
    b: float
    collection_digest: str


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
    return BM25Index(retriever, len(collection), k1, b, collection.digest)


def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("english")


def search(index: BM25Index, queries: Sequence[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32 [Q, depth], rows int64 [Q, depth]), best first, equal scores by row.

    A passage without a word of the query is no result; where there are fewer than `depth`, the rest is score 0, row -1.
    """
    import bm25s
    from tqdm import tqdm

    if depth < 1:
        raise SettingsError(f"depth is {depth}: give a whole number from 1")
    scores_QD = np.zeros((len(queries), depth), np.float32)
    rows_QD = np.full((len(queries), depth), -1, np.int64)
    words = bm25s.tokenize(list(queries), stopwords="en", stemmer=_stemmer(), show_progress=False, return_ids=False)
    matrix = index.retriever.scores
    scores_N = np.zeros(index.count, np.float32)
    silent = len(queries) < PROGRESS_QUERIES or not sys.stderr.isatty()
    for q, query in enumerate(tqdm(words, "BM25", unit="query", disable=silent)):
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


def save(index: BM25Index, folder: str | Path) -> None:
    """Writes the index folder, whole or not at all; an earlier index there is replaced.

    Raises:
        SettingsError: something else is in the folder, or it cannot be written.
    """
    import bm25s

    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / MANIFEST_NAME).is_file() or not any(folder.iterdir()))):
        raise SettingsError(f"{folder} is there and is no BM25 index: give another folder")
    if folder.is_dir() and any(folder.iterdir()):
        _read_manifest(folder)
    staging = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        index.retriever.save(staging, show_progress=False)
        files = sorted(staging.iterdir())
        manifest = {
            "schema": SCHEMA_VERSION,
            "kind": KIND,
            "count": index.count,
            "collection": index.collection_digest,
            "k1": index.k1,
            "b": index.b,
            "method": "lucene",
            "stop_words": "english",
            "stemmer": "snowball english",
            "bm25s": bm25s.__version__,
            "files": {file.name: {"bytes": file.stat().st_size, "digest": file_digest(file)} for file in files},
        }
        (staging / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for file in staging.iterdir():
            with open(file, "rb") as content:
                os.fsync(content.fileno())
        if folder.exists():
            earlier = folder.with_name(f".{folder.name}.old{os.getpid()}")
            os.rename(folder, earlier)
            os.rename(staging, folder)
            shutil.rmtree(earlier)
        else:
            os.rename(staging, folder)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(staging)
        raise


def load(folder: str | Path, collection_digest: str | None = None) -> BM25Index:
    """The index of a folder, its large arrays memory-mapped.

    collection_digest: of the collection that will be searched; compared with the index's.

    Raises:
        DataError: no index there, one that its manifest does not match, or one of another collection (both named).
    """
    import bm25s

    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or file_digest(file) != entry["digest"]:
            raise DataError(f"{file} is missing or does not match {MANIFEST_NAME}: build the index again")
    if collection_digest is not None and manifest["collection"] != collection_digest:
        raise DataError(
            f"the BM25 index {folder} was built from collection {manifest['collection']}, the collection given is "
            f"{collection_digest}: build the index again, or give its own corpus with the same titles setting"
        )
    retriever = bm25s.BM25.load(folder, mmap=True, show_progress=False)
    return BM25Index(retriever, manifest["count"], manifest["k1"], manifest["b"], manifest["collection"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{folder} is no BM25 index (no {MANIFEST_NAME} that can be read): build one there") from None
    if not isinstance(manifest, dict) or (manifest.get("kind"), manifest.get("schema")) != (KIND, SCHEMA_VERSION):
        raise DataError(f"{folder} holds no BM25 index of schema {SCHEMA_VERSION}: give another folder")
    return manifest
