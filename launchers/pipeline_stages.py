"""The stages of a pipeline as commands of our launchers, with what each reads and makes (launchers/pipeline.py)."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.finetune_settings import OF_RERANKERS, OF_RETRIEVERS, FinetuneSettings, find_problems
from quincunx.engine.retrieval.pipeline import RECIPE_FILE, STAGES_FOLDER, Stage
from quincunx.engine.run_settings import require
from quincunx.engine.settings import PretrainSettings
from quincunx.launchers import encode, evaluate, finetune, mine, pretrain, score, search, split
from quincunx.launchers.command_line import parse_settings
from quincunx.launchers.encode import EncodeSettings
from quincunx.launchers.evaluate import EvaluateSettings
from quincunx.launchers.mine import MineSettings
from quincunx.launchers.pipeline_recipe import TRAIN, Recipe, corpus_of
from quincunx.launchers.score import ScoreSettings
from quincunx.launchers.search import SearchSettings
from quincunx.launchers.split import SplitSettings

LAUNCHERS = Path(os.path.relpath(Path(__file__).parent))
CLASSES = {
    "build_shards.py": BuildSettings,
    "pretrain.py": PretrainSettings,
    "finetune.py": FinetuneSettings,
    "split.py": SplitSettings,
    "encode.py": EncodeSettings,
    "search.py": SearchSettings,
    "mine.py": MineSettings,
    "score.py": ScoreSettings,
    "evaluate.py": EvaluateSettings,
}
CHECKS: dict[type, Callable[[Any], Any]] = {
    FinetuneSettings: lambda settings: require(find_problems(dataclasses.replace(settings, probe=None))),
    SplitSettings: split.check_settings,
    EncodeSettings: encode.check_settings,
    SearchSettings: search.check_settings,
    MineSettings: mine.check_settings,
    ScoreSettings: score.check_settings,
    EvaluateSettings: evaluate.checked_measures,
}
"""What each launcher itself checks before it reads a file; the probe is not written when finetune's are checked."""
MACHINE = {"device", "batch_tokens", "patience", "per_query"}
"""Settings of encoding, searching, scoring and evaluating that change no result."""
MINED_DEPTH = 200
"""Ranks that are searched for mining where the recipe does not say: mine.py's own depth."""
LENGTHS = {"max_query_tokens": 32, "max_passage_tokens": 144}
"""finetune.py's own, for the encoder that is not fine-tuned yet."""
NAMES = {"model", "encoder", "path", "shards"}
"""Flags whose value may be a name instead of a file: of a model, of documentation to read, of a remote shard set."""

UNLEARNED = {"probe"}
"""Flags whose file changes nothing that a stage makes: another probe is no reason to train again."""


