"""What a pre-training run learns and from what: every setting once, with its default, unit and range.

How it is run (ZeRO stage, offload, precision) stands in the DeepSpeed JSON instead (ds_configs/, docs/training.md).
Defaults are the papers': RetroMAE's where both speak, MASTER's where only MASTER does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from quincunx.data_shards.tasks import TASKS, TaskSpec
from quincunx.engine.run_settings import RunSettings, find_run_problems


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(RunSettings):
    """Settings of a pre-training run."""

    STREAM_FIELDS: ClassVar = ("seed", "global_batch", "max_tokens", "neighbour")
    MODEL_FIELDS: ClassVar = (
        "encoder", "from_scratch", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions",
        "tasks", "decoder", "decoder_layers", "query_stream", "shared_decoder",
    )  # fmt: skip
    MACHINE_FIELDS: ClassVar = (
        *RunSettings.MACHINE_FIELDS, "kernels", "held_out_every", "held_out_passages", "cache", "cache_gb",
    )  # fmt: skip
    DATA_FIELDS: ClassVar = ("shards",)
    LOCAL_FIELDS: ClassVar = (*RunSettings.LOCAL_FIELDS, "shards", "cache", "cache_gb")

    shards: list[str] = field(default_factory=lambda: ["demo_run/shards"])
    """Shard sets made by build_shards.py: folders or URLs (s3://, gs://, https://), each with an optional :WEIGHT, the
    whole number of its turns in a mixture."""
    output: str = "runs/pretrain"
    """Run folder: checkpoints, metrics.jsonl, settings.yaml. The same command on the same folder resumes."""
    learning_rate: float = 1e-4
    """Peak learning rate (RetroMAE: 1e-4; MASTER: 3e-4)."""
    global_batch: int = 256
    """Passages of one optimizer step, over all ranks and accumulation (RetroMAE: 256 on Wikipedia)."""
    export: bool = True
    """Export the encoder, the sentence-transformers model and the full bundle into OUTPUT/export at the end."""

    encoder: str = "bert-base-uncased"
    """Encoder to start from: a Hugging Face name or folder, package:MODULE/FOLDER, or one of our bundles (then with its
    decoders and LM head)."""
    from_scratch: bool = False
    """Start from random weights: the encoder's architecture (or a model type such as bert) at the sizes below."""
    hidden_size: int | None = None
    """Width of an encoder from scratch."""
    num_layers: int | None = None
    """Layers of an encoder from scratch."""
    num_heads: int | None = None
    """Attention heads of an encoder from scratch."""
    intermediate_size: int | None = None
    """Feed-forward width of an encoder from scratch (default: 4 x hidden_size)."""
    max_positions: int | None = None
    """Longest text that an encoder from scratch can read, in tokens (default: max_tokens)."""
    tasks: list[str] = field(default_factory=lambda: ["retromae"])
    """Decoder tasks: mkp, cmp, npr, dor, gor, retromae; none of them ([]) is masked language modelling alone."""
    decoder: Literal["masked", "enhanced"] = "enhanced"
    """Kind of decoder: masked (MASTER) or enhanced (RetroMAE, Eq. 4 to 7)."""
    decoder_layers: int = 2
    """Layers of a masked decoder (MASTER: 2); an enhanced decoder has one by definition."""
    decoder_init: Literal["random", "encoder"] = "random"
    """Decoder layers start random, or as copies of the encoder's last layers (as SimLM does)."""
    query_stream: Literal["raw", "embedded"] = "raw"
    """Query stream of an enhanced decoder: raw h + position (RetroMAE's code), or passed through the embedding layer's
    LayerNorm and dropout (its FlagEmbedding fork)."""
    shared_decoder: bool = False
    """All tasks decode through one decoder instead of one each (MASTER's ablation, Table 6)."""
    task_weights: list[float] | None = None
    """Weight lambda of each task's loss; the encoder's own has 1 (default: the share of passages with its text)."""
    encoder_mask_rate: float = 0.30
    """Share of the encoder's tokens that are masked, alpha (RetroMAE, MASTER: 0.30)."""
    decoder_mask_rate: float = 0.50
    """Share of a decoder's tokens that are hidden, beta (RetroMAE, MASTER: 0.50)."""
    corruption: Literal["80-10-10", "mask"] = "80-10-10"
    """What a masked token becomes: [MASK], a random token or itself at 80/10/10 per cent, or always [MASK]."""
    neighbour: Literal["next", "halves"] = "next"
    """What npr decodes: the document's next passage (MASTER's paper), or the second half of a passage whose first half
    the encoder reads (MASTER's code)."""
    max_tokens: int = 512
    """Longest text in tokens, [CLS] and [SEP] included; longer texts are cut (and counted)."""
    held_out_every: int = 1000
    """Steps between held-out losses (also before the first step and after the last); 0 never."""
    held_out_passages: int = 1024
    """Held-out passages scored each time."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Who computes the LM-head loss and the enhanced decoders' attention: auto takes Triton on GPUs (Ampere or newer),
    torch elsewhere."""
    cache: str | None = None
    """Folder that remote shards are cached in (default: $QUINCUNX_CACHE, or else ~/.cache/quincunx)."""
    cache_gb: float = 50.0
    """Size of that cache in gigabytes."""

    def task_specs(self, shares: Sequence[float]) -> list[TaskSpec]:
        """The recipe's tasks in their order, with kind of decoder and weight; `shares` of the passages serve them."""
        weights = self.task_weights or shares
        return [TaskSpec(name=name, decoder=self.decoder, weight=weight) for name, weight in zip(self.tasks, weights)]

    def shard_weights(self) -> list[tuple[str, int]]:
        """(path, weight) of each shard set; `path:3` has weight 3, a bare path 1."""
        pairs = []
        for entry in self.shards:
            path, colon, weight = entry.rpartition(":")
            is_port = "://" in path and "/" not in path.partition("://")[2]  # http://host:8080
            pairs.append((path, int(weight)) if colon and weight.isdigit() and not is_port else (entry, 1))
        return pairs


def find_problems(settings: PretrainSettings) -> list[str]:
    """Every value out of its range and every contradiction, each as one clause; empty where there is none."""
    problems = find_run_problems(settings)

    def need(condition: bool, clause: str) -> None:
        if not condition:
            problems.append(clause)

    s = settings
    need(bool(s.shards), "shards is empty; name at least one shard set")
    need(all(weight > 0 for _, weight in s.shard_weights()), "a shard set's weight must be at least 1")
    unknown = [task for task in s.tasks if task not in TASKS]
    need(not unknown, f"tasks has unknown {', '.join(unknown)}; choose from {', '.join(TASKS)}")
    need(len(set(s.tasks)) == len(s.tasks), f"tasks names a task twice: {', '.join(s.tasks)}")
    need(
        s.task_weights is None or len(s.task_weights) == len(s.tasks),
        f"task_weights has {len(s.task_weights or [])} numbers for {len(s.tasks)} tasks",
    )
    need(all(0 <= weight < 1e6 for weight in s.task_weights or []), "task_weights must be from 0 to below a million")
    for name in ("encoder_mask_rate", "decoder_mask_rate"):
        need(0 < getattr(s, name) < 1, f"{name} is {getattr(s, name)}; it must lie between 0 and 1")
    need(0 < s.cache_gb < 1e6, f"cache_gb is {s.cache_gb}; it must be above 0 and below a million")
    need(s.held_out_every >= 0, f"held_out_every is {s.held_out_every}; it must be at least 0")
    need(s.decoder_layers >= 1, f"decoder_layers is {s.decoder_layers}; it must be at least 1")
    need(s.max_tokens >= 4, f"max_tokens is {s.max_tokens}; it must be at least 4")
    need(s.held_out_passages >= 1 or not s.held_out_every, "held_out_passages must be at least 1, or held_out_every 0")
    dimensions = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions")
    given = [name for name in dimensions if getattr(s, name) is not None]
    need(s.from_scratch or not given, f"{', '.join(given)} can only be set together with from_scratch")
    missing = [name for name in dimensions[:3] if getattr(s, name) is None]
    need(not s.from_scratch or not missing, f"from_scratch needs {', '.join(missing)}")
    need(all(getattr(s, name) > 0 for name in given), f"{', '.join(given)} must be above 0")
    if s.hidden_size is not None and s.num_heads:
        need(
            s.hidden_size % s.num_heads == 0, f"hidden_size {s.hidden_size} is not divisible by num_heads {s.num_heads}"
        )
    return problems


def find_idle_settings(settings: PretrainSettings) -> list[str]:
    """One sentence per setting that was changed but has no effect in this run."""
    defaults, sentences = PretrainSettings(), []

    def idle(name: str, reason: str) -> None:
        if getattr(settings, name) != getattr(defaults, name):
            sentences.append(f"{name} has no effect: {reason}")

    if settings.decoder == "enhanced":
        idle("decoder_layers", "an enhanced decoder has one layer")
    else:
        idle("query_stream", "only an enhanced decoder has a query stream")
    if len(settings.tasks) < 2:
        idle("shared_decoder", f"there {'is one task' if settings.tasks else 'are no tasks'} to decode")
    if settings.probe is None:
        idle("probe_every", "no probe folder is given")
    if settings.held_out_every == 0:
        idle("held_out_passages", "held_out_every is 0")
    return sentences
