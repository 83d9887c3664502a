"""Fine-tuning: its settings, what its runs share as jobs of the training loop, and the export of what they trained.

Two kinds of job have the steps: retriever_job.py (stages retriever1, retriever2, distil) and reranker_job.py.
recipes/finetune/ holds the stages' published values (SimLM's recipe, which MASTER follows); `--recipe` chooses one.

OUTPUT/export/retriever   SentenceTransformer and load_retriever load it
OUTPUT/export/reranker    sentence-transformers' CrossEncoder and load_reranker load it
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quincunx.data_shards.durable import file_digest
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.setting import setting
from quincunx.engine.checkpoint import Checkpoint
from quincunx.engine.export import PLOT_FILE, learned_settings, model_card, open_export
from quincunx.engine.ranks import Environment, choose_device
from quincunx.engine.retrieval.candidates import iterate_candidates
from quincunx.engine.retrieval.collection import read_passages, read_queries
from quincunx.engine.retrieval.trec import read_qrels
from quincunx.engine.run_folder import MODEL_FOLDER
from quincunx.engine.settings import Machine, RunSettings, load_machine

if TYPE_CHECKING:
    import torch

    from quincunx.data_shards.stream import Stream
    from quincunx.engine.evaluations import Probe
    from quincunx.engine.retrieval.cross_encoder import Reranker
    from quincunx.engine.retrieval.dual_encoder import Retriever

OF_RETRIEVERS = (
    "max_query_tokens", "max_passage_tokens", "towers", "pooling", "normalise", "temperature", "all_pairs",
    "mask_known_positives",
)  # fmt: skip
OF_RERANKERS = ("max_pair_tokens", "gradient_candidates", "r_drop")
OF_DISTILLING = ("distil_loss", "contrastive_weight")
"""Settings that only some stages have."""
USAGE = {
    "retriever": """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
scores = model.similarity(model.encode_query(["a query"]), model.encode_document(["a passage", "another"]))
```""",
    "reranker": """```python
from sentence_transformers import CrossEncoder

