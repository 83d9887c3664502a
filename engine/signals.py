"""How a run is asked to stop, and how it notices that it hangs.

A request is SIGTERM, SIGUSR1, Ctrl-C or the death of the launcher. It only sets a flag here; the training loop folds
the flag into its per-step all-reduce, so that all ranks save at the same step and leave with exit code 75.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from quincunx.data_shards.errors import EXIT_HUNG

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEATS_TO_DIE = 2
"""The second Ctrl-C stops at once; schedulers and launchers may repeat their signals, so those never do."""
ON_HANG_SECONDS = 15.0
"""What a hung process takes for its last words at most: the disk they go to may be what hangs."""


class StopRequest:
    """Whether this process has been asked to stop, and by what. Install once, in the main thread, before training."""

    def __init__(self, launched: bool):
        """launched: the process was started by deepspeed, torchrun, srun or mpirun, whose death is a request too."""
        self.reason: str | None = None
        self._interrupts = 0
        self._parent = os.getppid() if launched else None
        self._command = launched_by_deepspeed(self._parent) if launched else None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= REPEATS_TO_DIE:
                raise KeyboardInterrupt

    def pending(self) -> bool:
        """True from the first request on; costs two system calls a step."""
        if self.reason is None and self._parent is not None:
            orphaned = os.getppid() != self._parent
            if orphaned or (self._command is not None and parent_of(self._parent) != self._command):
                self.reason = "the death of the launcher"
        return self.reason is not None


def launched_by_deepspeed(parent: int) -> int | None:
    """Process id of the `deepspeed` command where `parent` is the launcher process it started, else None.

    The `deepspeed` command starts `deepspeed.launcher.launch`, which starts the ranks. Killing the command leaves the
    other two running without a word, so a rank watches the command beside its own parent.
    """
    if "deepspeed.launcher.launch" not in command_line(parent):
        return None
    above = parent_of(parent)
    return above if above is not None and "deepspeed" in command_line(above) else None


def command_line(pid: int) -> str:
    """A process's command line, empty where it cannot be read (it is gone, or this is no Linux)."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def parent_of(pid: int) -> int | None:
    """A process's parent id, None where it cannot be read."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


class Watchdog:
    """Ends the process with exit code 76 when `beat` has not been called for `seconds`.

    A thread, because a hung collective never returns to the main one. Before it ends the process it prints every
    thread's stack on stderr, which shows the call that hangs, and calls `on_hang`, for ON_HANG_SECONDS at most.
    """

    def __init__(self, seconds: float, on_hang: Callable[[], None] = lambda: None):
        self._seconds, self._on_hang = seconds, on_hang
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Says that the run has got somewhere: a step, a checkpoint, a probe is done."""
        self._last = time.monotonic()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self._seconds / 10)):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                print(
                    f"hung: no step has finished for {silent / 60:.1f} minutes (hang_minutes); the stacks of all"
                    " threads follow; the same command resumes from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                closing = threading.Thread(target=self._on_hang, daemon=True)
                closing.start()
                closing.join(ON_HANG_SECONDS)
                os._exit(EXIT_HUNG)
