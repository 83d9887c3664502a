"""Which checkpoint a run continues from, and whether it may. Rank 0 alone decides, before the ranks talk."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quincunx.data_shards.errors import CheckpointError
from quincunx.engine.checkpoint import Checkpoint, committed, convert, find_newest, needs_conversion
from quincunx.engine.checkpoint_save import remove_leftovers
from quincunx.engine.deepspeed_config import precision_of
from quincunx.engine.preparation import Prepared
from quincunx.engine.run_folder import RunFolder
from quincunx.engine.settings import (
    MACHINE_FIELDS,
    MODEL_FIELDS,
    STREAM_FIELDS,
    PretrainSettings,
    as_plain,
    settings_digest,
)

DAMAGED = "damaged-"
"""Prefix of checkpoints that did not verify when the run was continued from an older one."""


LOCAL_FIELDS = (
    "shards", "output", "deepspeed", "probe", "cache", "cache_gb", "num_workers", "tracking", "run_name", "fresh",
)  # fmt: skip
"""Settings that machines of one run may have of their own: paths of equal files, and what rank 0 alone reads."""


@dataclass(frozen=True)
class Resume:
    """What rank 0 tells the others to load."""

    checkpoint: Checkpoint
    folder: Path
    """The checkpoint's folder, or that of its conversion."""
    universal: bool
    """It was converted, for another number of ranks, ZeRO stage or precision."""


def choose_checkpoint(
    settings: PretrainSettings, prepared: Prepared, folder: RunFolder, world_size: int
) -> Resume | None:
    """The checkpoint to resume from, None to start from nothing; sets an earlier run aside for --fresh.

    Prints why a newer checkpoint is skipped and what has changed since. Raises
    CheckpointError where checkpoints exist and none can be continued.
    """
    if settings.fresh and (aside := folder.set_aside()) is not None:
        print(f"--fresh: the earlier run was moved to {aside}", flush=True)
    folder.checkpoints.mkdir(exist_ok=True)
    remove_leftovers(folder.checkpoints)
    checkpoint = find_newest(folder.checkpoints)
    if checkpoint is None:
        return None
    if checkpoint.step > prepared.total_steps:
        raise CheckpointError(
            f"{checkpoint.folder} has done {checkpoint.step} steps, more than the {prepared.total_steps} asked for; "
            "give more steps, or start anew with --fresh or another --output"
        )
    for damaged in committed(folder.checkpoints):
        if damaged != checkpoint.folder and damaged.name > checkpoint.folder.name:
            # Out of the way of retention, which would otherwise count it among the newest. Nothing is deleted.
            damaged.rename(damaged.with_name(f"{DAMAGED}{damaged.name}"))
    for change in check_fits(checkpoint, settings, prepared):
        print(f"warning: resuming with a changed setting: {change}", flush=True)
    stage = prepared.config["zero_optimization"]["stage"]
    if not needs_conversion(checkpoint, world_size, stage, precision_of(prepared.config)):
        return Resume(checkpoint, checkpoint.folder, universal=False)
    print(f"converting {checkpoint.folder.name} from {checkpoint.world_size} to {world_size} ranks", flush=True)
    return Resume(checkpoint, convert(checkpoint), universal=True)


def fingerprint(settings: PretrainSettings, prepared: Prepared) -> str:
    """What every rank must have alike: data, model, and every setting but the paths and sizes of a machine's own."""
    common = {name: value for name, value in as_plain(settings).items() if name not in LOCAL_FIELDS}
    common |= {"config": prepared.config, "micro_batch": prepared.micro_batch, "probe": prepared.probe is not None}
    digest = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]
    datasets = ", ".join(prepared.dataset_ids)
    return f"dataset {datasets}, model {prepared.model_digest}, settings {digest}"


def run_state(settings: PretrainSettings, prepared: Prepared, counters: dict[str, Any], run_id: str) -> dict[str, Any]:
    """What a checkpoint holds beside weights and moments; JSON-able.

    counters: step, skipped_steps and bad_steps (the last ones in a row). The order needs no more than the step, since
    the rows of a step are a function of seed, global_batch and step.
    """
    return {
        **counters,
        "run_id": run_id,
        "dataset_ids": prepared.dataset_ids,
        "dataset_weights": [weight for _, weight in settings.shard_weights()],
        "model_digest": prepared.model_digest,
        "settings": as_plain(settings),
        "settings_digest": settings_digest(settings),
    }


def check_fits(checkpoint: Checkpoint, settings: PretrainSettings, prepared: Prepared) -> list[str]:
    """Compares a checkpoint with the run that wants to continue it.

    Returns one sentence per changed setting that changes what is learned without making it another run. Raises
    CheckpointError where dataset, model, or the place of a step in the data differ.
    """
    state = checkpoint.state
    remedy = "give the settings it was made with, or start anew with --fresh or another --output"
    weights = [weight for _, weight in settings.shard_weights()]
    if state["dataset_ids"] != prepared.dataset_ids or state["dataset_weights"] != weights:
        raise CheckpointError(
            f"{checkpoint.folder} was trained on dataset {', '.join(state['dataset_ids'])} (weights "
            f"{state['dataset_weights']}), the shards given are {', '.join(prepared.dataset_ids)} ({weights}); {remedy}"
        )
    now, then = as_plain(settings), state["settings"]
    changed = {
        name: f"{name} was {then.get(name)} and is {value}" for name, value in now.items() if then.get(name) != value
    }
    foreign = [changed[name] for name in (*MODEL_FIELDS, *STREAM_FIELDS) if name in changed]
    if foreign:
        raise CheckpointError(f"{checkpoint.folder} belongs to another run: {'; '.join(foreign)}; {remedy}")
    if state["model_digest"] != prepared.model_digest:
        raise CheckpointError(
            f"{checkpoint.folder} holds a model of other shapes than encoder {settings.encoder} gives; {remedy}"
        )
    quiet = {*MACHINE_FIELDS, "shards"}
    return [sentence for name, sentence in changed.items() if name not in quiet]
