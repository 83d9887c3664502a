"""Fine-tunes a pre-trained encoder on one of GLUE's tasks, from local files; the same command goes on.

    python launchers/glue.py --task mrpc --data glue_data/MRPC --encoder runs/quincunx/export/encoder \\
        --output runs/mrpc
    torchrun --nproc-per-node 8 launchers/glue.py ...

Tasks: cola, mrpc, stsb, qqp. The defaults are BERT's published settings; dev is measured with GLUE's own measures, and
predictions are written if there is a test file. docs/glue.md shows the files.
"""

from collections.abc import Sequence

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.engine.ranks import discover_environment, one_voice
from quincunx.engine.retrieval.glue import GlueSettings, run_glue
from quincunx.launchers.command_line import parse_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs this rank; returns its exit code."""
    environment = discover_environment()
    with one_voice(environment):
        return run_glue(parse_settings(GlueSettings, __doc__, argv), environment)


if __name__ == "__main__":
    exit_with_one_sentence(main)
