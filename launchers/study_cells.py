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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from quincunx.data_shards.artefact import differences
from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.durable import file_digest
from quincunx.data_shards.errors import EXIT_DIVERGED, SettingsError
from quincunx.data_shards.tasks import TASKS
from quincunx.engine.generate import GenerateSettings
from quincunx.engine.retrieval.evaluation import measure_name
from quincunx.engine.retrieval.finetuning import FinetuneSettings
from quincunx.engine.retrieval.study_report import describe_code, read_pretraining, results_of
from quincunx.engine.retrieval.trec import read_qrels
from quincunx.engine.run_folder import read_metrics
from quincunx.engine.settings import PretrainSettings
from quincunx.launchers import finetune, pretrain
from quincunx.launchers.command_line import as_flags, parse_settings, suggestion

LAUNCHERS = Path(os.path.relpath(Path(__file__).parent))
STUDIES = Path(__file__).parent.parent / "recipes" / "study"
PROBE_QUERIES, PROBE_PASSAGES = 300, 3000
NEVER = 10**6
OWN_SETTINGS = {
    "shards": {"path", "output", "format", "generations", "progress", "remake"},
    "pretrain": {"seed", "output", "shards", "probe", "fresh", "export"},
    "finetune": {
        "seed", "output", "encoder", "candidates", "corpus", "queries", "probe", "probe_every", "fresh", "export",
    },
}  # fmt: skip
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

    @property
    def judged(self) -> Path:
        return self.collection / "qrels" / f"{self.made_from['split']}.tsv"

    @property
    def shards(self) -> Path:
        return self.data / ("shards" if self.made_from["generate"] else "plain")

    @property
    def candidates(self) -> Path:
        return self.data / f"candidates-{self.made_from['train_share']!r}.jsonl"

    @property
    def bm25_made_from(self) -> dict[str, Any]:
        return {name: self.made_from[name] for name in ("collection", "split", "measures")}

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
        """The finished cell's record; None if it is not made yet. Raises SettingsError as load_record."""
        return load_record(self.record_file, self.made_from)

    def bm25(self) -> dict[str, Any] | None:
        """BM25's record of the collection, as record."""
        return load_record(self.bm25_file, self.bm25_made_from)

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
        said = next((line for line in reversed(lines[-20:]) if line.startswith("error: ")), "no error line")
        super().__init__(f"{script}.py ended with exit code {code} ({said}); its output ends {log}")
        self.code = code


class _UniqueKeys(yaml.SafeLoader):
    """Keys as they are written: 0.10 and on are names of variants, not 0.1 and True."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if any(not isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            line = node.start_mark.line + 1
            raise SettingsError(f"line {line} and below have a key that is no name: give `key: value`")
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
            allowed = f"allowed: {', '.join(shapes)}"
            hint = suggestion(str(key), set(shapes)).replace("--help lists the settings", allowed)
            raise SettingsError(f"{where}: unknown field {key}{hint}")
        is_list, each = isinstance(shapes[key], list), shapes[key]
        each = each[0] if is_list else each
        values = value if is_list and isinstance(value, list) else [value]
        if is_list != isinstance(value, list) or any(not isinstance(v, each) or isinstance(v, bool) for v in values):
            wanted = f"a list, each {IN_WORDS[each]}" if is_list else IN_WORDS[each]
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
        parse_settings(BuildSettings, "", as_flags(given))
        for task, settings in recipe.generate.items():
            where = f"generate {task}"
            if not isinstance(settings, dict) or "model" not in settings:
                raise SettingsError(f"give settings of generate.py, the model among them, not {settings!r}")
            given = {"task": task, "model": "x", "format": "beir", "path": "x", "tokenizer": "x", "output": "x"}
            parse_settings(GenerateSettings, "", as_flags({**given, **settings}))
        for name, variant in recipe.variants.items():
            where = f"variant {name}"
            if not 0 < variant.train_share <= 1:
                raise SettingsError(f"train_share is {variant.train_share}: give a number above 0, at most 1")
            settings = parse_training("pretrain", {**recipe.pretrain, **variant.pretrain, "shards": ["x"]})
            for command in TRAININGS:
                refuse_own(command, {**getattr(recipe, command), **getattr(variant, command)})
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
            parse_training("finetune", {**recipe.finetune, **variant.finetune, **given})
    except SettingsError as error:
        raise SettingsError(f"{path}, {where}: {error}") from None


def refuse_own(command: str, settings: Mapping[str, Any]) -> None:
    """Raises SettingsError for settings that the study gives itself."""
    if given := OWN_SETTINGS[command] & settings.keys():
        raise SettingsError(f"{command} sets {', '.join(sorted(given))}, which the study sets: leave it out")


TRAININGS = {
    "pretrain": (PretrainSettings, pretrain.RECIPES, "retromae"),
    "finetune": (FinetuneSettings, finetune.RECIPES, finetune.DEFAULT_RECIPE),
}
"""What trains -> its settings, its recipes, and the recipe whose settings the others change unless they name one."""


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
    return with_file_digest({**settings, "steps": parse_training("pretrain", {**settings, "shards": ["x"]}).steps})


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
"""run(command, **flags): one launcher; raises CommandFailed."""


def make_data(cell: Cell, run: Run) -> None:
    """What cells of a collection share: shards, judged queries with a probe, BM25 beside them, training candidates."""
    folder, collection, made_from = cell.data, cell.collection, cell.made_from
    texts = {"corpus": collection, "queries": collection}
    if not (folder / "result.json").exists():
        make_shards(cell, run)
        probe = {"probe_queries": PROBE_QUERIES, "probe_passages": PROBE_PASSAGES}
        run("split", **texts, qrels=cell.judged, **probe, output=folder / "judged")
        depth, found = depth_for(made_from["measures"]), folder / "bm25.trec"
        run("search", method="bm25", **texts, qrels=cell.judged, depth=depth, output=found)
        run("evaluate", run=found, qrels=cell.judged, measures=made_from["measures"], **results(folder))
    if not cell.candidates.exists():
        share, qrels = made_from["train_share"], collection / "qrels" / "train.tsv"
        train, ranks = folder / f"train-{share!r}", TRAIN_NEGATIVES + 10
        sample = max(1, round(share * len(read_qrels(qrels))))
        run("split", queries=collection, qrels=qrels, sample=sample, output=train)
        texts = {"corpus": collection, "queries": train / "queries.jsonl", "qrels": train / "qrels.tsv"}
        run("search", method="bm25", **texts, depth=ranks, output=train / "bm25.trec")
        kept = {"depth": ranks, "num_negatives": TRAIN_NEGATIVES, "random_fill": TRAIN_NEGATIVES}
        run("mine", run=train / "bm25.trec", **texts, **kept, output=cell.candidates)


def make_shards(cell: Cell, run: Run) -> None:
    """The collection's shards, in DATA/plain; with generated texts in DATA/shards."""
    source = {"format": "beir", "path": cell.collection}
    settings = {**source, "tokenizer": "train:4096", **cell.made_from["shards"], "progress": False}
    run("build_shards", **settings, output=cell.data / "plain")
    generated = {task: cell.data / task for task in cell.made_from["generate"]}
    if generated:
        source["tokenizer"] = cell.data / "plain" / "tokenizer"
        same = {name: settings[name] for name in ("max_tokens", "with_titles") if name in settings}
        for task, output in generated.items():
            run("generate", task=task, **source, **same, **cell.made_from["generate"][task], output=output)
        joined = {**settings, **source, "generations": [*generated.values()]}
        run("build_shards", **joined, output=cell.shards)


