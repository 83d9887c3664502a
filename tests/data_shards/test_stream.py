"""The order: every sample once an epoch, any step at once. The stream: the same batches for any number of workers,
ranks and restarts; its workers fail and end properly."""

import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import fields, is_dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quincunx.data_shards.batches import Batch
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.packer import Packer
from quincunx.data_shards.shards import open_shards
from quincunx.data_shards.stream import Order, Stream, mixture_pattern, permute_point
from quincunx.data_shards.tasks import TaskSpec

GLOBAL_BATCH = 48
BLOCKS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def make_stream(shard_sets, weights=None, seed=5, global_batch=GLOBAL_BATCH, micro_batch=3, **options) -> Stream:
    tasks = [TaskSpec(name="mkp", decoder="enhanced"), TaskSpec(name="npr", decoder="masked")]
    packer = Packer(
        shard_sets,
        tasks,
        encoder_mask_rate=0.3,
        decoder_mask_rate=0.5,
        corruption="80-10-10",
        neighbour="next",
        max_tokens=64,
        seed=seed,
    )
    order = Order(seed, [shard_set.block_samples("train") for shard_set in shard_sets], weights)
    return Stream(packer, order, global_batch=global_batch, micro_batch=micro_batch, **options)


def take(stream: Stream, start_step: int, num_steps: int) -> list[list[Batch]]:
    steps = stream.iterate(start_step)
    try:
        return [next(steps) for _ in range(num_steps)]
    finally:
        steps.close()


def content(value) -> list[bytes]:
    """Every array of a batch, or of a part of it."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return [np.asarray(value).tobytes()]
    if isinstance(value, dict):
        return [array for part in value.values() for array in content(part)]
    if is_dataclass(value):
        return [array for field in fields(value) for array in content(getattr(value, field.name))]
    return [array for part in value for array in content(part)] if isinstance(value, list | tuple) else []


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stream_")]


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_any_number_of_workers_gives_the_batches_of_step(shard_set):
    pure = make_stream([shard_set])
    expected = content([pure.step(step) for step in range(30)])
    for num_workers in (0, 1, 3):
        assert content(take(make_stream([shard_set], num_workers=num_workers), 0, 30)) == expected


def test_a_restart_at_step_k_continues_as_if_run_through(shard_set, other_shard_set):
    sets, weights = [shard_set, other_shard_set], [2, 1]
    through = [content(step) for step in take(make_stream(sets, weights, num_workers=2), 0, 40)]
    assert len({epoch for step in take(make_stream(sets, weights), 0, 40) for b in step for epoch in b.rows.epochs}) > 2
    for k in (1, 17, 39):
        resumed = take(make_stream(sets, weights, num_workers=1), k, 40 - k)
        assert [content(step) for step in resumed] == through[k:]


def test_all_ranks_together_hold_the_global_batch_with_the_same_masks(shard_set):
    def by_passage(world_size: int, micro_batch: int) -> dict[int, bytes]:
        """sample id -> the encoder's corrupted ids and its labels."""
        passages = {}
        for rank in range(world_size):
            stream = make_stream([shard_set], micro_batch=micro_batch, rank=rank, world_size=world_size, num_workers=0)
            for batch in stream.step(4):
                assert batch.num_passages == micro_batch
                bounds = batch.encoder.cu_seqlens[1:-1].tolist()
                ids = np.split(batch.encoder.input_ids.numpy(), bounds)
                labels = np.zeros(batch.num_tokens, int)
                labels[batch.encoder_labels.positions] = batch.encoder_labels.ids
                for sample_id, *arrays in zip(batch.rows.sample_ids, ids, np.split(labels, bounds)):
                    assert sample_id not in passages
                    passages[int(sample_id)] = b"".join(array.tobytes() for array in arrays)
        return passages

    whole = by_passage(1, GLOBAL_BATCH)
    assert len(whole) == GLOBAL_BATCH
    for world_size, micro_batch in [(1, 8), (2, 8), (4, 12), (8, 3), (16, 1)]:
        assert by_passage(world_size, micro_batch) == whole


def test_a_damaged_block_is_raised_at_the_step_that_needs_it(shard_set, tmp_path):
    damaged = open_shards(shutil.copytree(shard_set.path, tmp_path / "set"))
    shard = damaged.manifest.shards[0]
    last = shard.blocks[-1]
    path = Path(damaged.path, shard.name)
    data = bytearray(path.read_bytes())
    data[last.offset + last.size // 2] ^= 0x10
    path.write_bytes(data)

    stream = make_stream([damaged], global_batch=1, micro_batch=1, num_workers=2)
    first_lost = damaged.num_samples("train") - last.samples
    needs_it = next(step for step in range(1000) if stream.order.global_batch(step, 1).sample_ids[0] >= first_lost)
    steps = stream.iterate(0)
    assert len([next(steps) for _ in range(needs_it)]) == needs_it
    named = f"block {len(shard.blocks) - 1} of shard {shard.name}.*verify_shards"
    with pytest.raises(DataError, match=named):
        next(steps)
    assert wait_until(lambda: not stream_threads())


def test_workers_stay_a_bounded_number_of_steps_ahead_and_end_when_the_stream_is_closed(shard_set):
    stream = make_stream([shard_set], num_workers=2)
    made = []
    stream.step = lambda step: made.append(step) or Stream.step(stream, step)
    steps = stream.iterate(0)
    next(steps)
    assert wait_until(lambda: len(made) == 5)
    time.sleep(0.2)
    assert sorted(made) == [0, 1, 2, 3, 4], "one consumed, two a worker ahead"
    assert len(stream_threads()) == 2
    steps.close()
    assert wait_until(lambda: not stream_threads())


def test_a_stream_left_open_does_not_keep_the_process_alive(shard_set):
    """Nor does it change the exit code."""
    program = f"""
        import importlib.util, sys
        from quincunx.data_shards.shards import open_shards
        spec = importlib.util.spec_from_file_location("test_stream", {__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        stream = module.make_stream([open_shards({shard_set.path!r})], num_workers=2)
        steps = stream.iterate(0)
        next(steps)
        print("left open")
        sys.exit(75)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (75, "left open\n"), done.stderr


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
    part = slice(3 * global_batch // world_size, 4 * global_batch // world_size)
    of_rank = [order.global_batch(step, global_batch).sample_ids[part] for step in a_window_of_steps]
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
