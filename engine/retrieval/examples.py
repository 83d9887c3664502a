"""Fine-tuning batches: queries in groups with a positive and hard negatives, drawn purely and tokenised on the fly.

Which queries form step t, and in which order, is a pure function of (seed, t) and the number of queries
(data_shards/stream.py); ranks share the step's queries out, each a contiguous part. An epoch takes every query once, in
an order of its own. Steps do not stop at its end: if the number of queries is no multiple of the global batch, the last
queries of an epoch share a step with the first of the next, so that none is lost. A query can stand twice in such a
step; `known_positives` (losses.py) keeps it from being its own negative.

A draw of a query's candidates is a pure function of (seed, query id, epoch). A query's list is permuted once, and epoch
e takes the places e n to (e + 1) n - 1 of it, round and round: no candidate stands twice in a group while there are
enough, and none comes again before all have come. A query with fewer negatives than its group takes gets all of them
and random passages of the collection that are no positives of it, afresh each epoch; if teacher's scores are asked for,
which random passages have not, it gets its own negatives again.

Letters: B queries of a micro-batch, G passages of a query's group (its positive first), T tokens, P the most positives
that any query has.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from quincunx.data_shards.batches import Text, join_texts
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.hashing import compiled, fold, text_key
from quincunx.data_shards.stream import Order, Rows, Stream, permute_point
from quincunx.data_shards.tokenizer import tokenise
from quincunx.engine.retrieval.candidates import Candidates, check_negatives, check_scores
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.files import in_groups

POSITIVE, NEGATIVE, RANDOM = 1, 2, 3
QUERIES_AT_ONCE = 4096
CACHED_TEXTS = 1 << 18
CANDIDATES_LIST = "the list of candidates"


class Groups:
    """Training queries with their candidates, as rows of two collections. See the head of this file.

    num_hard_negatives: G - 1. with_scores: every candidate must have its teacher's score, and draws carry it.

    Raises:
        DataError: no queries, a query or passage that the collections do not have, a missing score, with scores a query
            without negatives, or no passages to fill a group with.
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
        assert num_hard_negatives >= with_scores
        self.queries, self.passages, self.group = queries, passages, 1 + num_hard_negatives
        query_ids, positives, negatives = [], [], []
        for part in in_groups(candidates, QUERIES_AT_ONCE):  # so that only arrays of them all stand in memory
            if with_scores:
                check_scores(part, CANDIDATES_LIST)
                check_negatives(part, CANDIDATES_LIST)
            query_ids += [row.query_id for row in part]
            positives.append(_flatten(part, "positives", passages, with_scores))
            negatives.append(_flatten(part, "negatives", passages, with_scores))
        if not query_ids:
            raise DataError("the candidates hold no training query: give at least one")
        self.query_rows = queries.known_rows(query_ids, "queries", CANDIDATES_LIST)
        """int64 [queries], row in the collection of queries."""
        self._positives, self._negatives = _join(positives), _join(negatives)
        hashes = [xxhash.xxh3_64_intdigest(query_id.encode()) >> 1 for query_id in query_ids]
        self._keys = _query_keys(seed, np.array(hashes, np.int64))
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
        rows = np.concatenate([positives.rows[first], negatives.rows[at]], 1).astype(np.int64)
        _fill(rows, keys, epochs, self.positives(sample_ids), len(self.passages))
        if not self._repeat:
            return rows, None
        return rows, np.concatenate([positives.scores[first], negatives.scores[at]], 1)

    def positives(self, sample_ids: np.ndarray) -> np.ndarray:
        """int64 [B, P], the rows of all positives of each query, filled with -1."""
        at, lists = np.arange(self.max_positives), self._positives
        at = np.where(at < lists.sizes[sample_ids, None], at + lists.starts[sample_ids, None], -1)
        return lists.rows[at].astype(np.int64)


class _Lists(NamedTuple):
    """One list a query, laid end to end."""

    rows: np.ndarray
    """int32 [entries + 1], row in the collection of passages; the last is -1, for a place that no entry fills."""
    scores: np.ndarray
    """float32 [entries]; empty without a teacher"""
    sizes: np.ndarray
    """int64 [queries]"""
    starts: np.ndarray
    """int64 [queries]"""


def _flatten(candidates: Sequence[Candidates], side: str, passages: Collection, with_scores: bool) -> list[np.ndarray]:
    """rows, scores (none without) and sizes of _Lists."""
    assert len(passages) < 2**31
    lists = [getattr(row, side) for row in candidates]
    rows = passages.known_rows([id for ids in lists for id in ids], "passages", CANDIDATES_LIST)
    scores = [row.scores[id] for row, ids in zip(candidates, lists) for id in ids] if with_scores else []
    return [rows.astype(np.int32), np.array(scores, np.float32), np.array(list(map(len, lists)), np.int64)]


def _join(parts: Sequence[list[np.ndarray]]) -> _Lists:
    rows, scores, sizes = map(np.concatenate, zip(*parts))
    return _Lists(np.append(rows, np.int32(-1)), scores, sizes, np.cumsum(sizes) - sizes)


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


@dataclass(frozen=True, kw_only=True)
class GroupedBatch:
    """A micro-batch of B queries and their B * G passages, group by group, the positive first."""

    group: int
    """G"""
    query_rows: np.ndarray
    """int64 [B], row in the collection of queries."""
    passage_rows: np.ndarray
    """int64 [B * G], row in the collection of passages."""
    num_cut_texts: int
    """How many of the texts were longer than allowed and were cut."""

    def __len__(self) -> int:
        return len(self.query_rows)

    @property
    def num_passages(self) -> int:
        return len(self.passage_rows)


