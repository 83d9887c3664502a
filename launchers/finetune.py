"""Fine-tunes a retriever or a reranker on queries with mined negatives; the same command resumes.

    deepspeed launchers/finetune.py --recipe retriever1 --encoder runs/quincunx/export/encoder \\
        --candidates bm25_negatives.jsonl --corpus corpus.jsonl --queries queries.jsonl --output runs/retriever1

Recipes, each with a stage's published settings (recipes/finetune/), any of which a flag changes: retriever1 (BM25's
negatives; the default), retriever2 (retriever1's), reranker, distil (the reranker's scores), or a YAML file.
docs/finetuning.md describes the whole chain. torchrun, srun and plain python work as with pretrain.py.

Exit codes: 0 done, 2 settings, 3 data, 4 checkpoint, 75 stopped on request after a checkpoint, 76 hung, 77 diverged.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from quincunx.data_shards.errors import SettingsError, exit_with_one_sentence
from quincunx.engine.ranks import discover_environment, one_voice
from quincunx.engine.retrieval.finetuning import FinetuneSettings, finetune
from quincunx.engine.settings import find_config_problems
from quincunx.launchers.command_line import parse_settings

RECIPES = Path(__file__).parent.parent / "recipes" / "finetune"
DEFAULT_RECIPE = "retriever1"


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs this rank; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    environment = discover_environment()
    with one_voice(environment):
        if any(word.split("=")[0] == "--stage" for word in arguments):
            raise SettingsError("a recipe chooses the stage: give --recipe retriever1, retriever2, reranker or distil")
        settings = parse_settings(
            FinetuneSettings,
            __doc__,
            arguments,
            config_flag="--recipe",
            config_folder=RECIPES,
            default_config=DEFAULT_RECIPE,
            find_more=partial(find_config_problems, world_size=environment.world_size),
        )
        return finetune(settings, environment)


if __name__ == "__main__":
    exit_with_one_sentence(main)
