"""The DeepSpeed JSON of a run: read, checked against the recipe, its "auto" values filled in.

The recipe says what is learned, the JSON how it is run. So a value that the recipe owns must be "auto" or absent in the
JSON; a number there would be a second truth. The micro-batch may stand in either.
"""

import difflib
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.settings import RunSettings

BUNDLED = Path(__file__).parent.parent / "ds_configs"
LARGEST_DEFAULT_MICRO_BATCH = 32

OWNED_BY_RECIPE = {
    "train_batch_size": "global_batch",
    "gradient_accumulation_steps": "global_batch and micro_batch",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas": "adam_betas",
    "optimizer.params.eps": "adam_eps",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler": "warmup_share and steps",
}
"""Key of the JSON -> the settings that decide it."""

SECTIONS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "optimizer",
    "scheduler", "fp16", "bf16", "checkpoint",
)  # fmt: skip
KNOWN_KEYS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "data_types", "zero_optimization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type", "sparse_gradients",
    "prescale_gradients", "gradient_predivide_factor", "steps_per_print", "wall_clock_breakdown", "dump_state",
    "memory_breakdown", "flops_profiler", "activation_checkpointing", "comms_logger", "tensorboard", "wandb",
    "csv_monitor", "comet", "monitor_config", "aio", "checkpoint", "compile", "autotuning", "elasticity", "nebula",
    "timers", "disable_allgather", "seq_parallel_communication_data_type", "graph_harvesting",
    "use_data_before_expert_parallelism", "tensor_parallel",
})  # fmt: skip
"""DeepSpeed ignores a key it does not know; here a typing error is an error."""


def find_config_problems(settings: RunSettings, world_size: int) -> list[str]:
    """What is wrong with the DeepSpeed JSON, alone and beside the settings, as clauses.

    Raises SettingsError for a file that cannot be read.
    """
    config = load_deepspeed_json(settings.deepspeed)
    micro_batch, problems = choose_micro_batch(config, settings, world_size)
    filled = fill_config(config, settings, micro_batch, world_size, cuda=False)
    if left := sorted(auto_keys(filled)):
        problems.append(f'the DeepSpeed JSON has "auto" where nothing fills it: {", ".join(left)}')
    return find_conflicts(config, settings) + problems


def load_config(settings: RunSettings, world_size: int, cuda: bool) -> tuple[dict[str, Any], int]:
    """(the filled DeepSpeed JSON, examples of one forward pass of one rank) of checked settings."""
    config = load_deepspeed_json(settings.deepspeed)
    micro_batch, _ = choose_micro_batch(config, settings, world_size)
    return fill_config(config, settings, micro_batch, world_size, cuda), micro_batch


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
    return config


