"""Checkpoints: written whole or not at all, found, verified, and continued by runs that fit.

A checkpoint is a folder step-00001000 of DeepSpeed's own files and a manifest.json with the run's state and every
file's size and digest. DeepSpeed writes in place, and a rank killed meanwhile leaves a folder that cannot be loaded. So
it writes into a staging folder, which gets its name only when every rank's files are on the disk:

    1. every rank writes its files into checkpoints/.staging-step-N, each with fsync, and digests them;
    2. every rank reports its files, or why it could not write them, to rank 0;
    3. rank 0 writes manifest.json (state, sizes, digests), fsyncs, renames the folder to step-N, fsyncs its parent;
    4. all ranks learn whether it was committed; rank 0 then drops the oldest.

A kill before the rename leaves the last checkpoint as it was, one after it leaves the new one. A failed write (a full
disk) ends in step 2: the staging folder is removed and training goes on. Several machines need a shared file system.

A run continues bit for bit at the same number of ranks; at another one, or at another ZeRO stage, the checkpoint is
first converted into DeepSpeed's universal format. Rank 0 alone chooses what to continue from, before the ranks talk.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from quincunx.data_shards.durable import file_digest, publish, sync_folder, written_whole
from quincunx.data_shards.errors import CheckpointError, SettingsError
from quincunx.data_shards.setting import as_plain, names_of
from quincunx.engine.run_folder import RunFolder
from quincunx.engine.settings import precision_of

if TYPE_CHECKING:
    from quincunx.engine.training import Job

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STAGING = ".staging-"
DELETING = ".deleting-"
UNIVERSAL = ".universal"
DAMAGED = "damaged-"
"""Prefix of checkpoints that did not verify when the run was continued from an older one."""


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
    """What the run needs beside weights and moments (engine/training.py: Run.save)."""
    converted: Path | None = None
    """Its conversion for another number of ranks, ZeRO stage or precision, which is loaded in its place."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def committed(folder: Path) -> list[Path]:
    """The checkpoint folders under `folder`, newest first, unverified."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def verify(checkpoint: Path) -> Checkpoint:
    """Reads a checkpoint's manifest and every byte it lists. Raises CheckpointError with the first thing amiss."""
    names = ("step", "world_size", "zero_stage", "precision", "state")
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        version, files = manifest["schema_version"], manifest["files"]
        values = {name: manifest[name] for name in names} if version == SCHEMA_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint} has no readable {MANIFEST} ({reason})") from None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{checkpoint} has format {version}, but this quincunx reads {SCHEMA_VERSION}; update quincunx"
        )
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}")
        if file_digest(path) != entry["xxh3_128"]:
            raise CheckpointError(f"{path} differs from the digest in its manifest")
    return Checkpoint(folder=checkpoint, **values)


