"""What launchers of many ranks share: the launcher's own flag, and one voice for an error that all ranks find."""

import time
from collections.abc import Sequence

from quincunx.engine.environment import Environment

RANK_0_SPEAKS_FIRST_SECONDS = 5.0


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments less `--local_rank=N`, which the deepspeed launcher adds; the environment says it too."""
    return [word for word in arguments if word.split("=")[0] not in ("--local_rank", "--local-rank")]


def say_once(error: Exception, environment: Environment) -> Exception:
    """The error as this rank should say it: rank 0 at once; others later and by name, should rank 0 not have it.

    All ranks find the same error in the same files, and the launcher ends them as soon as the first one leaves.
    """
    if environment.is_main:
        return error
    time.sleep(RANK_0_SPEAKS_FIRST_SECONDS)
    return type(error)(f"rank {environment.rank}: {error}")
