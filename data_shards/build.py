"""A corpus to a shard set: plan, tasks, merge, manifest last.

The unfinished build lives in `<output>/work`: identity.json says what is being built, each finished task has left a
result there. The same command continues a build that was stopped at any moment, and gives the same bytes as one that
was not, whatever the number of workers; the number of tasks is part of what decides the bytes, so it follows from the
corpus, not from the machine.
"""

import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from quincunx.data_shards.block import VERSION as BLOCK_VERSION
from quincunx.data_shards.build_merge import PUBLISHING_NAME, merge_tasks
from quincunx.data_shards.build_settings import TRAIN_PREFIX, BuildSettings
from quincunx.data_shards.build_task import TaskPlan
from quincunx.data_shards.documents import Input
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.manifest import MANIFEST_NAME, SCHEMA_VERSION, FileEntry, Manifest
from quincunx.data_shards.shard_writer import full_disk_is_named, write_file
from quincunx.data_shards.shards import check_shard_sizes

WORK_FOLDER = "work"
IDENTITY_NAME = "identity.json"
TASK_BYTES = 8 * 2**20
MAX_TASKS = 4096


def build_shards(settings: BuildSettings, command: list[str], say: Callable[[str], None] = print) -> Manifest | None:
    """Builds, or continues building, the shard set that `settings` describe.

    command: what the user ran, recorded in build.json. Returns the manifest, or None where Slurm has the tasks now.

    Raises:
        SettingsError: an output folder that holds something else, is in use, or cannot be written.
        DataError: an empty or damaged corpus, duplicate passage ids, a full disk; without overwrite also a finished
            set in the output folder that is damaged.
    """
    from quincunx.data_shards.readers import list_inputs

    started = time.time()
    inputs = list_inputs(settings.format, settings.path)
    say(f"{len(inputs)} inputs, {sum(source.bytes for source in inputs) / 1e6:,.1f} MB")
    identity = build_identity(settings, inputs)
    output = Path(settings.output)
    if not settings.overwrite and (finished := finished_set(output)):
        if identity_of(finished) != identity:
            raise SettingsError(
                f"{output} holds another shard set ({differences(identity_of(finished), identity)}): give another "
                "output, or --overwrite to replace it"
            )
        check_shard_sizes(settings.output, finished)
        remove_leftover(output)
        say(f"{output} already holds this shard set, complete (dataset id {finished.dataset_id}): nothing to do")
        return finished
    with working_folder(output, identity, settings.overwrite) as work:
        with full_disk_is_named(output):
            plan = write_plan(settings, identity, work, say)
            if not run_plan(settings, plan):
                say("Run the same command again when the tasks are finished: it completes the shard set.")
                return None
        manifest = merge_tasks(
            plan,
            output,
            sources=tuple(FileEntry(**source) for source in identity["sources"]),
            record={
                "command": command,
                "folder": os.getcwd(),
                "settings": asdict(settings),
                "versions": versions(),
                "seconds": round(time.time() - started, 1),
            },
        )
        remove_work(work)
    return manifest


def run_plan(settings: BuildSettings, plan: TaskPlan) -> bool:
    """Stage 1 with the executor that the settings ask for; False where tasks are still to come."""
    from quincunx.data_shards.build_executor import run_tasks

    workers = settings.workers or (len(os.sched_getaffinity(0)) if settings.executor == "local" else -1)
    slurm = dict(argument.split("=", 1) for argument in settings.slurm_args)
    slurm |= {"partition": settings.slurm_partition, "time": settings.slurm_time}
    return run_tasks(plan, settings.executor, workers, slurm, settings.progress)


