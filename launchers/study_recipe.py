"""The recipe of a study, read and checked: what every cell's commands will be given.

A recipe (recipes/study/*.yaml) has these keys; `variants` alone is required:

shards, pretrain, finetune   settings of build_shards.py, pretrain.py and finetune.py for every variant
generate                     {queries: settings of generate.py, continuation: ...}: texts for dor and gor
variants                     NAME: {pretrain, finetune, train_share, at_step}, what differs from the above
seeds, split, measures       of the cells; what judges them (qrels/SPLIT.tsv); the first measure is the tested one
against                      variants that the others are tested against
base                         a recipe whose keys hold where this one has none (pretrain, finetune: setting by setting)
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.durable import file_digest
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.tasks import TASKS
from quincunx.engine.generate import GenerateSettings
from quincunx.engine.retrieval.evaluation import find_measure
from quincunx.engine.retrieval.finetuning import FinetuneSettings
from quincunx.engine.settings import PretrainSettings
from quincunx.launchers import finetune, pretrain
from quincunx.launchers.command_line import as_flags, parse_settings, suggestion

STUDIES = Path(__file__).parent.parent / "recipes" / "study"
OWN_SETTINGS = {
    "shards": {"path", "output", "format", "generations", "progress", "remake"},
    "pretrain": {"seed", "output", "shards", "probe", "fresh", "export"},
    "finetune": {
        "seed", "output", "encoder", "candidates", "corpus", "queries", "probe", "probe_every", "fresh", "export",
    },
}  # fmt: skip
"""Settings that the study gives itself."""
TRAININGS = {
    "pretrain": (PretrainSettings, pretrain.RECIPES, "retromae"),
    "finetune": (FinetuneSettings, finetune.RECIPES, finetune.DEFAULT_RECIPE),
}
"""What trains -> its settings, its recipes, and the recipe whose settings the others change unless they name one."""
SHAPES = {
    "variants": dict, "shards": dict, "generate": dict, "pretrain": dict, "finetune": dict, "seeds": [int],
    "split": str, "measures": [str], "against": [str], "base": str,
}  # fmt: skip
VARIANT_SHAPES = {"pretrain": dict, "finetune": dict, "train_share": (int, float), "at_step": int}
IN_WORDS = {dict: "`key: value` lines", str: "a name", int: "a whole number", (int, float): "a number"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the study's table, with all settings of its trainings but for seed and files."""

    pretrain: Mapping[str, Any]
    finetune: Mapping[str, Any]
    train_share: float = 1.0
    """Share of the training queries that fine-tune; smaller shares are part of larger ones."""
    at_step: int | None = None
    """Step of the pre-training whose checkpoint is fine-tuned (default: the last)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A study as its file describes it."""

    name: str
    variants: Mapping[str, Variant]
    shards: Mapping[str, Any] = field(default_factory=dict)
    generate: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    split: str = "dev"
    measures: Sequence[str] = ("MRR@10", "nDCG@10", "R@100")
    against: Sequence[str] = ()


class _UniqueKeys(yaml.SafeLoader):
    """Keys as they are written: 0.10 and on are names of variants, not 0.1 and True."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        place = f"line {node.start_mark.line + 1} and below"
        is_name = all(isinstance(key, yaml.ScalarNode) for key, _ in node.value)
        need(is_name, f"{place} have a key that is no name: give `key: value`")
        names = [key.value for key, _ in node.value]
        twice = sorted({name for name in names if names.count(name) > 1})
        need(not twice, f"{place} name {', '.join(twice)} twice: rename one")
        self.flatten_mapping(node)  # what `<<` brings comes first, and is overridden
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


def need(holds: bool, sentence: str) -> None:
    """Raises SettingsError if something does not hold."""
    if not holds:
        raise SettingsError(sentence)


@contextlib.contextmanager
def within(place: str | Path) -> Iterator[None]:
    """Says in a SettingsError which part of the recipe it is about."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from None


def read_recipe(name: str) -> Recipe:
    """The recipe in a YAML file, or of that name in recipes/study. Raises SettingsError with the first thing amiss."""
    path = find_recipe(name)
    content = read_content(path)
    with within(path):
        if "base" in content:
            base = read_content(find_recipe(content.pop("base"), path.parent))
            need("base" not in base, "its base has a base of its own: name that one, and repeat what differs")
            if "variants" in content:
                base.pop("against", None)  # it names variants of the base
            for key in ("pretrain", "finetune"):
                content[key] = {**base.get(key, {}), **content.get(key, {})}
            content = {**base, **content}
        need(bool(content.get("variants")), "it has no variants: name at least one")
        common = {command: content.pop(command, {}) for command in TRAININGS}
        variants = {}
        for name, values in content.pop("variants").items():
            need(
                bool(re.fullmatch(r"\w[\w.+-]*(?<!\.json)", name)),
                f"a variant is named {name!r}; give letters, digits, hyphens and dots, no .json at the end",
            )
            with within(f"variant {name}"):
                variants[name] = read_variant({} if values is None else values, common, content.get("generate", {}))
        recipe = Recipe(name=path.stem, variants=variants, **content)
        check(recipe)
    return recipe


