"""What a pre-training run learns and from what: every setting once, with its default, unit and range.

How it is run (ZeRO stage, offload, precision) stands in the DeepSpeed JSON instead (ds_configs/, docs/training.md).
Defaults are the papers': RetroMAE's where both speak, MASTER's where only MASTER does.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.tasks import TASKS, TaskSpec

STREAM_FIELDS = ("seed", "global_batch", "max_tokens", "neighbour")
"""Settings that place a step in the data: under others, a checkpoint's run would repeat and miss passages."""
MODEL_FIELDS = (
    "encoder", "from_scratch", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions", "tasks",
    "decoder", "decoder_layers", "query_stream",
)  # fmt: skip
"""Settings that shape the model: a checkpoint made with others does not fit."""
MACHINE_FIELDS = (
    "output", "deepspeed", "micro_batch", "device", "num_workers", "compile", "kernels",
    "gradient_checkpointing", "fresh",
    "tracking", "run_name", "log_every", "checkpoint_every", "keep_checkpoints", "probe", "probe_every",
    "held_out_every", "held_out_passages", "hang_minutes", "cache", "cache_gb", "export",
)  # fmt: skip
"""Settings that change nothing that is learned; a resumed run may change them without a word."""


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Settings of a pre-training run."""

    shards: list[str] = field(default_factory=lambda: ["demo_run/shards"])
    """Shard sets made by build_shards.py: folders or URLs (s3://, gs://, https://), each with an optional :WEIGHT, the
    whole number of its turns in a mixture."""
    output: str = "runs/pretrain"
    """Run folder: checkpoints, metrics.jsonl, settings.yaml. The same command on the same folder resumes."""
    deepspeed: str = "zero2"
    """DeepSpeed JSON: a file, or zero1, zero2, zero3, zero2_offload or zero3_offload."""
    fresh: bool = False
    """Start anew where the run folder holds a run; the old one is moved aside, not deleted."""

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
    dropout: float | None = None
    """Dropout of encoder and decoders, 0 to 1 (default: the named encoder's)."""

    tasks: list[str] = field(default_factory=lambda: ["retromae"])
    """Decoder tasks: mkp, cmp, npr, dor, gor, retromae."""
    decoder: Literal["masked", "enhanced"] = "enhanced"
    """Kind of decoder: masked (MASTER) or enhanced (RetroMAE, Eq. 4 to 7)."""
    decoder_layers: int = 2
    """Layers of a masked decoder (MASTER: 2); an enhanced decoder has one by definition."""
    decoder_init: Literal["random", "encoder"] = "random"
    """Decoder layers start random, or as copies of the encoder's last layers (as SimLM does)."""
    query_stream: Literal["raw", "embedded"] = "raw"
    """Query stream of an enhanced decoder: raw h + position (RetroMAE's code), or passed through the embedding layer's
    LayerNorm and dropout (its FlagEmbedding fork)."""
    task_weights: list[float] | None = None
    """Weight lambda of each task's loss, in the order of tasks (default: 1 each); the encoder's own loss has 1."""
    encoder_mask_rate: float = 0.30
    """Share of the encoder's tokens that are masked, alpha (RetroMAE, MASTER: 0.30)."""
    decoder_mask_rate: float = 0.50
    """Share of a decoder's tokens that are hidden, beta (RetroMAE, MASTER: 0.50)."""
    corruption: Literal["80-10-10", "mask"] = "80-10-10"
    """What a masked token becomes: [MASK], a random token or itself at 80/10/10 per cent, or always [MASK]."""
    neighbour: Literal["next", "halves"] = "next"
    """What npr decodes: the document's next passage (MASTER's paper), or the second half of a passage whose first half
    the encoder reads (MASTER's code)."""

    learning_rate: float = 1e-4
    """Peak learning rate (RetroMAE: 1e-4; MASTER: 3e-4)."""
    warmup_share: float = 0.1
    """Share of the steps over which the rate rises linearly from 0; it then falls linearly to 0."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay; none on biases and norms."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down; 0 never."""
    steps: int | None = None
    """Length of the run in optimizer steps; give this or epochs."""
    epochs: float | None = None
    """Length of the run in passes over the shards; give this or steps."""
    global_batch: int = 256
    """Passages of one optimizer step, over all ranks and accumulation (RetroMAE: 256 on Wikipedia)."""
    micro_batch: int | None = None
    """Passages of one forward pass of one rank (default: the DeepSpeed JSON's number, else as many as divide the rank's
    share, at most 32). Changes memory and speed, not the gradient."""
    max_tokens: int = 512
    """Longest text in tokens, [CLS] and [SEP] included; longer texts are cut (and counted)."""
    seed: int = 42
    """Seed of everything random: order, masks, initial weights, dropout."""
    max_bad_steps: int = 10
    """Consecutive steps with a loss or gradient that is not finite after which the run ends with exit code 77."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; one more is written at the end."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones."""
    log_every: int = 10
    """Steps between lines of metrics; each is the mean over these steps."""
    held_out_every: int = 1000
    """Steps between held-out losses (also before the first step and after the last); 0 never."""
    held_out_passages: int = 1024
    """Held-out passages scored each time."""
    probe: str | None = None
    """BEIR folder (corpus.jsonl, queries.jsonl, qrels/) of the retrieval probe."""
    probe_every: int = 1000
    """Steps between probes (also before the first step and after the last); 0 never."""
    tracking: str = "sqlite"
    """MLflow: "sqlite" (mlflow.db in the run folder), a tracking URI, or "none"."""
    run_name: str | None = None
    """Name of the run in MLflow (default: the run folder's name)."""
    export: bool = True
    """Export the encoder, the sentence-transformers model and the full bundle into OUTPUT/export at the end."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: cuda fails where there is no GPU, auto takes one where there is."""
    gradient_checkpointing: bool = False
    """Recompute the encoder's activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Who computes the LM-head loss and the enhanced decoders' attention: auto takes Triton on GPUs (Ampere or newer),
    torch elsewhere."""
    num_workers: int = 2
    """Background threads of a rank that pack batches; the batches do not depend on it."""
    cache: str | None = None
    """Folder that remote shards are cached in (default: ~/.cache/quincunx)."""
    cache_gb: float = 50.0
    """Size of that cache in gigabytes."""
    hang_minutes: float = 30.0
    """Minutes without a finished step (or probe, or checkpoint) after which a rank ends with exit code 76."""

    def task_specs(self) -> list[TaskSpec]:
        """The recipe's tasks in their order, with kind of decoder and weight."""
        weights = self.task_weights or [1.0] * len(self.tasks)
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
    problems = []

    def need(condition: bool, clause: str) -> None:
        if not condition:
            problems.append(clause)

    s = settings
    need(bool(s.shards), "shards is empty; name at least one shard set")
    need(all(weight > 0 for _, weight in s.shard_weights()), "a shard set's weight must be at least 1")
    need(bool(s.tasks), f"tasks is empty; choose from {', '.join(TASKS)}")
    unknown = [task for task in s.tasks if task not in TASKS]
    need(not unknown, f"tasks has unknown {', '.join(unknown)}; choose from {', '.join(TASKS)}")
    need(len(set(s.tasks)) == len(s.tasks), f"tasks names a task twice: {', '.join(s.tasks)}")
    need(
        s.task_weights is None or len(s.task_weights) == len(s.tasks),
        f"task_weights has {len(s.task_weights or [])} numbers for {len(s.tasks)} tasks",
    )
    need(all(weight >= 0 for weight in s.task_weights or []), "task_weights must be at least 0")
    for name in ("encoder_mask_rate", "decoder_mask_rate"):
        need(0 < getattr(s, name) < 1, f"{name} is {getattr(s, name)}; it must lie between 0 and 1")
    need(s.dropout is None or 0 <= s.dropout < 1, f"dropout is {s.dropout}; it must be at least 0 and below 1")
    need(0 <= s.warmup_share <= 1, f"warmup_share is {s.warmup_share}; it must lie between 0 and 1")
    need(all(0 <= beta < 1 for beta in s.adam_betas), f"adam_betas are {s.adam_betas}; they must lie between 0 and 1")
    for name in ("learning_rate", "adam_eps", "hang_minutes", "cache_gb"):
        value = getattr(s, name)
        need(0 < value < 1e6, f"{name} is {value}; it must be above 0 and below a million")
    need(s.num_workers <= 256, f"num_workers is {s.num_workers}; it must be at most 256")
    need(s.global_batch <= 2**24, f"global_batch is {s.global_batch}; it must be at most {2**24}")
    for name in ("weight_decay", "max_grad_norm", "held_out_every", "probe_every", "num_workers", "seed"):
        need(getattr(s, name) >= 0, f"{name} is {getattr(s, name)}; it must be at least 0")
    for name in (
        "global_batch",
        "decoder_layers",
        "max_bad_steps",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
    ):
        need(getattr(s, name) >= 1, f"{name} is {getattr(s, name)}; it must be at least 1")
    need(s.seed < 2**32, f"seed is {s.seed}; it must be below 2**32")
    need(s.max_tokens >= 4, f"max_tokens is {s.max_tokens}; it must be at least 4")
    need(s.micro_batch is None or s.micro_batch >= 1, f"micro_batch is {s.micro_batch}; it must be at least 1")
    need(s.held_out_passages >= 1 or not s.held_out_every, "held_out_passages must be at least 1, or held_out_every 0")
    need(
        (s.steps is None) != (s.epochs is None),
        "give the run's length as steps or as epochs, and set the other to null (--steps null)",
    )
    for name in ("steps", "epochs"):
        value = getattr(s, name)
        need(value is None or value > 0, f"{name} is {value}; it must be above 0")
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
    if s.probe is not None:
        need((Path(s.probe) / "corpus.jsonl").is_file(), f"probe {s.probe} is no BEIR folder: it has no corpus.jsonl")
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
    if settings.probe is None:
        idle("probe_every", "no probe folder is given")
    if settings.held_out_every == 0:
        idle("held_out_passages", "held_out_every is 0")
    return sentences


def total_steps(settings: PretrainSettings, num_passages: int) -> int:
    """Optimizer steps of the whole run over `num_passages` training passages; at least 1."""
    if settings.steps is not None:
        return settings.steps
    return max(1, round(settings.epochs * num_passages / settings.global_batch))


def as_plain(settings: PretrainSettings) -> dict[str, Any]:
    """The settings as YAML and JSON can hold them."""
    plain = dataclasses.asdict(settings)
    plain["adam_betas"] = list(plain["adam_betas"])
    return plain


def settings_digest(settings: PretrainSettings) -> str:
    """16 hex digits of everything that changes what is learned."""
    learned = {name: value for name, value in as_plain(settings).items() if name not in MACHINE_FIELDS}
    return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:16]


def require(problems: list[str]) -> None:
    """Raises one SettingsError with all `problems`."""
    if problems:
        raise SettingsError("; ".join(problems))
