"""The order: every sample once an epoch, the same global batch on any number of ranks, any step at once."""

import time
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.order import Order, mixture_pattern, permute_point

BLOCKS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def all_rows(order: Order, num_rows: int, global_batch: int):
    steps = [order.global_batch(step, global_batch) for step in range(-(-num_rows // global_batch))]
    return (np.concatenate(column) for column in zip(*steps))


@given(BLOCKS, st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_bijection_on_the_samples(blocks, seed, global_batch, window):
    order = Order(seed, [np.array(blocks)], window=window)
    num_samples = sum(blocks)
    _, epochs, sample_ids = all_rows(order, 2 * num_samples, global_batch)
    for epoch in (0, 1):
        assert sorted(sample_ids[epochs == epoch]) == list(range(num_samples))


@given(st.integers(1, 500), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_permute_point_is_a_bijection_at_any_size(size, key):
    assert sorted(permute_point(key, x, size) for x in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_permute_point_draws_every_permutation_of_a_few_equally_often(size):
    num_keys, all_orders = 12_000, list(permutations(range(size)))
    counts = dict.fromkeys(all_orders, 0)
    for key in range(num_keys):
        counts[tuple(permute_point(key * 13 + 5, x, size) for x in range(size))] += 1
    degrees, expected = len(all_orders) - 1, num_keys / len(all_orders)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < degrees + 5 * (2 * degrees) ** 0.5


def test_permute_point_sends_neighbours_of_a_window_apart():
    size, num_keys = 8192, 4000
    gaps = [(permute_point(key, 101, size) - permute_point(key, 100, size)) % size for key in range(num_keys)]
    counts = np.bincount(np.array(gaps) * 32 // size, minlength=32)
    assert ((counts - num_keys / 32) ** 2 / (num_keys / 32)).sum() < 31 + 5 * (2 * 31) ** 0.5


@given(BLOCKS, st.integers(0, 2**32 - 1), st.integers(0, 1000), st.sampled_from([16, 48, 2048]))
@settings(max_examples=40, deadline=None)
def test_the_global_batch_is_the_same_on_1_2_4_8_and_16_ranks(blocks, seed, step, global_batch):
    order = Order(seed, [np.array(blocks), np.array([7, 5])], weights=[3, 1])
    whole = order.global_batch(step, global_batch)
    for world_size in (1, 2, 4, 8, 16):
        parts = [order.rank_batch(step, global_batch, rank, world_size) for rank in range(world_size)]
        assert len({len(part.sample_ids) for part in parts}) == 1
        for column, expected in zip(zip(*parts), whole):
            assert np.array_equal(np.concatenate(column), expected)


@pytest.mark.parametrize("blocks", [[40], [1, 1, 1, 1, 1, 1, 1, 1], [1024] * 20])
def test_every_epoch_and_every_seed_has_a_new_order(blocks):
    num_samples = sum(blocks)
    orders = []
    for seed in (0, 1):
        _, epochs, sample_ids = all_rows(Order(seed, [np.array(blocks)]), 3 * num_samples, max(1, num_samples // 40))
        orders += [sample_ids[epochs == epoch] for epoch in range(3)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Random orders agree in 1 place on average, Poisson: 12 or more has probability below 1e-9. Batches of
            # many lanes are sorted by lane, where agreement is likelier.
            assert (first == second).sum() < min(max(12, num_samples // 100), num_samples)


def test_a_batch_spreads_over_the_epoch_and_a_rank_stays_within_few_blocks():
    num_blocks, global_batch, world_size = 5000, 512, 8
    order = Order(3, [np.full(num_blocks, 1024)])
    blocks = order.global_batch(4000, global_batch).sample_ids // 1024
    assert len(np.unique(blocks)) > global_batch // 3
    a_window_of_steps = range(1000, 1000 + 8192 * 64 // global_batch, 8)
    of_rank = [order.rank_batch(step, global_batch, 3, world_size).sample_ids for step in a_window_of_steps]
    lanes_of_rank, blocks_of_window = 64 // world_size, 2 * (8192 // 1024 + 1)
    assert len(np.unique(np.concatenate(of_rank) // 1024)) <= lanes_of_rank * blocks_of_window


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 40))
@settings(deadline=None)
def test_a_mixture_keeps_its_weights_exactly(weights, global_batch):
    order = Order(0, [np.array([50])] * len(weights), weights)
    num_rows = 3 * sum(weights)
    datasets, _, _ = all_rows(order, num_rows, global_batch)
    if num_rows % global_batch == 0:
        assert np.bincount(datasets).tolist() == [3 * weight for weight in weights]
    pattern = mixture_pattern(weights)
    for dataset, weight in enumerate(weights):
        given_so_far = np.cumsum(pattern == dataset)
        due = np.arange(1, len(pattern) + 1) * weight / sum(weights)
        assert np.abs(given_so_far - due).max() < len(weights)


def test_each_dataset_of_a_mixture_goes_through_its_own_epochs():
    sizes, weights = [[30, 20], [7, 4]], [5, 2]
    order = Order(9, [np.array(blocks) for blocks in sizes], weights)
    datasets, epochs, sample_ids = all_rows(order, 70 * 11, 10)
    for dataset, blocks in enumerate(sizes):
        for epoch in range(3):
            chosen = sample_ids[(datasets == dataset) & (epochs == epoch)]
            assert sorted(chosen) == list(range(sum(blocks)))


def test_any_step_of_100_million_samples_is_found_within_50_milliseconds():
    blocks = np.full(97_657, 1024)  # 100,000,768 samples
    order = Order(1, [blocks])
    order.global_batch(0, 2048)  # compiles
    seconds = []
    for epoch in range(1, 4):  # every epoch permutes its blocks anew
        started = time.perf_counter()
        order = Order(1, [blocks])
        rows = order.global_batch(epoch * 48_829 + 20_000, 2048)
        seconds.append(time.perf_counter() - started)
        assert rows.epochs[0] == epoch
    assert min(seconds) < 0.05


def test_the_tail_of_an_epoch_is_reported():
    text = Order(0, [np.array([1000, 38])]).describe(100)
    assert "1,038 passages" in text and "10.4 steps" in text and "the last 38 passages" in text


def test_a_shard_set_without_samples_is_refused():
    with pytest.raises(SettingsError, match="has no samples in this split"):
        Order(0, [np.array([5]), np.array([], np.int64)], [1, 1])
