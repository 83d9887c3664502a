"""The cells of a study: its recipe, read and checked, and the commands that make one cell.

A recipe (recipes/study/*.yaml) has these keys; `variants` alone is required:

shards, pretrain, finetune   settings of build_shards.py, pretrain.py and finetune.py for every variant
generate                     {queries: settings of generate.py, continuation: ...}: texts for dor and gor
variants                     NAME: {pretrain, finetune, train_share, at_step}, what differs from the above
seeds, split, measures       of the cells; what judges them (qrels/SPLIT.tsv); the first measure is the tested one
against                      variants that the others are tested against
base                         a recipe whose keys hold where this one has none (pretrain, finetune: setting by setting)

A cell is (collection, variant, seed). Its record says all that went in (`made_from`) and all that came out.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from quincunx.data_shards import build_settings
from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.errors import EXIT_DIVERGED, SettingsError
from quincunx.data_shards.tasks import TASKS
from quincunx.engine.generate import GenerateSettings
from quincunx.engine.metrics_file import read_metrics
from quincunx.engine.model_card import curves
from quincunx.engine.retrieval import finetune_settings
from quincunx.engine.retrieval.files import file_digest, manifest_path
from quincunx.engine.retrieval.finetune_settings import FinetuneSettings
from quincunx.engine.retrieval.judgements import read_qrels
from quincunx.engine.retrieval.measures import measure_name
from quincunx.engine.retrieval.pipeline import versions
from quincunx.engine.retrieval.report import load_result
from quincunx.engine.run_settings import require
from quincunx.engine.settings import PretrainSettings, find_problems
from quincunx.launchers import finetune, pretrain
from quincunx.launchers.command_line import parse_settings, suggestion

LAUNCHERS = Path(os.path.relpath(Path(__file__).parent))
STUDIES = Path(__file__).parent.parent / "recipes" / "study"
PROBE_QUERIES, PROBE_PASSAGES = 300, 3000
NEVER = 10**6
OWN_SETTINGS = {
    "shards": {"path", "output", "format", "generations", "progress", "overwrite"},
    "pretrain": {"seed", "output", "shards", "probe", "fresh", "export"},
    "finetune": {
        "seed",
        "output",
        "encoder",
        "candidates",
        "corpus",
        "queries",
        "probe",
        "probe_every",
        "fresh",
        "export",
    },
}
"""Settings that the study gives itself."""
TRAIN_NEGATIVES = 20
"""BM25's negatives that a training query keeps."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the study's table."""

    pretrain: Mapping[str, Any] = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)
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
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    split: str = "dev"
    measures: Sequence[str] = ("MRR@10", "nDCG@10", "R@100")
    against: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell, with all settings of its commands."""

    collection: Path
    variant: str
    seed: int
    made_from: Mapping[str, Any]
    """Everything that decides its result."""
    output: Path
    work: Path

    @property
    def record_file(self) -> Path:
        return self.output / "cells" / self.collection.name / self.variant / f"seed-{self.seed}.json"

    @property
    def bm25_file(self) -> Path:
        return self.output / "cells" / self.collection.name / "bm25.json"

    @property
    def label(self) -> str:
        return f"{self.collection.name} {self.variant} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.tuned / "log.txt"

    @cached_property
    def data(self) -> Path:
        names = ("collection", "shards", "generate", "split", "measures")
        return self._folder("data", {name: self.made_from[name] for name in names})

    @cached_property
    def pretrained(self) -> Path:
        """Run folder of the pre-training, the same for all cells that share it."""
        names = ("collection", "shards", "generate", "pretrain")
        return self._folder("pretrain", {name: self.made_from[name] for name in names})

    @cached_property
    def tuned(self) -> Path:
        return self._folder(self.variant, self.made_from)

    def record(self) -> dict[str, Any] | None:
        """The finished cell's record; None where it is not made yet. Raises SettingsError as load_record."""
        return load_record(self.record_file, self.made_from, ("measures", "per_query", "before", "probe", "held_out"))

    @property
    def bm25_made_from(self) -> dict[str, Any]:
        return {name: self.made_from[name] for name in ("collection", "split", "measures")}

    def bm25(self) -> dict[str, Any] | None:
        """BM25's record of the collection, as record."""
        return load_record(self.bm25_file, self.bm25_made_from, ("measures", "per_query"))

    def _folder(self, name: str, decided_by: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:8]
        return self.work / self.collection.name / f"{name}-{digest}"