def build_identity(settings: BuildSettings, inputs: list[Input]) -> dict[str, Any]:
    """What decides the bytes of the set: the settings that matter, the sources' digests, the tokenizer's."""
    from quincunx.data_shards.generations import list_generation_files
    from quincunx.data_shards.tokenizer import load_tokenizer, tokenizer_digest

    trained = settings.tokenizer.startswith(TRAIN_PREFIX)
    files = list_generation_files(settings.generations)
    generated = [Input(path.name, (path,), path.stat().st_size) for path in files]
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(lambda source: source.digest, [*inputs, *generated]))
    sources = [
        {"name": source.name, "bytes": source.bytes, "digest": digest}
        for source, digest in zip([*inputs, *generated], digests)
    ]
    input_bytes = sum(source.bytes for source in inputs)
    content = {
        "format": settings.format,
        "tokenizer": settings.tokenizer if trained else "given",
        "tokenizer_megabytes": settings.tokenizer_megabytes if trained else 0,
        "max_tokens": settings.max_tokens,
        "with_titles": settings.with_titles,
        "on_bad_record": settings.on_bad_record,
        "held_out_share": settings.held_out_share,
        "probe_queries": settings.probe_queries,
        "tasks": settings.tasks or max(1, min(MAX_TASKS, -(-input_bytes // TASK_BYTES))),
        "block_samples": settings.block_samples,
        "shard_bytes": settings.shard_bytes,
        "num_buckets": settings.num_buckets,
        "num_generation_files": len(generated),
        "block_version": BLOCK_VERSION,
        "schema_version": SCHEMA_VERSION,
    } | ({"pairs": True} if settings.pairs else {})  # absent otherwise: sets from before it keep their identity
    digest = "" if trained else tokenizer_digest(load_tokenizer(settings.tokenizer))
    return {"content": content, "sources": sources, "given_tokenizer": digest}


def identity_of(manifest: Manifest) -> dict[str, Any]:
    """The identity that a finished set was built from."""
    given = manifest.settings.get("tokenizer") == "given"
    return {
        "content": manifest.settings,
        "sources": [asdict(source) for source in manifest.sources],
        "given_tokenizer": manifest.tokenizer_digest if given else "",
    }


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between two identities, for a message."""
    parts = [
        f"{key} {found['content'].get(key)} there, {value} here"
        for key, value in wanted["content"].items()
        if found["content"].get(key) != value
    ]
    parts += ["another corpus"] * (found["sources"] != wanted["sources"])
    parts += ["another tokenizer"] * (found["given_tokenizer"] != wanted["given_tokenizer"])
    return ", ".join(parts)


def finished_set(output: Path) -> Manifest | None:
    """The manifest in the output folder; None where there is none.

    Raises:
        SettingsError: a folder or manifest that this user may not read.
        DataError: a manifest that is damaged, foreign or of a newer version.
    """
    path = output / MANIFEST_NAME
    try:
        return Manifest.from_json(path.read_text("utf-8", "replace"), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unusable_output(output, error) from None
    except DataError as error:
        raise DataError(f"{error}, or build anew in its place with --overwrite") from None


def unusable_output(output: Path, error: OSError) -> SettingsError:
    return SettingsError(
        f"output {output} cannot be used ({error.strerror}): give a folder that you may read and write, or a new one"
    )


@contextmanager
def working_folder(output: Path, identity: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """The folder of the unfinished build, locked for this process; `remove_work` removes it when it has served.

    What lies there goes on being used if it belongs to the same identity and no set was published from it.

    Raises:
        SettingsError: another process builds there, an unfinished build with other settings is there, or the folder
            cannot be written or locked.
        DataError: a full disk.
    """
    work = output / WORK_FOLDER
    try:
        with full_disk_is_named(output):
            work.mkdir(parents=True, exist_ok=True)
            lock = open(work / "lock", "w")  # noqa: SIM115 - closed by the next statement
    except OSError as error:
        raise unusable_output(output, error) from None
    with lock:
        take_lock(lock, output)
        identity_file = work / IDENTITY_NAME
        found = json.loads(identity_file.read_text()) if identity_file.exists() else None
        if found and identity["content"]["on_bad_record"] == "skip":  # tasks finished under "stop" met no bad record
            found["content"]["on_bad_record"] = "skip"
        if found and not overwrite and found | {"sources": identity["sources"]} != identity:
            raise SettingsError(
                f"{output} holds an unfinished build ({differences(found, identity)}): finish it with its own "
                f"command, delete {work}, give another output, or --overwrite to start anew"
            )
        published = (work / PUBLISHING_NAME).exists() and (output / MANIFEST_NAME).exists()
        if found != identity or published:  # nothing that lies here may be used again
            for entry in work.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for name in ("shards", "tasks"):
            (work / name).mkdir(exist_ok=True)
            for temporary in (work / name).glob(".*.tmp"):
                temporary.unlink()
        write_file(identity_file, json.dumps(identity).encode())
        yield work


def take_lock(lock: TextIO, output: Path) -> None:
    """Locks an open file for this process; raises SettingsError where another holds it or the file system has none."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked child does not inherit this kind
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise SettingsError(f"{output} is being built by another process: wait for it, or stop it first") from None
        raise SettingsError(
            f"the file system of output {output} gives no locks ({error.strerror}), which keep two builds apart: give "
            "an output on a file system that does"
        ) from None


def remove_work(work: Path) -> None:
    """Removes the working folder; its identity goes first, so that nothing uses a half-removed one."""
    (work / IDENTITY_NAME).unlink()
    shutil.rmtree(work)


def remove_leftover(output: Path) -> None:
    """Removes what a build left that was killed just after publishing; the work of one that goes on stays."""
    work = output / WORK_FOLDER
    if (work / PUBLISHING_NAME).exists() or (work.is_dir() and not (work / IDENTITY_NAME).exists()):
        with open(work / "lock", "w") as lock, suppress(SettingsError):
            take_lock(lock, output)
            shutil.rmtree(work)


def write_plan(settings: BuildSettings, identity: dict[str, Any], work: Path, say: Callable[[str], None]) -> TaskPlan:
    """Puts the tokenizer into the working folder, trained where the settings ask for it, and returns the plan."""
    folder = work / "tokenizer"
    if not folder.exists():
        from quincunx.data_shards.tokenizer import load_tokenizer
        from quincunx.data_shards.tokenizer_training import train_wordpiece

        if settings.tokenizer.startswith(TRAIN_PREFIX):
            size = int(settings.tokenizer.removeprefix(TRAIN_PREFIX))
            say(f"Training a WordPiece tokenizer of {size} on up to {settings.tokenizer_megabytes} MB of the corpus")
            tokenizer = train_wordpiece(sample_texts(settings, identity["content"]["tasks"]), size)
        else:
            tokenizer = load_tokenizer(settings.tokenizer)
        unfinished = work / "tokenizer.tmp"
        tokenizer.save_pretrained(unfinished)
        os.rename(unfinished, folder)
    index = work / "generations.index"
    if settings.generations and not index.exists():
        from quincunx.data_shards.generations import index_generations

        counts = index_generations(settings.generations, index)
        say(
            f"Generations for {counts.passages:,} passages: queries for {counts.queries:,}, "
            f"a continuation for {counts.continuation:,}"
        )
    return TaskPlan(
        format=settings.format,
        path=settings.path,
        tokenizer=str(folder),
        generations=str(index) if settings.generations else "",
        work=str(work),
        content=identity["content"],
    )


def sample_texts(settings: BuildSettings, tasks: int) -> Iterator[str]:
    """The first texts of each task's part, evenly, to `tokenizer_megabytes` in all."""
    from quincunx.data_shards.passages import document_texts
    from quincunx.data_shards.readers import read_documents

    budget = settings.tokenizer_megabytes * 10**6 // tasks
    for task in range(tasks):
        taken = 0
        for document in read_documents(settings.format, settings.path, task, tasks, "skip"):
            for text in document_texts(document, settings.with_titles):
                yield text
                taken += len(text)
            if taken >= budget:
                break


def versions() -> dict[str, str]:
    """Of what decides how a build behaves."""
    from importlib.metadata import version

    names = ("quincunx", "datatrove", "tokenizers", "transformers", "webdataset", "numpy")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in names}
