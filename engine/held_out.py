"""Held-out loss: every task on passages that are never trained on, with masks that never change.

The first passages of the shards' held-out split are packed once, with the masks of epoch 0. A task's loss is a mean
over its labelled tokens, in nats, and stands beside the unigram cross-entropy of the very same tokens: what a model
that ignores the text reaches by knowing how often each token is a label in training: the plateau that small models from
scratch sit on. Tasks label different words (keyword tasks the rare ones), so only the distance to a task's own unigram
can be compared.

Every rank must call run_held_out: the ranks share the batches, and under ZeRO-3 each forward gathers weights from all
of them, so all run the same number of forwards.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quincunx.data_shards.batches import PackedBatch
from quincunx.engine.ranks import rank_and_world, sum_over_ranks

if TYPE_CHECKING:
    import torch

    from quincunx.data_shards.packer import Packer

UNIGRAM_PASSAGES = 4096  # training passages that label frequencies are counted on
UNIGRAM_IN_A_ROW = 16  # of them side by side: each place is a block to be read, far away where shards are remote
PASSAGES_A_PACK = 256
PSEUDO_COUNTS = 10.0 ** np.arange(-4, 1)
"""Candidates of the count that every id of the vocabulary is given before the first label is seen."""


@dataclass(frozen=True)
class HeldOut:
    """Packed held-out passages, the same on every rank."""

    batches: list[PackedBatch]
    unigram: dict[str, float]
    """nats per labelled token of each task ("mlm" first) under its label frequencies in training; tasks with labels"""


def load_held_out(held_out: "Packer", train: "Packer", num_passages: int, micro_batch: int) -> HeldOut | None:
    """Packs `num_passages` held-out passages, shared equally by the shard sets that have any.

    held_out, train: packers of the two splits, alike otherwise. micro_batch: passages of one forward pass.
    Returns None where no shard set holds any passage out. A pure function: ranks need not talk.
    """
    datasets, samples = spread_samples(held_out, num_passages)
    if not len(samples):
        return None
    batches = pack_all(held_out, datasets, samples, micro_batch)
    trained = pack_all(train, *spread_samples(train, UNIGRAM_PASSAGES, UNIGRAM_IN_A_ROW), PASSAGES_A_PACK)
    return HeldOut(batches, unigram_cross_entropy(batches, trained, held_out.vocab_size))


def spread_samples(packer: "Packer", num_passages: int, in_a_row: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(datasets int16 [n], sample_ids int64 [n]), `in_a_row` at places evenly spread over each shard set.

    n <= num_passages, all of a smaller shard set.

    Spread, because corpora are sorted: the first passages may be of one kind, and lack a field that a task reads.
    """
    counts = [shard_set.num_samples(packer.split) for shard_set in packer.shard_sets]
    filled = [index for index, count in enumerate(counts) if count]
    shares = np.array_split(np.arange(num_passages), len(filled)) if filled else []
    taken = [min(len(share), counts[index]) for index, share in zip(filled, shares, strict=True)]
    ids = []
    for index, number in zip(filled, taken, strict=True):
        places = np.arange(0, number, in_a_row) * counts[index] // number
        ids.append((places[:, None] + np.arange(in_a_row)).ravel()[:number])
    datasets = np.repeat(np.array(filled, np.int16), taken)
    return datasets, np.concatenate(ids) if ids else np.empty(0, np.int64)


def pack_all(packer: "Packer", datasets: np.ndarray, samples: np.ndarray, micro_batch: int) -> list[PackedBatch]:
    """The samples in their order, `micro_batch` a batch, as epoch 0 masks them."""
    return [
        packer.pack(datasets[cut], np.zeros(len(samples[cut]), np.int32), samples[cut])
        for start in range(0, len(samples), micro_batch)
        for cut in [slice(start, start + micro_batch)]
    ]


def unigram_cross_entropy(batches: list[PackedBatch], trained: list[PackedBatch], vocab_size: int) -> dict[str, float]:
    """Nats per labelled token of `batches` under the label frequencies of `trained`, task by task."""
    counts = count_labels(trained, vocab_size)
    unigram = {}
    for task, labels in labels_by_task(batches).items():
        if len(labels):
            unigram[task] = -float(log_probabilities(counts[task])[labels].mean())
    return unigram


def labels_by_task(batches: list[PackedBatch]) -> dict[str, np.ndarray]:
    """int32 labels of all batches, the encoder's ("mlm") first."""
    labels = {"mlm": np.concatenate([batch.encoder_labels for batch in batches])}
    for task in batches[0].tasks:
        labels[task] = np.concatenate([batch.tasks[task].labels for batch in batches])
    return labels


def count_labels(batches: list[PackedBatch], vocab_size: int) -> dict[str, np.ndarray]:
    """How often each id is a label of the encoder ("mlm") and of each task, int64 [vocab_size]."""
    return {name: np.bincount(ids, minlength=vocab_size) for name, ids in labels_by_task(batches).items()}


def log_probabilities(counts: np.ndarray) -> np.ndarray:
    """Natural logarithms of the smoothed label distribution, float64 [vocab_size]; uniform where nothing was counted.

    The mean of -log_probabilities(counts)[labels] over held-out labels is their unigram cross-entropy in nats.

    Every id is given a pseudo-count, the one of PSEUDO_COUNTS under which the counted labels are likeliest, each with
    itself left out: a pseudo-count of 1 would raise the plateau on small corpora and make it easier to pass.
    """
    total = counts.sum()

    def left_out_likelihood(pseudo_count: float) -> float:
        seen = counts[counts > 0]
        return float(seen @ np.log((seen - 1 + pseudo_count) / (total - 1 + pseudo_count * len(counts))))

    pseudo_count = max(PSEUDO_COUNTS, key=left_out_likelihood) if total > 1 else 1.0
    return np.log((counts + pseudo_count) / (total + pseudo_count * len(counts)))


def run_held_out(model: Any, held_out: HeldOut, device: "torch.device") -> dict[str, float]:
    """held_out/loss/TASK and held_out/unigram/TASK in nats, held_out/accuracy/TASK (share right) on every rank.

    Every rank must call it. model: the PretrainModel, left in the mode it was in. Rank r runs batches r, r + ranks, and
    so on; one that has a batch fewer runs the last once more and does not count it. A task without labels is left out.
    """
    import torch

    from quincunx.engine.tensors import to_tensors

    rank, world = rank_and_world()
    own = held_out.batches[rank::world]
    names = ["mlm", *held_out.batches[0].tasks]
    totals = torch.zeros(3, len(names), dtype=torch.float64, device=device)
    unweighted = torch.ones(len(names), device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for turn in range(-(-len(held_out.batches) // world)):
                batch = own[turn] if turn < len(own) else held_out.batches[-1]
                output = model(to_tensors(batch, device), unweighted)
                if turn < len(own):
                    totals += torch.stack([x.to(totals) for x in (output.nll_sums, output.correct, output.counts)])
    finally:
        model.train(was_training)
    nll_sums, correct, counts = sum_over_ranks(totals).tolist()
    metrics = {}
    for task, nll, right, count in zip(names, nll_sums, correct, counts, strict=True):
        if count:
            metrics[f"held_out/loss/{task}"] = nll / count
            metrics[f"held_out/accuracy/{task}"] = right / count
            metrics[f"held_out/unigram/{task}"] = held_out.unigram[task]
    return metrics
