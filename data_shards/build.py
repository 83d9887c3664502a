"""A corpus to a shard set, one artefact (artefact.py): tasks write shards, then they are merged and published.

The same command continues a build that was stopped at any moment, and gives the same bytes as one that was not,
whatever the number of workers. The number of tasks is part of what decides the bytes, so it follows from the corpus,
not from the machine.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quincunx.data_shards.artefact import BEGUN, Work, artefact, full_disk_is_named, read_begun, work_folder
from quincunx.data_shards.build_merge import merge_tasks
from quincunx.data_shards.build_settings import TRAIN_PREFIX, BuildSettings
from quincunx.data_shards.build_task import TaskPlan, run_task
from quincunx.data_shards.durable import file_digest
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.generations import index_generations, list_generation_files
from quincunx.data_shards.passages import text_parts
from quincunx.data_shards.readers import list_inputs, read_documents
from quincunx.data_shards.records import Input, ReadReport
from quincunx.data_shards.shard_files import Files
from quincunx.data_shards.shards import MANIFEST_NAME, SCHEMA_VERSION, FileEntry, Manifest, read_manifest
from quincunx.data_shards.tokenizer import load_tokenizer, tokenizer_digest
from quincunx.data_shards.tokenizer_training import train_wordpiece

KIND = "shards"
TASK_BYTES = 8 * 2**20
MAX_TASKS = 4096
# Settings that decide the bytes of a set, in the order of its manifest.
CONTENT = (
    "format", "tokenizer", "tokenizer_megabytes", "max_tokens", "with_titles", "on_bad_record", "held_out_share",
    "probe_queries", "tasks", "block_samples", "shard_bytes", "num_buckets",
)  # fmt: skip
RECORDED = ("quincunx", "datatrove", "tokenizers", "transformers", "numpy")
# The pool's fork server imports these once, instead of every worker; transformers alone takes seconds.
PRELOADED = [
    "quincunx.data_shards.build_task",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.tokenization_bert",
]


def build_shards(settings: BuildSettings, command: list[str], say: Callable[[str], None] = print) -> Manifest | None:
    """Builds, or continues building, the shard set that `settings` describe.

    command: what the user ran, recorded in build.json. Returns the manifest, or None if Slurm has the tasks now.

    Raises:
        SettingsError: an output folder that holds something else, is in use, or cannot be written.
        DataError: an empty or damaged corpus, duplicate passage ids, a full disk; a finished set in the output folder
            that is damaged.
    """
    started = time.time()
    inputs = list_inputs(settings.format, settings.path)
    say(f"{len(inputs)} inputs, {sum(source.bytes for source in inputs) / 1e6:,.1f} MB")
    output = Path(settings.output)
    content, made_from = identify(settings, inputs)
    if not settings.remake:
        rebuild_lost_shards(settings, content, made_from, say)
        keep_tasks_without_bad_records(output, made_from)
    with artefact(output, KIND, made_from, remake=settings.remake, read_own=read_made_from) as work:
        if work is None:
            manifest = read_manifest(Files(settings.output))
            say(f"{output} already holds this shard set, complete (dataset id {manifest.dataset_id}): nothing to do")
            return manifest
        plan = make_plan(settings, content, work, say)
        if not run_tasks(plan, settings):
            work.left_unfinished = True
            say("Run the same command again (without --remake) when the tasks are finished: it completes the set.")
            return None
        record = {
            "command": [word for word in command if word != "--remake"],  # run again, it fixes the set
            "folder": os.getcwd(),
            "settings": asdict(settings),
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in RECORDED},
            "seconds": round(time.time() - started, 1),
        }
        return merge_tasks(plan, tuple(FileEntry(**source) for source in made_from["corpus"]), record)


def identify(settings: BuildSettings, inputs: list[Input]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that decide the bytes of the set, and all that does: also the sources and a given tokenizer."""
    files = list_generation_files(settings.generations)
    sources = [*inputs, *(Input(path.name, (path,), path.stat().st_size) for path in files)]
    with ThreadPoolExecutor(8) as pool:
        corpus = list(pool.map(Input.describe, sources))
    content = {name: getattr(settings, name) for name in CONTENT}
    content["tasks"] = settings.tasks or max(1, min(MAX_TASKS, -(-sum(s.bytes for s in inputs) // TASK_BYTES)))
    given_digest = ""
    if not settings.tokenizer.startswith(TRAIN_PREFIX):
        content |= {"tokenizer": "given", "tokenizer_megabytes": 0}
        given_digest = tokenizer_digest(load_tokenizer(settings.tokenizer))
    content |= {"num_generation_files": len(files), "block_version": 1, "schema_version": SCHEMA_VERSION}
    if settings.pairs:  # absent otherwise: sets from before it keep their identity
        content["pairs"] = True
    return content, content | {"corpus": corpus, "tokenizer_digest": given_digest}


def read_made_from(output: Path) -> dict[str, Any] | None:
    """What a finished set says about itself, as artefact.py asks for it; None if there is none.

    Raises:
        DataError: a manifest that is damaged, foreign or of a newer version.
    """
    if not (output / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(Files(str(output)))
    given = manifest.settings.get("tokenizer") == "given"
    return {
        "kind": KIND,
        "made_from": manifest.settings
        | {
            "corpus": [asdict(source) for source in manifest.sources],
            "tokenizer_digest": manifest.tokenizer_digest if given else "",
        },
        "files": {name: {"bytes": entry.bytes, "digest": entry.digest} for name, entry in manifest.files.items()},
    }


def rebuild_lost_shards(
    settings: BuildSettings, content: dict[str, Any], made_from: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Makes shards of a finished set again that are missing or cut; only their tasks run.

    Raises:
        DataError: a shard that comes out differently.
    """
    output = Path(settings.output)
    found = read_made_from(output)
    if found is None or found["made_from"] != made_from:
        return
    sizes = {path.name: path.stat().st_size for path in output.glob("*.tar")}
    shards = {name: entry for name, entry in found["files"].items() if name.endswith(".tar")}
    lost = [name for name, entry in shards.items() if sizes.get(name) != entry["bytes"]]
    if not lost:
        return
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        plan = make_plan(settings, content, Work(output, Path(folder)), say)
        for task in sorted({int(name.split("-")[1]) for name in lost}):
            say(f"running task {task} of the build again")
            run_task(plan, task)
        for name in lost:
            made = plan.work.made(name)
            if not made.exists() or file_digest(made) != shards[name]["digest"]:
                raise DataError(
                    f"{output / name} differs from the manifest's after it was made again, because another version of "
                    "quincunx or of a library made the original: copy it again, or make the whole set anew with "
                    "--remake"
                )
            os.replace(made, output / name)


def keep_tasks_without_bad_records(output: Path, made_from: dict[str, Any]) -> None:
    """Lets a build that a bad record stopped go on with --on_bad_record skip: its finished tasks have met none."""
    begun = {"kind": KIND, "made_from": made_from | {"on_bad_record": "stop"}}
    if made_from["on_bad_record"] == "skip" and read_begun(work_folder(output)) == begun:
        (work_folder(output) / BEGUN).unlink()


def make_plan(settings: BuildSettings, content: dict[str, Any], work: Work, say: Callable[[str], None]) -> TaskPlan:
    """Makes the tokenizer, trained if the settings ask for it, and the index of generated texts; returns the plan."""
    plan = TaskPlan(settings.path, work, content)
    if not plan.tokenizer_folder.exists():
        if settings.tokenizer.startswith(TRAIN_PREFIX):
            size = int(settings.tokenizer.removeprefix(TRAIN_PREFIX))
            say(f"Training a WordPiece tokenizer of {size} on up to {settings.tokenizer_megabytes} MB of the corpus")
            tokenizer = train_wordpiece(sample_texts(settings, content["tasks"]), size)
        else:
            tokenizer = load_tokenizer(settings.tokenizer)
        unfinished = work.scratch(".tokenizer.tmp")
        tokenizer.save_pretrained(unfinished)
        os.rename(unfinished, plan.tokenizer_folder)
    if settings.generations and not plan.generations.exists():
        counts = index_generations(settings.generations, plan.generations)
        passages = counts.pop("passages")
        found = ", ".join(f"{name} for {count:,}" for name, count in counts.items())
        say(f"Generations for {passages:,} passages: {found}")
    return plan


def sample_texts(settings: BuildSettings, tasks: int) -> Iterator[str]:
    """The first texts of each task's part, evenly, to `tokenizer_megabytes` in all."""
    budget = settings.tokenizer_megabytes * 10**6 // tasks
    for task in range(tasks):
        taken = 0
        for document in read_documents(settings.format, settings.path, task, tasks, ReadReport("skip")):
            for text in map(" ".join, text_parts(document, settings.with_titles)):
                yield text
                taken += len(text)
            if taken >= budget:
                break


def run_tasks(plan: TaskPlan, settings: BuildSettings) -> bool:
    """Runs every unfinished task; returns whether all are finished now (Slurm jobs may take their time).

    Raises:
        SettingsError: the executor's own software is not there.
        DataError: what a task failed with.
    """
    missing = [task for task in range(plan.num_tasks) if not plan.work.is_done(task)]
    if not missing:
        return True
    if settings.executor == "local":
        run_locally(plan, missing, settings)
        return True
    for task in missing:  # a marker of datatrove's may have outlived its files in a crash
        Path(plan.datatrove_folder, "completions", f"{task:05d}").unlink(missing_ok=True)
    if settings.executor == "ray":
        run_on_ray(plan, settings)
        return True
    submit_to_slurm(plan, settings, len(missing))
    return False


def run_locally(plan: TaskPlan, tasks: list[int], settings: BuildSettings) -> None:
    """Runs tasks on this machine's cores, a bar of finished tasks on stderr."""
    workers = min(settings.workers or len(os.sched_getaffinity(0)), len(tasks))
    run = partial(run_task, plan)
    bar = partial(
        tqdm, total=plan.num_tasks, initial=plan.num_tasks - len(tasks), desc="shards", unit="task",
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file gets a line now and then
        disable=not settings.progress,
    )  # fmt: skip
    if workers == 1:
        for _ in bar(map(run, tasks)):
            pass
        return
    context = multiprocessing.get_context("forkserver")  # a killed builder's workers end after their task
    context.set_forkserver_preload(PRELOADED)
    with context.Pool(workers) as pool:
        for _ in bar(pool.imap_unordered(run, tasks)):
            pass


def run_elsewhere(plan: TaskPlan, data: Any, rank: int, world_size: int) -> None:
    """A step of a datatrove pipeline: runs task `rank`, and leaves what it fails with for the builder."""
    try:
        with full_disk_is_named(plan.work.path.parent):
            run_task(plan, rank)
    except Exception as error:
        known = isinstance(error, (DataError, SettingsError))
        text = str(error) if known else f"{type(error).__name__}: {error} (see {plan.datatrove_folder}/logs)"
        with contextlib.suppress(OSError):  # a full disk, say, which is what the task failed with
            plan.task_file(rank, "error").parent.mkdir(exist_ok=True)
            plan.task_file(rank, "error").write_text(text)
        raise


def raise_errors(plan: TaskPlan) -> None:
    """Raises DataError with what tasks on other machines failed with, once; a rerun tries them again."""
    paths = sorted(plan.work.scratch("tasks").glob("*-error"))
    errors = [f"task {path.name.split('-')[0]}: {path.read_text()}" for path in paths]
    for path in paths:
        path.unlink()
    if errors:
        more = f" (and {len(errors) - 1} more tasks failed)" if len(errors) > 1 else ""
        raise DataError(errors[0] + more)


def run_on_ray(plan: TaskPlan, settings: BuildSettings) -> None:
    try:
        import ray  # noqa: F401
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError:
        raise SettingsError("executor ray needs ray: pip install 'quincunx[ray]', or give --executor local") from None
    steps, workers = [partial(run_elsewhere, plan)], settings.workers or -1
    RayPipelineExecutor(steps, plan.num_tasks, workers, logging_dir=plan.datatrove_folder).run()
    raise_errors(plan)
    if not all(plan.work.is_done(task) for task in range(plan.num_tasks)):
        raise DataError(f"tasks ended without a result: see {plan.datatrove_folder}, and run the same command again")


def submit_to_slurm(plan: TaskPlan, settings: BuildSettings, num_missing: int) -> None:
    """Submits a job array of the unfinished tasks, unless the one submitted before is still in the queue."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    job_file = plan.work.scratch("slurm_job")
    arguments = dict(argument.split("=", 1) for argument in settings.slurm_args)
    try:
        if job_file.exists():
            job = job_file.read_text()
            queue = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True).stdout
            if queue.strip():
                finished = plan.num_tasks - num_missing
                print(f"Slurm job {job} is in the queue, {finished} of {plan.num_tasks} tasks are finished.")
                return
            raise_errors(plan)
        executor = SlurmPipelineExecutor(
            [partial(run_elsewhere, plan)],
            plan.num_tasks,
            time=settings.slurm_time,
            partition=settings.slurm_partition,
            mem_per_cpu_gb=int(arguments.pop("mem_per_cpu_gb", 4)),
            workers=settings.workers or -1,
            job_name="quincunx-shards",
            qos="",
            venv_path=f"{sys.prefix}/bin/activate" if sys.prefix != sys.base_prefix else None,
            sbatch_args={key: value for key, value in arguments.items() if key not in ("partition", "time")},
            logging_dir=plan.datatrove_folder,
        )
        executor.run()
    except FileNotFoundError as error:
        raise SettingsError(f"executor slurm needs {error.filename} on this machine: give --executor local") from None
    except subprocess.CalledProcessError as error:
        raise SettingsError(
            f"sbatch refused the job (exit {error.returncode}): see its message and {plan.datatrove_folder}, and check "
            "--slurm_partition, --slurm_time and --slurm_args"
        ) from None
    job_file.write_text(str(executor.job_id))
    print(f"Submitted {num_missing} tasks as Slurm job {executor.job_id}.")
