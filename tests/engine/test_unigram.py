"""The unigram yardstick is a distribution, close to the best one, and never easier to pass than add-one smoothing."""

import numpy as np
import pytest

from quincunx.data_shards.order import Rows
from quincunx.data_shards.packer import Packer
from quincunx.data_shards.shards import open_shards
from quincunx.data_shards.tasks import TaskSpec
from quincunx.engine.evaluations import count_labels, log_probabilities


def test_held_out_cross_entropy_of_many_labels_is_the_entropy_of_their_distribution():
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(500, 0.3))
    counts = np.bincount(rng.choice(500, 200_000, p=share), minlength=500)
    held_out = rng.choice(500, 50_000, p=share)
    log_probs = log_probabilities(counts)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    surprise = -log_probs[held_out]
    assert np.exp(log_probs).sum() == pytest.approx(1, abs=1e-12)
    assert abs(surprise.mean() - entropy) < 5 * surprise.std() / len(held_out) ** 0.5 + 500 / 200_000


def test_few_labels_in_a_large_vocabulary_are_smoothed_less_than_by_add_one():
    rng = np.random.default_rng(1)
    share = 1.0 / np.arange(1, 30_001)
    share /= share.sum()
    counts = np.bincount(rng.choice(30_000, 20_000, p=share), minlength=30_000)
    held_out = rng.choice(30_000, 20_000, p=share)
    add_one = np.log((counts + 1) / (counts.sum() + 30_000))
    assert -log_probabilities(counts)[held_out].mean() < -add_one[held_out].mean() - 0.05


@pytest.mark.parametrize("counts", [np.zeros(8, np.int64), np.eye(8, dtype=np.int64)[3]])
def test_no_label_or_one_label_still_gives_a_distribution(counts):
    assert np.exp(log_probabilities(counts)).sum() == pytest.approx(1, abs=1e-12)


def test_every_label_of_a_batch_is_counted_once_under_its_task(small_shards):
    tasks = [TaskSpec(name="mkp", decoder="masked"), TaskSpec(name="dor", decoder="enhanced")]
    packer = Packer(
        [open_shards(small_shards)],
        tasks,
        encoder_mask_rate=0.3,
        decoder_mask_rate=0.5,
        corruption="mask",
        neighbour="next",
        max_tokens=144,
        seed=0,
    )
    batches = [
        packer.pack(Rows(np.zeros(20, np.int16), np.zeros(20, np.int32), np.arange(start, start + 20)))
        for start in (0, 20)
    ]
    counts = count_labels(batches, packer.vocab_size)
    assert list(counts) == ["mlm", "mkp", "dor"]
    assert [table.sum() for table in counts.values()] == np.sum([b.num_labels() for b in batches], axis=0).tolist()
    first = batches[0].tasks["mkp"].labels.ids[0]
    assert counts["mkp"][first] == sum(int((batch.tasks["mkp"].labels.ids == first).sum()) for batch in batches)
