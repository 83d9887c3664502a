"""Builds a shard set from a corpus.

    python launchers/build_shards.py --format documents --path docs.jsonl --output shards/docs \\
        --tokenizer bert-base-uncased

The same command continues a build that was stopped, and says so if the set is complete. docs/shards.md describes
what is written, docs/corpora.md the formats that are read.
"""

import shlex
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.errors import EXIT_PREEMPTED, exit_with_one_sentence
from quincunx.launchers.command_line import parse_settings

if TYPE_CHECKING:
    from quincunx.data_shards.shards import Manifest


def main() -> int:
    settings = parse_settings(BuildSettings, "Builds a shard set from a corpus (docs/shards.md, docs/corpora.md).")
    from quincunx.data_shards.build import build_shards

    started = time.monotonic()
    manifest = build_shards(settings, command=[sys.executable, *sys.argv])
    if manifest is None:
        return EXIT_PREEMPTED
    print(summary(manifest, settings.output, time.monotonic() - started))
    return 0


def summary(manifest: "Manifest", output: str, seconds: float) -> str:
    """The table printed at the end of a build."""
    counts, train = Counter(manifest.counts), manifest.fields["train"]
    samples = {name: sum(of_split.get(name, 0) for of_split in manifest.fields.values()) for name in train}
    tokens = {name: counts[f"train_{name}_tokens"] + counts[f"heldout_{name}_tokens"] for name in train}
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    rows = {
        "documents": f"{counts['train_documents'] + counts['heldout_documents']:,}",
        "passages": f"{samples['passage']:,}",
        "  for training": f"{train['passage']:,}",
        "  held out": f"{samples['passage'] - train['passage']:,} of {counts['heldout_documents']:,} documents",
        "tokens of passages": f"{tokens['passage']:,} (mean {tokens['passage'] / samples['passage']:.1f})",
        "with next passage": f"{samples['next']:,}",
        **{
            f"with {name}": f"{samples[name]:,} ({tokens[name]:,} tokens)"
            for name in train
            if name not in ("passage", "next")
        },
        "generations joined": f"{counts['joined_generations']:,}",
        "generations unknown": f"{counts['unknown_generations']:,} (their passage id is not in the corpus)",
        "lost neighbour pairs": f"{counts['lost_neighbours']:,} (documents longer than a block)",
        "bad records skipped": f"{counts['bad_records']:,}",
        "empty passages skipped": f"{counts['empty_passages']:,}",
        "passages cut": f"{counts['cut_passages']:,} (of a collection, longer than {manifest.max_tokens} tokens)",
        "shards": f"{len(manifest.shards):,} of {num_bytes / 1e6:,.1f} MB in all",
        "vocabulary": f"{manifest.vocab_size:,}",
        "dataset id": manifest.dataset_id,
        "seconds": f"{seconds:.1f}",
        "written to": shlex.quote(output),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


if __name__ == "__main__":
    exit_with_one_sentence(main)
