"""A pipeline's recipe: data, splits, models, and settings for every stage, each key named by the launcher that has it.

A section that trains (retriever1, retriever2, reranker, distil, and before them shards and pretrain) is a stage of the
chain when the recipe has it, be it empty. docs/pipeline.md shows every section.
"""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from quincunx.data_shards.errors import SettingsError
from quincunx.launchers.command_line import field_types, find_config, in_words, suggestion

RECIPES = Path(__file__).parent.parent / "recipes" / "pipeline"
TRAINED = ("retriever1", "retriever2", "reranker", "distil")
SYSTEMS = ("bm25", "start", *TRAINED)
TRAIN = "train"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Section `data`."""

    folder: str | None = None
    """A BEIR folder, which gives what is not named: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv."""
    corpus: str | None = None
    """Passages to train on, and to search where a split names no others."""
    titles: bool = True
    """Titles belong to the passages' text."""
    negatives: str | None = None
    """Candidates for retriever1 (ours or SimLM's); without them BM25 is searched and mined."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Section `splits`, one under each name; `train` is trained on, all others are evaluated on."""

    folder: str | None = None
    """A BEIR folder of its own: corpus.jsonl, queries.jsonl, qrels/test.tsv."""
    corpus: str | None = None
    """Passages of its own."""
    queries: str | None = None
    """Queries (default: the folder's)."""
    qrels: str | None = None
    """Judgements (default: the folder's qrels/NAME.tsv, or DPR's own positives)."""
    answers: str | None = None
    """Answers for answer match (default: those of a DPR file)."""
    sample: int | None = None
    """Queries that are kept (default: all)."""
    probe_queries: int = 0
    """Queries of a small probe along the training; of one split only."""
    probe_passages: int = 500
    """Passages of the probe."""
    relevant_from: int = 1
    """Lowest grade that counts as relevant (TREC DL: 2)."""
    unknown_ids: str = "stop"
    """drop: leave out judgements of unknown queries, and queries without a relevant passage."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Section `models`."""

    encoder: str = "bert-base-uncased"
    """What every retriever starts from, unless the recipe pre-trains; `start` in the results."""
    reranker: str | None = None
    """What the reranker starts from (default: the encoder)."""


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """Section `execution`: how commands are run; nothing here changes a result."""

    launch: str = "python"
    """Command that starts training, encoding and scoring: "python", "deepspeed --num_gpus 8",
    "deepspeed --hostfile hosts", "torchrun --nproc_per_node 8", "srun python"."""
    device: str = "auto"
    """auto, cpu or cuda."""
    systems: tuple[str, ...] = SYSTEMS
    """Which are evaluated, of bm25, start, retriever1, retriever2, reranker, distil; those that the recipe has."""


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked. `sections` holds the settings of the stages as written."""

    name: str
    data: DataSettings
    splits: dict[str, Split]
    models: ModelSettings
    execution: ExecutionSettings
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def has(self, section: str) -> bool:
        return section in self.sections

    def settings(self, *sections: str) -> dict[str, Any]:
        """The settings of several sections together; a later one wins."""
        return {key: value for section in sections for key, value in self.sections.get(section, {}).items()}

    @property
    def evaluated(self) -> list[str]:
        """Names of the splits that are evaluated on."""
        return [name for name in self.splits if name != TRAIN]


def section_fields() -> dict[str, set[str]]:
    """Section -> the keys that it may have: settings of the launcher, less what the chain itself sets."""
    from quincunx.data_shards.build_settings import BuildSettings
    from quincunx.engine.retrieval.finetune_settings import FinetuneSettings
    from quincunx.engine.settings import PretrainSettings
    from quincunx.launchers.encode import EncodeSettings
    from quincunx.launchers.evaluate import EvaluateSettings
    from quincunx.launchers.mine import MineSettings
    from quincunx.launchers.score import ScoreSettings
    from quincunx.launchers.search import SearchSettings

    chain = {"output", "corpus", "queries", "qrels", "run", "candidates", "model", "stage", "titles", "answers"}
    chain |= {"kind", "method", "embeddings", "interactive", "page"}
    finetune = set(field_types(FinetuneSettings)) - chain - {"fresh"} | {"recipe"}
    mine = set(field_types(MineSettings)) - chain
    search = set(field_types(SearchSettings)) - chain
    return {
        "shards": set(field_types(BuildSettings)) - {"output"},
        "pretrain": set(field_types(PretrainSettings)) - {"output", "fresh"} | {"recipe"},
        "finetune": finetune,
        **dict.fromkeys(TRAINED, finetune),
        "encode": set(field_types(EncodeSettings)) - chain,
        "bm25": search,
        "search": search,
        **dict.fromkeys(("mine", "mine.bm25", "mine.retriever1", "mine.retriever2"), mine),
        "score": set(field_types(ScoreSettings)) - chain,
        "rerank": set(field_types(ScoreSettings)) - chain,
        "evaluate": set(field_types(EvaluateSettings)) - chain - {"compare", "per_query", "relevant_from"},
    }


def read_recipe(name: str, assignments: Sequence[str] = ()) -> Recipe:
    """The recipe NAME (recipes/pipeline/NAME.yaml, or a file), with `section.key=value` assignments over it.

    Raises SettingsError for a file that cannot be read, and for all unknown sections and keys in one sentence.
    """
    import yaml

    path = find_config(name, "--recipe", RECIPES)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold sections of `setting: value` lines")
    for assignment in assignments:
        assign(content, assignment)
    return check_recipe(content, path.stem, str(path))


def assign(content: dict[str, Any], assignment: str) -> None:
    """Sets `section.key=value` (value in YAML) in a recipe. Raises SettingsError where it is no assignment."""
    import yaml

    keys, equals, value = assignment.partition("=")
    *sections, key = keys.split(".")
    if not equals or not sections or not all((*sections, key)):
        raise SettingsError(f"--set {assignment!r} is not section.key=value, like retriever1.steps=200")
    if sections[0] == "mine" and len(sections) == 2:
        sections = [".".join(sections)]
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {assignment!r}: {' '.join(str(error).split())}") from None
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise SettingsError(f"--set {assignment!r}: {section} is a setting, not a section")
    content[key] = parsed


def check_recipe(content: Mapping[str, Any], name: str, where: str) -> Recipe:
    """The recipe of a YAML file's content. Raises SettingsError with all unknown sections and keys."""
    content = {key: {} if value is None else copy.deepcopy(value) for key, value in content.items()}
    own = {"data": DataSettings, "models": ModelSettings, "execution": ExecutionSettings}
    keys = {**{section: set(field_types(kind)) for section, kind in own.items()}, **section_fields()}
    problems = []
    for section, settings in content.items():
        if section not in (*keys, "splits"):
            problems.append(f"section {section}{hint(section, {*keys, 'splits'})}")
        elif section != "splits" or not isinstance(settings, dict):
            problems += unknown_keys(section, settings, keys.get(section, set()))
        else:
            settings = content["splits"] = {str(split): settings[split] or {} for split in settings}
            for split in settings:
                if not re.fullmatch(r"\w[\w.-]*", split):
                    problems.append(f"split {split!r}, which names files: take letters, digits, _, - and .")
                problems += unknown_keys(f"splits.{split}", settings[split], set(field_types(Split)))
    if problems:
        raise SettingsError(f"{where} sets what does not exist: {'; '.join(problems)}")
    typed = {section: (kind, content.get(section, {})) for section, kind in own.items()}
    typed |= {f"splits.{split}": (Split, settings) for split, settings in content.get("splits", {}).items()}
    problems = [clause for section, given in typed.items() for clause in wrong_types(section, *given)]
    if problems:
        raise SettingsError(f"{where}: {'; '.join(problems)}")
    splits = {split: Split(**settings) for split, settings in content.pop("splits", {}).items()}
    data, models, execution = (kind(**tupled(content.pop(section, {}), kind)) for section, kind in own.items())
    recipe = Recipe(name, data, fill_splits(splits, data, where), models, execution, content)
    check_chain(recipe, where)
    return recipe


