"""Fine-tuning batches: queries in groups with a positive and hard negatives, drawn purely and tokenised on the fly.

The order of queries is data_shards/order.py's, the threads are data_shards/stream.py's, the draws groups.py's;
`stream_examples` joins them with one of the two packers below. Which queries form step t, and in which order, is a pure
function of (seed, t) and the number of queries; ranks share the step's queries out, each a contiguous part.

An epoch takes every query once, in an order of its own. Steps do not stop at its end: where the number of queries is no
multiple of the global batch, the last queries of an epoch share a step with the first of the next, so that none is
lost. A query can stand twice in such a step; `known_positives` (losses.py) keeps it from being its own negative.

Letters: B queries of a micro-batch, G passages of a query's group (its positive first), T tokens, P the most positives
that any query has.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from quincunx.data_shards.batches import PackedText
from quincunx.data_shards.order import Order
from quincunx.data_shards.stream import Stream
from quincunx.engine.packing import pack, tokenise
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.groups import Groups

CACHED_TEXTS = 1 << 18


class GroupedBatch:
    """What the loop counts in a micro-batch of queries with their candidates."""

    query_rows: np.ndarray
    passage_rows: np.ndarray

    def __len__(self) -> int:
        return len(self.query_rows)

    def num_labels(self) -> list[int]:
        """[B]: what the loss is a mean over."""
        return [len(self)]

    @property
    def num_passages(self) -> int:
        return len(self.passage_rows)


@dataclass(frozen=True)
class RetrieverBatch(GroupedBatch):
    """A micro-batch of B queries and their B * G passages."""

    queries: PackedText
    passages: PackedText
    """Group by group, the positive first."""
    group: int
    """G"""
    query_rows: np.ndarray
    """int64 [B], row in the collection of queries."""
    passage_rows: np.ndarray
    """int64 [B * G], row in the collection of passages."""
    positives: np.ndarray
    """int64 [B, P], the rows of all positives of each query, filled with -1; P is the same in every batch."""
    teacher_scores: np.ndarray | None
    """float32 [B, G]"""
    num_cut_texts: int
    """How many of the texts were longer than allowed and were cut."""

    @property
    def num_tokens(self) -> int:
        return len(self.queries.input_ids) + len(self.passages.input_ids)


@dataclass(frozen=True)
class RerankerBatch(GroupedBatch):
    """A micro-batch of B * G (query, passage) pairs, group by group, the positive first; fields as above."""

    pairs: PackedText
    token_types: np.ndarray | None
    """int64 [T], None where the tokenizer gives none."""
    group: int
    query_rows: np.ndarray
    passage_rows: np.ndarray
    num_cut_texts: int

    @property
    def num_tokens(self) -> int:
        return len(self.pairs.input_ids)


class RetrieverPacker:
    """Groups of queries and passages as two packed texts, for the dual encoder. See stream_examples.

    max_query_tokens, max_passage_tokens: longer texts are cut there, [CLS] and [SEP] counted. The prompts stand before
    every text.
    """

    def __init__(
        self,
        groups: Groups,
        tokenizer: Any,
        *,
        max_query_tokens: int,
        max_passage_tokens: int,
        query_prompt: str = "",
        passage_prompt: str = "",
    ):
        self.groups = groups
        tokenizer = copy.deepcopy(tokenizer)  # whatever the run does with its own must not reach the workers
        self._queries = _TokenCache(groups.queries, tokenizer, max_query_tokens, query_prompt)
        self._passages = _TokenCache(groups.passages, tokenizer, max_passage_tokens, passage_prompt)

    def pack(self, datasets: np.ndarray, epochs: np.ndarray, sample_ids: np.ndarray) -> RetrieverBatch:
        """The micro-batch of B queries; see order.Rows (there is one dataset)."""
        rows_BG, scores_BG = self.groups.draw(epochs, sample_ids)
        query_rows = self.groups.query_rows[sample_ids]
        queries, num_cut_queries = self._queries.tokens(query_rows)
        passages, num_cut_passages = self._passages.tokens(rows_BG.ravel())
        return RetrieverBatch(
            queries=pack(queries),
            passages=pack(passages),
            group=self.groups.group,
            query_rows=query_rows,
            passage_rows=rows_BG.ravel(),
            positives=self.groups.positives(sample_ids),
            teacher_scores=scores_BG,
            num_cut_texts=num_cut_queries + num_cut_passages,
        )


class RerankerPacker:
    """Groups as packed (query, passage) pairs, for the cross-encoder. See stream_examples and cross_encoder.pack_pairs.

    max_tokens: longer pairs are cut there, special tokens counted.
    """

    def __init__(self, groups: Groups, tokenizer: Any, *, max_tokens: int):
        self.groups, self._max_tokens = groups, max_tokens
        self._tokenizer = copy.deepcopy(tokenizer)

    def pack(self, datasets: np.ndarray, epochs: np.ndarray, sample_ids: np.ndarray) -> RerankerBatch:
        """The micro-batch of B queries; see order.Rows (there is one dataset)."""
        from quincunx.engine.retrieval.cross_encoder import pack_pairs

        rows_BG, _ = self.groups.draw(epochs, sample_ids)
        query_rows, group = self.groups.query_rows[sample_ids], self.groups.group
        queries = [text for text in self.groups.queries.texts(query_rows) for _ in range(group)]
        passages = self.groups.passages.texts(rows_BG.ravel())
        pairs, token_types, num_cut = pack_pairs(self._tokenizer, queries, passages, self._max_tokens)
        return RerankerBatch(
            pairs=pairs,
            token_types=token_types,
            group=group,
            query_rows=query_rows,
            passage_rows=rows_BG.ravel(),
            num_cut_texts=num_cut,
        )


def stream_examples(
    packer: RetrieverPacker | RerankerPacker,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 1,
) -> Stream:
    """One rank's micro-batches, step by step; global_batch and micro_batch count queries. Raises as Stream does.

    `stream.order.global_batch(step, global_batch).sample_ids` are the step's queries, as places in the candidates.
    """
    order = Order(seed, [np.ones(len(packer.groups), np.int64)])  # blocks of one query: the whole epoch is permuted
    return Stream(
        packer,
        order,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )


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
