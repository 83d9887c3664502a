"""The stream of a rank's micro-batches: which samples a step takes, and threads that pack them ahead of the loop.

The order is pure arithmetic: (seed, step) -> the sample ids of the global batch. An epoch of one dataset: its blocks
are permuted and laid end to end to N positions; these are dealt to C = min(64, N) lanes, contiguous ranges whose sizes
differ by at most one. Every C positions of the epoch take one sample of each lane, the lanes in a fresh order; inside a
lane, windows of 8,192 samples are permuted. Both permutations are keyed bijections that are evaluated at one point,
without tables. So an epoch is a bijection on the samples whatever the block sizes; a step reads from 64 places at once,
each of which stays within about 9 blocks, and any step is found in the time of one sort of the block list.

Positions count on over epochs (epoch = position // N) and step t of a global batch B takes positions [t B, (t + 1) B).
A mixture deals the rows of all steps to datasets by a fixed pattern of its integer weights, each dataset counting its
own positions. The global batch is sorted by lane and only then cut into ranks, so it does not depend on their number,
and a rank reads few blocks. The state of a run is the step number.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from quincunx.data_shards.hashing import compiled, dataset_seed, fold, mix

NUM_LANES = 64
WINDOW = 8192
PERMUTE_ROUNDS = 32
# Folded into an epoch's key to keep its three kinds of draws apart.
BLOCK_PURPOSE, LANE_PURPOSE, WINDOW_PURPOSE = 1, 2, 3
STEPS_AHEAD_PER_WORKER = 2


class Rows(NamedTuple):
    """Samples of a batch, row by row: dataset int16 [B], epoch int32 [B], sample_id int64 [B] (index in the split)."""

    datasets: np.ndarray
    epochs: np.ndarray
    sample_ids: np.ndarray

    def at(self, which: Any) -> "Rows":
        """Some of the rows, by index or slice."""
        return Rows(*(column[which] for column in self))


class Order:
    """The order of a mixture of datasets; see the head of this file.

    block_samples: for each dataset, the number of samples of each block, in manifest order. weights: for each dataset,
    how many of every sum(weights) rows it gives, a positive integer. window: positions of a lane shuffled together.
    """

    def __init__(
        self, seed: int, block_samples: Sequence[np.ndarray], weights: Sequence[int] | None = None, window: int = WINDOW
    ):
        weights = weights or [1] * len(block_samples)
        assert len(weights) == len(block_samples) and min(weights) >= 1 and window >= 1
        self.seed = seed & 0xFFFFFFFF
        self.window = window
        self.block_starts = [np.append(0, np.cumsum(samples)) for samples in block_samples]
        self.num_samples = [int(starts[-1]) for starts in self.block_starts]
        assert all(self.num_samples), "a shard set has training samples, or was never finished"
        self.pattern = mixture_pattern(weights)
        self._epoch = lru_cache(maxsize=2 * len(block_samples))(self._permuted_blocks)

    def _epoch_key(self, dataset: int, epoch: int) -> int:
        return fold(mix(dataset_seed(self.seed, dataset)), epoch)

    def _permuted_blocks(self, dataset: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of blocks, int64 [K], and the position where each of them starts, int64 [K + 1]."""
        starts = self.block_starts[dataset]
        key = fold(self._epoch_key(dataset, epoch), BLOCK_PURPOSE)
        order = np.argsort(_hashes(key, len(starts) - 1), kind="stable")
        return order, np.append(0, np.cumsum(np.diff(starts)[order]))

    def _sample_ids(self, dataset: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epochs int32, sample ids int64 and lanes int64 at a dataset's running positions."""
        num_samples = self.num_samples[dataset]
        epochs, places = np.divmod(positions, num_samples)
        sample_ids, lanes = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            key = self._epoch_key(dataset, epoch)
            offsets, lanes[rows] = _lane_positions(key, places[rows], num_samples, self.window)
            block_order, starts = self._epoch(dataset, int(epoch))
            at = np.searchsorted(starts, offsets, side="right") - 1
            sample_ids[rows] = self.block_starts[dataset][block_order[at]] + offsets - starts[at]
        return epochs.astype(np.int32), sample_ids, lanes

    def global_batch(self, step: int, global_batch: int) -> Rows:
        """The rows of a step (from 0) over all ranks, sorted by lane; the same for every number of ranks."""
        rows = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
        turns, places = np.divmod(rows, len(self.pattern))
        datasets = self.pattern[places]
        epochs, sample_ids, lanes = np.empty(len(rows), np.int32), np.empty_like(rows), np.empty_like(rows)
        for dataset in range(len(self.num_samples)):
            mine = datasets == dataset
            in_pattern = np.cumsum(self.pattern == dataset)
            positions = turns[mine] * in_pattern[-1] + in_pattern[places[mine]] - 1
            epochs[mine], sample_ids[mine], lanes[mine] = self._sample_ids(dataset, positions)
        return Rows(datasets, epochs, sample_ids).at(np.argsort(lanes, kind="stable"))

    def describe(self, global_batch: int) -> str:
        """One sentence per dataset: samples, steps an epoch, and the epoch's tail."""
        sentences = []
        for dataset, num_samples in enumerate(self.num_samples):
            share = np.mean(self.pattern == dataset)
            steps = num_samples / (global_batch * share)
            sentence = f"shard set {dataset}: {num_samples:,} passages, an epoch is {steps:,.1f} steps"
            if len(self.num_samples) > 1:
                sentence += f" at {share:.1%} of the rows"
            elif tail := num_samples % global_batch:
                sentence += f"; the last {tail:,} passages of the first epoch share a step with the second"
            sentences.append(sentence)
        return "; ".join(sentences)


class Stream:
    """One rank's share of the global batches of `order`, packed by `packer` (packer.py, engine/retrieval/examples.py).

    packer: its pack(rows) makes a micro-batch, purely and from any thread; its names(rows) is for skipped_steps.jsonl.
    global_batch: samples (passages, or queries with their candidates) of an optimizer step over all ranks. micro_batch:
    samples of one forward on this rank. num_workers: threads that work ahead, 0 = none; at most 2 steps a worker (at
    least 2) are held ready.

    wait_seconds: time that the consumer of `iterate` has waited for batches, in all.
    """

    def __init__(
        self,
        packer: Any,
        order: Order,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 1,
    ):
        assert global_batch % (world_size * micro_batch) == 0 and 0 <= rank < world_size
        self.packer, self.order = packer, order
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.num_workers = num_workers
        self.wait_seconds = 0.0

    def step(self, step: int) -> list[Any]:
        """This rank's micro-batches of an optimizer step, counted from 0.

        Raises:
            DataError: a block that cannot be read.
        """
        rows = self.order.global_batch(step, self.global_batch)
        part, size = self.global_batch // self.world_size, self.micro_batch
        starts = range(self.rank * part, (self.rank + 1) * part, size)
        return [self.packer.pack(rows.at(slice(start, start + size))) for start in starts]

    def iterate(self, start_step: int = 0) -> Iterator[list[Any]]:
        """The micro-batches of start_step, start_step + 1, ... without end.

        A worker's exception is raised here, at the step it belongs to. Closing the generator, or dropping it, ends the
        workers after the step they are at.
        """
        steps = self._ahead(start_step) if self.num_workers else map(self.step, count(start_step))
        while True:
            started = time.perf_counter()
            batches = next(steps)
            self.wait_seconds += time.perf_counter() - started
            yield batches

    def _ahead(self, start_step: int) -> Iterator[list[Any]]:
        """The steps as `num_workers` threads make them."""
        workers = ThreadPoolExecutor(self.num_workers, "stream")
        try:
            ahead = deque()
            for step in count(start_step):
                ahead.append(workers.submit(self.step, step))
                if len(ahead) > STEPS_AHEAD_PER_WORKER * self.num_workers:
                    yield ahead.popleft().result()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def mixture_pattern(weights: Sequence[int]) -> np.ndarray:
    """Dataset of each row of one period, int16 [sum(weights) / gcd]: each as often as its weight, evenly spread.

    The k-th row (from 0) of a dataset of weight w stands where it is due, at (k + 1/2) / w of the period.
    """
    divisor = gcd(*weights)
    weights = [weight // divisor for weight in weights]
    datasets = np.repeat(np.arange(len(weights), dtype=np.int16), weights)
    due = np.concatenate([(np.arange(weight) + 0.5) / weight for weight in weights])
    return datasets[np.argsort(due, kind="stable")]


@compiled
def _hashes(key, count):
    hashes = np.empty(count, np.uint32)
    for i in range(count):
        hashes[i] = fold(key, i)
    return hashes


@compiled
def permute_point(key, x, size):
    """Where the bijection of [0, size) that `key` names sends x; int64, size at most 2**31.

    The swap-or-not shuffle (Hoang, Morris, Rogaway, CRYPTO 2012): each round pairs x with its mirror image about a
    random point and a random bit of the pair decides whether they change places. It works at any size, however small.
    """
    x = np.int64(x)
    for turn in range(PERMUTE_ROUNDS):
        round_key = fold(key, turn)
        mirror = (np.int64(round_key) * size >> 32) - x
        if mirror < 0:
            mirror += size
        if fold(round_key, max(x, mirror)) & np.uint32(1):
            x = mirror
    return x


@compiled
def _lane_positions(key, positions, num_samples, window):
    """Sends positions of an epoch to positions of the permuted block sequence and to lanes; int64 in and out.

    Each turn of C positions visits the lanes in an order of its own (the last turn visits only the longer lanes).
    Windows of a lane are cut at multiples of `window` less a phase of the lane's own, so that the lanes do not all ask
    for new blocks at once.
    """
    num_lanes = min(NUM_LANES, num_samples)
    size, num_longer = num_samples // num_lanes, num_samples % num_lanes
    out, lanes = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
    for n in range(len(positions)):
        offset = positions[n] // num_lanes
        lanes_left = num_lanes if offset < size else num_longer
        lane = permute_point(fold(fold(key, LANE_PURPOSE), offset), positions[n] % num_lanes, lanes_left)
        lane_start = lane * size + min(lane, num_longer)
        lane_size = size + (1 if lane < num_longer else 0)
        phase = lane * window // num_lanes
        number = (offset + phase) // window
        low = max(number * window - phase, 0)
        high = min((number + 1) * window - phase, lane_size)
        window_key = fold(fold(fold(key, WINDOW_PURPOSE), lane), number)
        out[n] = lane_start + low + permute_point(window_key, offset - low, high - low)
        lanes[n] = lane
    return out, lanes
