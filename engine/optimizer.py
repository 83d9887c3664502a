"""The optimizer: its learning rate, its parameter groups, and the operator it needs where it is offloaded.

torch marks the compilation of an operator with a file, which a killed process leaves behind and every later one waits
for, without end. In compile_once, ranks and runs take turns by the kernel's lock (flock), which dies with its holder:
whoever holds it knows that a mark still there is a dead process's, and removes it. For that the operators are compiled
in a folder of ours, `~/.cache/quincunx/torch_extensions`, unless TORCH_EXTENSIONS_DIR names another.
"""

import fcntl
import os
import sys
from pathlib import Path
from typing import Any

LOCK_FILE = "quincunx.lock"


def learning_rate_at(step: int, total_steps: int, peak: float, warmup_share: float) -> float:
    """Learning rate of optimizer step `step` (0-based): linear from near 0 to `peak`, then linear towards 0.

    Step 0 already learns (rate peak / warm-up steps) and so does the last one. A pure function, so that a resumed run
    needs no scheduler state.
    """
    warmup = round(total_steps * warmup_share)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(0, total_steps - step) / max(1, total_steps - warmup)


def parameter_groups(model, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of a model's trainable parameters: matrices, which decay, and biases and norm scales, which do not."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decaying = [parameter for _, parameter in named if parameter.ndim >= 2]
    others = [parameter for _, parameter in named if parameter.ndim < 2]
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def compile_once(builder: Any, is_main: bool) -> None:
    """Compiles and loads a DeepSpeed operator; later calls on this machine only load it.

    builder: a DeepSpeed op builder (deepspeed.ops.op_builder). is_main: says on stderr that it takes a minute.
    """
    import torch

    default = Path.home() / ".cache" / "quincunx" / "torch_extensions" / build_name(torch.__version__)
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / builder.name / "lock").unlink(missing_ok=True)
        if is_main and not list((folder / builder.name).glob("*.so")):
            print(f"compiling DeepSpeed's {builder.name} (once, about a minute)", file=sys.stderr, flush=True)
        builder.load(verbose=False)


def build_name(torch_version: str) -> str:
    """Folder for what this Python and torch can load together: `py311_torch2.13.0+cpu`."""
    return f"py{sys.version_info.major}{sys.version_info.minor}_torch{torch_version}"