def find_conflicts(config: dict[str, Any], settings: RunSettings) -> list[str]:
    """Every value of the JSON that contradicts the recipe or that training here cannot honour, each as one clause."""
    clauses = []
    for key, owner in OWNED_BY_RECIPE.items():
        value = lookup(config, key)
        if value is not None and value != "auto":
            clauses.append(f'the DeepSpeed JSON sets {key} to {json.dumps(value)}, which {owner} decides; write "auto"')
    micro_batch = config.get("train_micro_batch_size_per_gpu")
    if isinstance(micro_batch, int) and settings.micro_batch is not None:
        clauses.append(
            f"the DeepSpeed JSON sets train_micro_batch_size_per_gpu to {micro_batch} and the recipe micro_batch to "
            f'{settings.micro_batch}; write "auto" in the JSON or leave micro_batch out'
        )
    for key in config:
        if key not in KNOWN_KEYS:
            close = difflib.get_close_matches(key, KNOWN_KEYS, 1)
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            clauses.append(f"the DeepSpeed JSON has the unknown key {key}; {hint}")
    for key in SECTIONS:
        section = lookup(config, key)
        if section is not None and not isinstance(section, dict):
            clauses.append(f"the DeepSpeed JSON has {json.dumps(section)} as {key}; it must be an object")
    if isinstance(micro_batch, bool) or (not isinstance(micro_batch, int | None) and micro_batch != "auto"):
        clauses.append(
            f"the DeepSpeed JSON has {json.dumps(micro_batch)} as train_micro_batch_size_per_gpu; "
            'allowed: a whole number or "auto"'
        )
    stage = lookup(config, "zero_optimization.stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        clauses.append(f"the DeepSpeed JSON has zero_optimization.stage {stage}; allowed: 1, 2, 3")
    kind = lookup(config, "optimizer.type")
    if kind not in (None, "auto", "AdamW"):
        clauses.append(f"the DeepSpeed JSON has optimizer.type {kind}; allowed: AdamW")
    if lookup(config, "fp16.enabled") is True and lookup(config, "bf16.enabled") is True:
        clauses.append("the DeepSpeed JSON enables fp16 and bf16; choose one")
    if lookup(config, "torch_autocast.enabled") is True:
        clauses.append("the DeepSpeed JSON enables torch_autocast; enable bf16 instead")
    if lookup(config, "checkpoint.load_universal") is not None:
        clauses.append("the DeepSpeed JSON sets checkpoint.load_universal, which resuming decides; leave it out")
    return clauses


def choose_micro_batch(config: dict[str, Any], settings: RunSettings, world_size: int) -> tuple[int, list[str]]:
    """(examples of one forward pass of one rank, what is wrong with the batch sizes).

    From the recipe, else from the JSON, else the largest divisor of the rank's share that is at most 32.
    """
    if settings.global_batch % world_size:
        return 1, [
            f"global_batch {settings.global_batch} is not divisible by the {world_size} ranks; "
            f"nearest: {nearest_multiples(settings.global_batch, world_size)}"
        ]
    share = settings.global_batch // world_size
    given = settings.micro_batch or config.get("train_micro_batch_size_per_gpu", "auto")
    if given == "auto":
        return max(n for n in range(1, LARGEST_DEFAULT_MICRO_BATCH + 1) if share % n == 0), []
    if not isinstance(given, int) or given < 1 or share % given:
        divisors = [n for n in range(1, min(share, 4096) + 1) if share % n == 0]
        allowed = ", ".join(map(str, divisors[-8:]))
        return 1, [
            f"micro_batch {given} does not divide the {share} examples of a rank; the largest that do: {allowed}"
        ]
    return given, []


def nearest_multiples(number: int, divisor: int) -> str:
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def fill_config(
    config: dict[str, Any], settings: RunSettings, micro_batch: int, world_size: int, cuda: bool
) -> dict[str, Any]:
    """The JSON as DeepSpeed gets it: every "auto" replaced, what the recipe owns set.

    cuda: training runs on GPUs, in bfloat16 where they have it; else in float32.
    """
    filled = deepcopy(config)
    offload = lookup(filled, "zero_optimization.offload_optimizer.device") == "cpu"
    filled["train_micro_batch_size_per_gpu"] = micro_batch
    filled["gradient_accumulation_steps"] = settings.global_batch // (micro_batch * world_size)
    filled["train_batch_size"] = settings.global_batch
    filled["gradient_clipping"] = settings.max_grad_norm
    filled.pop("scheduler", None)
    optimizer = {
        "lr": settings.learning_rate,
        "betas": list(settings.adam_betas),
        "eps": settings.adam_eps,
        "weight_decay": settings.weight_decay,
    }
    given = lookup(config, "optimizer.params") or {}
    optimizer |= {key: value for key, value in given.items() if key not in optimizer and value != "auto"}
    # torch's AdamW needs no compiler; an offloaded optimizer runs on the CPU, where only DeepSpeed's own is fast.
    optimizer.setdefault("torch_adam", not offload)
    if optimizer["torch_adam"]:
        optimizer.setdefault("fused", True)  # one pass over weights and moments instead of ten
    filled["optimizer"] = {"type": "AdamW", "params": optimizer}
    if lookup(filled, "bf16.enabled") == "auto":
        filled["bf16"]["enabled"] = cuda and bfloat16_supported() and lookup(filled, "fp16.enabled") is not True
    for section in ("offload_optimizer", "offload_param"):
        if lookup(filled, f"zero_optimization.{section}.pin_memory") == "auto":
            filled["zero_optimization"][section]["pin_memory"] = cuda
    return filled


def precision_of(filled: dict[str, Any]) -> str:
    """float32, bfloat16 or float16: what a filled JSON trains the model in."""
    if lookup(filled, "bf16.enabled"):
        return "bfloat16"
    return "float16" if lookup(filled, "fp16.enabled") else "float32"


def bfloat16_supported() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def lookup(config: dict[str, Any], dotted: str) -> Any:
    """The value under `a.b.c`, None where any part is missing."""
    value: Any = config
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def auto_keys(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all values that are still "auto"."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found
