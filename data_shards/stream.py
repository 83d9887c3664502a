"""The stream of a rank's micro-batches, step by step, made ahead of the training loop by worker threads.

`Stream.step(t)` is pure; `Stream.iterate` gives the same batches in the same order whatever the number of workers. The
workers are threads, because the compiled loops that do the work release the GIL and threads share one cache of blocks.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

from quincunx.data_shards.order import Order

STEPS_AHEAD_PER_WORKER = 2


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
        rows = self.order.rank_batch(step, self.global_batch, self.rank, self.world_size)
        return [
            self.packer.pack(rows.at(slice(start, start + self.micro_batch)))
            for start in range(0, len(rows.sample_ids), self.micro_batch)
        ]

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
