"""Training queries with their candidates, and the group of passages drawn from each: a positive, then hard negatives.

A draw is a pure function of (seed, query id, epoch). A query's list is permuted once, and epoch e takes the places e n
to (e + 1) n - 1 of it, round and round: no candidate stands twice in a group while there are enough, and none comes
again before all have come. Where a query has fewer negatives than its group takes, it gets all of them and random
passages of the collection that are no positives of it, afresh each epoch; where teacher's scores are asked for, which
random passages have not, it gets its own negatives again.

Letters: B queries of a micro-batch, G passages of a query's group, P the most positives that any query has.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import xxhash

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.hashing import compiled, fold, text_key
from quincunx.data_shards.order import permute_point
from quincunx.data_shards.records import BadRecordError
from quincunx.engine.retrieval.candidates import Candidates, check_candidates, check_negatives, check_scores
from quincunx.engine.retrieval.collection import Collection

POSITIVE, NEGATIVE, RANDOM = 1, 2, 3
QUERIES_AT_ONCE = 4096


class Groups:
    """Training queries with their candidates, as rows of two collections. See the head of this file.

    num_hard_negatives: G - 1. with_scores: every candidate must have its teacher's score, and draws carry it.

    Raises:
        SettingsError: num_hard_negatives below 0, or 0 with scores.
        DataError: no queries, a query without positives, a candidate twice, a query or passage that the collections do
            not have, a missing score, with scores a query without negatives, or no passages to fill a group with.
    """

    def __init__(
        self,
        candidates: Iterable[Candidates],
        queries: Collection,
        passages: Collection,
        *,
        num_hard_negatives: int,
        seed: int,
        with_scores: bool = False,
    ):
        if num_hard_negatives < with_scores:
            raise SettingsError(f"num_negatives is {num_hard_negatives}: allowed are integers from {+with_scores}")
        self.queries, self.passages, self.group = queries, passages, 1 + num_hard_negatives
        query_ids: list[str] = []
        positives: list[_Lists] = []
        negatives: list[_Lists] = []
        rest = iter(candidates)
        while part := list(islice(rest, QUERIES_AT_ONCE)):  # so that only arrays of them all stand in memory
            _check(part, with_scores)
            query_ids += [row.query_id for row in part]
            positives.append(_flatten(part, "positives", passages, with_scores))
            negatives.append(_flatten(part, "negatives", passages, with_scores))
        if not query_ids:
            raise DataError("there are no training queries: give candidates of at least one")
        self.query_rows = _known_rows(queries, query_ids, "queries")
        """int64 [queries], row in the collection of queries."""
        self._positives, self._negatives = _join(positives), _join(negatives)
        self._keys = _query_keys(seed, np.array([_id_hash(query_id) for query_id in query_ids], np.int64))
        self._repeat = with_scores
        self.max_positives = int(self._positives.sizes.max())
        """P"""
        few = self._negatives.sizes < num_hard_negatives
        self.num_filled = int(few.sum())
        """Queries with fewer negatives than a group takes, whose groups are filled up."""
        if not with_scores and (few & (self._positives.sizes + num_hard_negatives > len(passages))).any():
            raise DataError(
                f"{passages.name} has {len(passages)} passages, too few to fill groups of {self.group}: lower "
                "num_negatives or give more passages"
            )

    def __len__(self) -> int:
        return len(self.query_rows)

    def draw(self, epochs: np.ndarray, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The groups of B queries: passage rows int64 [B, G], and teacher's scores float32 [B, G] or None.

        sample_ids: places in the list of candidates.
        """
        keys, positives, negatives = self._keys[sample_ids], self._positives, self._negatives
        first = _draw_places(keys, POSITIVE, epochs, positives.sizes[sample_ids], 1, True)
        others = _draw_places(keys, NEGATIVE, epochs, negatives.sizes[sample_ids], self.group - 1, self._repeat)
        first += positives.starts[sample_ids, None]
        at = np.where(others < 0, -1, others + negatives.starts[sample_ids, None])
        rows = np.concatenate([positives.rows[first], np.where(at < 0, -1, _take(negatives.rows, at))], 1)
        rows = rows.astype(np.int64)
        _fill(rows, keys, epochs, self.positives(sample_ids), len(self.passages))
        if not self._repeat:
            return rows, None
        return rows, np.concatenate([positives.scores[first], negatives.scores[at]], 1)

    def positives(self, sample_ids: np.ndarray) -> np.ndarray:
        """int64 [B, P], the rows of all positives of each query, filled with -1."""
        at = np.arange(self.max_positives)[None]
        there = at < self._positives.sizes[sample_ids, None]
        at = np.where(there, self._positives.starts[sample_ids, None] + at, 0)
        return np.where(there, self._positives.rows[at], -1).astype(np.int64)