SHAPES = {
    "variants": dict, "shards": dict, "generate": dict, "pretrain": dict, "finetune": dict, "seeds": [int],
    "split": str, "measures": [str], "against": [str], "base": str,
}  # fmt: skip
VARIANT_SHAPES = {"pretrain": dict, "finetune": dict, "train_share": (int, float), "at_step": int}
IN_WORDS = {dict: "`key: value` lines", str: "a name", int: "a whole number", (int, float): "a number"}


class CommandFailed(Exception):
    """A command of a cell ended with `code`."""

    def __init__(self, code: int, script: str, log: Path):
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        said = next((line for line in reversed(lines[-20:]) if line.startswith("error: ")), "")
        super().__init__(f"{script} ended with exit code {code} ({said or 'no error line'}); its output ends {log}")
        self.code = code


class _UniqueKeys(yaml.SafeLoader):
    """Keys as they are written: 0.10 and on are names of variants, not 0.1 and True."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if any(not isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise SettingsError(
                f"line {node.start_mark.line + 1} and below have a key that is no name: give `key: value`"
            )
        names = [key.value for key, _ in node.value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SettingsError(f"line {node.start_mark.line + 1} and below name {', '.join(twice)} twice: rename one")
        self.flatten_mapping(node)  # what `<<` brings comes first, and is overridden
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


def read_recipe(name: str) -> Recipe:
    """The recipe in a YAML file, or of that name in recipes/study. Raises SettingsError with the first thing amiss."""
    path = find_recipe(name)
    content = read_content(path)
    if "base" in content:
        base = read_content(find_recipe(content.pop("base"), path.parent))
        if "base" in base:
            raise SettingsError(f"{path}: its base has a base of its own: name that one, and repeat what differs")
        if "variants" in content:
            base.pop("against", None)  # it names variants of the base
        for key in ("pretrain", "finetune"):
            content[key] = {**base.get(key, {}), **content.get(key, {})}
        content = {**base, **content}
    if not content.get("variants"):
        raise SettingsError(f"{path} has no variants: name at least one")
    variants = {}
    for variant, values in content["variants"].items():
        if not re.fullmatch(r"\w[\w.+-]*(?<!\.json)", variant):
            raise SettingsError(
                f"{path}: a variant is named {variant!r}; give letters, digits, hyphens and dots, no .json at the end"
            )
        values = {} if values is None else values
        _check_keys(f"{path}, variant {variant}", values, VARIANT_SHAPES)
        variants[variant] = Variant(**values)
    recipe = Recipe(name=path.stem, **{**content, "variants": variants})
    _check(path, recipe)
    return recipe


def find_recipe(name: str, folder: Path = STUDIES) -> Path:
    for path in (Path(name), folder / name, folder / f"{name}.yaml", STUDIES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
    raise SettingsError(f"there is no study recipe {name}: give a YAML file, or one of {known}")


def read_content(path: Path) -> dict[str, Any]:
    """The keys of a recipe's file. Raises SettingsError for a file that is no recipe, and for unknown keys."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    _check_keys(str(path), content, SHAPES)
    return content


def _check_keys(where: str, content: Any, shapes: Mapping[str, Any]) -> None:
    """Raises SettingsError for a key that is unknown or has a value of another kind."""
    if not isinstance(content, dict):
        raise SettingsError(f"{where}: give `key: value` lines")
    for key, value in content.items():
        if key not in shapes:
            hint = suggestion(str(key), set(shapes)).replace(
                "--help lists the settings", f"allowed: {', '.join(shapes)}"
            )
            raise SettingsError(f"{where}: unknown field {key}{hint}")
        shape = shapes[key]
        each = shape[0] if isinstance(shape, list) else shape
        values = value if isinstance(shape, list) and isinstance(value, list) else [value]
        is_list = isinstance(shape, list) == isinstance(value, list)
        if not is_list or any(not isinstance(one, each) or isinstance(one, bool) for one in values):
            wanted = f"a list, each {IN_WORDS[each]}" if isinstance(shape, list) else IN_WORDS[each]
            raise SettingsError(f"{where}: {key} is {value!r}; give {wanted}")


