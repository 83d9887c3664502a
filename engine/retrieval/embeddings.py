"""A folder of embeddings: the vectors of a collection, in its order, made in parts by any number of ranks.

part-00000.npy ...   [rows, D] float16 or float32, memory-mapped when read; part-00000.json beside it: rows and digest
ids.txt              the collection's ids, one a line, in the same order
plan.json            how the rows are cut into parts, and all that decides them (retrieval/parts.py)
manifest.json        written last, by rank 0, after the parts are counted: no manifest, no embeddings

Letters: N rows, D channels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from quincunx.data_shards.errors import EXIT_DIVERGED, DataError
from quincunx.engine.environment import Environment
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.files import file_digest, written_whole
from quincunx.engine.retrieval.parts import Part, cut_rows, part_path, run_parts
from quincunx.engine.retrieval.progress import progress_bar

if TYPE_CHECKING:
    import torch

    from quincunx.engine.retrieval.dual_encoder import Retriever

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
IDS = "ids.txt"


class DivergedError(DataError):
    """A model whose vectors are not finite."""

    exit_code = EXIT_DIVERGED


@dataclass(frozen=True)
class Embeddings:
    """N vectors in parts, and what the manifest says of them."""

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
        """The collection's ids, by row. Raises DataError where ids.txt is not the one that the manifest names."""
        path = self.folder / IDS
        content = path.read_bytes() if path.is_file() else b""
        if xxhash.xxh3_128_hexdigest(content) != self.manifest["ids_digest"]:
            raise DataError(f"{path} is not the one that {MANIFEST} names: run encode.py again, which writes it anew")
        return content.decode("utf-8").splitlines()


def write_embeddings(
    folder: str | Path,
    retriever: "Retriever",
    collection: Collection,
    kind: str,
    *,
    environment: Environment,
    made_by: dict[str, Any],
    dtype: str = "float16",
    part_rows: int,
    batch_tokens: int | None = None,
    device: "torch.device | str" = "cpu",
    precision: str = "float32",
    patience_seconds: float = 3600.0,
) -> dict[str, Any] | None:
    """Encodes a collection into `folder`; every rank calls this. Parts that are there and verify are kept.

    kind: "query" or "passage". Returns the manifest on rank 0, None on the others. Raises DataError where the folder
    holds other embeddings or the ranks' parts do not add up to the collection, DivergedError for a vector that is not
    finite.
    """
    folder = Path(folder)
    ids = collection.ids()
    if any("\n" in id or "\r" in id for id in ids):
        raise DataError(f"{collection.name} has ids with line breaks in them: rename those records")
    fingerprint = {
        "model_digest": retriever.digest,
        "collection_digest": collection.digest,
        "kind": kind,
        "count": len(collection),
        "dim": retriever.model.width,
        "dtype": dtype,
        "normalised": retriever.model.normalise,
        "pooling": retriever.model.pooling,
        "max_tokens": retriever.max_tokens(kind),
        "prompt": retriever.prompt(kind),
        "precision": precision,
    }
    parts = cut_rows(len(collection), part_rows)
    own = parts[environment.rank :: environment.world_size]
    missing = sum(part.rows for part in own if not part_path(folder, part).exists())
    with progress_bar(missing, "encoding", "text", show=environment.is_main) as bar:

        def make_part(part: Part) -> np.ndarray:
            from quincunx.engine.retrieval.dual_encoder import encode_texts

            texts = collection.texts(range(part.start, part.stop))
            vectors = encode_texts(
                retriever,
                texts,
                kind,
                device=device,
                batch_tokens=batch_tokens,
                precision=precision,
                progress=bar.update,
            )
            with np.errstate(over="ignore"):  # what does not fit is named below
                vectors = vectors.astype(dtype, copy=False)
            if not np.isfinite(vectors).all():
                row = part.start + int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
                raise DivergedError(
                    f"the vector of {kind} {collection.id_at(row)} is not finite in {dtype}: the model has "
                    "diverged, or its vectors need --dtype float32"
                )
            return vectors

        paths = run_parts(folder, parts, make_part, fingerprint, environment, patience_seconds=patience_seconds)
    if paths is None:
        return None
    described = [{"file": path.name, "rows": len(_open_part(path)), "digest": file_digest(path)} for path in paths]
    counted = sum(part["rows"] for part in described)
    if counted != len(collection):
        raise DataError(
            f"the parts in {folder} hold {counted} vectors, {collection.name} has {len(collection)} texts: remove the "
            "folder and encode again"
        )
    content = "".join(f"{id}\n" for id in ids).encode("utf-8")
    with written_whole(folder / IDS, "wb") as file:
        file.write(content)
    manifest = {
        "schema": SCHEMA_VERSION,
        **fingerprint,
        "empty_rows": collection.empty_rows.tolist(),
        "ids_digest": xxhash.xxh3_128_hexdigest(content),
        "parts": described,
        "made_by": made_by,
    }
    with written_whole(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    for left_over in folder.glob(".part-*.tmp*"):  # of ranks that were killed; all are done here
        left_over.unlink(missing_ok=True)
    return manifest


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
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder} holds no finished embeddings (no {MANIFEST}): run encode.py, or the same command again to finish"
        ) from None
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST} is no JSON ({error}): run encode.py again") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA_VERSION or "parts" not in manifest:
        raise DataError(f"{folder / MANIFEST} is not a manifest of embeddings of schema {SCHEMA_VERSION}: encode again")
    if manifest["kind"] != kind:
        raise DataError(
            f"{folder} holds embeddings of kind {manifest['kind']}, {kind} is needed: run encode.py --kind {kind} into "
            "another folder"
        )
    for what, wanted in (("model", model_digest), ("collection", collection_digest)):
        found = manifest[f"{what}_digest"]
        if wanted is not None and wanted != found:
            raise DataError(
                f"{folder} holds embeddings of {what} {found}, and the {what} given here is {wanted}: give the {what} "
                "that they were made of, or run encode.py into another folder"
            )
    parts = []
    for described in manifest["parts"]:
        path = folder / described["file"]
        part = _open_part(path)
        expected = (described["rows"], manifest["dim"])
        if part.shape != expected or part.dtype != manifest["dtype"]:
            raise DataError(
                f"{path} holds {part.dtype} {part.shape} instead of {manifest['dtype']} {expected}: run the same "
                "encode.py command again, which makes that part anew"
            )
        if verify and file_digest(path) != described["digest"]:
            raise DataError(f"{path} is damaged: run the same encode.py command again, which makes that part anew")
        parts.append(part)
    return Embeddings(parts, manifest, folder)


def _open_part(path: Path) -> np.ndarray:
    try:
        part = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): run the same encode.py command again, which makes that part anew"
        ) from None
    if part.ndim != 2:
        raise DataError(f"{path} holds an array of {part.ndim} dimensions instead of rows of vectors: encode again")
    return part
