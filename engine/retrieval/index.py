"""Search by inner product in embeddings, exact or approximate.

exact           torch's matrix product and top k on the CPU or a GPU, block by block if the vectors exceed the memory
HNSW32          faiss: a graph of neighbours over whole vectors (Malkov and Yashunin 2016), on the CPU
IVF911,PQ96     faiss: lists around centroids, each vector in a few bytes (Jegou et al. 2011), on the CPU

Every other name is a string of faiss's index_factory. faiss is imported here only. Results are ordered by score, then
by row. Letters: Q queries, N rows, D channels, K results.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from quincunx.data_shards.durable import written_whole
from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.embeddings import Embeddings
from quincunx.engine.retrieval.progress import FEW_QUERIES, progress_bar

EXACT = "exact"
QUERIES_AT_ONCE = 256
BLOCK_ROWS = 2**17
"""Rows of one matrix product; parts are taken together up to so many."""
RESIDENT_BYTES = 2**31
"""Vectors up to this size stay in memory (float32) between searches."""


class Index:
    """Embeddings made ready for search; an approximate index is built once and kept in the embeddings' folder."""

    def __init__(
        self,
        embeddings: Embeddings,
        kind: str = EXACT,
        options: str = "",
        *,
        device: torch.device | str = "cpu",
        report: Callable[[str], None] = lambda _: None,
    ):
        """kind: EXACT, or a string of faiss's index_factory. options: faiss's index parameters ("efSearch=256").

        device: of exact search. Raises SettingsError if faiss is needed and not installed, or does not take the kind or
        the options.
        """
        self.embeddings, self.kind, self.options = embeddings, kind, options
        self.device = torch.device(device)
        self.report = report
        self.approximate = kind != EXACT
        self.blocks = [range(len(embeddings.parts))] if self.approximate else _blocks(embeddings)
        """Part numbers of what is searched at once."""
        self._stays = self.approximate or len(embeddings) * embeddings.width * 4 <= RESIDENT_BYTES
        self._resident: dict[int, Any] = {}
        """By block, what stays in memory between searches."""
        if self.approximate:
            try:
                import faiss
            except ImportError:
                raise SettingsError(
                    f"index {kind} needs faiss, which is not installed: pip install faiss-cpu, or give --index {EXACT}"
                ) from None
            self.faiss = faiss
            self._empty(options)

    def described(self) -> dict[str, Any]:
        """All of the index that decides its results. "shards" is in the manifests of earlier runs, which stay valid."""
        return {"kind": self.kind, "shards": 1} | ({"options": self.options} if self.approximate else {})

    def search(self, queries_QD: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32 [Q, K], rows int64 [Q, K]), best first, K = depth; -inf and -1 where there are no more.

        Texts without a visible character are never found: their vectors say nothing and are near to many queries.
        """
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        assert queries_QD.shape[1] == self.embeddings.width
        scores_QK = torch.full((len(queries_QD), depth), -torch.inf, device=self.device)
        rows_QK = torch.full((len(queries_QD), depth), -1, dtype=torch.int64, device=self.device)
        blocks = progress_bar("searching", "block", self.blocks, show=len(queries_QD) >= FEW_QUERIES)
        search_block = self._search_approximate if self.approximate else self._search_exact
        for number, parts in enumerate(blocks):
            start, stop = self.embeddings.starts[[parts.start, parts.stop]].tolist()
            first, last = np.searchsorted(self.embeddings.empty_rows, [start, stop])
            empty = torch.from_numpy(self.embeddings.empty_rows[first:last] - start).to(self.device)
            scores, rows = search_block(number, queries_QD, depth + len(empty))
            scores = scores.masked_fill(torch.isin(rows, empty), -torch.inf)
            rows = torch.where(scores == -torch.inf, -1, rows + start)
            # Rows of this block lie above all before, and both sorts are stable: equal scores stay in order of rows.
            scores, order = torch.cat([scores_QK, scores], dim=1).sort(dim=1, descending=True, stable=True)
            scores_QK = scores[:, :depth]
            rows_QK = torch.cat([rows_QK, rows], dim=1).gather(1, order[:, :depth])
        return scores_QK.cpu().numpy(), rows_QK.cpu().numpy()

    def _ready(self, number: int) -> Any:
        """What is searched of a block: float32 [rows, D] on the device, or the faiss index."""
        if number in self._resident:
            return self._resident[number]
        if self.approximate:
            ready = self._faiss_index()
        else:
            vectors_ND = np.concatenate([self.embeddings.parts[part] for part in self.blocks[number]])
            ready = torch.from_numpy(vectors_ND).to(self.device).float()
        if self._stays:
            self._resident[number] = ready
        return ready

    def _search_exact(self, number: int, queries_QD: np.ndarray, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A block by brute force: scores and rows in it [Q, K], in order."""
        vectors_ND, queries = self._ready(number), torch.from_numpy(queries_QD).to(self.device)
        found = [top_rows(some_QD @ vectors_ND.T, depth) for some_QD in queries.split(QUERIES_AT_ONCE)]
        return torch.cat([scores for scores, _ in found]), torch.cat([rows for _, rows in found])

    def _search_approximate(self, number: int, queries_QD: np.ndarray, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = self._ready(number)
        with self._as_sentence("cannot be searched"):
            if any(piece.startswith("HNSW") for piece in self.kind.split(",")):
                given = re.search(r"\befSearch=(\d+)", self.options)
                candidates = max(int(given[1]) if given else 0, depth)  # with fewer it would silently find less
                self.faiss.ParameterSpace().set_index_parameter(index, "efSearch", candidates)
            scores_QK, rows_QK = index.search(queries_QD, depth)
        scores_QK[rows_QK < 0] = -np.inf
        return in_order(*(torch.from_numpy(array).to(self.device) for array in (scores_QK, rows_QK)))

    def _faiss_index(self) -> Any:
        """The faiss index: read from where it was kept, else built and kept."""
        built_with = ",".join(option for option in self.options.split(",") if "efConstruction" in option)
        parts = self.embeddings.manifest.get("parts", [])
        digest = xxhash.xxh3_128_hexdigest(json.dumps([self.kind, built_with, parts]).encode())
        folder = self.embeddings.folder
        if folder is None:
            index = self._build(built_with)
        else:
            path = folder / f"index-{digest}.faiss"
            try:
                index = self.faiss.read_index(str(path))
            except RuntimeError:  # it is not there, or cut off
                index = self._build(built_with)
                self._keep(index, path)
        self.faiss.ParameterSpace().set_index_parameters(index, self.options)
        return index

    def _keep(self, index: Any, path: Path) -> None:
        try:
            with written_whole(path, "wb") as file:
                self.faiss.write_index(index, self.faiss.PyCallbackIOWriter(file.write))
        except (OSError, RuntimeError, SettingsError) as error:  # a folder that may only be read, a full disk
            self.report(f"the index is not kept ({str(error).strip().splitlines()[-1]})")

    def _build(self, options: str) -> Any:
        begun, rows = time.monotonic(), len(self.embeddings)
        index = self._empty(options)
        lists = self.faiss.try_extract_index_ivf(index)
        lists = None if lists is None else self.faiss.downcast_index(lists)
        if hasattr(lists, "do_polysemous_training"):
            lists.do_polysemous_training = False  # takes minutes, for a filter that is not used here
        wanted = max(256 * getattr(lists, "nlist", 0), 2**16)  # as many as faiss's k-means would look at
        with self._as_sentence(f"cannot be built over {rows} vectors"):
            if not index.is_trained:
                index.train(self.embeddings.vectors(np.linspace(0, rows - 1, min(rows, wanted)).astype(np.int64)))
            for part in self.embeddings.parts:
                index.add(np.array(part, np.float32))
        self.report(f"built {self.kind} over {index.ntotal} vectors in {time.monotonic() - begun:.1f} s")
        return index

    def _empty(self, options: str) -> Any:
        """The index before it holds a vector."""
        faiss, width = self.faiss, self.embeddings.width
        with self._as_sentence(f"is not an index of faiss for {width} channels"):
            if re.search(r"HNSW[01](?!\d)", self.kind):  # faiss ends the process
                raise RuntimeError("a graph needs 2 links or more")
            index = faiss.index_factory(width, self.kind, faiss.METRIC_INNER_PRODUCT)
            faiss.ParameterSpace().set_index_parameters(index, options)
        return index

    @contextmanager
    def _as_sentence(self, problem: str) -> Iterator[None]:
        """faiss's errors as one sentence."""
        try:
            yield
        except RuntimeError as error:
            given = f"--index {self.kind}" + (f" --index_options {self.options}" if self.options else "")
            reason = str(error).rpartition(":")[2].strip()
            raise SettingsError(
                f"{given} {problem} ({reason}): give --index {EXACT}, or a string and options of faiss that fit, such "
                "as HNSW32 with efSearch=256 or IVF911,PQ96 with nprobe=32 (docs/search.md)"
            ) from None


def _blocks(embeddings: Embeddings) -> list[range]:
    """Part numbers of each block: consecutive parts up to BLOCK_ROWS rows, one part at least."""
    first, blocks = 0, []
    for part in range(1, len(embeddings.parts)):
        if embeddings.starts[part + 1] - embeddings.starts[first] > BLOCK_ROWS:
            blocks.append(range(first, part))
            first = part
    return [*blocks, range(first, len(embeddings.parts))]


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
