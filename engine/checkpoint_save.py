"""Writing checkpoints that are either whole or not there.

DeepSpeed writes a checkpoint in place, and a rank killed meanwhile leaves one that cannot be loaded. So it writes into
a staging folder here, and the folder gets its name only when every rank's files are on the disk:

    1. every rank writes its files into checkpoints/.staging-step-N, each with fsync, its digest taken on the way;
    2. every rank reports its files, or why it could not write them, to rank 0;
    3. rank 0 writes manifest.json (state, sizes, digests), fsyncs, renames the folder to step-N, fsyncs its parent;
    4. all ranks learn whether it was committed; rank 0 then drops the oldest.

A kill before the rename leaves the last checkpoint as it was, one after it leaves the new one. A failed write (a full
disk) ends in step 2: the staging folder is removed and training goes on. Several machines need a shared file system.
"""

import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

import xxhash

from quincunx.engine.checkpoint import MANIFEST, SCHEMA_VERSION, UNIVERSAL, committed, step_name

STAGING = ".staging-"
DELETING = ".deleting-"
STATE_KEY = "quincunx"


def save_checkpoint(engine, group, folder: Path, step: int, state: dict[str, Any], keep: int) -> str | None:
    """Commits the engine's state as `folder`/step-N; all ranks call it and all get the same answer.

    engine: the DeepSpeed engine. group: the process group that the ranks report over. state: JSON-able run state, the
    same on every rank. keep: checkpoints kept afterwards.
    Returns None, or why the checkpoint could not be written; then nothing of it is left and the earlier ones stand.
    """
    import torch.distributed as dist

    rank, staging = dist.get_rank(), folder / f"{STAGING}{step_name(step)}"
    writer = CheckpointWriter()
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        writer.makedirs(str(staging))
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda save_path: None  # would raise on rank 0 alone where the disk is full
    engine.save_checkpoint(
        str(folder),
        tag=staging.name,
        client_state={STATE_KEY: state, "universal_checkpoint_info": {}},
        save_latest=False,
    )
    reports = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (writer.failure, writer.files), group=group)
    failures = [f"rank {source}: {failure}" for source, (failure, _) in enumerate(reports) if failure]
    if rank == 0 and not failures:
        files = {name: entry for _, written in reports for name, entry in written.items()}
        try:
            commit(staging, folder / step_name(step), manifest_of(engine, step, state, files))
        except OSError as error:
            failures.append(f"rank 0: {error}")
    outcome = [failures]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if rank == 0:
        if failures:
            shutil.rmtree(staging, ignore_errors=True)
        else:
            drop_oldest(folder, keep)
    return "; ".join(outcome[0]) or None


class CheckpointWriter:
    """The engine that DeepSpeed writes a checkpoint's files through: digests, fsync, and no rank left waiting.

    A rank that raised inside DeepSpeed's save would leave the others in its barriers, so a failure is only noted here
    and reported when all ranks are through. The interface is deepspeed.runtime.checkpoint_engine.CheckpointEngine's.
    """

    def __init__(self):
        self.files: dict[str, dict[str, Any]] = {}
        self.failure: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        import torch

        digesting = None
        try:
            with open(path, "wb") as file:
                digesting = DigestingFile(file)
                torch.save(state_dict, digesting)
                file.flush()
                os.fsync(file.fileno())
            self.files[Path(path).name] = {"bytes": digesting.bytes, "xxh3_128": digesting.digest.hexdigest()}
        except Exception as error:  # also what torch makes of a failed write on its way out
            cause = (digesting and digesting.error) or error
            self.failure = self.failure or f"{Path(path).name}: {type(cause).__name__}: {cause}"

    def load(self, path: str, map_location=None) -> Any:
        import torch

        return torch.load(path, map_location=map_location, weights_only=False)  # our own files, verified before

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or f"{path}: {error.strerror}"

    def create(self, info) -> None:
        pass

    def commit(self, info) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def set_commit_info(self, info) -> None:
        pass

    def get_commit_info(self) -> None:
        return None

    def preserves_storage_sharing(self) -> bool:
        return True

    def cleanup(self) -> None:
        pass


class DigestingFile:
    """A file that is written front to back and digested on the way; `error` is the first write that failed."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.bytes = 0
        self.digest = xxhash.xxh3_128()
        self.error: OSError | None = None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()


def manifest_of(engine, step: int, state: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "world_size": engine.world_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": str(engine.get_data_types()[0]).removeprefix("torch."),
        "state": state,
        "files": files,
    }


def commit(staging: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest and gives the folder its name, each step on the disk before the next."""
    with open(staging / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(staging)
    if final.exists():  # an earlier save of this step, which a resumed run has just repeated
        discard(final)
    staging.rename(final)
    sync_folder(final.parent)


def drop_oldest(folder: Path, keep: int) -> None:
    """Deletes all but the `keep` newest committed checkpoints."""
    for old in committed(folder)[keep:]:
        discard(old)


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint so that a kill meanwhile leaves no half of it under its name."""
    doomed = checkpoint.with_name(f"{DELETING}{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed run left behind: staging and half-deleted folders, conversions. Rank 0, lock held."""
    for pattern in (f"{STAGING}*", f"{DELETING}*", UNIVERSAL):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
