"""The settings that every training run has, pre-training and fine-tuning alike: folder, optimizer, length, batch.

How a run is executed (ZeRO stage, offload, precision) stands in the DeepSpeed JSON instead (ds_configs/).
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from quincunx.data_shards.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of any training run; each stage adds its own."""

    STREAM_FIELDS: ClassVar[tuple[str, ...]] = ("seed", "global_batch")
    """Settings that place a step in the data: under others, a checkpoint's run would repeat and miss examples."""
    MODEL_FIELDS: ClassVar[tuple[str, ...]] = ()
    """Settings that shape the model: a checkpoint made with others does not fit."""
    MACHINE_FIELDS: ClassVar[tuple[str, ...]] = (
        "output", "deepspeed", "micro_batch", "device", "num_workers", "compile", "gradient_checkpointing", "fresh",
        "tracking", "run_name", "log_every", "checkpoint_every", "keep_checkpoints", "probe", "probe_every",
        "hang_minutes", "export",
    )  # fmt: skip
    """Settings that change nothing that is learned; a resumed run may change them without a word."""
    DATA_FIELDS: ClassVar[tuple[str, ...]] = ()
    """Settings that name the training data's files; what they hold is compared by its ids, not by path."""
    LOCAL_FIELDS: ClassVar[tuple[str, ...]] = (
        "output", "deepspeed", "probe", "num_workers", "tracking", "run_name", "fresh",
    )  # fmt: skip
    """Settings that machines of one run may have of their own: paths of equal files, and what rank 0 alone reads."""

    output: str = "runs/run"
    """Run folder: checkpoints, metrics.jsonl, settings.yaml. The same command on the same folder resumes."""
    deepspeed: str = "zero2"
    """DeepSpeed JSON: a file, or zero1, zero2, zero3, zero2_offload or zero3_offload."""
    fresh: bool = False
    """Start anew where the run folder holds a run; the old one is moved aside, not deleted."""
    dropout: float | None = None
    """Hidden dropout, 0 to 1 (default: the named encoder's)."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
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
    """Length of the run in optimizer steps; give this or epochs. 0 saves and exports the model as it starts."""
    epochs: float | None = None
    """Length of the run in passes over the training data; give this or steps."""
    global_batch: int = 256
    """Training examples (passages, or queries in fine-tuning) of one optimizer step, over ranks and accumulation."""
    micro_batch: int | None = None
    """Training examples of one forward pass of one rank (default: the DeepSpeed JSON's number, else as many as divide
    the rank's share, at most 32). Changes memory and speed, not the gradient."""
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
    probe: str | None = None
    """BEIR folder (corpus.jsonl, queries.jsonl, qrels/) of the retrieval probe."""
    probe_every: int = 1000
    """Steps between probes (also before the first step and after the last); 0 never."""
    tracking: str = "sqlite"
    """MLflow: "sqlite" (mlflow.db in the run folder), a tracking URI, or "none"."""
    run_name: str | None = None
    """Name of the run in MLflow (default: the run folder's name)."""
    export: bool = True
    """Export the finished models into OUTPUT/export at the end."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: cuda fails where there is no GPU, auto takes one where there is."""
    gradient_checkpointing: bool = False
    """Recompute the encoder's activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    num_workers: int = 2
    """Background threads of a rank that pack batches; the batches do not depend on it."""
    hang_minutes: float = 30.0
    """Minutes without a finished step (or probe, or checkpoint) after which a rank ends with exit code 76."""


def find_run_problems(settings: RunSettings) -> list[str]:
    """Every common value out of its range, each as one clause; empty where there is none."""
    problems = []

    def need(condition: bool, clause: str) -> None:
        if not condition:
            problems.append(clause)

    s = settings
    need(s.dropout is None or 0 <= s.dropout < 1, f"dropout is {s.dropout}; it must be at least 0 and below 1")
    need(0 <= s.warmup_share <= 1, f"warmup_share is {s.warmup_share}; it must lie between 0 and 1")
    need(all(0 <= beta < 1 for beta in s.adam_betas), f"adam_betas are {s.adam_betas}; they must lie between 0 and 1")
    for name in ("learning_rate", "adam_eps", "hang_minutes"):
        value = getattr(s, name)
        need(0 < value < 1e6, f"{name} is {value}; it must be above 0 and below a million")
    need(s.num_workers <= 256, f"num_workers is {s.num_workers}; it must be at most 256")
    need(s.global_batch <= 2**24, f"global_batch is {s.global_batch}; it must be at most {2**24}")
    for name in ("weight_decay", "max_grad_norm", "probe_every", "num_workers", "seed"):
        need(getattr(s, name) >= 0, f"{name} is {getattr(s, name)}; it must be at least 0")
    for name in ("global_batch", "max_bad_steps", "checkpoint_every", "keep_checkpoints", "log_every"):
        need(getattr(s, name) >= 1, f"{name} is {getattr(s, name)}; it must be at least 1")
    need(s.seed < 2**32, f"seed is {s.seed}; it must be below 2**32")
    need(s.micro_batch is None or s.micro_batch >= 1, f"micro_batch is {s.micro_batch}; it must be at least 1")
    need(
        (s.steps is None) != (s.epochs is None),
        "give the run's length as steps or as epochs, and set the other to null (--steps null)",
    )
    need(s.steps is None or 0 <= s.steps < 1e9, f"steps is {s.steps}; it must be at least 0 and below 1e9")
    need(s.epochs is None or 0 < s.epochs < 1e9, f"epochs is {s.epochs}; it must be above 0 and below 1e9")
    if s.probe is not None:
        need((Path(s.probe) / "corpus.jsonl").is_file(), f"probe {s.probe} is no BEIR folder: it has no corpus.jsonl")
    return problems


def total_steps(settings: RunSettings, num_examples: int) -> int:
    """Optimizer steps of the whole run over `num_examples` training examples; at least 1."""
    if settings.steps is not None:
        return settings.steps
    return max(1, round(settings.epochs * num_examples / settings.global_batch))


def as_plain(settings: RunSettings) -> dict[str, Any]:
    """The settings as YAML and JSON can hold them."""
    plain = dataclasses.asdict(settings)
    plain["adam_betas"] = list(plain["adam_betas"])
    return plain


def settings_digest(settings: RunSettings) -> str:
    """16 hex digits of everything that changes what is learned."""
    learned = {name: value for name, value in as_plain(settings).items() if name not in settings.MACHINE_FIELDS}
    return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:16]


def require(problems: list[str]) -> None:
    """Raises one SettingsError with all `problems`."""
    if problems:
        raise SettingsError("; ".join(problems))