def _check(path: Path, recipe: Recipe) -> None:
    """Parses the settings of every command as the command itself will."""
    if not recipe.measures:
        raise SettingsError(f"{path}: measures is empty; name at least one, the first is tested")
    for name in recipe.measures:
        measure_name(name)
    unknown = [name for name in recipe.against if name not in recipe.variants]
    if unknown:
        raise SettingsError(
            f"{path}: against names {', '.join(unknown)}; the variants are {', '.join(recipe.variants)}"
        )
    if not recipe.seeds or len(set(recipe.seeds)) != len(recipe.seeds):
        raise SettingsError(f"{path}: seeds are {recipe.seeds}; give at least one, each once")
    if any(not 0 <= seed < 2**32 for seed in recipe.seeds):
        raise SettingsError(f"{path}: seeds are {recipe.seeds}; give numbers from 0 to {2**32 - 1}")
    where = "shards"
    try:
        refuse_own("shards", recipe.shards)
        given = {"format": "beir", "path": "x", "output": "x", "tokenizer": "x", **recipe.shards}
        build_settings.check_settings(parse_settings(BuildSettings, "", as_words(given)))
        for task, settings in recipe.generate.items():
            where = f"generate {task}"
            if not isinstance(settings, dict) or "model" not in settings:
                raise SettingsError(f"give settings of generate.py, the model among them, not {settings!r}")
            given = {"task": task, "model": "x", "format": "beir", "path": "x", "tokenizer": "x", "output": "x"}
            parse_settings(GenerateSettings, "", as_words({**given, **settings}))
        for name, variant in recipe.variants.items():
            where = f"variant {name}"
            if not 0 < variant.train_share <= 1:
                raise SettingsError(f"train_share is {variant.train_share}: give a number above 0, at most 1")
            settings = parse_pretrain({**recipe.pretrain, **variant.pretrain, "shards": ["x"]})
            for command in ("pretrain", "finetune"):
                refuse_own(command, {**getattr(recipe, command), **getattr(variant, command)})
            require(find_problems(settings))
            missing = {TASKS[task].field for task in settings.tasks} - {"passage", "next"} - recipe.generate.keys()
            if missing:
                raise SettingsError(
                    f"its tasks need generated texts, {' and '.join(sorted(missing))}: name their models under "
                    "`generate`, or leave the tasks out"
                )
            if settings.steps is None:
                raise SettingsError("pretrain gives no steps: a study compares by steps")
            step = settings.steps if variant.at_step is None else variant.at_step
            if not (step == settings.steps or (0 < step < settings.steps and step % settings.checkpoint_every == 0)):
                raise SettingsError(
                    f"at_step is {step}, where no checkpoint is written: give a multiple of checkpoint_every "
                    f"({settings.checkpoint_every}) up to {settings.steps}"
                )
            needed = settings.steps // settings.checkpoint_every + 2
            if variant.at_step is not None and settings.keep_checkpoints < needed:
                raise SettingsError(
                    f"at_step needs all checkpoints and keep_checkpoints is {settings.keep_checkpoints}: give {needed} "
                    "or more (a stop on request writes one besides)"
                )
            given = {"candidates": "x", "corpus": "x", "queries": "x"}
            require(finetune_settings.find_problems(parse_finetune({**recipe.finetune, **variant.finetune, **given})))
    except SettingsError as error:
        raise SettingsError(f"{path}, {where}: {error}") from None


def refuse_own(command: str, settings: Mapping[str, Any]) -> None:
    """Raises SettingsError for settings that the study gives itself."""
    if given := OWN_SETTINGS[command] & settings.keys():
        raise SettingsError(f"{command} sets {', '.join(sorted(given))}, which the study sets: leave it out")


def parse_pretrain(settings: Mapping[str, Any]) -> PretrainSettings:
    words = pretrain_words(settings)
    return parse_settings(PretrainSettings, "", words, config_flag="--recipe", config_folder=pretrain.RECIPES)


