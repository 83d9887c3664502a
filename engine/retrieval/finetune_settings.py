"""What a fine-tuning run learns and from what: the settings of every stage, with defaults, units and ranges.

recipes/finetune/ holds the stages' published values (SimLM's recipe, which MASTER follows); `--recipe` chooses one.
"""

from dataclasses import dataclass
from typing import Literal

from quincunx.data_shards.setting import setting
from quincunx.engine.settings import RunSettings

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
