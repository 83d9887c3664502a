"""The settings of a training run, and the DeepSpeed JSON: read, checked against them, its "auto" values filled in.

The settings say what is learned, the JSON how it is run (ZeRO stage, offload, precision: ds_configs/,
docs/training.md). A value that the settings own must be "auto" or absent in the JSON; a number there would be a second
truth. The micro-batch may stand in either. Pre-training's defaults are the papers': RetroMAE's if both give one,
MASTER's if only MASTER does.
"""

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.setting import setting
from quincunx.data_shards.tasks import TASKS, TaskSpec

BUNDLED = Path(__file__).parent.parent / "ds_configs"
LARGEST_DEFAULT_MICRO_BATCH = 32
SECTIONS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "optimizer",
    "optimizer.params", "fp16", "bf16", "checkpoint",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of any training run; each stage adds its own."""

    output: str = setting("runs/run", role="machine", local=True)
    """Run folder: checkpoints, metrics.jsonl, settings.yaml. The same command on the same folder resumes."""
    deepspeed: str = setting("zero2", role="machine", local=True)
    """DeepSpeed JSON: a file, or zero1, zero2, zero3, zero2_offload or zero3_offload."""
    fresh: bool = setting(False, role="machine", local=True)
    """Start anew if the run folder holds a run; the old one is moved aside, not deleted."""
    dropout: float | None = setting(None, low=0, below=1)
    """Hidden dropout, 0 to 1 (default: the named encoder's)."""
    learning_rate: float = setting(1e-4, above=0, below=10**6)
    """Peak learning rate (RetroMAE: 1e-4; MASTER: 3e-4)."""
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
    """Training examples (passages, or queries in fine-tuning) of one optimizer step, over ranks and accumulation
    (RetroMAE: 256 on Wikipedia)."""
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
    """Where to train: cuda fails if there is no GPU, auto takes one if there is."""
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


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(RunSettings):
    """Settings of a pre-training run."""

    shards: list[str] = setting(["demo_run/shards"], role="data", local=True)
    """Shard sets made by build_shards.py: folders or URLs (s3://, gs://, https://), each with an optional :WEIGHT, the
    whole number of its turns in a mixture."""
    output: str = setting("runs/pretrain", role="machine", local=True)
    """Run folder: checkpoints, metrics.jsonl, settings.yaml. The same command on the same folder resumes."""
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
    sentence_losses: dict[str, float] = setting({}, role="model", low=0, below=10**6)
    """Losses of the sentence vectors beside the tasks', each with its weight (engine/model.py: SENTENCE_LOSSES)."""
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
        unknown = [task for task in self.tasks if task not in TASKS]
        num_weights = len(self.tasks if self.task_weights is None else self.task_weights)
        sizes = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions")
        given = [name for name in sizes if getattr(self, name) is not None]
        missing = [name for name in sizes[:3] if name not in given]
        ragged = self.hidden_size and self.num_heads and self.hidden_size % self.num_heads
        rules = [
            (self.shards, "shards is empty; name at least one shard set"),
            (all(weight > 0 for _, weight in self.shard_weights()), "a shard set's weight must be at least 1"),
            (not unknown, f"tasks has unknown {', '.join(unknown)}; choose from {', '.join(TASKS)}"),
            (len(set(self.tasks)) == len(self.tasks), f"tasks names a task twice: {', '.join(self.tasks)}"),
            (num_weights == len(self.tasks), f"task_weights has {num_weights} numbers for {len(self.tasks)} tasks"),
            (self.from_scratch or not given, f"{', '.join(given)} can only be set together with from_scratch"),
            (not self.from_scratch or not missing, f"from_scratch needs {', '.join(missing)}"),
            (not ragged, f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"),
        ]
        return super().contradictions() + [clause for holds, clause in rules if not holds]

    def idle(self) -> list[str]:
        """One sentence per setting that was changed but has no effect in this run."""
        defaults = PretrainSettings()
        reasons = {
            "decoder_layers": self.decoder == "enhanced" and "an enhanced decoder has one layer",
            "query_stream": self.decoder == "masked" and "only an enhanced decoder has a query stream",
            "shared_decoder": len(self.tasks) < 2 and "there are fewer than two tasks to decode",
            "probe_every": self.probe is None and "no probe folder is given",
            "held_out_passages": self.held_out_every == 0 and "held_out_every is 0",
        }
        return [
            f"{name} has no effect: {reason}"
            for name, reason in reasons.items()
            if reason and getattr(self, name) != getattr(defaults, name)
        ]


class Machine(NamedTuple):
    """How a run is run."""

    config: dict[str, Any]
    """The DeepSpeed JSON, filled."""
    micro_batch: int
    """Examples of one forward pass of one rank."""
    cuda: bool


def find_config_problems(settings: RunSettings, world_size: int) -> list[str]:
    """What is wrong with the DeepSpeed JSON, alone and beside the settings, as clauses.

    Raises SettingsError for a file that cannot be read.
    """
    config = load_deepspeed_json(settings.deepspeed)
    filled, problems = fill_config(config, settings, world_size, cuda=False)
    if left := sorted(auto_keys(filled)):
        problems.append(
            f'the DeepSpeed JSON has "auto" for keys that quincunx does not fill: {", ".join(left)}; give values'
        )
    stage, kind = lookup(config, "zero_optimization.stage"), lookup(config, "optimizer.type")
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        problems.append(f"the DeepSpeed JSON has zero_optimization.stage {stage}; allowed: 1, 2, 3")
    if kind not in (None, "auto", "AdamW"):
        problems.append(f"the DeepSpeed JSON has optimizer.type {kind}; allowed: AdamW")
    if lookup(config, "fp16.enabled") is True and lookup(config, "bf16.enabled") is True:
        problems.append("the DeepSpeed JSON enables fp16 and bf16; choose one")
    if lookup(config, "torch_autocast.enabled") is True:
        problems.append("the DeepSpeed JSON enables torch_autocast; enable bf16 instead")
    if lookup(config, "checkpoint.load_universal") is not None:
        problems.append("the DeepSpeed JSON sets checkpoint.load_universal, which resuming decides; leave it out")
    return problems


def load_machine(settings: RunSettings, world_size: int, cuda: bool) -> Machine:
    """Of settings without config problems. cuda: on GPUs, in bfloat16 if they have it; else on CPUs, in float32."""
    config, _ = fill_config(load_deepspeed_json(settings.deepspeed), settings, world_size, cuda)
    return Machine(config, config["train_micro_batch_size_per_gpu"], cuda)


def load_deepspeed_json(name: str) -> dict[str, Any]:
    """The JSON that `--deepspeed` names: a file, or one of ours by name (`zero2`, also `ds_configs/zero2.json`)."""
    path = Path(name)
    if not path.is_file() and path.parent in (Path(), Path("ds_configs")):
        path = BUNDLED / f"{path.name.removesuffix('.json')}.json"
    if not path.is_file():
        ours = ", ".join(sorted(file.stem for file in BUNDLED.glob("*.json")))
        raise SettingsError(f"--deepspeed {name}: no such file, and none of ours ({ours})")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise SettingsError(f"--deepspeed {name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise SettingsError(f"--deepspeed {name} must hold one JSON object")
    for key in SECTIONS:
        if not isinstance(section := lookup(config, key), dict | None):
            raise SettingsError(f"--deepspeed {name} has {json.dumps(section)} as {key}; it must be an object")
    return config


def fill_config(
    config: dict[str, Any], settings: RunSettings, world_size: int, cuda: bool
) -> tuple[dict[str, Any], list[str]]:
    """(the JSON as DeepSpeed gets it, a clause for each value in it that the settings decide)."""
    filled, (micro_batch, problems) = deepcopy(config), choose_micro_batch(config, settings, world_size)
    accumulation = settings.global_batch // (micro_batch * world_size)
    owned = {
        "train_batch_size": ("global_batch", settings.global_batch),
        "gradient_accumulation_steps": ("global_batch and micro_batch", accumulation),
        "gradient_clipping": ("max_grad_norm", settings.max_grad_norm),
        "optimizer.params.lr": ("learning_rate", settings.learning_rate),
        "optimizer.params.betas": ("adam_betas", list(settings.adam_betas)),
        "optimizer.params.eps": ("adam_eps", settings.adam_eps),
        "optimizer.params.weight_decay": ("weight_decay", settings.weight_decay),
        "scheduler": ("warmup_share and steps", None),
    }
    for key, (owner, value) in owned.items():
        given = lookup(config, key)
        if given not in (None, "auto"):
            clause = f"the DeepSpeed JSON sets {key} to {json.dumps(given)}, which {owner} decides"
            problems.append(f'{clause}; write "auto"')
        put(filled, key, value)
    del filled["scheduler"]
    put(filled, "train_micro_batch_size_per_gpu", micro_batch)
    put(filled, "optimizer.type", "AdamW")
    parameters = filled["optimizer"]["params"]
    if parameters.get("torch_adam", "auto") == "auto":
        parameters["torch_adam"] = True  # needs no compiler, and offloaded it is as fast as DeepSpeed's own
    if parameters["torch_adam"]:
        parameters.setdefault("fused", True)  # one pass over weights and moments instead of ten
    is_float16 = lookup(config, "fp16.enabled") is True
    for key, value in (
        ("bf16.enabled", cuda and bfloat16_supported() and not is_float16),
        ("zero_optimization.offload_optimizer.pin_memory", cuda),
        ("zero_optimization.offload_param.pin_memory", cuda),
    ):
        if lookup(config, key) == "auto":
            put(filled, key, value)
    return filled, problems


def choose_micro_batch(config: dict[str, Any], settings: RunSettings, world_size: int) -> tuple[int, list[str]]:
    """(examples of one forward pass of one rank, what is wrong with the batch sizes).

    From the recipe, else from the JSON, else the largest divisor of the rank's share that is at most 32.
    """
    key, problems = "train_micro_batch_size_per_gpu", []
    in_json = None if config.get(key) == "auto" else config.get(key)
    if isinstance(in_json, bool) or not isinstance(in_json, int | None):
        return 1, [f'the DeepSpeed JSON has {json.dumps(in_json)} as {key}; allowed: a whole number or "auto"']
    if in_json is not None and settings.micro_batch is not None:
        problems.append(
            f"the DeepSpeed JSON sets {key} to {in_json} and the recipe micro_batch to {settings.micro_batch}; "
            'write "auto" in the JSON or leave micro_batch out'
        )
    share, rest = divmod(settings.global_batch, world_size)
    if rest:
        nearest = " or ".join(str(number * world_size) for number in (share, share + 1) if number)
        return 1, [
            *problems,
            f"global_batch {settings.global_batch} is not divisible by the {world_size} ranks; nearest: {nearest}",
        ]
    given = in_json if settings.micro_batch is None else settings.micro_batch
    if given is None:
        return max(n for n in range(1, LARGEST_DEFAULT_MICRO_BATCH + 1) if share % n == 0), problems
    if given < 1 or share % given:
        allowed = ", ".join([str(n) for n in range(1, min(share, 4096) + 1) if share % n == 0][-8:])
        return 1, [
            *problems,
            f"micro_batch {given} does not divide the {share} examples of a rank; the largest that do: {allowed}",
        ]
    return given, problems


def precision_of(filled: dict[str, Any]) -> str:
    """float32, bfloat16 or float16: what a filled JSON trains the model in."""
    if lookup(filled, "bf16.enabled"):
        return "bfloat16"
    return "float16" if lookup(filled, "fp16.enabled") else "float32"


def bfloat16_supported() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def lookup(config: dict[str, Any], dotted: str) -> Any:
    """The value under `a.b.c`, None if any part is missing."""
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def put(config: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets the value under `a.b.c`; sections that are missing are made."""
    *sections, key = dotted.split(".")
    for section in sections:
        config[section] = config.get(section) or {}
        config = config[section]
    config[key] = value


def auto_keys(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all values that are still "auto"."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found
