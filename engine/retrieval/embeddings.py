"""A folder of embeddings: the vectors of a collection, in its order, made in parts by any number of ranks.

part-00000.npy ...   [rows, D] float16 or float32, memory-mapped when read
ids.txt              the collection's ids, one a line, in the same order
manifest.json        what they were made from (data_shards/artefact.py)

Letters: N rows, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from quincunx.data_shards.artefact import artefact, open_artefact
from quincunx.data_shards.errors import EXIT_DIVERGED, DataError
from quincunx.engine.ranks import Environment
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.progress import progress_bar

if TYPE_CHECKING:
    from quincunx.engine.retrieval.dual_encoder import Retriever

KIND = "embeddings"
IDS = "ids.txt"


class DivergedError(DataError):
    """A model whose vectors are not finite."""

    exit_code = EXIT_DIVERGED


@dataclass(frozen=True)
class Embeddings:
    """N vectors in parts, and what they were made from (`write_embeddings`), with the parts' digests."""

    parts: Sequence[np.ndarray]
    """[rows, D] each, float16 or float32; memory-mapped where they come from a folder"""
    manifest: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    """None: the vectors are in memory only."""

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [parts + 1], the first row of every part; the last entry is N."""
        return np.cumsum([0, *map(len, self.parts)]).astype(np.int64)

    @cached_property
    def empty_rows(self) -> np.ndarray:
        """int64, ascending: rows of texts without a visible character, which no search finds."""
        return np.array(self.manifest.get("empty_rows", []), np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def width(self) -> int:
        """D"""
        return self.parts[0].shape[1]

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [len(rows), D], in the order given."""
        rows = np.asarray(rows, np.int64)
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        out = np.empty((len(rows), self.width), np.float32)
        for number in np.unique(numbers):
            chosen = numbers == number
            out[chosen] = self.parts[number][rows[chosen] - self.starts[number]]
        return out

    def ids(self) -> list[str]:
        """The collection's ids, by row. Raises DataError if ids.txt is not the one that was written."""
        content = (self.folder / IDS).read_bytes()
        if xxhash.xxh3_128_hexdigest(content) != self.manifest["ids_digest"]:
            raise DataError(f"{self.folder / IDS} is damaged: run encode.py again with --remake")
        return content.decode("utf-8").splitlines()


def write_embeddings(
    folder: str | Path,
    retriever: "Retriever",
    collection: Collection,
    kind: str,
    *,
    environment: Environment,
    details: dict[str, Any],
    part_rows: int,
    dtype: str = "float16",
    precision: str = "float32",
    remake: bool = False,
    **encoding: Any,
) -> bool:
    """Encodes a collection into `folder`; every rank calls this.

    kind: "query" or "passage". details: for the manifest, not compared. encoding: device and batch_tokens of
    encode_texts. Returns whether this rank is the one that finished them. Raises DivergedError for a vector that is not
    finite, and as artefact.
    """
    from quincunx.engine.retrieval.dual_encoder import encode_texts

    ids = collection.ids()
    if any("\n" in id or "\r" in id for id in ids):
        raise DataError(f"ids of {collection.name} contain line breaks: rename those records")
    made_from = {
        "model_digest": retriever.digest,
        "collection_digest": collection.digest,
        "kind": kind,
        "count": len(collection),
        "dim": retriever.model.width,
        "dtype": dtype,
        "normalised": retriever.model.normalise,
        "pooling": retriever.model.pooling,
        "max_tokens": retriever.max_tokens[kind],
        "prompt": retriever.prompts[kind],
        "precision": precision,
        "part_rows": part_rows,
    }
    place = {"rank": environment.rank, "world_size": environment.world_size}
    with artefact(folder, KIND, made_from, remake=remake, **place) as work:
        if work is None:
            return False
        parts = [range(start, min(start + part_rows, len(ids))) for start in range(0, len(ids), part_rows)]
        own = [n for n in range(work.rank, len(parts), work.world_size) if not work.is_done(n)]
        with progress_bar("encoding", "text", total=sum(len(parts[n]) for n in own), show=work.leads) as bar:
            for number in work.missing(len(parts)):
                texts = collection.texts(parts[number])
                vectors = encode_texts(retriever, texts, kind, precision=precision, progress=bar.update, **encoding)
                with np.errstate(over="ignore"):  # what does not fit is named below
                    vectors = vectors.astype(dtype, copy=False)
                for bad in np.flatnonzero(~np.isfinite(vectors).all(1))[:1]:
                    raise DivergedError(
                        f"the vector of {kind} {ids[parts[number][bad]]} is not finite in {dtype}: the model has "
                        "diverged, or its vectors need --dtype float32"
                    )
                with work.part(number, ".npy") as file:
                    np.save(file, vectors, allow_pickle=False)
        if work.leads:
            work.wait()
            with work.file(IDS, "wb") as file:
                file.write("".join(f"{id}\n" for id in ids).encode("utf-8"))
            work.details = {**details, "empty_rows": collection.empty_rows.tolist()}
        return work.leads


def open_embeddings(
    folder: str | Path,
    *,
    kind: str = "passage",
    model_digest: str | None = None,
    collection_digest: str | None = None,
    verify: bool = False,
) -> Embeddings:
    """Opens a finished folder, its vectors memory-mapped.

    kind: "passage" or "query", which must have been encoded. model_digest, collection_digest: what the embeddings must
    be of; None is not compared. verify: read every part and compare its digest, instead of its shape alone.

    Raises:
        DataError: unfinished, damaged, of the other kind, or of another model or collection (both ids named).
    """
    folder = Path(folder)
    manifest = open_artefact(folder, KIND, verify=verify)
    made_from, files = manifest["made_from"], manifest["files"]
    if made_from["kind"] != kind:
        raise DataError(
            f"{folder} holds embeddings of kind {made_from['kind']}, {kind} is needed: run encode.py --kind {kind} "
            "into another folder"
        )
    for what, wanted in (("model", model_digest), ("collection", collection_digest)):
        found = made_from[f"{what}_digest"]
        if wanted is not None and wanted != found:
            raise DataError(
                f"{folder} holds embeddings of {what} {found}, but the {what} given is {wanted}: give the one that "
                "they were made from, or run encode.py into another folder"
            )
    names = sorted(name for name in files if name.startswith("part-"))
    parts = [np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in names]
    described = {"parts": [files[name]["digest"] for name in names], "ids_digest": files[IDS]["digest"]}
    return Embeddings(parts, {**made_from, **manifest["details"], **described}, folder)
