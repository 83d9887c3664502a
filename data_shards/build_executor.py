"""Runs the tasks of a build with datatrove: on this machine's cores, or as Slurm or Ray jobs.

datatrove hands out the tasks, keeps the workers, and skips what is finished; its chatter goes to log files in the work
folder, and a progress bar stands in its place.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils.logging import logger

from quincunx.data_shards.build_task import PROGRESS_SECONDS, TaskPlan, run_task
from quincunx.data_shards.errors import DataError, SettingsError

# The pool's fork server imports these once, instead of every worker; transformers alone takes seconds.
PRELOADED = [
    "quincunx.data_shards.build_executor",
    "quincunx.data_shards.generations",
    "quincunx.data_shards.passages",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.tokenization_bert",
    "webdataset.writer",
]


class Task:
    """A datatrove pipeline of one step: run task `rank` of the plan."""

    def __init__(self, plan: TaskPlan):
        self.plan = plan

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        assert world_size == self.plan.content["tasks"]
        try:
            run_task(self.plan, rank, leave_with_parent=multiprocess.parent_process() is not None)
        except Exception as error:
            known = isinstance(error, (DataError, SettingsError))
            text = str(error) if known else f"{type(error).__name__}: {error} (see {self.plan.work}/datatrove/logs)"
            with contextlib.suppress(OSError):  # a full disk, say, which is what the task failed with
                self.plan.task_file(rank, "error").write_text(text)
            raise

    def __repr__(self) -> str:
        return f"quincunx shards of {self.plan.format} corpus {self.plan.path}"


class QuietLocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor whose workers log to a file instead of the terminal."""

    def _launch_run_for_rank(self, rank, ranks_q, completed=None, completed_lock=None):
        if multiprocess.parent_process() is not None:
            sys.stderr = open(Path(self.logging_dir.path, f"worker-{os.getpid()}.log"), "a")  # noqa: SIM115
        return super()._launch_run_for_rank(rank, ranks_q, completed, completed_lock)


def run_tasks(plan: TaskPlan, executor: str, workers: int, slurm: dict[str, str], show_progress: bool) -> bool:
    """Runs every unfinished task; returns whether all are finished now (Slurm jobs may take their time).

    Args:
        executor: local, slurm or ray.
        workers: tasks that run beside each other.
        slurm: `partition` and `time` of the jobs, and any further sbatch arguments.

    Raises:
        SettingsError: the executor's own software is not there.
        DataError: what a task failed with.
    """
    num_tasks = plan.content["tasks"]
    folder = Path(plan.work, "datatrove")
    for task in range(num_tasks):
        if not plan.task_file(task, "result.json").exists():  # a marker may have outlived its files in a crash
            Path(folder, "completions", f"{task:05d}").unlink(missing_ok=True)
    if all_finished(plan):
        return True
    if executor == "local":
        for error in Path(plan.work, "tasks").glob("*-error"):
            error.unlink()
    pipeline = [Task(plan)]
    if executor == "slurm":
        return _submit_to_slurm(plan, pipeline, folder, workers, slurm)
    with _logging_to(folder / "build.log"), _orphans_end(), _progress_bar(plan, show_progress):
        if executor == "local":
            multiprocess.set_forkserver_preload(PRELOADED)
            QuietLocalExecutor(pipeline, num_tasks, min(workers, num_tasks), str(folder)).run()
        else:
            _ray_executor(pipeline, num_tasks, workers, str(folder)).run()
            raise_errors(plan)
            if not all_finished(plan):
                raise DataError(f"tasks ended without a result: see {folder}, and run the same command again")
    return True


def all_finished(plan: TaskPlan) -> bool:
    return all(plan.task_file(task, "result.json").exists() for task in range(plan.content["tasks"]))


def raise_errors(plan: TaskPlan) -> None:
    """Raises DataError with what tasks on other machines failed with, once; a rerun tries them again."""
    paths = sorted(Path(plan.work, "tasks").glob("*-error"))
    errors = [f"task {path.name.split('-')[0]}: {path.read_text()}" for path in paths]
    for path in paths:
        path.unlink()
    if errors:
        more = f" (and {len(errors) - 1} more tasks failed)" if len(errors) > 1 else ""
        raise DataError(errors[0] + more)


