"""The batch: what one forward and backward of the model needs, as flat tensors without padding.

Everything that a device would have to be asked for (positions, longest sequences) is computed where the batch is
packed, on the host, so that no step waits for the device.

Letters: B passages of the micro-batch, S sequences of one text, T its tokens with [CLS] and [SEP], M labelled tokens, L
the longest sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Moved = TypeVar("Moved")


@dataclass(frozen=True)
class Text:
    """S sequences laid end to end, each [CLS] ... [SEP], corrupted where a masked text hides words."""

    input_ids: torch.Tensor
    """int64 [T]"""
    positions: torch.Tensor
    """int64 [T], position inside the sequence; [CLS] = 0."""
    sequences: torch.Tensor
    """int64 [T], number of the sequence."""
    starts: torch.Tensor
    """int64 [S], the [CLS] of every sequence."""
    cu_seqlens: torch.Tensor
    """int32 [S + 1], where each sequence starts; the last entry is T."""
    max_length: int
    """L, 0 without sequences."""


@dataclass(frozen=True)
class Labels:
    """The labelled tokens of a text."""

    positions: torch.Tensor
    """int64 [M], ascending, into the text's tokens."""
    ids: torch.Tensor
    """int64 [M], the original ids there."""


@dataclass(frozen=True)
class Context:
    """A text that decoders read; S may be smaller than B, and 0, where samples lack the field."""

    text: Text
    passage_index: torch.Tensor
    """int64 [S], the encoder sequence whose [CLS] vector replaces position 0."""


@dataclass(frozen=True)
class Task:
    """What one decoder recovers."""

    context: str
    """Name of its context in the batch. Enhanced decoders of one field (mkp, cmp, retromae) share one, which the model
    embeds once. Which ones do never depends on the data: under ZeRO-3 all ranks must run the same modules, in every
    micro-batch."""
    labels: Labels
    keys: torch.Tensor | None = None
    """int32 [S], bits of the uint32 key that row visibility is drawn from; enhanced decoders only, as the next two."""
    word_ids: torch.Tensor | None = None
    """int32 [T], index of the token's word within its text (0 at [CLS] and [SEP], where it does not matter)."""
    keep_thresholds: torch.Tensor | None = None
    """int32 [T] in [0, 2**30], column j is kept for a row whose draw is below it; 2**30 = always, 0 = never."""
    visibility: torch.Tensor | None = None
    """bool [S, L, L] instead of the three above: an explicit mask, to replay published cases."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B passages, with every task's text."""

    encoder: Text
    encoder_labels: Labels
    contexts: dict[str, Context]
    """By a field's name, or by a masked task's."""
    tasks: dict[str, Task]
    """In the recipe's order; a task without rows is there with S = 0."""
    rows: Any = None
    """The rows (stream.Rows) that it was packed from."""
    num_cut_texts: int = 0
    """How many texts of this batch were longer than max_tokens and were cut."""

    def num_labels(self) -> list[int]:
        """Labelled tokens of this batch: the encoder's first, then each task's in order."""
        return [len(self.encoder_labels.ids), *(len(task.labels.ids) for task in self.tasks.values())]

    @property
    def num_passages(self) -> int:
        """B"""
        return len(self.encoder.starts)

    @property
    def num_tokens(self) -> int:
        """Tokens that the encoder reads."""
        return len(self.encoder.input_ids)


def make_text(input_ids: np.ndarray, cu_seqlens: np.ndarray) -> Text:
    """The text of token ids [T] and bounds [S + 1]."""
    starts, lengths = cu_seqlens[:-1], np.diff(cu_seqlens)
    return Text(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        positions=torch.from_numpy(np.arange(len(input_ids)) - np.repeat(starts, lengths).astype(np.int64)),
        sequences=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        starts=torch.tensor(starts, dtype=torch.int64),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        max_length=int(lengths.max(initial=0)),
    )


def make_labels(positions: np.ndarray, ids: np.ndarray) -> Labels:
    """The labels `ids` [M] at ascending `positions` [M] of a text."""
    assert (np.diff(positions) > 0).all(), "label positions must ascend"
    return Labels(torch.tensor(positions, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64))


def join_texts(texts: Sequence[np.ndarray]) -> Text:
    """Texts of token ids laid end to end; one at least."""
    return make_text(np.concatenate(texts), np.cumsum([0, *map(len, texts)]))


def batches_by_length(texts: Sequence[np.ndarray], batch_tokens: int = 8192) -> list[np.ndarray]:
    """Indices (int64) of the texts, longest first, in batches of at most `batch_tokens` tokens, one text at least."""
    order = sorted(range(len(texts)), key=lambda index: (-len(texts[index]), index))
    batches: list[list[int]] = []
    tokens = 0
    for index in order:
        if not batches or tokens + len(texts[index]) > batch_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += len(texts[index])
    return [np.array(batch) for batch in batches]


def to_device(value: Moved, device: torch.device | str) -> Moved:
    """A batch, or a part of one, with its tensors on `device`; copies to a GPU do not wait for it."""
    if isinstance(value, torch.Tensor):
        if torch.device(device).type == "cuda":
            return value.pin_memory().to(device, non_blocking=True)
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(part, device) for name, part in value.items()}
    if is_dataclass(value):
        return type(value)(*(to_device(getattr(value, field.name), device) for field in fields(value)))
    return value
