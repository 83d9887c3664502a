"""Re-checks a finished shard set, every byte of it.

    python launchers/verify_shards.py shards/docs

Exit code 0: sound; 3: damaged, each damaged file and block is named.
"""

import sys
from dataclasses import dataclass

from quincunx.data_shards.errors import DataError, exit_with_one_sentence
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
    settings = parse_settings(VerifySettings, "Re-checks a finished shard set (docs/shards.md).", argv)
    from quincunx.data_shards.verify import verify_shards

    report = verify_shards(settings.shards)
    print(table(report))
    if report.damaged:
        names = ", ".join(report.damaged)
        rebuild = (
            f", or delete the damaged shards and run `{report.command}` again, which makes only these (with --remake, "
            "the whole set)"
        )
        raise DataError(f"{settings.shards} is damaged in {names}: copy them again{rebuild if report.command else ''}")
    return 0


def table(report) -> str:
    """One line for each file, and what is wrong with it below."""
    width = max(map(len, report.problems))
    lines = [f"{'file':<{width}}  {'bytes':>14}  {'blocks':>7}  {'samples':>11}  state"]
    for name, problems in report.problems.items():
        entry = report.manifest.files.get(name)
        counts = [] if entry is None else [entry.bytes]
        counts += [len(entry.blocks), entry.samples] if hasattr(entry, "blocks") else []
        numbers = [*(f"{count:,}" for count in counts), "", "", ""]
        cells = "  ".join(f"{number:>{size}}" for number, size in zip(numbers, (14, 7, 11)))
        lines.append(f"{name:<{width}}  {cells}  {'DAMAGED' if problems else 'ok'}")
        lines += [f"  {name} {problem}" for problem in problems]
    manifest = report.manifest
    lines.append(
        f"{len(report.problems)} files, {len(report.damaged)} damaged; {manifest.num_samples('train'):,} training and "
        f"{manifest.num_samples('heldout'):,} held-out samples; dataset id {manifest.dataset_id}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with_one_sentence(main)
