"""What a fine-tuning run learns and from what: the settings of every stage, with defaults, units and ranges.

recipes/finetune/ holds the stages' published values (SimLM's recipe, which MASTER follows); `--stage` chooses one.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from quincunx.engine.run_settings import RunSettings, find_run_problems

STAGES = ("retriever1", "retriever2", "reranker", "distil")
OF_RETRIEVERS = (
    "max_query_tokens", "max_passage_tokens", "towers", "pooling", "normalise", "temperature", "all_pairs",
    "mask_known_positives",
)  # fmt: skip
OF_RERANKERS = ("max_pair_tokens", "gradient_candidates", "r_drop")
"""Settings that only the one kind of model has."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(RunSettings):
    """Settings of a fine-tuning run."""

    STREAM_FIELDS: ClassVar = ("seed", "global_batch", "num_negatives")
    MODEL_FIELDS: ClassVar = ("stage", "towers", "pooling", "normalise")
    MACHINE_FIELDS: ClassVar = (*RunSettings.MACHINE_FIELDS, "probe_split")
    DATA_FIELDS: ClassVar = ("encoder", "candidates", "corpus", "queries")
    LOCAL_FIELDS: ClassVar = (*RunSettings.LOCAL_FIELDS, *DATA_FIELDS)

    stage: Literal["retriever1", "retriever2", "reranker", "distil"] = "retriever1"
    """What is trained: a dual encoder (retriever1 on BM25's negatives, retriever2 on mined ones, distil on a teacher's
    scores too) or a reranker, a cross-encoder."""
    output: str = "runs/finetune"
    """Run folder: checkpoints, metrics.jsonl, settings.yaml, export/. The same command on the same folder resumes."""
    encoder: str = "bert-base-uncased"
    """Model to start from: a pre-training run's export/encoder, a Hugging Face name or folder, package:NAME/FOLDER."""
    candidates: str = ""
    """Training queries with positives and negatives: a file of mine.py or of SimLM's; for distil one of score.py."""
    corpus: str = ""
    """Passages: a BEIR folder or corpus.jsonl, an MS MARCO tsv, a DPR tsv, JSONL or Parquet."""
    queries: str = ""
    """Queries: a BEIR folder or queries.jsonl, a tsv (query id, text), DPR json."""
    titles: bool = True
    """Put a passage's title before its text."""

    global_batch: int = 64
    """Queries of one optimizer step, over ranks and accumulation; all passages of the step are negatives of each."""
    micro_batch: int | None = None
    """Queries (each with its passages) of one forward pass of one rank (default: the DeepSpeed JSON's number, else as
    many as divide the rank's share, at most 32). Changes memory and speed, not the gradient: a step that takes several
    encodes everything twice (gradient cache)."""
    num_negatives: int = 15
    """Negatives of each query in a step, drawn anew every epoch from its candidates."""
    max_query_tokens: int = 32
    """Longest query in tokens, [CLS] and [SEP] included."""
    max_passage_tokens: int = 144
    """Longest passage in tokens, [CLS] and [SEP] included."""
    max_pair_tokens: int = 192
    """Longest (query, passage) pair of a reranker in tokens, special tokens included."""
    learning_rate: float = 2e-5
    """Peak learning rate."""

    towers: Literal["shared", "separate"] = "shared"
    """One encoder for queries and passages, or two that start alike."""
    pooling: Literal["cls", "mean"] | None = None
    """A text's vector: its [CLS] state or the mean over its tokens (default: what its folder says, else cls)."""
    normalise: bool = True
    """Vectors of length 1 (cosine); false is the plain dot product."""
    temperature: float = 0.02
    """A retriever's scores are divided by it in every loss (SimLM: 0.02 with length 1; 1 for plain dot products)."""
    all_pairs: bool = False
    """Also contrast positive with queries, query with queries and positive with positives (SimLM's k-q, q-q, k-k)."""
    mask_known_positives: bool = True
    """Passages of other queries that are known positives of this one are no negatives of it."""
    distil_loss: Literal["kl", "margin_mse"] = "kl"
    """How a student follows its teacher's scores: KL divergence or margin-MSE."""
    contrastive_weight: float = 0.2
    """Weight of the contrastive loss beside the teacher's in distil (SimLM: 0.2)."""

    gradient_candidates: int | None = None
    """Candidates of a query that a reranker's gradient goes through: the positive and the negatives that it scores
    highest now; the others only take part in that choice (SimLM: 16 of 64; default: all)."""
    r_drop: float = 1.0
    """Weight of a reranker's R-Drop, which makes two dropout passes agree; 0 leaves it out and saves half the time."""

    probe_split: str = "dev"
    """The probe judges by qrels/SPLIT.tsv of its folder."""

    @property
    def is_reranker(self) -> bool:
        return self.stage == "reranker"


def find_problems(settings: FinetuneSettings) -> list[str]:
    """Every value out of its range and every contradiction, each as one clause; empty where there is none."""
    problems = find_run_problems(settings)

    def need(condition: bool, clause: str) -> None:
        if not condition:
            problems.append(clause)

    s = settings
    for name in ("candidates", "corpus", "queries"):
        need(bool(getattr(s, name)), f"{name} is not given; name a file (or, for corpus and queries, a BEIR folder)")
    need(s.num_negatives >= 0, f"num_negatives is {s.num_negatives}; it must be at least 0")
    need(
        s.num_negatives >= 1 or s.stage in ("retriever1", "retriever2"),
        f"num_negatives is {s.num_negatives}; {s.stage} compares candidates of one query and needs at least 1",
    )
    for name in ("max_query_tokens", "max_passage_tokens", "max_pair_tokens"):
        need(getattr(s, name) >= 8, f"{name} is {getattr(s, name)}; it must be at least 8")
    need(0 < s.temperature <= 100, f"temperature is {s.temperature}; it must be above 0 and at most 100")
    for name in ("contrastive_weight", "r_drop"):
        need(0 <= getattr(s, name) <= 100, f"{name} is {getattr(s, name)}; it must lie between 0 and 100")
    need(
        s.gradient_candidates is None or 2 <= s.gradient_candidates <= s.num_negatives + 1,
        f"gradient_candidates is {s.gradient_candidates}; it must lie between 2 and num_negatives + 1, which is "
        f"{s.num_negatives + 1}",
    )
    return problems


def find_idle_settings(settings: FinetuneSettings) -> list[str]:
    """One sentence per setting that was changed but has no effect in this stage."""
    defaults, sentences = FinetuneSettings(), []
    groups = (
        (settings.is_reranker, (*OF_RETRIEVERS, "probe"), "a reranker reads pairs"),
        (not settings.is_reranker, OF_RERANKERS, "only a reranker has it"),
        (settings.stage != "distil", ("distil_loss", "contrastive_weight"), "only distil has it"),
    )
    for idle, names, reason in groups:
        for name in names if idle else ():
            if getattr(settings, name) != getattr(defaults, name):
                sentences.append(f"{name} has no effect in stage {settings.stage}: {reason}")
    return sentences
