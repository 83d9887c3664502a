"""Compares every byte of a finished shard set with its manifest.

    python launchers/verify_shards.py shards/docs

Exit code 0: sound; 3: damaged, each damaged file and block is named.
"""

import sys
from dataclasses import dataclass

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Settings of launchers/verify_shards.py."""

    shards: str
    """Folder or URL of the shard set; may be given without the flag, as the first argument."""


def main() -> int:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--shards", *argv]
    settings = parse_settings(
        VerifySettings, "Compares every byte of a finished shard set with its manifest (docs/shards.md).", argv
    )
    from quincunx.data_shards.verify import verify_shards

    verify_shards(settings.shards)
    return 0


if __name__ == "__main__":
    exit_with_one_sentence(main)
