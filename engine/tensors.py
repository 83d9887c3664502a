"""Packed numpy batches as tensors on the model's device, with everything the device would otherwise have to ask for.

Letters: B passages, S sequences of a text, T its tokens, M its labelled tokens, L its longest sequence.
"""

from dataclasses import dataclass

import numpy as np
import torch

from quincunx.data_shards.batches import PackedBatch, PackedText
from quincunx.data_shards.tasks import TASKS


@dataclass(frozen=True)
class TensorText:
    """S sequences end to end."""

    input_ids: torch.Tensor
    """int64 [T]"""
    positions: torch.Tensor
    """int64 [T], position inside the sequence; [CLS] = 0."""
    sequences: torch.Tensor
    """int64 [T], number of the sequence."""
    starts: torch.Tensor
    """int64 [S], the [CLS] of every sequence."""
    cu_seqlens: torch.Tensor
    """int32 [S + 1]"""
    max_length: int
    """L, the longest sequence in tokens; 0 without sequences."""


@dataclass(frozen=True, kw_only=True)
class TensorRows:
    """Some tokens of a text."""

    positions: torch.Tensor
    """int64 [M], ascending, into the text's tokens."""
    cu_seqlens: torch.Tensor
    """int32 [S + 1], which of the M belong to which sequence."""
    max_rows: int
    """Most of one sequence."""


@dataclass(frozen=True, kw_only=True)
class TensorLabels(TensorRows):
    """The labelled tokens of a text."""

    labels: torch.Tensor
    """int64 [M]"""


@dataclass(frozen=True)
class TensorTask:
    """What one decoder needs; fields as in data_shards/batches.py. Equal texts of two tasks are one object here."""

    text: TensorText
    passage_index: torch.Tensor
    """int64 [S]"""
    labels: TensorLabels
    keys: torch.Tensor | None = None
    word_ids: torch.Tensor | None = None
    keep_thresholds: torch.Tensor | None = None
    visibility: torch.Tensor | None = None
    """bool [S, L, L] instead of the three above: an explicit mask, to replay published cases."""


@dataclass(frozen=True)
class TensorBatch:
    """One micro-batch on the device."""

    encoder: TensorText
    encoder_labels: TensorLabels
    tasks: dict[str, TensorTask]
    """By name; a task without rows may be absent."""


def to_tensors(batch: PackedBatch, device: torch.device | str = "cpu") -> TensorBatch:
    """Moves a packed batch to `device`; copies to a GPU do not wait for it.

    Enhanced decoders of one field (mkp, cmp and retromae) share one TensorText, so that the model embeds it once. Which
    ones do never depends on the data: under ZeRO-3 all ranks must run the same modules, in every micro-batch.
    """
    device = torch.device(device)
    contexts: dict[str, tuple[TensorText, torch.Tensor]] = {}
    tasks = {}
    for name, task in batch.tasks.items():
        context = name if task.keys is None else TASKS[name].field
        if context not in contexts:
            passage_index = _move(task.passage_index, device, torch.int64)
            contexts[context] = text_to_tensors(task.text, device), passage_index
        text, passage_index = contexts[context]
        tasks[name] = TensorTask(
            text=text,
            passage_index=passage_index,
            labels=labels_to_tensors(task.label_positions, task.labels, task.text.cu_seqlens, device),
            keys=_move(task.keys, device),
            word_ids=_move(task.word_ids, device),
            keep_thresholds=_move(task.keep_thresholds, device),
        )
    return TensorBatch(
        encoder=text_to_tensors(batch.encoder, device),
        encoder_labels=labels_to_tensors(
            batch.encoder_label_positions, batch.encoder_labels, batch.encoder.cu_seqlens, device
        ),
        tasks=tasks,
    )


def text_to_tensors(text: PackedText, device: torch.device | str = "cpu") -> TensorText:
    """A packed text with its positions, computed on the host so that the device is never asked for a length."""
    starts, lengths = text.cu_seqlens[:-1], np.diff(text.cu_seqlens)
    positions = np.arange(len(text.input_ids)) - np.repeat(starts, lengths)
    return TensorText(
        input_ids=_move(text.input_ids, device, torch.int64),
        positions=_move(positions, device, torch.int64),
        sequences=_move(np.repeat(np.arange(len(lengths)), lengths), device, torch.int64),
        starts=_move(starts, device, torch.int64),
        cu_seqlens=_move(text.cu_seqlens, device, torch.int32),
        max_length=int(lengths.max(initial=0)),
    )


def labels_to_tensors(
    positions: np.ndarray, labels: np.ndarray, cu_seqlens: np.ndarray, device: torch.device | str = "cpu"
) -> TensorLabels:
    """The labelled tokens of a text; `positions` ascending."""
    assert (np.diff(positions) > 0).all(), "label positions must ascend"
    bounds = np.searchsorted(positions, cu_seqlens)
    return TensorLabels(
        positions=_move(positions, device, torch.int64),
        labels=_move(labels, device, torch.int64),
        cu_seqlens=_move(bounds, device, torch.int32),
        max_rows=int(np.diff(bounds).max(initial=0)),
    )


def cls_rows(text: TensorText) -> TensorRows:
    """The [CLS] of every sequence."""
    count = torch.arange(len(text.cu_seqlens), dtype=torch.int32, device=text.cu_seqlens.device)
    return TensorRows(positions=text.starts, cu_seqlens=count, max_rows=1)


def cls_and_labels(text: TensorText, labels: TensorLabels) -> tuple[TensorRows, torch.Tensor, torch.Tensor]:
    """The [CLS] and the labelled tokens of every sequence; where among these each [CLS] [S] and each label [M] is."""
    num_sequences = len(text.starts)
    positions, order = torch.cat([text.starts, labels.positions]).sort()
    places = order.argsort()
    rows = TensorRows(
        positions=positions,
        cu_seqlens=labels.cu_seqlens + cls_rows(text).cu_seqlens,
        max_rows=labels.max_rows + 1,
    )
    return rows, places[:num_sequences], places[num_sequences:]


def empty_task(device: torch.device | str = "cpu") -> TensorTask:
    """A task without rows."""
    none, bounds = np.zeros(0, np.int32), np.zeros(1, np.int32)
    return TensorTask(
        text=text_to_tensors(PackedText(none, bounds), device),
        passage_index=_move(none, device, torch.int64),
        labels=labels_to_tensors(none, none, bounds, device),
        keys=_move(none, device),
        word_ids=_move(none, device),
        keep_thresholds=_move(none, device),
    )


def _move(array: np.ndarray | None, device: torch.device | str, dtype: torch.dtype | None = None):
    if array is None:
        return None
    tensor = torch.from_numpy(np.array(array))
    tensor = tensor if dtype is None else tensor.to(dtype)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