@dataclass(frozen=True, kw_only=True)
class RetrieverBatch(GroupedBatch):
    """Queries and passages apart."""

    queries: Text
    passages: Text
    positives: np.ndarray
    """int64 [B, P], the rows of all positives of each query, filled with -1; P is the same in every batch."""
    teacher_scores: np.ndarray | None
    """float32 [B, G]"""

    @property
    def num_tokens(self) -> int:
        return len(self.queries.input_ids) + len(self.passages.input_ids)


@dataclass(frozen=True, kw_only=True)
class RerankerBatch(GroupedBatch):
    """B * G (query, passage) pairs."""

    pairs: list[np.ndarray]
    """Token ids of each pair."""
    token_types: list[np.ndarray] | None
    """Beside them; None if the tokenizer gives none."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.pairs))


class GroupPacker:
    """What packers of groups share."""

    groups: Groups

    def names(self, rows: Rows) -> dict[str, list]:
        """The ids of the queries of some rows."""
        return {"query_ids": self.groups.queries.ids(self.groups.query_rows[rows.sample_ids])}


class RetrieverPacker(GroupPacker):
    """Groups of queries and passages as two packed texts, for the dual encoder. See stream_examples.

    max_tokens, prompts: of "query" and "passage"; longer texts are cut there, [CLS] and [SEP] counted, and the prompt
        stands before every text.
    """

    def __init__(self, groups: Groups, tokenizer: Any, max_tokens: dict[str, int], prompts: dict[str, str]):
        self.groups = groups
        tokenizer = copy.deepcopy(tokenizer)  # whatever the run does with its own must not reach the workers
        self._queries, self._passages = (
            _TokenCache(collection, tokenizer, max_tokens[kind], prompts[kind])
            for kind, collection in (("query", groups.queries), ("passage", groups.passages))
        )

    def pack(self, rows: Rows) -> RetrieverBatch:
        """The micro-batch of B queries; see stream.Rows (there is one dataset)."""
        rows_BG, scores_BG = self.groups.draw(rows.epochs, rows.sample_ids)
        query_rows = self.groups.query_rows[rows.sample_ids]
        queries, num_cut_queries = self._queries.tokens(query_rows)
        passages, num_cut_passages = self._passages.tokens(rows_BG.ravel())
        return RetrieverBatch(
            queries=join_texts(queries),
            passages=join_texts(passages),
            group=self.groups.group,
            query_rows=query_rows,
            passage_rows=rows_BG.ravel(),
            positives=self.groups.positives(rows.sample_ids),
            teacher_scores=scores_BG,
            num_cut_texts=num_cut_queries + num_cut_passages,
        )


class RerankerPacker(GroupPacker):
    """Groups as (query, passage) pairs, for the cross-encoder. See stream_examples and cross_encoder.tokenise_pairs.

    max_tokens: longer pairs are cut there, special tokens counted.
    """

    def __init__(self, groups: Groups, tokenizer: Any, *, max_tokens: int):
        self.groups, self._max_tokens = groups, max_tokens
        self._tokenizer = copy.deepcopy(tokenizer)

    def pack(self, rows: Rows) -> RerankerBatch:
        """The micro-batch of B queries; see stream.Rows (there is one dataset)."""
        from quincunx.engine.retrieval.cross_encoder import tokenise_pairs

        rows_BG, _ = self.groups.draw(rows.epochs, rows.sample_ids)
        query_rows, group = self.groups.query_rows[rows.sample_ids], self.groups.group
        queries = [text for text in self.groups.queries.texts(query_rows) for _ in range(group)]
        passages = self.groups.passages.texts(rows_BG.ravel())
        pairs, token_types, num_cut = tokenise_pairs(self._tokenizer, queries, passages, self._max_tokens)
        return RerankerBatch(
            pairs=pairs,
            token_types=token_types,
            group=group,
            query_rows=query_rows,
            passage_rows=rows_BG.ravel(),
            num_cut_texts=num_cut,
        )


def stream_examples(packer: RetrieverPacker | RerankerPacker, *, seed: int, **shares: int) -> Stream:
    """One rank's micro-batches, step by step; shares: global_batch, micro_batch (both count queries), rank, world_size
    and num_workers of Stream, which raises if they do not divide.

    `stream.order.global_batch(step, global_batch).sample_ids` are the step's queries, as places in the candidates.
    """
    order = Order(seed, [np.ones(len(packer.groups), np.int64)])  # blocks of one query: the whole epoch is permuted
    return Stream(packer, order, **shares)


class _TokenCache:
    """Texts of a collection as token ids [CLS] ... [SEP]; the first CACHED_TEXTS that were asked for are kept."""

    def __init__(self, collection: Collection, tokenizer: Any, max_tokens: int, prompt: str):
        self._collection, self._tokenizer = collection, tokenizer
        self._max_tokens, self._prompt = max_tokens, prompt
        self._kept: dict[int, tuple[np.ndarray, bool]] = {}

    def tokens(self, rows: np.ndarray) -> tuple[list[np.ndarray], int]:
        """int32 [n] for each row, and how many of them were cut at max_tokens."""
        found = {row: kept for row in set(rows.tolist()) if (kept := self._kept.get(row))}
        missing = [row for row in dict.fromkeys(rows.tolist()) if row not in found]
        texts = [self._prompt + text for text in self._collection.texts(missing)]
        for row, ids in zip(missing, tokenise(texts, self._tokenizer, self._max_tokens + 1), strict=True):
            was_cut = len(ids) > self._max_tokens
            found[row] = (np.append(ids[: self._max_tokens - 1], ids[-1:]) if was_cut else ids, was_cut)
            if len(self._kept) < CACHED_TEXTS:
                self._kept[row] = found[row]
        return [found[row][0] for row in rows.tolist()], sum(found[row][1] for row in rows.tolist())
