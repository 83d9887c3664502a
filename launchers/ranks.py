"""What launchers of many ranks share: the launcher's own flag, and one voice for an error that all ranks find."""

import contextlib
import time
from collections.abc import Iterator, Sequence

from quincunx.data_shards.errors import CheckpointError, DataError, SettingsError
from quincunx.engine.environment import Environment

RANK_0_SPEAKS_FIRST_SECONDS = 5.0


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments less `--local_rank=N`, which the deepspeed launcher adds; the environment says it too."""
    return [word for word in arguments if word.split("=")[0] not in ("--local_rank", "--local-rank")]


@contextlib.contextmanager
def one_voice(environment: Environment) -> Iterator[None]:
    """Has rank 0 say a user's error at once, and others later and by name, should rank 0 not have it.

    All ranks find the same error in the same files, and the launcher ends them as soon as the first one leaves.
    """
    try:
        yield
    except (SettingsError, DataError, CheckpointError) as error:
        if environment.is_main:
            raise
        time.sleep(RANK_0_SPEAKS_FIRST_SECONDS)
        raise type(error)(f"rank {environment.rank}: {error}") from None
