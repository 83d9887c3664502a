"""Which checkpoint a run continues from, and whether it may. Rank 0 alone decides, before the ranks talk."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quincunx.data_shards.errors import CheckpointError
from quincunx.data_shards.setting import as_plain, local_names, names_of
from quincunx.engine.checkpoint import Checkpoint, committed, convert, find_newest, needs_conversion
from quincunx.engine.checkpoint_save import remove_leftovers
from quincunx.engine.deepspeed_config import precision_of
from quincunx.engine.job import Job
from quincunx.engine.run_folder import RunFolder

DAMAGED = "damaged-"
"""Prefix of checkpoints that did not verify when the run was continued from an older one."""


@dataclass(frozen=True)
class Resume:
    """What rank 0 tells the others to load."""

    checkpoint: Checkpoint
    folder: Path
    """The checkpoint's folder, or that of its conversion."""
    universal: bool
    """It was converted, for another number of ranks, ZeRO stage or precision."""


def choose_checkpoint(job: Job, model_digest: str, folder: RunFolder, world_size: int) -> Resume | None:
    """The checkpoint to resume from, None to start from nothing; sets an earlier run aside for --fresh.

    Prints why a newer checkpoint is skipped and what has changed since. Raises
    CheckpointError where checkpoints exist and none can be continued.
    """
    if job.settings.fresh and (aside := folder.set_aside()) is not None:
        print(f"--fresh: the earlier run was moved to {aside}", flush=True)
    folder.checkpoints.mkdir(exist_ok=True)
    remove_leftovers(folder.checkpoints)
    checkpoint = find_newest(folder.checkpoints)
    if checkpoint is None:
        return None
    if checkpoint.step > job.total_steps:
        raise CheckpointError(
            f"{checkpoint.folder} has done {checkpoint.step} steps, more than the {job.total_steps} asked for; "
            "give more steps, or start anew with --fresh or another --output"
        )
    for damaged in committed(folder.checkpoints):
        if damaged != checkpoint.folder and damaged.name > checkpoint.folder.name:
            # Out of the way of retention, which would otherwise count it among the newest. Nothing is deleted.
            damaged.rename(damaged.with_name(f"{DAMAGED}{damaged.name}"))
    for change in check_fits(checkpoint, job, model_digest):
        print(f"warning: resuming with a changed setting: {change}", flush=True)
    stage = job.config["zero_optimization"]["stage"]
    precision = precision_of(job.config)
    if not needs_conversion(checkpoint, world_size, stage, precision):
        return Resume(checkpoint, checkpoint.folder, universal=False)
    change = f"from {checkpoint.world_size} to {world_size} ranks, ZeRO {checkpoint.zero_stage} to {stage}"
    print(f"converting {checkpoint.folder.name} {change}, {checkpoint.precision} to {precision}", flush=True)
    return Resume(checkpoint, convert(checkpoint), universal=True)


def fingerprint(job: Job, model_digest: str) -> str:
    """What every rank must have alike: data, model, and every setting but the paths and sizes of a machine's own."""
    local = local_names(job.settings)
    common = {name: value for name, value in as_plain(job.settings).items() if name not in local}
    common |= {"config": job.config, "micro_batch": job.micro_batch}
    common["evaluations"] = [evaluation.kind for evaluation in job.evaluations]
    digest = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]
    return f"dataset {', '.join(job.dataset_ids)}, model {model_digest}, settings {digest}"


def run_state(job: Job, model_digest: str, counters: dict[str, Any], run_id: str) -> dict[str, Any]:
    """What a checkpoint holds beside weights and moments; JSON-able.

    counters: step, skipped_steps and bad_steps (the last ones in a row). The order needs no more than the step, since
    the examples of a step are a function of seed, global_batch and step.
    """
    return {
        **counters,
        "run_id": run_id,
        "dataset_ids": job.dataset_ids,
        "dataset_weights": job.dataset_weights,
        "model_digest": model_digest,
        "settings": as_plain(job.settings),
        "settings_digest": job.settings.digest(),
    }


def settings_of(state: dict[str, Any], kind: type) -> dict[str, Any]:
    """A checkpoint's settings; one that is younger than the checkpoint had its default then."""
    return as_plain(kind(**{name: value for name, value in state["settings"].items() if name in field_names(kind)}))


def field_names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def check_fits(checkpoint: Checkpoint, job: Job, model_digest: str) -> list[str]:
    """Compares a checkpoint with the run that wants to continue it.

    Returns one sentence per changed setting that changes what is learned without making it another run. Raises
    CheckpointError where dataset, model, or the place of a step in the data differ.
    """
    state, settings = checkpoint.state, job.settings
    remedy = "give the settings it was made with, or start anew with --fresh or another --output"
    if state["dataset_ids"] != job.dataset_ids or state["dataset_weights"] != job.dataset_weights:
        raise CheckpointError(
            f"{checkpoint.folder} was trained on dataset {', '.join(state['dataset_ids'])} (weights "
            f"{state['dataset_weights']}), this one is {', '.join(job.dataset_ids)} ({job.dataset_weights}); {remedy}"
        )
    now, then = as_plain(settings), settings_of(state, type(settings))
    changed = {name: f"{name} was {then[name]} and is {value}" for name, value in now.items() if then[name] != value}
    foreign = [changed[name] for name in names_of(settings, "model", "stream") if name in changed]
    if foreign:
        raise CheckpointError(f"{checkpoint.folder} belongs to another run: {'; '.join(foreign)}; {remedy}")
    if state["model_digest"] != model_digest:
        raise CheckpointError(f"{checkpoint.folder} holds a model of other shapes than this run's; {remedy}")
    quiet = names_of(settings, "machine", "data")
    return [sentence for name, sentence in changed.items() if name not in quiet]
