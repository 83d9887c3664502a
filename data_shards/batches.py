"""Packed batches: what one forward and backward of the model needs, as flat numpy arrays without padding.

Letters: B passages of the micro-batch, S sequences of one text stream, T its tokens with [CLS] and [SEP], M labelled
tokens.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedText:
    """S sequences laid end to end, each [CLS] ... [SEP], corrupted where a masked text hides words."""

    input_ids: np.ndarray
    """int32 [T]"""
    cu_seqlens: np.ndarray
    """int32 [S + 1], where each sequence starts; the last entry is T."""


@dataclass(frozen=True)
class PackedTask:
    """The text that one decoder recovers; S may be smaller than B, and 0, where samples lack the task's field."""

    text: PackedText
    passage_index: np.ndarray
    """int32 [S], the encoder sequence whose [CLS] vector replaces position 0."""
    label_positions: np.ndarray
    """int32 [M], ascending positions in `text.input_ids` that carry a label."""
    labels: np.ndarray
    """int32 [M], the original ids there."""
    keys: np.ndarray | None = None
    """int32 [S], bits of the uint32 key that row visibility is drawn from; enhanced decoders only, as the next two."""
    word_ids: np.ndarray | None = None
    """int32 [T], index of the token's word within its text (0 at [CLS] and [SEP], where it does not matter)."""
    keep_thresholds: np.ndarray | None = None
    """int32 [T] in [0, 2**30], column j is kept for a row whose draw is below it; 2**30 = always, 0 = never."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of B passages, with every task's text."""

    encoder: PackedText
    encoder_label_positions: np.ndarray
    """int32 [M], as in PackedTask."""
    encoder_labels: np.ndarray
    """int32 [M]"""
    tasks: dict[str, PackedTask]
    """In the recipe's order; a task without rows is there with S = 0."""
    sample_ids: np.ndarray
    """int64 [B], index of the sample in its dataset's split."""
    datasets: np.ndarray
    """int16 [B], index of the dataset in the mixture."""
    epochs: np.ndarray
    """int32 [B], how often the dataset had been gone through before."""
    num_cut_texts: int = 0
    """How many texts of this batch were longer than max_tokens and were cut."""

    def num_labels(self) -> list[int]:
        """Labelled tokens of this batch: the encoder's first, then each task's in order."""
        return [len(self.encoder_labels), *(len(task.labels) for task in self.tasks.values())]

    @property
    def num_passages(self) -> int:
        """B"""
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that the encoder reads."""
        return len(self.encoder.input_ids)