def parse_finetune(settings: Mapping[str, Any]) -> FinetuneSettings:
    words = as_words(with_length(settings))
    base = finetune.stage_named_in(words)
    return parse_settings(
        FinetuneSettings, "", words, config_flag="--recipe", config_folder=finetune.RECIPES, base_config=base
    )


def pretrain_words(settings: Mapping[str, Any]) -> list[str]:
    """pretrain.py's command line; `recipe` names the pre-training recipe that the others change (default retromae)."""
    return as_words(with_length({"recipe": "retromae", **settings}))


def with_length(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A length in steps takes the place of the recipe's epochs."""
    return {"epochs": None, **settings} if settings.get("steps") is not None else dict(settings)


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """{"steps": 3, "tasks": ["mkp"]} as --steps=3 --tasks=["mkp"]."""
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [f"--{name}={value}" for name, value in words.items() if name != "recipe_digest"]


def make_cells(recipe: Recipe, collections: Sequence[str], output: Path, work: Path) -> list[Cell]:
    """All cells, a seed of every collection after the other. Raises SettingsError for collections that do not serve."""
    folders = [Path(os.path.abspath(collection)) for collection in collections]
    if len({folder.name for folder in folders}) != len(folders):
        raise SettingsError(f"two collections have the same name: {', '.join(map(str, folders))}; rename a folder")
    digests = {folder: collection_digests(folder, recipe.split) for folder in folders}
    pretrain = {name: full_pretrain(recipe, variant) for name, variant in recipe.variants.items()}
    return [
        Cell(
            collection=folder,
            variant=name,
            seed=seed,
            made_from={
                "collection": digests[folder],
                "shards": {**recipe.shards},
                "generate": {**recipe.generate},
                "pretrain": {**pretrain[name], "seed": seed},
                "finetune": {**with_file_digest({**recipe.finetune, **variant.finetune}), "seed": seed},
                "train_share": variant.train_share,
                "at_step": variant.at_step,
                "split": recipe.split,
                "measures": [*recipe.measures],
            },
            output=output,
            work=work,
        )
        for seed in recipe.seeds
        for folder in folders
        for name, variant in recipe.variants.items()
    ]


def full_pretrain(recipe: Recipe, variant: Variant) -> dict[str, Any]:
    """The variant's pre-training settings, with its steps, which may come from the settings file that it names."""
    settings = {**recipe.pretrain, **variant.pretrain}
    return with_file_digest({**settings, "steps": parse_pretrain({**settings, "shards": ["x"]}).steps})


def with_file_digest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that name a file of the user's hold its content, too: another content is another cell."""
    path = Path(str(settings.get("recipe", "")))
    return {**settings, "recipe_digest": file_digest(path)} if path.is_file() else dict(settings)


def collection_digests(folder: Path, split: str) -> dict[str, str]:
    """Digests of a BEIR folder's files. Raises SettingsError where one that the study reads is missing."""
    files = ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", f"qrels/{split}.tsv"]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise SettingsError(
            f"collection {folder} has no {', '.join(missing)}: give a BEIR folder with training queries and "
            f"judgements of the split {split}"
        )
    return {name: file_digest(folder / name) for name in files}


Run = Callable[..., None]
"""run(script, settings, inputs, trains=False): one command; raises CommandFailed."""


def make_data(cell: Cell, run: Run) -> None:
    """What cells of a collection share: shards, judged queries with a probe, BM25 beside them, training candidates."""
    folder, collection, made_from = cell.data, cell.collection, cell.made_from
    if not (folder / "result.json").exists():
        make_shards(cell, run)
        judged = {"qrels": collection / "qrels" / f"{made_from['split']}.tsv"}
        texts = {"corpus": collection, "queries": collection, **judged}
        probe = {"probe_queries": PROBE_QUERIES, "probe_passages": PROBE_PASSAGES}
        run("split.py", probe, {**texts, "output": folder / "judged"})
        run(
            "search.py",
            {"method": "bm25", "depth": depth_for(made_from["measures"])},
            {**texts, "output": folder / "bm25.trec"},
        )
        found = {"run": folder / "bm25.trec", **judged, **results(folder)}
        run("evaluate.py", {"measures": made_from["measures"]}, found)
    share = made_from["train_share"]
    candidates = candidates_file(folder, share)
    if not manifest_path(candidates).exists():
        candidates.unlink(missing_ok=True)
        qrels, train = collection / "qrels" / "train.tsv", folder / f"train-{share!r}"
        sample = max(1, round(share * len(read_qrels(qrels))))
        run("split.py", {"sample": sample}, {"queries": collection, "qrels": qrels, "output": train})
        texts = {"corpus": collection, "queries": train / "queries.jsonl", "qrels": train / "qrels.tsv"}
        ranks = TRAIN_NEGATIVES + 10
        run("search.py", {"method": "bm25", "depth": ranks}, {**texts, "output": train / "bm25.trec"})
        kept = {"depth": ranks, "num_negatives": TRAIN_NEGATIVES, "random_fill": TRAIN_NEGATIVES}
        run("mine.py", kept, {**texts, "run": train / "bm25.trec", "output": candidates})