class Chain:
    """Stages as they are added, each in a folder of its own; a method gives the path of what its stage makes."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder
        self.stages: list[Stage] = []

    def split(self, name: str) -> None:
        split = self.recipe.splits[name]
        keys = ("sample", "probe_queries", "probe_passages", "unknown_ids")
        settings = {key: getattr(split, key) for key in keys if getattr(split, key) is not None}
        inputs = {"queries": split.queries, "qrels": split.qrels, "answers": split.answers}
        if split.probe_queries:
            inputs["corpus"] = split.corpus
            settings["titles"] = self.recipe.data.titles
        self._add(f"split.{name}", "split.py", settings, inputs)

    def pretrain(self) -> str:
        """The pre-trained encoder."""
        settings, inputs = self.recipe.settings("pretrain"), {}
        if self.recipe.has("shards"):
            shards = self.recipe.settings("shards")
            corpus = {"path": shards.pop("path", None)}
            inputs["shards"] = self._add("shards", "build_shards.py", shards, corpus, resumes=True)
        inputs["encoder"] = settings.pop("encoder", None)
        settings.setdefault("device", self.recipe.execution.device)
        return self._add("pretrain", "pretrain.py", settings, inputs, made="export/encoder", launched=True)

    def search(self, system: str, model: str | None, split: str) -> str:
        """A run of the split's queries: BM25's, or a retriever's over its embeddings of the passages."""
        inputs = {"queries": self._of_split(split, "queries.jsonl")}
        if system == "bm25":
            settings = {"method": "bm25", **self._placed("bm25")}
            inputs["corpus"] = self.recipe.splits[split].corpus
        else:
            settings = {"method": "dense", **self._untrained(system, "query"), **self._placed("search")}
            inputs |= {"model": model, "embeddings": self.encode(system, model, split)}
        if split == TRAIN:
            settings["depth"] = self.recipe.settings("mine", f"mine.{system}").get("depth", MINED_DEPTH)
        return self._add(f"search.{system}.{split}", "search.py", settings, inputs, "run.trec")

    def encode(self, system: str, model: str, split: str) -> str:
        """Embeddings of the passages that the split searches."""
        corpus = self.recipe.splits[split].corpus
        name = f"encode.{system}" if corpus == corpus_of(self.recipe.data) else f"encode.{system}.{split}"
        settings = {**self._untrained(system, "passage"), **self._placed("encode")}
        inputs = {"model": model, "corpus": corpus}
        return self._add(name, "encode.py", settings, inputs, "embeddings", launched=True)

    def mine(self, system: str, run: str) -> str:
        """Candidates from the system's run of the training queries."""
        inputs = {"run": run, "qrels": self._of_split(TRAIN, "qrels.tsv"), **self._training_data()}
        if self._has_answers(TRAIN):
            inputs["answers"] = self._of_split(TRAIN, "answers.jsonl")
        relevant_from = self.recipe.splits[TRAIN].relevant_from
        settings = {"relevant_from": relevant_from} | self.recipe.settings("mine", f"mine.{system}")
        return self._add(f"mine.{system}", "mine.py", settings, inputs, "negatives.jsonl")

    def finetune(self, stage: str, encoder: str, candidates: str) -> str:
        """The trained retriever or reranker."""
        idle = (*OF_RETRIEVERS, "probe_every") if stage == "reranker" else OF_RERANKERS
        shared = {key: value for key, value in self._placed("finetune").items() if key not in idle}
        settings = {"stage": stage, **shared, **self.recipe.settings(stage)}
        if settings.get("steps") is not None:
            settings.setdefault("epochs", None)  # of the stage's own recipe
        inputs = {"encoder": settings.pop("encoder", encoder), "candidates": candidates, **self._training_data()}
        probed = [name for name, split in self.recipe.splits.items() if split.probe_queries]
        if probed and stage != "reranker":
            inputs["probe"] = self._of_split(probed[0], "probe")
        made = "export/reranker" if stage == "reranker" else "export/retriever"
        return self._add(stage, "finetune.py", settings, inputs, made=made, launched=True)

    def score(self, model: str, candidates: str) -> str:
        """The candidates with the reranker's scores."""
        inputs = {"model": model, "candidates": candidates, **self._training_data()}
        return self._add("score", "score.py", self._placed("score"), inputs, "scored.jsonl", launched=True)

    def rerank(self, model: str, run: str, split: str) -> str:
        """The reranker's order of the top of a run."""
        inputs = {"model": model, "run": run, "corpus": self.recipe.splits[split].corpus}
        inputs["queries"] = self._of_split(split, "queries.jsonl")
        return self._add(f"rerank.{split}", "score.py", self._placed("rerank"), inputs, "run.trec", launched=True)

    def evaluate(self, system: str, run: str, split: str) -> None:
        """Means with intervals, and every query's values."""
        name, settings = f"evaluate.{system}.{split}", self.recipe.settings("evaluate")
        if self._has_answers(split):
            inputs = {"answers": self._of_split(split, "answers.jsonl"), "corpus": self.recipe.splits[split].corpus}
        else:
            inputs = {"qrels": self._of_split(split, "qrels.tsv")}
            settings["relevant_from"] = self.recipe.splits[split].relevant_from
        settings["per_query"] = str(self.folder / name / "queries.jsonl")
        self._add(name, "evaluate.py", settings, {"run": run, **inputs}, "result.json")

    def report(self) -> None:
        """The page over all stages, made anew when any of them has run or the recipe is another."""
        work = self.folder / "report"
        self.stages.append(
            Stage(
                name="report",
                command=[sys.executable, str(LAUNCHERS / "report.py"), "--pipeline", str(self.folder)],
                settings={},
                inputs={"recipe": self.folder / RECIPE_FILE}
                | {stage.name: self.folder / STAGES_FOLDER / f"{stage.name}.json" for stage in self.stages},
                work=work,
                outputs=[work / "report.html", work / "report.md"],
            )
        )

    def _add(
        self,
        name: str,
        script: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str | None],
        output: str = "",
        *,
        made: str = "",
        launched: bool = False,
        resumes: bool = False,
    ) -> str:
        """Adds a stage unless it is there; gives the path of what it makes.

        settings: flags of the script. inputs: flags that name a file, a folder or a model; None leaves one out.
        output: --output in the stage's folder (default: the folder itself). made: what of the output counts, in it.
        launched: by `execution.launch`, on many ranks, and resuming by itself.
        """
        work = self.folder / name
        target = work / output / made
        if any(stage.name == name for stage in self.stages):
            return str(target)
        inputs = {flag: path for flag, path in inputs.items() if path is not None}
        flags = {**settings, **inputs, "output": str(work / output)}
        words = [word for flag, value in flags.items() for word in (f"--{flag}", *as_words(value))]
        paths = {
            flag: Path(path)
            for flag, path in inputs.items()
            if flag not in UNLEARNED and (flag not in NAMES or self._is_path(path))
        }
        outputs = [target]
        if "per_query" in settings:
            outputs.append(Path(settings["per_query"]))
        self.stages.append(
            Stage(
                name=name,
                command=[*self._launch(launched), str(LAUNCHERS / script), *words],
                settings=resolved(name, script, words, paths),
                inputs=paths,
                work=work,
                outputs=outputs,
                resumes=launched or resumes,
            )
        )
        return str(target)

    def _is_path(self, name: str) -> bool:
        """Whether it is something on disk, now or once an earlier stage has run; else a model's name."""
        path = Path(name)
        return path.exists() or any(stage.work in (path, *path.parents) for stage in self.stages)

    def _launch(self, launched: bool) -> list[str]:
        """The words before the script; python, deepspeed and torchrun are those beside the Python that runs this."""
        beside = Path(sys.executable).parent
        words = shlex.split(self.recipe.execution.launch) if launched else ["python"]
        words = [str(beside / word) if (beside / word).is_file() else word for word in words]
        return [sys.executable if Path(word).name == "python" else word for word in words]

    def _placed(self, *sections: str) -> dict[str, Any]:
        """The settings of sections, with what all commands that read passages with a model have in common."""
        common = {"device": self.recipe.execution.device, "titles": self.recipe.data.titles}
        return common | self.recipe.settings(*sections)

    def _untrained(self, system: str, kind: str) -> dict[str, Any]:
        """Lengths and pooling for the encoder before its fine-tuning: those that it is fine-tuned with."""
        if system != "start":
            return {}
        found = LENGTHS | self.recipe.settings("finetune", "retriever1")
        pooling = {key: found[key] for key in ("pooling", "normalise") if key in found}
        return {"max_tokens": found[f"max_{kind}_tokens"], **pooling}

    def _training_data(self) -> dict[str, str]:
        return {"corpus": self.recipe.splits[TRAIN].corpus, "queries": self._of_split(TRAIN, "queries.jsonl")}

    def _of_split(self, split: str, name: str) -> str:
        return str(self.folder / f"split.{split}" / name)

    def _has_answers(self, split: str) -> bool:
        found = self.recipe.splits[split]
        return bool(found.answers) or found.queries.removesuffix(".gz").endswith((".json", ".csv"))


