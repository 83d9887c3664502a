"""The errors a user can cause, each with the exit code that a launcher answers with.

A message is one sentence: what was given, what is allowed, how to mend it. The exit codes of every launcher:
0 done, 2 settings, 3 data, 4 checkpoint, 75 preempted (saved, run the same command again), 76 hung, 77 diverged.
"""

import os
import sys
from collections.abc import Callable

EXIT_PREEMPTED = 75
EXIT_HUNG = 76
EXIT_DIVERGED = 77


class SettingsError(ValueError):
    """A setting that is unknown, out of range, or in conflict with another."""

    exit_code = 2


class DataError(ValueError):
    """A corpus, shard, tokenizer or generation file that cannot be used as it is."""

    exit_code = 3


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or does not fit this run."""

    exit_code = 4


def exit_with_one_sentence(main: Callable[[], int | None]) -> None:
    """Runs `main`, prints a user's error as one sentence on stderr, and exits with its code.

    Anything else is a defect of ours and keeps its traceback. QUINCUNX_TRACEBACK=1 keeps every traceback.
    """
    try:
        code = main()
    except (SettingsError, DataError, CheckpointError) as error:
        if os.environ.get("QUINCUNX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    sys.exit(code or 0)
