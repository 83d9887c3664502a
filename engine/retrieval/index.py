"""Search by inner product in embeddings, exact or approximate, one part after the other where they exceed the memory.

exact   torch's matrix product and top k, on the CPU or a GPU; needs no other library
flat    the same search by faiss
ivfpq   faiss: lists around centroids, each vector in a few bytes (Jegou et al. 2011); searches some of the lists
hnsw    faiss: a graph of neighbours over whole vectors (Malkov and Yashunin 2016)

faiss is imported here only. Results are ordered by score, then by row: a search in shards gives what one index gives.
Letters: Q queries, N rows, D channels, K results.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from quincunx.data_shards.durable import file_digest, written_whole
from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.embeddings import Embeddings
from quincunx.engine.retrieval.progress import FEW_QUERIES, progress_bar
from quincunx.engine.retrieval.search import BUILT_WITH, SEARCHED_WITH, IndexKind, IndexOptions

QUERIES_AT_ONCE = 256
BLOCK_ROWS = 2**17
"""Rows of one matrix product; parts are taken together up to so many."""
RESIDENT_BYTES = 2**31
"""Vectors up to this size stay in memory (float32) between searches."""
LEAST_A_CENTROID = 39
"""Vectors a centroid that faiss wants for training."""


class Index:
    """Embeddings made ready for search; approximate indexes are built once and kept in the embeddings' folder."""

    def __init__(
        self,
        embeddings: Embeddings,
        kind: IndexKind = "exact",
        *,
        options: IndexOptions | None = None,
        device: torch.device | str = "cpu",
        shard_rows: int | None = None,
        report: Callable[[str], None] = lambda _: None,
    ):
        """shard_rows: an approximate index covers about so many rows, the next one the next; None: one for all.

        Raises SettingsError where faiss is needed and not installed, or the options do not fit the embeddings.
        """
        self.embeddings, self.kind = embeddings, kind
        self.options = options or IndexOptions()
        self.device = torch.device(device)
        self.report = report
        self.faiss = None if kind == "exact" else import_faiss(kind)
        self.approximate = kind in BUILT_WITH
        self.shards = _shards(embeddings, shard_rows if self.approximate else BLOCK_ROWS)
        small = len(embeddings) * embeddings.width * 4 <= RESIDENT_BYTES
        self._stays = len(self.shards) == 1 if self.approximate else small
        self._resident: dict[int, Any] = {}
        """By shard, what stays in memory between searches."""
        if kind == "ivfpq":
            self._check_ivfpq()

    def search(self, queries_QD: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32 [Q, K], rows int64 [Q, K]), best first, K = depth; -inf and -1 where there are no more.

        Texts without a visible character are never found: their vectors say nothing and are near to many queries.
        """
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        assert queries_QD.shape[1] == self.embeddings.width
        scores_QK = torch.full((len(queries_QD), depth), -torch.inf, device=self.device)
        rows_QK = torch.full((len(queries_QD), depth), -1, dtype=torch.int64, device=self.device)
        shards = progress_bar("searching", "shard", self.shards, show=len(queries_QD) >= FEW_QUERIES)
        search_shard = self._search_approximate if self.approximate else self._search_block
        for number, parts in enumerate(shards):
            start, stop = self._bounds(parts)
            first, last = np.searchsorted(self.embeddings.empty_rows, [start, stop])
            empty = torch.from_numpy(self.embeddings.empty_rows[first:last] - start).to(self.device)
            scores, rows = search_shard(number, queries_QD, depth + len(empty))
            scores = scores.masked_fill(torch.isin(rows, empty), -torch.inf)
            rows = torch.where(scores == -torch.inf, -1, rows + start)
            # Rows of this shard lie above all before, and both sorts are stable: equal scores stay in order of rows.
            scores, order = torch.cat([scores_QK, scores], dim=1).sort(dim=1, descending=True, stable=True)
            scores_QK = scores[:, :depth]
            rows_QK = torch.cat([rows_QK, rows], dim=1).gather(1, order[:, :depth])
        return scores_QK.cpu().numpy(), rows_QK.cpu().numpy()

    def _search_block(self, number: int, queries_QD: np.ndarray, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A block by brute force: scores and rows in it [Q, K], in order."""
        vectors_ND = self._ready(number)
        if self.kind == "exact":
            queries = torch.from_numpy(queries_QD).to(self.device)
            found = [top_rows(some_QD @ vectors_ND.T, depth) for some_QD in queries.split(QUERIES_AT_ONCE)]
            return torch.cat([scores for scores, _ in found]), torch.cat([rows for _, rows in found])
        faiss, asked = self.faiss, {"k": min(depth, len(vectors_ND)), "metric": self.faiss.METRIC_INNER_PRODUCT}
        if self.device.type == "cuda" and num_gpus(faiss):
            place = {"res": faiss.StandardGpuResources(), "device": self.device.index or 0}
            found = faiss.knn_gpu(xq=queries_QD, xb=vectors_ND.numpy(), **asked, **place)
        else:
            found = faiss.knn(queries_QD, vectors_ND.numpy(), **asked)
        return in_order(*(torch.from_numpy(array).to(self.device) for array in found))

    def _ready(self, number: int) -> Any:
        """What is searched of a shard: its faiss index, or float32 [rows, D] on the device (for faiss on the host)."""
        if number in self._resident:
            return self._resident[number]
        if self.approximate:
            ready = self._placed(self._faiss_index(number))
        else:
            vectors_ND = np.concatenate([self.embeddings.parts[part] for part in self.shards[number]])
            ready = torch.from_numpy(vectors_ND).to("cpu" if self.kind == "flat" else self.device).float()
        if self._stays:
            self._resident[number] = ready
        return ready

    def _search_approximate(self, number: int, queries_QD: np.ndarray, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = self._ready(number)
        if self.kind == "hnsw":
            index.hnsw.efSearch = max(self.options.ef_search, depth)
        scores_QK, rows_QK = index.search(queries_QD, depth)
        scores_QK[rows_QK < 0] = -np.inf
        return in_order(*(torch.from_numpy(array).to(self.device) for array in (scores_QK, rows_QK)))

    def _bounds(self, parts: range) -> tuple[int, int]:
        """First row of a shard, and of what follows it."""
        return int(self.embeddings.starts[parts.start]), int(self.embeddings.starts[parts.stop])

    def _faiss_index(self, number: int) -> Any:
        """The faiss index of a shard: read where it was kept, else built and kept."""
        parts = self.shards[number]
        digests = json.dumps(self.embeddings.manifest.get("parts", [])[parts.start : parts.stop])
        description = {**self._options(BUILT_WITH), "parts": xxhash.xxh3_128_hexdigest(digests.encode())}
        path = None
        if self.embeddings.folder is not None:
            path = self.embeddings.folder / f"index-{self.kind}-{number:05d}.faiss"
            if _is_kept(path, description):
                return self.faiss.read_index(str(path))
        begun = time.monotonic()
        index = self._build(parts)
        if path is not None:
            try:
                with written_whole(path, "wb") as file:
                    self.faiss.write_index(index, self.faiss.PyCallbackIOWriter(file.write))
                with written_whole(path.with_suffix(".json")) as file:
                    json.dump({**description, "digest": file_digest(path)}, file)
            except (OSError, RuntimeError, SettingsError) as error:  # a folder that may only be read, a full disk
                self.report(f"the index is not kept ({str(error).strip().splitlines()[-1]})")
        self.report(f"built {self.kind} over {index.ntotal} vectors in {time.monotonic() - begun:.1f} s")
        return index

    def _placed(self, index: Any) -> Any:
        """Ready to search: on all GPUs where faiss has them and the kind can be there."""
        if self.kind == "ivfpq":
            self.faiss.extract_index_ivf(index).nprobe = self.options.num_probes  # before it is on a GPU
        if self.device.type == "cuda" and self.kind == "ivfpq" and num_gpus(self.faiss):
            return self.faiss.index_cpu_to_all_gpus(index)
        return index

    def _options(self, *tables: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        """The kind, and its options in BUILT_WITH and SEARCHED_WITH."""
        names = [name for table in tables for name in table.get(self.kind, ())]
        return {"kind": self.kind, **{name: getattr(self.options, name) for name in names}}

    def described(self) -> dict[str, Any]:
        """The kind, and every option that has a part in its results."""
        options = self._options(BUILT_WITH, SEARCHED_WITH)
        return {**options, "shards": len(self.shards) if self.approximate else 1}

    def _build(self, parts: range) -> Any:
        faiss, width = self.faiss, self.embeddings.width
        start, stop = self._bounds(parts)
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, self.options.links, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = self.options.ef_construction
        else:
            rows = stop - start
            num_lists = self.options.num_lists or max(1, min(round(4 * rows**0.5), rows // LEAST_A_CENTROID))
            factory = f"IVF{num_lists},PQ{self._code_bytes()}"
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
            index.do_polysemous_training = False  # takes minutes, for a filter that is not used here
            wanted = max(256 * num_lists, 2**16)  # as many as faiss's k-means would look at
            sample = np.linspace(start, stop - 1, min(rows, wanted)).astype(np.int64)
            index.train(self.embeddings.vectors(sample))
        for part in parts:
            index.add(np.array(self.embeddings.parts[part], np.float32))
        return index

    def _code_bytes(self) -> int:
        width = self.embeddings.width
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        if self.options.code_bytes is None:
            return max(n for n in divisors if n <= max(1, width // 4))
        if self.options.code_bytes not in divisors:
            raise SettingsError(
                f"code_bytes is {self.options.code_bytes}, which does not divide the {width} channels: give one of "
                f"{', '.join(map(str, divisors))}"
            )
        return self.options.code_bytes

    def _check_ivfpq(self) -> None:
        self._code_bytes()
        for parts in self.shards:
            start, stop = self._bounds(parts)
            if (rows := stop - start) < max(256, self.options.num_lists or 0):
                raise SettingsError(
                    f"an ivfpq index of {self.options.num_lists or 'some'} lists cannot be trained on {rows} vectors, "
                    "because it needs 256 and one for each list: give --index exact, fewer lists or larger shards"
                )


def import_faiss(kind: str) -> Any:
    """faiss, or SettingsError."""
    try:
        import faiss
    except ImportError:
        raise SettingsError(
            f"index {kind} needs faiss, which is not installed: pip install faiss-cpu, or give --index exact"
        ) from None
    return faiss


def num_gpus(faiss: Any) -> int:
    """How many GPUs faiss can use; the CPU package has no such function."""
    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0


def _shards(embeddings: Embeddings, shard_rows: int | None) -> list[range]:
    """Part numbers of each shard: consecutive parts up to shard_rows rows, one part at least."""
    first, shards = 0, []
    for part in range(1, len(embeddings.parts)):
        if shard_rows is not None and embeddings.starts[part + 1] - embeddings.starts[first] > shard_rows:
            shards.append(range(first, part))
            first = part
    return [*shards, range(first, len(embeddings.parts))]


def _is_kept(path: Path, description: dict[str, Any]) -> bool:
    """Whether `path` is the index of this description, undamaged."""
    try:
        kept = json.loads(path.with_suffix(".json").read_bytes())
        return kept == {**description, "digest": file_digest(path)}
    except (OSError, ValueError):
        return False


def in_order(scores_QK: torch.Tensor, rows_QK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same results by score, equal scores by row."""
    rows_QK, order = rows_QK.sort(dim=1)
    scores_QK, by_score = scores_QK.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores_QK, rows_QK.gather(1, by_score)


def top_rows(scores_QN: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [Q, K], rows [Q, K]) of the K = min(depth, N) best, in order.

    Of equal scores at the end the first rows are taken; torch's topk takes any.
    """
    depth = min(depth, scores_QN.shape[1])
    scores_QK, rows_QK = scores_QN.topk(depth, dim=1)
    last_Q1 = scores_QK[:, -1:]
    tied = ((scores_QN >= last_Q1).sum(dim=1) > depth).nonzero()[:, 0].tolist()
    for query in tied:
        rows = (scores_QN[query] >= last_Q1[query]).nonzero()[:, 0]
        order = scores_QN[query, rows].sort(descending=True, stable=True).indices[:depth]
        rows_QK[query] = rows[order]
        scores_QK[query] = scores_QN[query, rows_QK[query]]
    return in_order(scores_QK, rows_QK)


def recall_against_exact(rows_QK: np.ndarray, exact_QK: np.ndarray) -> float:
    """Share of the exact results that are among the approximate ones; both int64 [Q, K], -1 where there is none."""
    found = wanted = 0
    for rows, exact in zip(rows_QK, exact_QK, strict=True):
        real = exact[exact >= 0]
        found, wanted = found + int(np.isin(real, rows).sum()), wanted + len(real)
    return found / wanted if wanted else 1.0
