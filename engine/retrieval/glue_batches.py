"""Micro-batches of a GLUE file for data_shards/stream.py: sentences or pairs, tokenised as they are needed.

Letters: B examples of a micro-batch, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quincunx.data_shards.batches import PackedText
from quincunx.engine.packing import pack
from quincunx.engine.retrieval.cross_encoder import TRUNCATION, tokenise_pairs
from quincunx.engine.retrieval.glue_data import GlueExamples


@dataclass(frozen=True)
class GlueBatch:
    """A micro-batch of B sentences or pairs."""

    text: PackedText
    token_types: np.ndarray | None
    """int64 [T], None where the tokenizer gives none or the task reads one sentence."""
    labels: np.ndarray
    """[B], int64 classes or float32 scores."""
    num_cut_texts: int
    """How many were longer than max_tokens."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_passages(self) -> int:
        return len(self)

    @property
    def num_tokens(self) -> int:
        return len(self.text.input_ids)


@dataclass(frozen=True)
class GluePacker:
    """Makes micro-batches of a file's examples, purely and from any thread."""

    examples: GlueExamples
    tokenizer: Any
    max_tokens: int

    def pack(self, datasets: np.ndarray, epochs: np.ndarray, sample_ids: np.ndarray) -> GlueBatch:
        """The micro-batch of some rows of the order, each [B]; neither of the first two changes an example."""
        examples, rows = self.examples, sample_ids.tolist()
        seconds = None if examples.seconds is None else [examples.seconds[row] for row in rows]
        ids, types, num_cut = tokenise_examples(
            self.tokenizer, [examples.firsts[row] for row in rows], seconds, self.max_tokens
        )
        return GlueBatch(pack(ids), None if types is None else np.concatenate(types), examples.labels[rows], num_cut)


def tokenise_examples(
    tokenizer: Any, firsts: Sequence[str], seconds: Sequence[str] | None, max_tokens: int
) -> tuple[list[np.ndarray], list[np.ndarray] | None, int]:
    """Ids int32 [n] and token types int64 [n] (or None) of sentences or pairs, and how many were cut at max_tokens."""
    if seconds is not None:
        return tokenise_pairs(tokenizer, firsts, seconds, max_tokens)
    rows = tokenizer(
        list(firsts), truncation=TRUNCATION, max_length=max_tokens, padding=False, return_attention_mask=False
    )
    num_cut = sum(bool(encoding.overflowing) for encoding in rows.encodings)
    return [np.array(row, np.int32) for row in rows["input_ids"]], None, num_cut