class _Lists(NamedTuple):
    """One list a query, laid end to end."""

    rows: np.ndarray
    """int32 [entries], row in the collection of passages."""
    scores: np.ndarray | None
    """float32 [entries]"""
    sizes: np.ndarray
    """int64 [queries]"""
    starts: np.ndarray
    """int64 [queries]"""


def _check(candidates: Sequence[Candidates], with_scores: bool) -> None:
    try:
        for row in candidates:
            check_candidates(row)
    except BadRecordError as error:
        raise DataError(f"the candidates cannot be trained on: {error}; mend or remove the query") from None
    if with_scores:
        check_scores(candidates, "the list of candidates")
        check_negatives(candidates, "the list of candidates")


def _flatten(candidates: Sequence[Candidates], side: str, passages: Collection, with_scores: bool) -> _Lists:
    assert len(passages) < 2**31
    ids = [id for row in candidates for id in getattr(row, side)]
    scores = None
    if with_scores:
        scores = np.array([row.scores[id] for row in candidates for id in getattr(row, side)], np.float32)
    sizes = np.array([len(getattr(row, side)) for row in candidates], np.int64)
    return _Lists(_known_rows(passages, ids, "passages").astype(np.int32), scores, sizes, np.cumsum(sizes) - sizes)


def _join(parts: Sequence[_Lists]) -> _Lists:
    sizes = np.concatenate([part.sizes for part in parts])
    scores = None if parts[0].scores is None else np.concatenate([part.scores for part in parts])
    return _Lists(np.concatenate([part.rows for part in parts]), scores, sizes, np.cumsum(sizes) - sizes)


def _known_rows(collection: Collection, ids: list[str], kind: str) -> np.ndarray:
    rows = collection.rows(ids)
    if (rows < 0).any():
        unknown = [ids[at] for at in np.flatnonzero(rows < 0)]
        raise DataError(
            f"{len(unknown)} candidates' {kind} are not in {collection.name} (first: {', '.join(unknown[:3])}): give "
            "the collection that the candidates were made from"
        )
    return rows


def _id_hash(query_id: str) -> int:
    return xxhash.xxh3_64_intdigest(query_id.encode()) >> 1


def _take(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    return values[at] if len(values) else np.zeros(at.shape, values.dtype)


@compiled
def _query_keys(seed, hashes):
    keys = np.empty(len(hashes), np.uint32)
    for n in range(len(hashes)):
        keys[n] = text_key(seed, 0, hashes[n], 0)
    return keys


@compiled
def _draw_places(keys, purpose, epochs, sizes, count, repeat):
    """int64 [B, count], places in lists of these sizes: distinct while there are enough, then -1, or all over again."""
    places = np.full((len(keys), count), -1, np.int64)
    for n in range(len(keys)):
        key, size = fold(keys[n], purpose), sizes[n]
        for i in range(count):
            if size >= count or repeat:
                places[n, i] = permute_point(key, (np.int64(epochs[n]) * count + i) % size, size)
            elif i < size:
                places[n, i] = permute_point(key, i, size)
    return places


@compiled
def _fill(rows_BG, keys, epochs, positives_BP, num_passages):
    """Replaces every -1 by a random passage that is neither in the group nor a positive of the query."""
    for n in range(len(rows_BG)):
        key = fold(fold(keys[n], RANDOM), epochs[n])
        turn = 0
        for i in range(rows_BG.shape[1]):
            while rows_BG[n, i] < 0:
                row = np.int64(fold(key, turn)) * num_passages >> 32
                turn += 1
                if not (rows_BG[n] == row).any() and not (positives_BP[n] == row).any():
                    rows_BG[n, i] = row
