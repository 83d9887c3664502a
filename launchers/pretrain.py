"""Pre-trains an encoder with up to five shallow decoders on shards; the same command resumes.

    deepspeed launchers/pretrain.py --deepspeed ds_configs/zero2.json --recipe quincunx --shards SHARDS --output RUN
    torchrun --nproc-per-node 8 launchers/pretrain.py --recipe master ...
    srun python launchers/pretrain.py --recipe retromae ...
    python launchers/pretrain.py                     (one process; without --recipe the demo recipe)

Exit codes: 0 done, 2 settings, 3 data, 4 checkpoint, 75 stopped on request after a checkpoint, 76 hung, 77 diverged.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.engine.ranks import discover_environment, one_voice
from quincunx.engine.settings import PretrainSettings, find_config_problems
from quincunx.launchers.command_line import parse_settings

RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT_RECIPE = "demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs this rank; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    environment = discover_environment()
    with one_voice(environment):
        if environment.is_main and not any(word.split("=")[0] == "--recipe" for word in arguments):
            print(
                f"no --recipe given: running the {DEFAULT_RECIPE} recipe ({RECIPES / DEFAULT_RECIPE}.yaml)", flush=True
            )
        settings = parse_settings(
            PretrainSettings,
            __doc__,
            arguments,
            config_flag="--recipe",
            config_folder=RECIPES,
            default_config=DEFAULT_RECIPE,
            find_more=partial(find_config_problems, world_size=environment.world_size),
        )
        from quincunx.engine.pretraining import pretrain

        return pretrain(settings, environment)


if __name__ == "__main__":
    exit_with_one_sentence(main)
