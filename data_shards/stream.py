"""The stream of a rank's micro-batches, step by step, made ahead of the training loop by worker threads.

`Stream.step(t)` is pure; `Stream.iterate` gives the same batches in the same order whatever the number of workers. The
workers are threads, because the compiled loops that do the work release the GIL and threads share one cache of blocks.
They are daemons, so that a read that hangs cannot keep a finished process alive; it waits LAST_STEP_SECONDS for them,
because Python ends a daemon that comes back from compiled code by unwinding it, which may abort the process instead.
"""

import atexit
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.order import Order, Rows

STEPS_AHEAD_PER_WORKER = 2
LAST_STEP_SECONDS = 10.0

_workers: dict[threading.Thread, SimpleQueue] = {}
_process_ends = threading.Event()


class Packs(Protocol):
    """What makes micro-batches, purely and from any thread: data_shards/packer.py, engine/retrieval/examples.py."""

    def pack(self, datasets: np.ndarray, epochs: np.ndarray, sample_ids: np.ndarray) -> Any:
        """The micro-batch of some rows of the order (order.Rows, each [B]); it counts its num_cut_texts."""


class Stream:
    """One rank's share of the global batches of `order`, packed by `packer`.

    global_batch: samples (passages, or queries with their candidates) of an optimizer step over all ranks. micro_batch:
    samples of one forward on this rank. num_workers: threads that work ahead, 0 = none; at most 2 steps a worker (at
    least 2) are held ready.

    wait_seconds: time that the consumer of `iterate` has waited for batches, in all.

    Raises:
        SettingsError: global_batch is no multiple of world_size * micro_batch, or a number is out of range.
    """

    def __init__(
        self,
        packer: Packs,
        order: Order,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 1,
    ):
        if global_batch < 1 or micro_batch < 1 or global_batch % (world_size * micro_batch):
            raise SettingsError(
                f"a global batch of {global_batch} cannot be cut into micro-batches of {micro_batch} on {world_size} "
                f"ranks: give a global batch that is a multiple of {world_size * max(micro_batch, 1)}"
            )
        if num_workers < 0:
            raise SettingsError(f"num_workers is {num_workers}; allowed are integers from 0")
        assert 0 <= rank < world_size
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
            self.packer.pack(*Rows(*(column[start : start + self.micro_batch] for column in rows)))
            for start in range(0, len(rows.sample_ids), self.micro_batch)
        ]

    def iterate(self, start_step: int = 0) -> Iterator[list[Any]]:
        """The micro-batches of start_step, start_step + 1, ... without end.

        A worker's exception is raised here, at the step it belongs to. Closing the generator, or dropping it, ends the
        workers after the step they are at.
        """
        if not self.num_workers:
            for step in count(start_step):
                started = time.perf_counter()
                batches = self.step(step)
                self.wait_seconds += time.perf_counter() - started
                yield batches
        tasks: SimpleQueue = SimpleQueue()
        ahead: deque[Future] = deque()
        steps = count(start_step)

        def ask_for_next_step() -> None:
            ahead.append(Future())
            tasks.put((next(steps), ahead[-1]))

        try:
            for number in range(self.num_workers):
                worker = threading.Thread(target=_work, args=(tasks, self.step), name=f"stream-{number}", daemon=True)
                _workers[worker] = tasks
                worker.start()
            for _ in range(STEPS_AHEAD_PER_WORKER * self.num_workers):
                ask_for_next_step()
            while True:
                started = time.perf_counter()
                batches = ahead.popleft().result()
                ask_for_next_step()
                self.wait_seconds += time.perf_counter() - started
                yield batches
        finally:
            for future in ahead:
                future.cancel()
            for _ in range(self.num_workers):
                tasks.put(None)


def _work(tasks: SimpleQueue, make_step) -> None:
    """A worker's life: takes (step, future) until it is given None, and hands every exception on."""
    while (task := tasks.get()) is not None and not _process_ends.is_set():
        step, future = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(make_step(step))
        except BaseException as error:
            future.set_exception(error)
    del _workers[threading.current_thread()]


@atexit.register
def _end_workers() -> None:
    """Lets every worker finish the step it is at."""
    _process_ends.set()
    ends = time.monotonic() + LAST_STEP_SECONDS
    for worker, tasks in list(_workers.items()):
        tasks.put(None)
        worker.join(max(0.0, ends - time.monotonic()))