def as_words(value: Any) -> list[str]:
    """A setting's value as the words after its flag."""
    if isinstance(value, list | tuple):
        return [json.dumps(list(value))]
    if isinstance(value, bool) or value is None:
        return [json.dumps(value)]
    return [str(value)]


def resolved(name: str, script: str, words: list[str], inputs: Mapping[str, Path]) -> dict[str, Any]:
    """All settings of a command that decide what it makes, defaults included, paths left out.

    Raises SettingsError, naming the stage, for a setting that its launcher would refuse; so nothing starts that a
    later stage's typing error would end.
    """
    options: dict[str, Any] = {}
    if script == "pretrain.py":
        options = {"config_folder": pretrain.RECIPES, "default_config": pretrain.DEFAULT_RECIPE}
    elif script == "finetune.py":
        options = {"config_folder": finetune.RECIPES, "base_config": finetune.stage_named_in(words)}
    flag = "--recipe" if options else "--config"
    kind = CLASSES[script]
    try:
        settings = parse_settings(kind, "", words, config_flag=flag, **options)
        CHECKS.get(kind, lambda _: None)(settings)
    except SettingsError as error:
        raise SettingsError(f"stage {name}: {error}") from None
    left_out = {*MACHINE, *getattr(kind, "MACHINE_FIELDS", ()), "output", *inputs}
    return {key: value for key, value in dataclasses.asdict(settings).items() if key not in left_out}
