"""Writes queries or continuations for every passage of a corpus with a Hugging Face model.

    python launchers/generate.py --task queries --model doc2query/msmarco-t5-base-v1 \\
        --format msmarco --path collection.tsv --tokenizer bert-base-uncased --output generated/queries
    torchrun --nproc_per_node 8 launchers/generate.py ...     # each process takes its share of the parts
    srun --ntasks 64 python launchers/generate.py ...

The same command again continues where it was stopped. `build_shards.py --generations generated/queries` joins the
texts by passage id. See docs/generations.md.
"""

import sys

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.engine.generate import GenerateSettings, generate_corpus
from quincunx.engine.ranks import discover_environment
from quincunx.launchers.command_line import parse_settings


def main() -> int:
    settings = parse_settings(GenerateSettings, "Writes queries or continuations for every passage of a corpus.")
    environment = discover_environment()
    counts = generate_corpus(settings, environment)
    done = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
    print(f"rank {environment.rank}: {done}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    exit_with_one_sentence(main)
