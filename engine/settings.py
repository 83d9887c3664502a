"""What a training run learns and from what: every setting once, with its default, unit, range and role.

How it is run (ZeRO stage, offload, precision) is in the DeepSpeed JSON instead (ds_configs/, docs/training.md).
Pre-training's defaults are the papers': RetroMAE's if both give one, MASTER's if only MASTER does.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quincunx.data_shards.setting import as_plain, names_of, setting
from quincunx.data_shards.tasks import TASKS, TaskSpec


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of any training run; each stage adds its own."""

    output: str = setting("runs/run", role="machine", local=True)
    """Run folder: checkpoints, metrics.jsonl, settings.yaml. The same command on the same folder resumes."""
    deepspeed: str = setting("zero2", role="machine", local=True)
    """DeepSpeed JSON: a file, or zero1, zero2, zero3, zero2_offload or zero3_offload."""
    fresh: bool = setting(False, role="machine", local=True)
    """Start anew where the run folder holds a run; the old one is moved aside, not deleted."""
    dropout: float | None = setting(None, low=0, below=1)
    """Hidden dropout, 0 to 1 (default: the named encoder's)."""
    learning_rate: float = setting(1e-4, above=0, below=10**6)
    """Peak learning rate."""
    warmup_share: float = setting(0.1, low=0, high=1)
    """Share of the steps over which the rate rises linearly from 0; it then falls linearly to 0."""
    weight_decay: float = setting(0.01, low=0)
    """AdamW's decoupled weight decay; none on biases and norms."""
    adam_betas: tuple[float, float] = setting((0.9, 0.999), low=0, below=1)
    """AdamW's decay rates of the first and second moment."""
    adam_eps: float = setting(1e-8, above=0, below=10**6)
    """AdamW's epsilon."""
    max_grad_norm: float = setting(1.0, low=0)
    """Gradient norm above which the gradient is scaled down; 0 never."""
    steps: int | None = setting(None, low=0, below=10**9)
    """Length of the run in optimizer steps; give this or epochs. 0 saves and exports the model as it starts."""
    epochs: float | None = setting(None, above=0, below=10**9)
    """Length of the run in passes over the training data; give this or steps."""
    global_batch: int = setting(256, low=1, high=2**24, role="stream")
    """Training examples (passages, or queries in fine-tuning) of one optimizer step, over ranks and accumulation."""
    micro_batch: int | None = setting(None, low=1, role="machine")
    """Training examples of one forward pass of one rank (default: the DeepSpeed JSON's number, else as many as divide
    the rank's share, at most 32). Changes memory and speed, not the gradient."""
    seed: int = setting(42, low=0, below=2**32, role="stream")
    """Seed of everything random: order, masks, initial weights, dropout."""
    max_bad_steps: int = setting(10, low=1)
    """Consecutive steps with a loss or gradient that is not finite after which the run ends with exit code 77."""
    checkpoint_every: int = setting(1000, low=1, role="machine")
    """Steps between checkpoints; one more is written at the end."""
    keep_checkpoints: int = setting(2, low=1, role="machine")
    """Checkpoints kept, the newest ones."""
    log_every: int = setting(10, low=1, role="machine")
    """Steps between lines of metrics; each is the mean over these steps."""
    probe: str | None = setting(None, role="machine", local=True)
    """BEIR folder (corpus.jsonl, queries.jsonl, qrels/) of the retrieval probe."""
    probe_every: int = setting(1000, low=0, role="machine")
    """Steps between probes (also before the first step and after the last); 0 never."""
    tracking: str = setting("sqlite", role="machine", local=True)
    """MLflow: "sqlite" (mlflow.db in the run folder), a tracking URI, or "none"."""
    run_name: str | None = setting(None, role="machine", local=True)
    """Name of the run in MLflow (default: the run folder's name)."""
    export: bool = setting(True, role="machine")
    """Export the finished models into OUTPUT/export at the end."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", role="machine")
    """Where to train: cuda fails where there is no GPU, auto takes one where there is."""
    gradient_checkpointing: bool = setting(False, role="machine")
    """Recompute the encoder's activations in the backward pass: less memory, about a third more time."""
    compile: bool = setting(False, role="machine")
    """Compile the model with torch.compile."""
    num_workers: int = setting(2, low=0, high=256, role="machine", local=True)
    """Background threads of a rank that pack batches; the batches do not depend on it."""
    hang_minutes: float = setting(30.0, above=0, below=10**6, role="machine")
    """Minutes without a finished step (or probe, or checkpoint) after which a rank ends with exit code 76."""

    def contradictions(self) -> list[str]:
        """What is wrong with values that are each in range, as clauses."""
        problems = []
        if (self.steps is None) == (self.epochs is None):
            problems.append("give the run's length as steps or as epochs, and set the other to None (--steps None)")
        checking = os.environ.get("QUINCUNX_CHECK")  # of a chain, whose earlier stages make the probe
        if self.probe is not None and not checking and not (Path(self.probe) / "corpus.jsonl").is_file():
            problems.append(f"probe {self.probe} is not a BEIR folder (corpus.jsonl is missing)")
        return problems

    def total_steps(self, num_examples: int) -> int:
        """Optimizer steps of the whole run over `num_examples` training examples; at least 1 if it counts epochs."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * num_examples / self.global_batch))

    def digest(self) -> str:
        """16 hex digits of everything that changes what is learned."""
        machine = names_of(self, "machine")
        learned = {name: value for name, value in as_plain(self).items() if name not in machine}
        return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(RunSettings):
    """Settings of a pre-training run."""

    shards: list[str] = setting(["demo_run/shards"], role="data", local=True)
    """Shard sets made by build_shards.py: folders or URLs (s3://, gs://, https://), each with an optional :WEIGHT, the
    whole number of its turns in a mixture."""
    output: str = setting("runs/pretrain", role="machine", local=True)
    """Run folder: checkpoints, metrics.jsonl, settings.yaml. The same command on the same folder resumes."""
    learning_rate: float = setting(1e-4, above=0, below=10**6)
    """Peak learning rate (RetroMAE: 1e-4; MASTER: 3e-4)."""
    global_batch: int = setting(256, low=1, high=2**24, role="stream")
    """Passages of one optimizer step, over all ranks and accumulation (RetroMAE: 256 on Wikipedia)."""
    export: bool = setting(True, role="machine")
    """Export the encoder, the sentence-transformers model and the full bundle into OUTPUT/export at the end."""

    encoder: str = setting("bert-base-uncased", role="model")
    """Encoder to start from: a Hugging Face name or folder, package:MODULE/FOLDER, or one of our bundles (then with its
    decoders and LM head)."""
    from_scratch: bool = setting(False, role="model")
    """Start from random weights: the encoder's architecture (or a model type such as bert) at the sizes below."""
    hidden_size: int | None = setting(None, above=0, role="model")
    """Width of an encoder from scratch."""
    num_layers: int | None = setting(None, above=0, role="model")
    """Layers of an encoder from scratch."""
    num_heads: int | None = setting(None, above=0, role="model")
    """Attention heads of an encoder from scratch."""
    intermediate_size: int | None = setting(None, above=0, role="model")
    """Feed-forward width of an encoder from scratch (default: 4 x hidden_size)."""
    max_positions: int | None = setting(None, above=0, role="model")
    """Longest text that an encoder from scratch can read, in tokens (default: max_tokens)."""
    tasks: list[str] = setting(["retromae"], role="model")
    """Decoder tasks: mkp, cmp, npr, dor, gor, retromae; none of them ([]) is masked language modelling alone."""
    decoder: Literal["masked", "enhanced"] = setting("enhanced", role="model")
    """Kind of decoder: masked (MASTER) or enhanced (RetroMAE, Eq. 4 to 7)."""
    decoder_layers: int = setting(2, low=1, role="model")
    """Layers of a masked decoder (MASTER: 2); an enhanced decoder has one by definition."""
    decoder_init: Literal["random", "encoder"] = "random"
    """Decoder layers start random, or as copies of the encoder's last layers (as SimLM does)."""
    query_stream: Literal["raw", "embedded"] = setting("raw", role="model")
    """Query stream of an enhanced decoder: raw h + position (RetroMAE's code), or passed through the embedding layer's
    LayerNorm and dropout (its FlagEmbedding fork)."""
    shared_decoder: bool = setting(False, role="model")
    """All tasks decode through one decoder instead of one each (MASTER's ablation, Table 6)."""
    task_weights: list[float] | None = setting(None, low=0, below=10**6)
    """Weight lambda of each task's loss; the encoder's own has 1 (default: the share of passages with its text)."""
    encoder_mask_rate: float = setting(0.30, above=0, below=1)
    """Share of the encoder's tokens that are masked, alpha (RetroMAE, MASTER: 0.30)."""
    decoder_mask_rate: float = setting(0.50, above=0, below=1)
    """Share of a decoder's tokens that are hidden, beta (RetroMAE, MASTER: 0.50)."""
    corruption: Literal["80-10-10", "mask"] = "80-10-10"
    """What a masked token becomes: [MASK], a random token or itself at 80/10/10 per cent, or always [MASK]."""
    neighbour: Literal["next", "halves"] = setting("next", role="stream")
    """What npr decodes: the document's next passage (MASTER's paper), or the second half of a passage whose first half
    the encoder reads (MASTER's code)."""
    max_tokens: int = setting(512, low=4, role="stream")
    """Longest text in tokens, [CLS] and [SEP] included; longer texts are cut (and counted)."""
    held_out_every: int = setting(1000, low=0, role="machine")
    """Steps between held-out losses (also before the first step and after the last); 0 never."""
    held_out_passages: int = setting(1024, low=1, role="machine")
    """Held-out passages scored each time."""
    kernels: Literal["auto", "triton", "torch"] = setting("auto", role="machine")
    """Who computes the LM-head loss and the enhanced decoders' attention: auto takes Triton on GPUs (Ampere or newer),
    torch elsewhere."""
    cache: str | None = setting(None, role="machine", local=True)
    """Folder that remote shards are cached in (default: $QUINCUNX_CACHE, or else ~/.cache/quincunx)."""
    cache_gb: float = setting(50.0, above=0, below=10**6, role="machine", local=True)
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

    def contradictions(self) -> list[str]:
        problems = super().contradictions()

        def need(condition: bool, clause: str) -> None:
            if not condition:
                problems.append(clause)

        need(bool(self.shards), "shards is empty; name at least one shard set")
        need(all(weight > 0 for _, weight in self.shard_weights()), "a shard set's weight must be at least 1")
        unknown = [task for task in self.tasks if task not in TASKS]
        need(not unknown, f"tasks has unknown {', '.join(unknown)}; choose from {', '.join(TASKS)}")
        need(len(set(self.tasks)) == len(self.tasks), f"tasks names a task twice: {', '.join(self.tasks)}")
        weights = self.task_weights
        need(
            weights is None or len(weights) == len(self.tasks),
            f"task_weights has {len(weights or [])} numbers for {len(self.tasks)} tasks",
        )
        sizes = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions")
        given = [name for name in sizes if getattr(self, name) is not None]
        need(self.from_scratch or not given, f"{', '.join(given)} can only be set together with from_scratch")
        missing = [name for name in sizes[:3] if getattr(self, name) is None]
        need(not self.from_scratch or not missing, f"from_scratch needs {', '.join(missing)}")
        if self.hidden_size and self.num_heads:
            need(
                self.hidden_size % self.num_heads == 0,
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}",
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
