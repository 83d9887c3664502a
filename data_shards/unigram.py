"""The unigram yardstick: what a model without any context would lose on each task's own labelled tokens.

Tasks label different tokens (keyword tasks the rare ones), so their raw losses are not comparable. A model that ignores
its input can at best learn how often each token is a label of the task; its cross-entropy is the plateau that small
models from scratch sit on, and the number that a task's loss must pass before it says anything about the passage.
"""

from collections.abc import Iterable

import numpy as np

from quincunx.data_shards.batches import PackedBatch

PSEUDO_COUNTS = 10.0 ** np.arange(-4, 1)
"""Candidates of the count that every id of the vocabulary is given before the first label is seen."""


def count_labels(batches: Iterable[PackedBatch], vocab_size: int) -> dict[str, np.ndarray]:
    """How often each id is a label of the encoder ("mlm") and of each task, int64 [vocab_size]."""
    counts: dict[str, np.ndarray] = {}
    for batch in batches:
        labels = {"mlm": batch.encoder_labels} | {name: task.labels for name, task in batch.tasks.items()}
        for name, ids in labels.items():
            counts[name] = counts.get(name, 0) + np.bincount(ids, minlength=vocab_size)
    return counts


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
