"""Fine-tunes a retriever or a reranker on queries with mined negatives; the same command resumes.

    deepspeed launchers/finetune.py --stage retriever1 --encoder runs/quincunx/export/encoder \\
        --candidates bm25_negatives.jsonl --corpus corpus.jsonl --queries queries.jsonl --output runs/retriever1

Stages, each with its published settings (recipes/finetune/), any of which a flag or --recipe FILE.yaml changes:
retriever1 (BM25's negatives), retriever2 (retriever1's), reranker, distil (the reranker's scores). docs/finetuning.md
tells the whole chain. torchrun, srun and plain python work as with pretrain.py.

Exit codes: 0 done, 2 settings, 3 data, 4 checkpoint, 75 stopped on request after a checkpoint, 76 hung, 77 diverged.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.engine.deepspeed_config import check_settings
from quincunx.engine.environment import discover_environment
from quincunx.engine.retrieval.finetune_settings import STAGES, FinetuneSettings, find_problems
from quincunx.launchers.command_line import parse_settings
from quincunx.launchers.ranks import one_voice, without_local_rank

RECIPES = Path(__file__).parent.parent / "recipes" / "finetune"


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs this rank; returns its exit code."""
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    environment = discover_environment()
    with one_voice(environment):
        settings = parse_settings(
            FinetuneSettings,
            __doc__,
            arguments,
            config_flag="--recipe",
            config_folder=RECIPES,
            base_config=stage_named_in(arguments),
        )
        check_settings(settings, find_problems(settings), environment.world_size)  # at once: imports take seconds
        from quincunx.engine.retrieval.finetuning import finetune

        return finetune(settings, environment)


def stage_named_in(arguments: Sequence[str]) -> str:
    """The stage whose recipe is read first: that of `--stage`, else that of the `--recipe` file, else retriever1."""
    words = " ".join(arguments).replace("=", " ").split()
    named = [value for flag, value in itertools.pairwise(words) if flag == "--stage"]
    named += [stage_in(Path(value)) for flag, value in itertools.pairwise(words) if flag == "--recipe"]
    return next((stage for stage in named if stage in STAGES), STAGES[0])


def stage_in(recipe: Path) -> str | None:
    """The stage of `--recipe NAME`, or of a YAML file; None where it names none (errors are said later)."""
    import yaml

    if not recipe.is_file():
        return recipe.name
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return content.get("stage") if isinstance(content, dict) else None


if __name__ == "__main__":
    exit_with_one_sentence(main)
