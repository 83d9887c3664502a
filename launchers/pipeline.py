"""The whole chain of fine-tuning from one recipe, each stage a command that is shown and can be repeated by hand.

    python launchers/pipeline.py --recipe small --set data.folder=FOLDER --output chain_run
    python launchers/pipeline.py --recipe msmarco_master --set execution.launch="deepspeed --num_gpus 8"
    python launchers/pipeline.py --recipe small ... --dry_run            # what would run, and why
    python launchers/pipeline.py --recipe small ... --only "evaluate.*" report
    python launchers/pipeline.py --recipe small ... --from distil

A stage whose verified output is there is skipped, so the same command goes on after a kill, and after a changed setting
runs what depends on it. Exit codes: 0 done, 75 stopped on request (SIGTERM; the running stage has saved), else that of
the command that failed. docs/pipeline.md describes recipes and stages.
"""

import dataclasses
import fnmatch
import json
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quincunx.data_shards.errors import SettingsError, exit_with_one_sentence
from quincunx.launchers.command_line import parse_settings, suggestion

if TYPE_CHECKING:
    from quincunx.engine.retrieval.pipeline import Stage
    from quincunx.launchers.pipeline_recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """Settings of a pipeline."""

    recipe: str = "small"
    """Recipe: a YAML file, or one of beir, msmarco_master, msmarco_retromae, nq, small."""
    output: str = "chain_run"
    """Folder of everything that is made: a folder a stage, stages/ with the stamps, report/."""
    set: tuple[str, ...] = ()
    """Settings over the recipe's: section.key=value, like retriever1.steps=200."""
    only: tuple[str, ...] = ()
    """These stages alone, by name or pattern (evaluate.*)."""
    from_stage: str | None = None
    """This stage and those after it (also --from); what comes before is taken as it is."""
    dry_run: bool = False
    """Show every command and whether it would run, and run nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    settings = parse_settings(PipelineSettings, __doc__, plain_words(words), config_flag="--config")
    from quincunx.engine.retrieval.pipeline import RECIPE_FILE, Pipeline, write_json
    from quincunx.launchers.pipeline_recipe import read_recipe

    recipe = read_recipe(settings.recipe, settings.set)
    folder = Path(settings.output)
    chain = build_chain(recipe, folder)
    stages = chosen(chain, settings.only, settings.from_stage)
    pipeline = Pipeline(folder, chain)
    if settings.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
        pipeline.preview(stages)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECIPE_FILE, describe(recipe, chain))
    print(f"recipe {recipe.name}: {len(stages)} stages into {folder}", flush=True)
    code = pipeline.run(stages)
    if code == 0 and (folder / "report" / "report.md").exists():
        print(f"\n{folder / 'report' / 'report.html'}\n")
    return code


def build_chain(recipe: "Recipe", folder: Path) -> list["Stage"]:
    """All stages of a recipe, in the order in which they run. Raises SettingsError for settings that do not fit."""
    from quincunx.launchers.pipeline_stages import Chain

    chain = Chain(recipe, folder)
    for name in recipe.splits:
        chain.split(name)
    encoder = chain.pretrain() if recipe.has("pretrain") else recipe.models.encoder
    models = {"start": encoder}
    if recipe.has("retriever1"):
        negatives = recipe.data.negatives or chain.mine("bm25", chain.search("bm25", None, "train"))
        models["retriever1"] = chain.finetune("retriever1", encoder, negatives)
    if recipe.has("retriever2"):
        negatives = chain.mine("retriever1", chain.search("retriever1", models["retriever1"], "train"))
        models["retriever2"] = chain.finetune("retriever2", encoder, negatives)
    if recipe.has("reranker"):
        negatives = chain.mine("retriever2", chain.search("retriever2", models["retriever2"], "train"))
        models["reranker"] = chain.finetune("reranker", recipe.models.reranker or encoder, negatives)
    if recipe.has("distil"):
        scored = chain.score(models["reranker"], negatives)
        models["distil"] = chain.finetune("distil", encoder, scored)
    for system in recipe.execution.systems:
        if system not in ("bm25", *models):
            continue
        for split in recipe.evaluated:
            if system == "reranker":
                run = chain.rerank(models["reranker"], chain.search("retriever2", models["retriever2"], split), split)
            else:
                run = chain.search(system, models.get(system), split)
            chain.evaluate(system, run, split)
    chain.report()
    return chain.stages


def chosen(stages: list["Stage"], only: Sequence[str], first: str | None) -> list["Stage"]:
    """The stages that `--only` and `--from` name. Raises SettingsError for a name that there is not."""
    names = [stage.name for stage in stages]
    if first is not None:
        if first not in names:
            raise SettingsError(f"--from {first}: there is no such stage{in_chain(first, names)}")
        stages = stages[names.index(first) :]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise SettingsError(f"--only {pattern}: there is no such stage{in_chain(pattern, names)}")
    return [stage for stage in stages if not only or any(fnmatch.fnmatch(stage.name, pattern) for pattern in only)]


def in_chain(name: str, names: Sequence[str]) -> str:
    return suggestion(name, set(names)).replace("--help lists the settings", f"the stages are {', '.join(names)}")


def describe(recipe: "Recipe", stages: Sequence["Stage"]) -> dict[str, Any]:
    """What the report needs to know of the chain."""
    return {
        "recipe": recipe.name,
        "data": dataclasses.asdict(recipe.data),
        "models": dataclasses.asdict(recipe.models),
        "splits": {name: dataclasses.asdict(split) for name, split in recipe.splits.items()},
        "evaluated": recipe.evaluated,
        "systems": [
            system
            for system in recipe.execution.systems
            if any(stage.name.startswith(f"evaluate.{system}.") for stage in stages)
        ],
        "sections": recipe.sections,
        "stages": [stage.name for stage in stages],
    }


def plain_words(words: Sequence[str]) -> list[str]:
    """`--from` as the setting from_stage; what follows `--set` as one JSON list, commas and all."""
    found: list[str] = []
    assignments: list[str] = []
    into_set = False
    for word in words:
        if word == "--set" or word.startswith("--set="):
            into_set = word == "--set"
            assignments += [] if into_set else [word.removeprefix("--set=")]
        elif into_set and not word.startswith("--"):
            assignments.append(word)
        else:
            into_set = False
            found.append(re.sub(r"^--from(?==|$)", "--from_stage", word))
    return [*found, f"--set={json.dumps(assignments)}"] if assignments else found


if __name__ == "__main__":
    exit_with_one_sentence(main)
