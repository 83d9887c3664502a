"""Fine-tunes a pre-trained encoder on one of GLUE's tasks, from local files; the same command resumes.

    python launchers/glue.py --task mrpc --data glue_data/MRPC --encoder runs/quincunx/export/encoder \\
        --output runs/mrpc

Tasks: cola, mrpc, stsb, qqp. The defaults are BERT's published settings; dev is measured with GLUE's own measures, and
predictions are written where there is a test file. docs/glue.md shows the files. deepspeed, torchrun and srun work as
with pretrain.py.

Exit codes: 0 done, 2 settings, 3 data, 4 checkpoint, 75 stopped on request after a checkpoint, 76 hung, 77 diverged.
"""

import sys
from collections.abc import Sequence
from functools import partial

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.engine.deepspeed_config import find_config_problems
from quincunx.engine.environment import discover_environment
from quincunx.engine.retrieval.glue_settings import GlueSettings
from quincunx.launchers.command_line import parse_settings
from quincunx.launchers.ranks import one_voice, without_local_rank


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs this rank; returns its exit code."""
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    environment = discover_environment()
    with one_voice(environment):
        settings = parse_settings(
            GlueSettings,
            __doc__,
            arguments,
            config_flag="--recipe",
            find_more=partial(find_config_problems, world_size=environment.world_size),
        )
        from quincunx.engine.retrieval.glue import run_glue

        return run_glue(settings, environment)


if __name__ == "__main__":
    exit_with_one_sentence(main)