def wrong_types(section: str, kind: type, settings: Mapping[str, Any]) -> list[str]:
    """A clause for every value that is not of its setting's type."""
    types, clauses = field_types(kind), []
    for key, value in settings.items():
        options = get_args(types[key]) if isinstance(types[key], UnionType) else (types[key],)
        fits = any(
            isinstance(value, list) and all(isinstance(item, str) for item in value)
            if get_origin(option) is tuple
            else type(value) is option
            for option in options
        )
        if not fits:
            clauses.append(f"{section}.{key} is {value!r}; it must be {in_words(types[key])}")
    return clauses


def unknown_keys(section: str, settings: Any, known: set[str]) -> list[str]:
    if not isinstance(settings, dict):
        return [f"section {section}, which must hold `setting: value` lines"]
    return [f"{section}.{key}{hint(str(key), known)}" for key in settings if key not in known]


def hint(name: str, known: set[str]) -> str:
    return suggestion(name, known).replace("--help lists the settings", "docs/pipeline.md lists what there is")


def tupled(settings: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Lists of YAML as the tuples of a frozen dataclass."""
    tuples = {item.name for item in dataclasses.fields(kind) if isinstance(item.default, tuple)}
    return {key: tuple(value) if key in tuples else value for key, value in settings.items()}


def fill_splits(splits: dict[str, Split], data: DataSettings, where: str) -> dict[str, Split]:
    """The splits with corpus, queries and qrels named; raises SettingsError where something is named nowhere."""
    filled = {}
    for name, split in splits.items():
        folder, judged = (split.folder, "test") if split.folder else (data.folder, name)
        corpus = split.corpus or (f"{folder}/corpus.jsonl" if split.folder else corpus_of(data))
        queries = split.queries or (folder and f"{folder}/queries.jsonl")
        qrels = split.qrels
        if qrels is None and split.queries is None and folder:
            qrels = f"{folder}/qrels/{judged}.tsv"
        for what, value in (("corpus", corpus), ("queries", queries)):
            if not value:
                raise SettingsError(
                    f"{where}: the {what} of split {name} is named nowhere; give splits.{name}.{what}, or a BEIR "
                    "folder as --set data.folder=FOLDER"
                )
        filled[name] = dataclasses.replace(split, corpus=corpus, queries=queries, qrels=qrels)
    return filled


def corpus_of(data: DataSettings) -> str | None:
    return data.corpus or (data.folder and f"{data.folder}/corpus.jsonl")


def check_chain(recipe: Recipe, where: str) -> None:
    """Raises SettingsError where stages lack what they need."""
    needs = {"retriever2": "retriever1", "reranker": "retriever2", "distil": "reranker"}
    problems = [
        f"{stage} needs section {before}"
        for stage, before in needs.items()
        if recipe.has(stage) and not recipe.has(before)
    ]
    if any(map(recipe.has, TRAINED)) and TRAIN not in recipe.splits:
        problems.append("training needs split train")
    if not recipe.evaluated:
        problems.append("there is no split to evaluate on; give splits.dev or another name")
    foreign = [system for system in recipe.execution.systems if system not in SYSTEMS]
    if foreign:
        problems.append(f"execution.systems has {', '.join(foreign)}; allowed are {', '.join(SYSTEMS)}")
    if sum(split.probe_queries > 0 for split in recipe.splits.values()) > 1:
        problems.append("probe_queries are given for more than one split; give them for one")
    if recipe.has("pretrain") and not (recipe.has("shards") or recipe.settings("pretrain").get("shards")):
        problems.append("pretrain needs section shards, or pretrain.shards")
    if problems:
        raise SettingsError(f"{where}: {'; '.join(problems)}")
