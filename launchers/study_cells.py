"""The cells of a study, and the commands that make one.

A cell is (collection, variant, seed). Its record says all that went in (`made_from`) and all that came out.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quincunx.data_shards.artefact import differences
from quincunx.data_shards.durable import file_digest, written_whole
from quincunx.data_shards.errors import EXIT_DIVERGED, DataError, SettingsError
from quincunx.engine.retrieval.study_report import describe_code, read_pretraining, results_of
from quincunx.engine.retrieval.trec import read_qrels
from quincunx.engine.tracking import read_metrics
from quincunx.launchers.study_recipe import Recipe

PROBE_QUERIES, PROBE_PASSAGES = 300, 3000
NEVER = 10**6
TRAIN_NEGATIVES = 20
"""BM25's negatives that a training query keeps."""
Run = Callable[..., None]
"""run(command, **flags): one launcher; raises CommandFailed."""


class CommandFailed(DataError):
    """A command of a cell ended with `exit_code`, or was not begun because of a request to stop."""

    def __init__(self, exit_code: int, sentence: str):
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Record:
    """A small file: `made_from`, all that decides a result, and what came out."""

    path: Path
    made_from: Mapping[str, Any]
    results: frozenset[str]
    """Keys of what came out, if it did not diverge."""

    def read(self) -> dict[str, Any] | None:
        """What it says; None if it is not made yet. Raises SettingsError if it is damaged, or was made otherwise."""
        try:
            record = json.loads(self.path.read_text())
            then = dict(record["made_from"])
            if "diverged" not in record and self.results - record.keys():
                raise KeyError
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise SettingsError(f"{self.path} is damaged: remove it, and it is made again") from None
        if then != self.made_from:
            raise SettingsError(
                f"{self.path} was made otherwise ({differences(then, self.made_from)}): give another --output, or the "
                "recipe and collection that it was made with"
            )
        return record

    def write(self, found: Mapping[str, Any]) -> None:
        """One key a line: lists of values stay on theirs."""
        record = {**found, "made_from": self.made_from}
        with written_whole(self.path) as file:
            file.write("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()) + "\n}\n")


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
    def label(self) -> str:
        return f"{self.collection.name} {self.variant} seed {self.seed}"

    @property
    def record(self) -> Record:
        path = self.output / "cells" / self.collection.name / self.variant / f"seed-{self.seed}.json"
        return Record(path, self.made_from, frozenset({"measures", "per_query", "before", "probe", "held_out"}))

    @property
    def bm25(self) -> Record:
        """BM25's record of the cell's collection."""
        made_from = {name: self.made_from[name] for name in ("collection", "split", "measures")}
        path = self.output / "cells" / self.collection.name / "bm25.json"
        return Record(path, made_from, frozenset({"measures", "per_query"}))

    @property
    def log(self) -> Path:
        return self.tuned / "log.txt"

    @property
    def texts(self) -> dict[str, Path]:
        return {"corpus": self.collection, "queries": self.collection}

    @property
    def judged(self) -> Path:
        return self.collection / "qrels" / f"{self.made_from['split']}.tsv"

    @property
    def shards(self) -> Path:
        return self.data / ("shards" if self.made_from["generate"] else "plain")

    @property
    def candidates(self) -> Path:
        return self.data / f"candidates-{self.made_from['train_share']!r}.jsonl"

    @cached_property
    def data(self) -> Path:
        return self._folder("data", "collection", "shards", "generate", "split", "measures")

    @cached_property
    def pretrained(self) -> Path:
        """Run folder of the pre-training, the same for all cells that share it."""
        return self._folder("pretrain", "collection", "shards", "generate", "pretrain")

    @cached_property
    def tuned(self) -> Path:
        return self._folder(self.variant, *self.made_from)

    def _folder(self, name: str, *decided_by: str) -> Path:
        decided = json.dumps({key: self.made_from[key] for key in decided_by}, sort_keys=True)
        return self.work / self.collection.name / f"{name}-{hashlib.sha256(decided.encode()).hexdigest()[:8]}"

    def is_made(self) -> bool:
        """Whether the cell's record and BM25's beside it are there."""
        return self.record.read() is not None and self.bm25.read() is not None

    def outcome(self) -> str:
        """The first measure of a finished cell, in words."""
        record = self.record.read()
        if "diverged" in record:
            return "diverged"
        name, found = next(iter(record["measures"].items()))
        return f"{name} {found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def make_cells(recipe: Recipe, collections: Sequence[str], output: Path, work: Path) -> list[Cell]:
    """All cells, a seed of every collection after the other. Raises SettingsError for collections that do not serve."""
    folders = [Path(os.path.abspath(collection)) for collection in collections]
    if len({folder.name for folder in folders}) != len(folders):
        raise SettingsError(f"two collections have the same name: {', '.join(map(str, folders))}; rename a folder")
    digests = {folder: collection_digests(folder, recipe.split) for folder in folders}
    return [
        Cell(
            collection=folder,
            variant=name,
            seed=seed,
            made_from={
                "collection": digests[folder],
                "shards": {**recipe.shards},
                "generate": {**recipe.generate},
                "pretrain": {**variant.pretrain, "seed": seed},
                "finetune": {**variant.finetune, "seed": seed},
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


def collection_digests(folder: Path, split: str) -> dict[str, str]:
    """Digests of a BEIR folder's files. Raises SettingsError if one that the study reads is missing."""
    files = ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", f"qrels/{split}.tsv"]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise SettingsError(
            f"collection {folder} has no {', '.join(missing)}: give a BEIR folder with training queries and "
            f"judgements of the split {split}"
        )
    return {name: file_digest(folder / name) for name in files}


def make_data(cell: Cell, run: Run) -> None:
    """What cells of a collection share: shards, a probe of judged queries, BM25 and its record, candidates."""
    folder = cell.data
    if not (folder / "result.json").exists():
        make_shards(cell, run)
        probe = {"probe_queries": PROBE_QUERIES, "probe_passages": PROBE_PASSAGES}
        run("split", **cell.texts, qrels=cell.judged, **probe, output=folder / "judged")
        search_and_judge(cell, folder, run, method="bm25", **cell.texts)
    if not cell.candidates.exists():
        share, qrels = cell.made_from["train_share"], cell.collection / "qrels" / "train.tsv"
        train, ranks = folder / f"train-{share!r}", TRAIN_NEGATIVES + 10
        sample = max(1, round(share * len(read_qrels(qrels))))
        run("split", queries=cell.collection, qrels=qrels, sample=sample, output=train)
        texts = {"corpus": cell.collection, "queries": train / "queries.jsonl", "qrels": train / "qrels.tsv"}
        run("search", method="bm25", **texts, depth=ranks, output=train / "bm25.trec")
        kept = {"depth": ranks, "num_negatives": TRAIN_NEGATIVES, "random_fill": TRAIN_NEGATIVES}
        run("mine", run=train / "bm25.trec", **texts, **kept, output=cell.candidates)
    if cell.bm25.read() is None:
        cell.bm25.write(results_of(folder))


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


def search_and_judge(cell: Cell, folder: Path, run: Run, **search: Any) -> None:
    """Searches for the judged queries, and evaluates what is found."""
    measures, found = cell.made_from["measures"], folder / "run.trec"
    run("search", **search, qrels=cell.judged, depth=depth_for(measures), output=found)
    judged = {"qrels": cell.judged, "per_query": folder / "queries.jsonl"}
    run("evaluate", run=found, **judged, measures=measures, output=folder / "result.json")


def depth_for(measures: Sequence[str]) -> int:
    """Passages of a run that the measures look at: the largest cutoff, 1,000 where one has none, at least 100."""
    cutoffs = [int(found[1]) if (found := re.search(r"@(\d+)$", measure)) else 1000 for measure in measures]
    return max([100, *cutoffs])


def make_cell(cell: Cell, run: Run) -> None:
    """Runs the cell's commands, each of which goes on where it stopped, and writes the cell's record."""
    record: dict[str, Any] = {"collection": cell.collection.name, "variant": cell.variant, "seed": cell.seed}
    try:
        train_and_judge(cell, run)
    except CommandFailed as failed:
        if failed.exit_code != EXIT_DIVERGED:
            raise
        record["diverged"] = True
    else:
        before = next(line for line in read_metrics(cell.tuned) if line["kind"] == "probe")
        record |= results_of(cell.tuned)
        record["before"] = {name.removeprefix("probe/"): before[name] for name in before if name.startswith("probe/")}
        record |= {**read_pretraining(cell.pretrained), "code": describe_code()}
    cell.record.write(record)


def train_and_judge(cell: Cell, run: Run) -> None:
    made_from, tuned = cell.made_from, cell.tuned
    encoder, retriever = cell.pretrained / "export" / "encoder", tuned / "export" / "retriever"
    if not encoder.exists():
        inputs = {"shards": [cell.shards], "probe": cell.data / "judged" / "probe"}
        run("pretrain", **{"tracking": "none", **made_from["pretrain"], **inputs, "output": cell.pretrained})
    if not retriever.exists():
        if made_from["at_step"] is not None:
            encoder = tuned / "pretrained" / "encoder"
            run("export", run=cell.pretrained, step=made_from["at_step"], output=encoder.parent)
        given = {"encoder": encoder, "candidates": cell.candidates, **cell.texts, "probe": cell.collection}
        seldom = {"probe_split": made_from["split"], "probe_every": NEVER, "checkpoint_every": NEVER}
        run("finetune", **{"tracking": "none", **seldom, **made_from["finetune"], **given, "output": tuned})
    model = {"model": retriever, "precision": "float32", "device": made_from["finetune"].get("device", "auto")}
    # float32: vectors of an encoder that has learned little are nearly alike, and float16 ranks them wrongly.
    run("encode", **model, corpus=cell.collection, dtype="float32", output=tuned / "embeddings")
    search_and_judge(cell, tuned, run, **model, embeddings=tuned / "embeddings", queries=cell.collection)