scores = CrossEncoder(".").predict([("a query", "a passage")])
```""",
}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(RunSettings):
    """Settings of a fine-tuning run."""

    stage: Literal["retriever1", "retriever2", "reranker", "distil"] = setting("retriever1", role="model")
    """What is trained: a dual encoder (retriever1 on BM25's negatives, retriever2 on mined ones, distil on a teacher's
    scores too) or a reranker, a cross-encoder."""
    output: str = setting("runs/finetune", role="machine", local=True)
    """Run folder: checkpoints, metrics.jsonl, settings.yaml, export/. The same command on the same folder resumes."""
    encoder: str = setting("bert-base-uncased", role="data", local=True)
    """Model to start from: a pre-training run's export/encoder, a Hugging Face name or folder, package:NAME/FOLDER."""
    candidates: str = setting("", role="data", local=True)
    """Training queries with positives and negatives: a file of mine.py or of SimLM's; for distil one of score.py."""
    corpus: str = setting("", role="data", local=True)
    """Passages: a BEIR folder or corpus.jsonl, an MS MARCO tsv, a DPR tsv, JSONL or Parquet."""
    queries: str = setting("", role="data", local=True)
    """Queries: a BEIR folder or queries.jsonl, a tsv (query id, text), DPR json."""
    titles: bool = True
    """Put a passage's title before its text."""

    global_batch: int = setting(64, low=1, high=2**24, role="stream")
    """Queries of one optimizer step, over ranks and accumulation; all passages of the step are negatives of each."""
    micro_batch: int | None = setting(None, low=1, role="machine")
    """Queries (each with its passages) of one forward pass of one rank (default: the DeepSpeed JSON's number, else as
    many as divide the rank's share, at most 32). Changes memory and speed, not the gradient: a step that takes several
    encodes everything twice (gradient cache)."""
    num_negatives: int = setting(15, low=0, role="stream")
    """Negatives of each query in a step, drawn anew every epoch from its candidates."""
    max_query_tokens: int = setting(32, low=8)
    """Longest query in tokens, [CLS] and [SEP] included."""
    max_passage_tokens: int = setting(144, low=8)
    """Longest passage in tokens, [CLS] and [SEP] included."""
    max_pair_tokens: int = setting(192, low=8)
    """Longest (query, passage) pair of a reranker in tokens, special tokens included."""
    learning_rate: float = setting(2e-5, above=0, below=10**6)
    """Peak learning rate."""

    towers: Literal["shared", "separate"] = setting("shared", role="model")
    """One encoder for queries and passages, or two that start alike."""
    pooling: Literal["cls", "mean"] | None = setting(None, role="model")
    """A text's vector: its [CLS] state or the mean over its tokens (default: what its folder says, else cls)."""
    normalise: bool = setting(True, role="model")
    """Vectors of length 1 (cosine); false is the plain dot product."""
    temperature: float = setting(0.02, above=0, high=100)
    """A retriever's scores are divided by it in every loss (SimLM: 0.02 with length 1; 1 for plain dot products)."""
    all_pairs: bool = False
    """Also contrast positive with queries, query with queries and positive with positives (SimLM's k-q, q-q, k-k)."""
    mask_known_positives: bool = True
    """Passages of other queries that are known positives of this one are no negatives of it."""
    distil_loss: Literal["kl", "margin_mse"] = "kl"
    """How a student follows its teacher's scores: KL divergence or margin-MSE."""
    contrastive_weight: float = setting(0.2, low=0, high=100)
    """Weight of the contrastive loss beside the teacher's in distil (SimLM: 0.2)."""

    gradient_candidates: int | None = None
    """Candidates of a query that a reranker's gradient goes through: the positive and the negatives that it scores
    highest now; the others only take part in that choice (SimLM: 16 of 64; default: all)."""
    r_drop: float = setting(1.0, low=0, high=100)
    """Weight of a reranker's R-Drop, which makes two dropout passes agree; 0 leaves it out and saves half the time."""

    probe_split: str = setting("dev", role="machine")
    """The probe judges by qrels/SPLIT.tsv of its folder."""

    @property
    def is_reranker(self) -> bool:
        return self.stage == "reranker"

    def contradictions(self) -> list[str]:
        problems = super().contradictions()
        for name in ("candidates", "corpus", "queries"):
            if not getattr(self, name):
                problems.append(f"{name} is not given; name a file (or, for corpus and queries, a BEIR folder)")
        if self.num_negatives < 1 and self.stage not in ("retriever1", "retriever2"):
            problems.append(
                f"num_negatives is {self.num_negatives}; {self.stage} compares candidates of one query and needs at "
                "least 1"
            )
        if self.gradient_candidates is not None and not 2 <= self.gradient_candidates <= self.num_negatives + 1:
            problems.append(
                f"gradient_candidates is {self.gradient_candidates}; it must lie between 2 and num_negatives + 1, "
                f"which is {self.num_negatives + 1}"
            )
        return problems

    def idle(self) -> list[str]:
        """One sentence per setting that was changed but has no effect in this stage."""
        groups = (
            (self.is_reranker, (*OF_RETRIEVERS, "probe"), "a reranker reads pairs"),
            (not self.is_reranker, OF_RERANKERS, "only a reranker has it"),
            (self.stage != "distil", OF_DISTILLING, "only distil has it"),
        )
        defaults = FinetuneSettings()
        return [
            f"{name} has no effect in stage {self.stage}: {reason}"
            for is_idle, names, reason in groups
            for name in names
            if is_idle and getattr(self, name) != getattr(defaults, name)
        ]


@dataclass(frozen=True)
class FinetuneJob:
    """What the two kinds of fine-tuning share; fields and methods as engine/training.py has them."""

    settings: FinetuneSettings
    machine: Machine
    loaded: "Retriever | Reranker"
    """The model to train, with its tokenizer."""
    stream: "Stream"
    probe: "Probe | None"
    data: dict[str, list]
    """The ids are of candidates, passages, queries, and the model that training starts from."""

    @property
    def model(self) -> "torch.nn.Module":
        return self.loaded.model


def finetune(settings: FinetuneSettings, environment: Environment) -> int:
    """Runs or resumes a fine-tuning on this rank; returns the process's exit code (engine/training.py)."""
    from quincunx.engine.training import run_training

    return run_training(lambda: prepare(settings, environment), environment)


def prepare(settings: FinetuneSettings, environment: Environment) -> FinetuneJob:
    """Checks data and model, and opens them. Raises SettingsError or DataError."""
    import torch

    from quincunx.engine.retrieval.examples import Groups, RerankerPacker, RetrieverPacker, stream_examples
    from quincunx.engine.retrieval.reranker_job import RerankerJob
    from quincunx.engine.retrieval.retriever_job import RetrieverJob

    machine = load_machine(settings, environment.world_size, choose_device(settings.device, environment))
    groups = Groups(
        iterate_candidates(settings.candidates),
        read_queries(settings.queries),
        read_passages(settings.corpus, titles=settings.titles),
        num_hard_negatives=settings.num_negatives,
        seed=settings.seed,
        with_scores=settings.stage == "distil",
    )
    torch.manual_seed(settings.seed)
    loaded, probe = load_to_train(settings), None
    if settings.is_reranker:
        job, packer = RerankerJob, RerankerPacker(groups, loaded.tokenizer, max_tokens=settings.max_pair_tokens)
    else:
        job = RetrieverJob
        packer = RetrieverPacker(groups, loaded.tokenizer, loaded.max_tokens, loaded.prompts)
        if settings.probe is not None and settings.probe_every:
            probe = load_judged(settings, loaded)
    stream = stream_examples(
        packer,
        seed=settings.seed,
        global_batch=settings.global_batch,
        micro_batch=machine.micro_batch,
        rank=environment.rank,
        world_size=environment.world_size,
        num_workers=settings.num_workers,
    )
    if environment.is_main:
        filled = f", groups of {groups.num_filled:,} queries filled up" if groups.num_filled else ""
        print(
            f"stage {settings.stage}: {len(groups):,} queries with {groups.group - 1} negatives{filled}, an epoch is "
            f"{len(groups) / settings.global_batch:,.1f} steps"
        )
        for sentence in settings.idle():
            print(f"warning: {sentence}")
    digests = [file_digest(settings.candidates), groups.passages.digest, groups.queries.digest, loaded.digest]
    return job(
        settings=settings,
        machine=machine,
        loaded=loaded,
        stream=stream,
        probe=probe,
        data={"dataset_ids": digests, "dataset_weights": [1] * len(digests)},
    )


def load_judged(settings: FinetuneSettings, retriever: "Retriever") -> "Probe":
    """The probe, judged by qrels/SPLIT.tsv and read as the retriever reads texts. Raises DataError."""
    from quincunx.engine.evaluations import make_probe

    folder = Path(settings.probe)
    passages, queries = read_passages(folder, titles=settings.titles), read_queries(folder)
    qrels = read_qrels(folder / "qrels" / f"{settings.probe_split}.tsv")
    passage_texts = dict(zip(passages.ids(), passages.texts()))
    return make_probe(folder, passage_texts, dict(zip(queries.ids(), queries.texts())), qrels, retriever.tokenise)


def load_to_train(settings: FinetuneSettings) -> "Retriever | Reranker":
    """The model that training starts from, in training mode. Raises SettingsError."""
    from quincunx.engine.retrieval.cross_encoder import load_reranker
    from quincunx.engine.retrieval.dual_encoder import DualEncoder, load_retriever

    training = {"dropout": settings.dropout, "gradient_checkpointing": settings.gradient_checkpointing}
    if settings.is_reranker:
        loaded = load_reranker(settings.encoder, max_tokens=settings.max_pair_tokens, **training)
    else:
        limits = {"query": settings.max_query_tokens, "passage": settings.max_passage_tokens}
        given = {"pooling": settings.pooling, "normalise": settings.normalise, "max_tokens": limits}
        loaded = load_retriever(settings.encoder, **given, **training)
        model = loaded.model
        if settings.towers == "shared" and not model.shared:
            raise SettingsError(f"encoder {settings.encoder} has two towers; give --towers separate")
        if settings.towers == "separate" and model.shared:
            model = DualEncoder(model.passage, copy.deepcopy(model.passage), model.pooling, model.normalise)
            loaded = dataclasses.replace(loaded, model=model)
    loaded.model.train()
    return loaded


def export_finetuned(run_folder: Path, output: Path, step: int | None = None) -> Path:
    """Exports the newest checkpoint that verifies, or that step's; replaces an earlier export. Returns its folder.

    Configuration and tokenizer come from the run's folder `model`, which holds the model that the run started from.
    Raises CheckpointError as open_export.
    """
    from quincunx.engine.retrieval.cross_encoder import load_reranker, save_reranker
    from quincunx.engine.retrieval.dual_encoder import load_retriever, save_retriever

    checkpoint, weights, plot = open_export(run_folder, output, step)
    kind = "reranker" if checkpoint.state["settings"]["stage"] == "reranker" else "retriever"
    folder, card = output / kind, finetuned_card(run_folder, checkpoint, kind, plot)
    load, save = (load_reranker, save_reranker) if kind == "reranker" else (load_retriever, save_retriever)
    save(folder, load(str(run_folder / MODEL_FOLDER)), weights, card=card)
    if plot:
        (folder / PLOT_FILE).write_bytes((output / PLOT_FILE).read_bytes())
    return folder


def finetuned_card(run_folder: Path, checkpoint: Checkpoint, kind: str, plot: bool) -> str:
    """README.md of a fine-tuned model, in the Hugging Face hub's format."""
    settings = checkpoint.state["settings"]
    names = ("candidates", "corpus", "queries", "starting model")
    titles = "stand before the passages" if settings["titles"] else "are left out"
    digests = "\n".join(f"- {name}: `{digest}`" for name, digest in zip(names, checkpoint.state["dataset_ids"]))
    return model_card(
        run_folder,
        run_folder.resolve().name,
        f"A {'reranker (cross-encoder)' if kind == 'reranker' else 'dense retriever'}, stage {settings['stage']}, "
        f"fine-tuned with quincunx for {checkpoint.step} steps of {settings['global_batch']} queries with "
        f"{settings['num_negatives']} negatives each, starting from `{settings['encoder']}`.",
        f"## Use\n\n{USAGE[kind]}",
        f"By the digests of their content; titles {titles}.\n\n{digests}",
        learned_settings(FinetuneSettings, settings),
        pipeline={"reranker": "text-ranking", "retriever": "sentence-similarity"}[kind],
        tags=[settings["stage"]],
        plot=plot,
    )