def find_recipe(name: str, folder: Path = STUDIES) -> Path:
    for path in (Path(name), folder / name, folder / f"{name}.yaml", STUDIES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
    raise SettingsError(f"there is no study recipe {name}: give a YAML file, or one of {known}")


def read_content(path: Path) -> dict[str, Any]:
    """The keys of a recipe's file. Raises SettingsError for a file that is no recipe, and for unknown keys."""
    with within(path):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SettingsError(f"it cannot be read as YAML: {' '.join(str(error).split())}") from None
        check_keys(content, SHAPES)
    return content


def check_keys(content: Any, shapes: Mapping[str, Any]) -> None:
    """Raises SettingsError for a key that is unknown or has a value of another kind."""
    need(isinstance(content, dict), "give `key: value` lines")
    allowed = f"; allowed: {', '.join(shapes)}"
    for key, value in content.items():
        need(key in shapes, f"unknown field {key}{suggestion(key, shapes, allowed)}")
        is_list, each = isinstance(shapes[key], list), shapes[key]
        each = each[0] if is_list else each
        values = value if is_list and isinstance(value, list) else [value]
        need(
            is_list == isinstance(value, list) and all(isinstance(v, each) and not isinstance(v, bool) for v in values),
            f"{key} is {value!r}; give {'a list, each ' if is_list else ''}{IN_WORDS[each]}",
        )


def check(recipe: Recipe) -> None:
    """Raises SettingsError for what is wrong outside the variants."""
    need(bool(recipe.measures), "measures is empty; name at least one, the first is tested")
    for name in recipe.measures:
        find_measure(name)
    unknown = [name for name in recipe.against if name not in recipe.variants]
    need(not unknown, f"against names {', '.join(unknown)}; the variants are {', '.join(recipe.variants)}")
    seeds = recipe.seeds
    need(0 < len(seeds) == len(set(seeds)), f"seeds are {seeds}; give at least one, each once")
    need(all(0 <= seed < 2**32 for seed in seeds), f"seeds are {seeds}; give numbers from 0 to {2**32 - 1}")
    collection = {"format": "beir", "path": "x", "output": "x", "tokenizer": "x"}
    with within("shards"):
        refuse_own("shards", recipe.shards)
        parse_settings(BuildSettings, "", as_flags({**collection, **recipe.shards}))
    for task, settings in recipe.generate.items():
        with within(f"generate {task}"):
            has_model = isinstance(settings, dict) and "model" in settings
            need(has_model, f"give settings of generate.py, the model among them, not {settings!r}")
            parse_settings(GenerateSettings, "", as_flags({"task": task, **collection, **settings}))


def read_variant(values: Any, common: Mapping[str, Any], generated: Mapping[str, Any]) -> Variant:
    """Completes what a recipe says of a variant, and parses it as the commands will.

    common: command -> settings of all variants. generated: the texts that the study generates, by field.
    """
    check_keys(values, VARIANT_SHAPES)
    complete = {command: {**common[command], **values.get(command, {})} for command in TRAININGS}
    for command, settings in complete.items():
        refuse_own(command, settings)
    variant = Variant(**{**values, **complete})
    share, at_step = variant.train_share, variant.at_step
    need(0 < share <= 1, f"train_share is {share}: give a number above 0, at most 1")
    settings = parse_training("pretrain", {**variant.pretrain, "shards": ["x"]})
    parse_training("finetune", {**variant.finetune, "candidates": "x", "corpus": "x", "queries": "x"})
    missing = {TASKS[task].field for task in settings.tasks} - {"passage", "next"} - generated.keys()
    need(
        not missing,
        f"its tasks need generated texts, {' and '.join(sorted(missing))}: name their models under `generate`, or "
        "leave the tasks out",
    )
    need(settings.steps is not None, "pretrain gives no steps: a study compares by steps")
    every, needed = settings.checkpoint_every, settings.steps // settings.checkpoint_every + 2
    need(
        at_step in (None, settings.steps) or (0 < at_step < settings.steps and at_step % every == 0),
        f"at_step is {at_step}, where no checkpoint is written: give a multiple of checkpoint_every ({every}) up to "
        f"{settings.steps}",
    )
    need(
        at_step is None or settings.keep_checkpoints >= needed,
        f"at_step needs all checkpoints and keep_checkpoints is {settings.keep_checkpoints}: give {needed} or more (a "
        "stop on request writes one besides)",
    )
    pretrain = {**variant.pretrain, "steps": settings.steps}  # perhaps of a settings file
    return replace(variant, pretrain=with_file_digest(pretrain), finetune=with_file_digest(variant.finetune))


def with_file_digest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that name a file of the user's hold its content, too: another content is another cell."""
    path = Path(str(settings.get("recipe", "")))
    return {**settings, "recipe_digest": file_digest(path)} if path.is_file() else dict(settings)


def refuse_own(command: str, settings: Mapping[str, Any]) -> None:
    """Raises SettingsError for settings that the study gives itself."""
    given = OWN_SETTINGS[command] & settings.keys()
    need(not given, f"{command} sets {', '.join(sorted(given))}, which the study sets: leave it out")


def words_of(command: str, settings: Mapping[str, Any]) -> list[str]:
    """The command line of a launcher. A length in steps takes the place of a training recipe's epochs."""
    if command in TRAININGS:
        settings = {"recipe": TRAININGS[command][2], **settings}
        if settings.get("steps") is not None:
            settings = {"epochs": None, **settings}
    return as_flags({name: value for name, value in settings.items() if name != "recipe_digest"})


def parse_training(command: str, settings: Mapping[str, Any]) -> Any:
    settings_class, recipes, _ = TRAININGS[command]
    words = words_of(command, settings)
    return parse_settings(settings_class, "", words, config_flag="--recipe", config_folder=recipes)
