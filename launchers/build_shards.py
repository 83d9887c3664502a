"""Builds a shard set from a corpus.

    python launchers/build_shards.py --format documents --path docs.jsonl --output shards/docs \\
        --tokenizer bert-base-uncased

The same command continues a build that was stopped, and says so if the set is complete. docs/shards.md describes
what is written, docs/corpora.md the formats that are read.
"""

import shlex
import sys
import time

from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.errors import EXIT_PREEMPTED, exit_with_one_sentence
from quincunx.data_shards.shards import Manifest
from quincunx.launchers.command_line import parse_settings


def main() -> int:
    settings = parse_settings(BuildSettings, "Builds a shard set from a corpus (docs/shards.md, docs/corpora.md).")
    from quincunx.data_shards.build import build_shards

    started = time.monotonic()
    manifest = build_shards(settings, command=[sys.executable, *sys.argv])
    if manifest is None:
        return EXIT_PREEMPTED
    print(summary(manifest, settings.output, time.monotonic() - started))
    return 0


def summary(manifest: Manifest, output: str, seconds: float) -> str:
    """The table printed at the end of a build."""
    counts = manifest.counts
    train, heldout = manifest.fields["train"], manifest.fields["heldout"]

    def tokens(name: str) -> int:
        return sum(counts.get(f"{split}_{name}_tokens", 0) for split in ("train", "heldout"))

    rows = [
        ("documents", f"{counts['train_documents'] + counts.get('heldout_documents', 0):,}"),
        ("passages", f"{train['passage'] + heldout['passage']:,}"),
        ("  for training", f"{train['passage']:,}"),
        ("  held out", f"{heldout['passage']:,} of {counts.get('heldout_documents', 0):,} documents"),
        (
            "tokens of passages",
            f"{tokens('passage'):,} (mean {tokens('passage') / max(1, train['passage'] + heldout['passage']):.1f})",
        ),
        ("with next passage", f"{train['next'] + heldout['next']:,}"),
        *(
            (f"with {name}", f"{train[name] + heldout.get(name, 0):,} ({tokens(name):,} tokens)")
            for name in train
            if name not in ("passage", "next")
        ),
        ("generations joined", f"{counts.get('joined_generations', 0):,}"),
        ("generations unknown", f"{counts.get('unknown_generations', 0):,} (their passage id is not in the corpus)"),
        ("lost neighbour pairs", f"{counts['lost_neighbours']:,} (documents longer than a block)"),
        ("bad records skipped", f"{counts.get('bad_records', 0):,}"),
        ("empty passages skipped", f"{counts.get('empty_passages', 0):,}"),
        (
            "passages cut",
            f"{counts.get('cut_passages', 0):,} (of a collection, longer than {manifest.max_tokens} tokens)",
        ),
        ("shards", f"{len(manifest.shards):,} of {sum(shard.bytes for shard in manifest.shards) / 1e6:,.1f} MB in all"),
        ("vocabulary", f"{manifest.vocab_size:,}"),
        ("dataset id", manifest.dataset_id),
        ("seconds", f"{seconds:.1f}"),
        ("written to", shlex.quote(output)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    exit_with_one_sentence(main)