def _ray_executor(pipeline: list, num_tasks: int, workers: int, folder: str):
    try:
        import ray  # noqa: F401
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError:
        raise SettingsError("executor ray needs ray: pip install 'quincunx[ray]', or give --executor local") from None
    return RayPipelineExecutor(pipeline, num_tasks, workers, logging_dir=folder)


def _submit_to_slurm(plan: TaskPlan, pipeline: list, folder: Path, workers: int, slurm: dict[str, str]) -> bool:
    """Submits a job array of the unfinished tasks, unless the one submitted before is still in the queue."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    num_tasks = plan.content["tasks"]
    job_file = Path(plan.work, "slurm_job")
    try:
        if job_file.exists():
            queue = ["squeue", "--noheader", "--jobs", job_file.read_text()]
            if subprocess.run(queue, capture_output=True, text=True).stdout.strip():
                finished = sum(plan.task_file(task, "result.json").exists() for task in range(num_tasks))
                print(
                    f"Slurm job {job_file.read_text()} is in the queue, {finished} of {num_tasks} tasks are finished."
                )
                return False
            raise_errors(plan)
        others = {key: value for key, value in slurm.items() if key not in ("partition", "time", "mem_per_cpu_gb")}
        executor = SlurmPipelineExecutor(
            pipeline,
            num_tasks,
            time=slurm["time"],
            partition=slurm["partition"],
            mem_per_cpu_gb=int(slurm.get("mem_per_cpu_gb", 4)),
            workers=workers,
            job_name="quincunx-shards",
            qos="",
            venv_path=f"{sys.prefix}/bin/activate" if sys.prefix != sys.base_prefix else None,
            sbatch_args=others,
            logging_dir=str(folder),
        )
        with _logging_to(folder / "build.log"):
            executor.run()
    except FileNotFoundError as error:
        raise SettingsError(f"executor slurm needs {error.filename} on this machine: give --executor local") from None
    except subprocess.CalledProcessError as error:
        raise SettingsError(
            f"sbatch refused the job (exit {error.returncode}): see its message and {folder}, and check "
            "--slurm_partition, --slurm_time and --slurm_args"
        ) from None
    job_file.write_text(str(executor.job_id))
    print(f"Submitted {num_tasks} tasks as Slurm job {executor.job_id}.")
    return False


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """datatrove's messages of this process, which it writes to stderr, go to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as log, contextlib.redirect_stderr(log):
        logger.remove()
        logger.add(log)
        try:
            yield
        finally:
            logger.remove()


_end_with_parent = False


@contextlib.contextmanager
def _orphans_end() -> Iterator[None]:
    """datatrove's manager process is forked and would outlive a killed builder; on Linux the kernel ends it."""
    global _end_with_parent
    _end_with_parent = True
    try:
        yield
    finally:
        _end_with_parent = False


def _after_fork() -> None:
    if _end_with_parent and sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _progress_bar(plan: TaskPlan, show: bool) -> Iterator[None]:
    """A bar of finished tasks, with the number of passages so far and the time left, on the real stderr."""
    if not show:
        yield
        return
    from tqdm import tqdm

    num_tasks = plan.content["tasks"]
    stop = threading.Event()
    bar = tqdm(total=num_tasks, desc="shards", unit="task", file=sys.__stderr__, dynamic_ncols=True)
    bar.mininterval = 0.1 if sys.__stderr__.isatty() else 30  # a log file gets a line now and then

    def follow() -> None:
        passages: dict[int, int] = {}
        finished: set[int] = set()
        last = False
        while not last:
            last = stop.wait(PROGRESS_SECONDS)
            for task in set(range(num_tasks)) - finished:
                with contextlib.suppress(OSError, ValueError):
                    passages[task] = int(plan.task_file(task, "progress").read_text())
                if plan.task_file(task, "result.json").exists():
                    finished.add(task)
                    passages[task] = plan.task_file(task, "hashes.bin").stat().st_size // 8  # a hash for each passage
            bar.set_postfix_str(f"{sum(passages.values()):,} passages", refresh=False)
            bar.update(len(finished) - bar.n)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bar.close()