def bm25_record(cell: Cell) -> dict[str, Any]:
    """BM25's record of the cell's collection."""
    return {**read_results(cell.data), "made_from": cell.bm25_made_from}


def make_shards(cell: Cell, run: Run) -> None:
    """The collection's shards, in DATA/plain; with generated texts in DATA/shards."""
    source, settings = (
        {"format": "beir", "path": cell.collection},
        {"tokenizer": "train:4096", **cell.made_from["shards"]},
    )
    run("build_shards.py", {**settings, "progress": False}, {**source, "output": cell.data / "plain"})
    generated = {task: cell.data / task for task in cell.made_from["generate"]}
    if generated:
        source["tokenizer"] = cell.data / "plain" / "tokenizer"
        same = {name: settings[name] for name in ("max_tokens", "with_titles") if name in settings}
        for task, output in generated.items():
            of_task = cell.made_from["generate"][task]
            run("generate.py", {"task": task, **same, **of_task}, {**source, "output": output})
        joined = {**settings, "generations": [*map(str, generated.values())], "progress": False}
        run("build_shards.py", joined, {**source, "output": cell.data / "shards"})


def candidates_file(data: Path, share: float) -> Path:
    return data / f"candidates-{share!r}.jsonl"


def depth_for(measures: Sequence[str]) -> int:
    """Passages of a run that the measures look at: the largest cutoff, 1,000 where one has none, at least 100."""
    cutoffs = [int(found[1]) if (found := re.search(r"@(\d+)$", measure)) else 1000 for measure in measures]
    return max([100, *cutoffs])


def results(folder: Path) -> dict[str, Path]:
    return {"output": folder / "result.json", "per_query": folder / "queries.jsonl"}


def run_cell(cell: Cell, run: Run) -> dict[str, Any]:
    """Runs the cell's commands, each of which goes on where it stopped, and returns the cell's record."""
    made_from, data, collection = cell.made_from, cell.data, cell.collection
    record: dict[str, Any] = {"collection": collection.name, "variant": cell.variant, "seed": cell.seed}
    encoder = cell.pretrained / "export" / "encoder"
    shards = data / ("shards" if made_from["generate"] else "plain")
    try:
        if not encoder.exists():
            inputs = {"shards": shards, "probe": data / "judged" / "probe", "output": cell.pretrained}
            run("pretrain.py", {"tracking": "none", **made_from["pretrain"]}, inputs, trains=True)
        if made_from["at_step"] is not None:
            encoder = cell.tuned / "pretrained" / "encoder"
            run("export.py", {"step": made_from["at_step"]}, {"run": cell.pretrained, "output": encoder.parent})
        texts = {"corpus": collection, "queries": collection}
        inputs = {"encoder": encoder, "candidates": candidates_file(data, made_from["train_share"]), **texts}
        probe = {"probe_split": made_from["split"], "probe_every": NEVER, "checkpoint_every": NEVER}
        inputs |= {"probe": collection, "output": cell.tuned}
        run("finetune.py", {"tracking": "none", **probe, **made_from["finetune"]}, inputs, trains=True)
        search_and_judge(cell, run)
    except CommandFailed as failed:
        if failed.code != EXIT_DIVERGED:
            raise
        return {**record, "diverged": True, "made_from": made_from}
    before = next(line for line in read_metrics(cell.tuned) if line["kind"] == "probe")
    return {
        **record,
        **read_results(cell.tuned),
        "before": {name.removeprefix("probe/"): before[name] for name in before if name.startswith("probe/")},
        **read_pretraining(cell.pretrained),
        "code": describe_code(),
        "made_from": made_from,
    }


