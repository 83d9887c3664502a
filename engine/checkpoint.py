"""Finding, checking and loading checkpoints; engine/checkpoint_save.py writes them and says why they are whole.

A checkpoint is a folder step-00001000 of DeepSpeed's own files and a manifest.json with the run's state and every
file's size and digest. A run continues bit for bit at the same number of ranks; at another one, or at another ZeRO
stage, the checkpoint is first converted into DeepSpeed's universal format.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import xxhash

from quincunx.data_shards.errors import CheckpointError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
UNIVERSAL = ".universal"
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified against its manifest."""

    folder: Path
    step: int
    """Optimizer steps done."""
    world_size: int
    zero_stage: int
    precision: str
    """float32, bfloat16 or float16: the model's precision in training."""
    state: dict[str, Any]
    """What the run needs beside weights and moments (engine/resume.py: run_state)."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def committed(folder: Path) -> list[Path]:
    """The checkpoint folders under `folder`, newest first, unverified."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def verify(checkpoint: Path) -> Checkpoint:
    """Reads a checkpoint's manifest and every byte it lists. Raises CheckpointError with the first thing amiss."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        version, files = manifest["schema_version"], manifest["files"]
        if version != SCHEMA_VERSION:
            raise CheckpointError(f"{checkpoint} has format {version}, this quincunx reads {SCHEMA_VERSION}; update it")
        found = Checkpoint(
            folder=checkpoint,
            **{name: manifest[name] for name in ("step", "world_size", "zero_stage", "precision", "state")},
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint} has no readable {MANIFEST} ({reason})") from None
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}")
        if file_digest(path) != entry["xxh3_128"]:
            raise CheckpointError(f"{path} differs from the digest in its manifest")
    return found


def file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def find_newest(folder: Path, report: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint under `folder` that verifies, None where there is none at all.

    report: told why each newer one is skipped. Raises CheckpointError where checkpoints exist but none verifies.
    """
    reasons = []
    for candidate in committed(Path(folder)):
        try:
            return verify(candidate)
        except CheckpointError as error:
            reasons.append(str(error))
            report(f"skipping checkpoint {candidate.name}: {error}")
    if reasons:
        raise CheckpointError(
            f"no checkpoint in {folder} is usable ({'; '.join(reasons)}); restore one, or start anew with --fresh"
        )
    return None


def find_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step. Raises CheckpointError where there is none that verifies, naming those that exist."""
    if not (folder / step_name(step)).is_dir():
        kept = ", ".join(str(int(path.name.removeprefix("step-"))) for path in committed(folder)) or "none"
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has those of steps {kept}")
    return verify(folder / step_name(step))


def needs_conversion(checkpoint: Checkpoint, world_size: int, zero_stage: int, precision: str) -> bool:
    """Whether the checkpoint must become a universal one to be loaded by such a run.

    Raises CheckpointError between ZeRO 3 and the lower stages, whose files DeepSpeed cannot convert into each other.
    """
    if (checkpoint.zero_stage == 3) != (zero_stage == 3):
        raise CheckpointError(
            f"{checkpoint.folder} was written under ZeRO {checkpoint.zero_stage} and cannot be continued under ZeRO "
            f"{zero_stage}; take the earlier DeepSpeed JSON, or export the model and start anew from the export"
        )
    return (checkpoint.world_size, checkpoint.zero_stage, checkpoint.precision) != (world_size, zero_stage, precision)


def convert(checkpoint: Checkpoint) -> Path:
    """Writes the checkpoint as a universal one, which any world size loads; returns its folder. Rank 0 only."""
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    output = checkpoint.folder.parent / UNIVERSAL / checkpoint.folder.name
    shutil.rmtree(output, ignore_errors=True)
    options = SimpleNamespace(
        input_folder=str(checkpoint.folder),
        output_folder=str(output),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal(options)
    return output


def load_checkpoint(engine, folder: Path) -> None:
    """Loads weights, moments and counters from a committed or converted checkpoint folder; all ranks call it.

    The optimizer's hyper-parameters stay this run's: DeepSpeed would take the earlier run's, and loading a universal
    checkpoint under ZeRO 3 it gives every parameter group the first one's. There it also gives all groups one step
    tensor, which each would count up. (DeepSpeed 0.19; the test is the resume from 2 to 1 ranks under zero3.)
    """
    groups = engine.optimizer.param_groups
    ours = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed could not load {folder}")
    for group, values in zip(groups, ours, strict=True):
        group.update(values)
    for state in engine.optimizer.optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()


def consolidated_state_dict(folder: Path) -> dict[str, Any]:
    """The model's float32 weights on the CPU, from a checkpoint of any ZeRO stage and world size."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