def depth_for(measures: Sequence[str]) -> int:
    """Passages of a run that the measures look at: the largest cutoff, 1,000 where one has none, at least 100."""
    cutoffs = [int(found[1]) if (found := re.search(r"@(\d+)$", measure)) else 1000 for measure in measures]
    return max([100, *cutoffs])


def results(folder: Path) -> dict[str, Path]:
    return {"output": folder / "result.json", "per_query": folder / "queries.jsonl"}


def bm25_record(cell: Cell) -> dict[str, Any]:
    """BM25's record of the cell's collection."""
    return {**results_of(*results(cell.data).values()), "made_from": cell.bm25_made_from}


def run_cell(cell: Cell, run: Run) -> dict[str, Any]:
    """Runs the cell's commands, each of which goes on where it stopped, and returns the cell's record."""
    made_from, tuned = cell.made_from, cell.tuned
    record: dict[str, Any] = {"collection": cell.collection.name, "variant": cell.variant, "seed": cell.seed}
    encoder = cell.pretrained / "export" / "encoder"
    texts = {"corpus": cell.collection, "queries": cell.collection}
    try:
        if not encoder.exists():
            inputs = {"shards": [cell.shards], "probe": cell.data / "judged" / "probe"}
            run("pretrain", **{"tracking": "none", **made_from["pretrain"], **inputs, "output": cell.pretrained})
        if made_from["at_step"] is not None:
            encoder = tuned / "pretrained" / "encoder"
            run("export", run=cell.pretrained, step=made_from["at_step"], output=encoder.parent)
        given = {"encoder": encoder, "candidates": cell.candidates, **texts, "probe": cell.collection}
        seldom = {"probe_split": made_from["split"], "probe_every": NEVER, "checkpoint_every": NEVER}
        run("finetune", **{"tracking": "none", **seldom, **made_from["finetune"], **given, "output": tuned})
        search_and_judge(cell, run)
    except CommandFailed as failed:
        if failed.code != EXIT_DIVERGED:
            raise
        return {**record, "diverged": True, "made_from": made_from}
    before = next(line for line in read_metrics(tuned) if line["kind"] == "probe")
    return {
        **record,
        **results_of(*results(tuned).values()),
        "before": {name.removeprefix("probe/"): before[name] for name in before if name.startswith("probe/")},
        **read_pretraining(cell.pretrained),
        "code": describe_code(),
        "made_from": made_from,
    }


def search_and_judge(cell: Cell, run: Run) -> None:
    """Searches the collection with the cell's fine-tuned encoder, and evaluates what it finds."""
    made_from, tuned = cell.made_from, cell.tuned
    model, embeddings, found = tuned / "export" / "retriever", tuned / "embeddings", tuned / "run.trec"
    device = {"device": made_from["finetune"].get("device", "auto"), "precision": "float32"}
    # float32: vectors of an encoder that has learned little are nearly alike, and float16 ranks them wrongly.
    run("encode", model=model, corpus=cell.collection, dtype="float32", **device, output=embeddings)
    asked = {"queries": cell.collection, "qrels": cell.judged, "depth": depth_for(made_from["measures"])}
    run("search", model=model, embeddings=embeddings, **asked, **device, output=found)
    run("evaluate", run=found, qrels=cell.judged, measures=made_from["measures"], **results(tuned))


def load_record(path: Path, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """A cell's record, or BM25's; None where it is not made yet. Raises SettingsError if it was made otherwise."""
    try:
        record = json.loads(path.read_text())
        then = dict(record["made_from"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise SettingsError(f"{path} is damaged: remove it, and it is made again") from None
    now = json.loads(json.dumps(made_from))
    if then != now:
        raise SettingsError(
            f"{path} was made otherwise ({differences(then, now)}): give another --output, or the recipe and "
            "collection that it was made with"
        )
    return record