def find_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint under `folder` that verifies, None if there is none at all; prints why one is skipped.

    Raises CheckpointError if checkpoints exist but none verifies.
    """
    reasons = []
    for candidate in committed(folder):
        try:
            return verify(candidate)
        except CheckpointError as error:
            reasons.append(str(error))
            print(f"skipping checkpoint {candidate.name}: {error}")
    if reasons:
        raise CheckpointError(
            f"no checkpoint in {folder} is usable ({'; '.join(reasons)}); restore one, or start anew with --fresh"
        )
    return None


def choose_checkpoint(
    job: "Job", identity: dict[str, Any], total_steps: int, folder: RunFolder, world_size: int
) -> Checkpoint | None:
    """The checkpoint to resume from, None to start from nothing; sets an earlier run aside for --fresh.

    Prints why a newer checkpoint is skipped and what has changed since. Raises CheckpointError if checkpoints exist and
    none can be continued.
    """
    if job.settings.fresh and (aside := folder.set_aside()) is not None:
        print(f"--fresh: the earlier run was moved to {aside}", flush=True)
    folder.checkpoints.mkdir(exist_ok=True)
    remove_leftovers(folder.checkpoints)
    checkpoint = find_newest(folder.checkpoints)
    if checkpoint is None:
        return None
    if checkpoint.step > total_steps:
        raise CheckpointError(
            f"{checkpoint.folder} is at step {checkpoint.step}, beyond the {total_steps} of this run; "
            "give more steps, or start anew with --fresh or another --output"
        )
    for damaged in itertools.takewhile(lambda path: path != checkpoint.folder, committed(folder.checkpoints)):
        # Out of the way of retention, which would otherwise count it among the newest. Nothing is deleted.
        damaged.rename(damaged.with_name(f"{DAMAGED}{damaged.name}"))
    for change in check_fits(checkpoint, job, identity):
        print(f"warning: resuming with a changed setting: {change}", flush=True)
    stage = job.machine.config["zero_optimization"]["stage"]
    precision = precision_of(job.machine.config)
    if not needs_conversion(checkpoint, world_size, stage, precision):
        return checkpoint
    change = f"from {checkpoint.world_size} to {world_size} ranks, ZeRO {checkpoint.zero_stage} to {stage}"
    print(f"converting {checkpoint.folder.name} {change}, {checkpoint.precision} to {precision}", flush=True)
    return dataclasses.replace(checkpoint, converted=convert(checkpoint))


def check_fits(checkpoint: Checkpoint, job: "Job", identity: dict[str, Any]) -> list[str]:
    """Compares a checkpoint with the run that wants to continue it.

    identity: the run's job.data and its model_digest. Returns one sentence per changed setting that changes what is
    learned without making it another run. Raises CheckpointError if dataset, model, or the place of a step in the data
    differ.
    """
    state, settings = checkpoint.state, job.settings
    remedy = "give the settings it was made with, or start anew with --fresh or another --output"
    if any(state[key] != identity[key] for key in job.data):
        raise CheckpointError(
            f"{checkpoint.folder} was trained on dataset {', '.join(state['dataset_ids'])} (weights "
            f"{state['dataset_weights']}), this one is {', '.join(identity['dataset_ids'])} "
            f"({identity['dataset_weights']}); {remedy}"
        )
    now = as_plain(settings)
    then = as_plain(type(settings)()) | state["settings"]  # a setting younger than the checkpoint had its default
    if then.get("sentence_losses") == []:  # as it stood before they had weights
        then["sentence_losses"] = {}
    changed = {name: f"{name} was {then[name]} and is {value}" for name, value in now.items() if then[name] != value}
    foreign = [changed[name] for name in names_of(settings, "model", "stream") if name in changed]
    if foreign:
        raise CheckpointError(f"{checkpoint.folder} belongs to another run: {'; '.join(foreign)}; {remedy}")
    if state["model_digest"] != identity["model_digest"]:
        raise CheckpointError(f"the model in {checkpoint.folder} has other shapes than this run's; {remedy}")
    quiet = names_of(settings, "machine", "data")
    return [sentence for name, sentence in changed.items() if name not in quiet]


def needs_conversion(checkpoint: Checkpoint, world_size: int, zero_stage: int, precision: str) -> bool:
    """Whether the checkpoint must become a universal one to be loaded by such a run.

    Raises CheckpointError between ZeRO 3 and the lower stages, whose files DeepSpeed cannot convert into each other.
    """
    if (checkpoint.zero_stage == 3) != (zero_stage == 3):
        raise CheckpointError(
            f"{checkpoint.folder} was written under ZeRO {checkpoint.zero_stage} and cannot continue under ZeRO "
            f"{zero_stage}; use the earlier DeepSpeed JSON, or export the model and start from the export"
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
    import torch

    groups = engine.optimizer.param_groups
    ours = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed could not load {folder}")
    for group, values in zip(groups, ours, strict=True):
        group.update(values)
    if isinstance(engine.optimizer.optimizer, torch.optim.AdamW):
        for state in engine.optimizer.optimizer.state.values():
            if "step" in state:  # a number in checkpoints that DeepSpeed's own Adam has written
                state["step"] = torch.as_tensor(
                    state["step"], dtype=torch.float32, device=state["exp_avg"].device
                ).clone()


def save_checkpoint(engine, group, folder: Path, step: int, state: dict[str, Any], keep: int) -> str | None:
    """Commits the engine's state as `folder`/step-N; all ranks call it and all get the same answer.

    engine: the DeepSpeed engine. group: the process group that the ranks report over. state: JSON-able run state, of
    rank 0. keep: checkpoints kept afterwards.
    Returns None, or why the checkpoint could not be written; then nothing of it is left and the earlier ones stand.
    """
    import torch.distributed as dist

    is_main, staging = dist.get_rank() == 0, folder / f"{STAGING}{step_name(step)}"
    writer = CheckpointWriter()
    if is_main:
        shutil.rmtree(staging, ignore_errors=True)
        writer.makedirs(str(staging))
    engine.checkpoint_engine.save, engine.checkpoint_engine.makedirs = writer.save, writer.makedirs
    engine._copy_recovery_script = lambda save_path: None  # would raise on rank 0 alone if the disk is full
    client_state = {"universal_checkpoint_info": {}}  # its presence lets DeepSpeed convert the checkpoint
    engine.save_checkpoint(str(folder), tag=staging.name, client_state=client_state, save_latest=False)
    reports = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (writer.failure, writer.files), group=group)
    failures = [f"rank {source}: {failure}" for source, (failure, _) in enumerate(reports) if failure]
    if is_main and not failures:
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "world_size": engine.world_size,
            "zero_stage": int(engine.zero_optimization_stage()),
            "precision": str(engine.get_data_types()[0]).removeprefix("torch."),
            "state": state,
            "files": {name: entry for _, written in reports for name, entry in written.items()},
        }
        try:
            commit(staging, folder / step_name(step), manifest)
        except (OSError, SettingsError) as error:
            failures.append(f"rank 0: {error}")
    outcome = [failures]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if is_main and failures:
        shutil.rmtree(staging, ignore_errors=True)
    elif is_main:
        for old in committed(folder)[keep:]:
            discard(old)
    return "; ".join(outcome[0]) or None


class CheckpointWriter:
    """What DeepSpeed writes a checkpoint's files with: fsync, digests, and no rank left waiting.

    A rank that raised inside DeepSpeed's save would leave the others in its barriers, so a failure is only noted here
    and reported when all ranks are through.
    """

    def __init__(self):
        self.files: dict[str, dict[str, Any]] = {}
        self.failure: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        import torch

        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
            self.files[Path(path).name] = {"bytes": os.path.getsize(path), "xxh3_128": file_digest(path)}
        except Exception as error:  # torch hides a failed write behind an error of its own
            cause = error if isinstance(error, OSError) else error.__context__ or error
            self.failure = self.failure or f"{Path(path).name}: {type(cause).__name__}: {cause}"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or f"{path}: {error.strerror}"


def commit(staging: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest and gives the folder its name, each step on the disk before the next."""
    with written_whole(staging / MANIFEST) as file:
        json.dump(manifest, file, indent=1)
    if final.exists():  # an earlier save of this step, which a resumed run has just repeated
        discard(final)
    publish(staging, final)
    sync_folder(final.parent)


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint so that a kill meanwhile leaves no half of it under its name."""
    doomed = checkpoint.with_name(f"{DELETING}{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed run left behind: staging and half-deleted folders, conversions. Rank 0, lock held."""
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