def search_and_judge(cell: Cell, run: Run) -> None:
    """Searches the collection with the cell's fine-tuned encoder, and evaluates what it finds."""
    made_from, collection = cell.made_from, cell.collection
    model, embeddings, found = cell.tuned / "export" / "retriever", cell.tuned / "embeddings", cell.tuned / "run.trec"
    judged = {"qrels": collection / "qrels" / f"{made_from['split']}.tsv"}
    device = {"device": made_from["finetune"].get("device", "auto"), "precision": "float32"}
    # float32: vectors of an encoder that has learned little are nearly alike, and float16 ranks them wrongly.
    vectors = {"dtype": "float32", **device}
    run("encode.py", vectors, {"model": model, "corpus": collection, "output": embeddings})
    asked = {"model": model, "embeddings": embeddings, "queries": collection, **judged, "output": found}
    run("search.py", {"depth": depth_for(made_from["measures"]), **device}, asked)
    run("evaluate.py", {"measures": made_from["measures"]}, {"run": found, **judged, **results(cell.tuned)})


def read_results(folder: Path) -> dict[str, Any]:
    """{"measures": {name: {mean, low, high}}, "per_query": the first measure's values in the order of query ids}."""
    found = load_result(folder)
    values = next(iter(found.evaluation.per_query.values()))
    return {"measures": found.record["measures"], "per_query": [round(values[query], 6) for query in sorted(values)]}


def read_pretraining(run_folder: Path) -> dict[str, Any]:
    """The probe's curves, held-out losses [before, after, unigram] and the median rate, of a pre-training's metrics."""
    curve = partial(curves, run_folder)
    probe: dict[str, list] = {"step": []}
    for name, (steps, values) in curve("probe", "probe/").items():
        probe |= {"step": steps, name: [round(value, 4) for value in values]}
    losses, unigrams = curve("held_out", "held_out/loss/"), curve("held_out", "held_out/unigram/")
    held_out = {
        task: [round(value, 4) for value in (values[0], values[-1], unigrams[task][1][-1])]
        for task, (_, values) in losses.items()
    }
    _, rates = curve("train", "passages_per_second").get("", ([], []))
    rate = round(sorted(rates)[len(rates) // 2], 1) if rates else None
    return {"probe": probe, "held_out": held_out, "passages_per_second": rate}


def describe_code() -> dict[str, Any]:
    """Commit and versions that a result was made with."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"commit": commit or None, **versions()}


def command_line(
    script: str, settings: Mapping[str, Any], inputs: Mapping[str, Any], launch: Sequence[str]
) -> list[str]:
    """One command of a cell, as a user would type it."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in inputs.items()}
    together = {**settings, **plain}
    if script == "pretrain.py":
        together["shards"] = [together["shards"]]
        words = pretrain_words(together)
    else:
        words = as_words(with_length(together))
    return [*(launch or [sys.executable]), str(LAUNCHERS / script), *words]


def load_record(path: Path, made_from: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any] | None:
    """A record with all `parts`, or of a cell that diverged; None if it is not made yet.

    Raises SettingsError if it is damaged or was made otherwise.
    """
    try:
        record = json.loads(path.read_text())
        then = dict(record["made_from"])
        if "diverged" not in record and not {*parts} <= record.keys():
            raise KeyError
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise SettingsError(f"{path} is damaged: remove it, and it is made again") from None
    now = json.loads(json.dumps(made_from))
    if then != now:
        raise SettingsError(
            f"{path} was made otherwise ({difference(then, now)}): give another --output, or the recipe and collection "
            "that it was made with"
        )
    return record


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that differs, as a clause."""
    for key in dict.fromkeys([*then, *now]):
        before, after = (side.get(key, "left out") for side in (then, now))
        if before != after:
            if isinstance(before, dict) and isinstance(after, dict):
                return f"{key} {difference(before, after)}"
            return f"{key} was {before} and is {after}"
    raise AssertionError("no difference")
