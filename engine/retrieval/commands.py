"""Commands that a study runs, stopped together with everything they have started."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

from quincunx.data_shards.errors import EXIT_PREEMPTED

SAVING_PATIENCE_SECONDS = 600.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may wait for a lock


class Stopping:
    """Runs commands, one in each thread, and hands a request to stop (SIGTERM, SIGUSR1, Ctrl-C) to all that run.

    A command is a process group of its own, so that the request reaches every rank whatever the launcher does with it;
    it gets SIGTERM too when this process dies.
    """

    def __init__(self):
        self.requested = False
        self._processes: set[subprocess.Popen] = set()

    def __enter__(self) -> "Stopping":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Asks all that run to stop, and lets nothing start any more."""
        self.requested = True
        for process in tuple(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def run(self, command: Sequence[str], lock: IO[str], **options: Any) -> int:
        """The command's exit code; 75 where it was asked to stop. It holds `lock` as long as it lives.

        options: further ones of subprocess.Popen.
        """
        if self.requested:
            return EXIT_PREEMPTED
        process = subprocess.Popen(
            command, start_new_session=True, pass_fds=(lock.fileno(),), preexec_fn=_follow_parent, **options
        )
        self._processes.add(process)
        if self.requested:  # it came between the question above and the start
            self.stop()
        code = process.wait()
        if self.requested:
            wait_for_group(process.pid)
        self._processes.discard(process)
        if code and self.requested:
            return EXIT_PREEMPTED
        return code if code >= 0 else 128 - code


def _follow_parent() -> None:
    """SIGTERM to this process when its parent dies (Linux; elsewhere the command outlives a killed study)."""
    if sys.platform == "linux":
        LIBC.prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def wait_for_group(group: int) -> None:
    """Waits until no process of the group is left: ranks whose launcher is gone may still be saving."""
    deadline = time.monotonic() + SAVING_PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
