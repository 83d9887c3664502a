"""A study of pre-trainings: variants x seeds x collections, each cell pre-trained, fine-tuned and judged; one table.

    python launchers/study.py --recipe papers --collections DATA/squad DATA/medquad --output studies/papers
    sbatch --array=0-15 launchers/cluster/study.sbatch --recipe papers ...     # the array's tasks share the cells

Every stage of a cell is one of the ordinary commands. A finished cell is a small file in OUTPUT/cells, everything large
lies in --work; the same command again skips finished cells and goes on with the others. Several processes may run it on
one output at once. docs/study.md describes recipes and reports.

Exit codes: 0 done, 2 settings, 75 stopped on request (running stages have saved), else that of the command that failed.
"""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from quincunx.data_shards.errors import EXIT_PREEMPTED, SettingsError, exit_with_one_sentence
from quincunx.engine.retrieval.commands import Stopping
from quincunx.engine.retrieval.files import written_whole
from quincunx.launchers.command_line import parse_settings
from quincunx.launchers.study_cells import (
    Cell,
    CommandFailed,
    bm25_record,
    command_line,
    make_cells,
    make_data,
    read_recipe,
    run_cell,
)

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of a study."""

    recipe: str
    """Recipe: a YAML file, or one of papers, master_table6, master_table7, master_table9, master_figure2,
    retromae_table6."""
    collections: tuple[str, ...]
    """BEIR folders with training queries and the judged split; each is a study of its own, from pre-training on."""
    output: str
    """Folder of the cells' records and of the report."""
    work: str | None = None
    """Folder of everything large: shards, runs, embeddings (default: OUTPUT/work)."""
    workers: int | None = None
    """Cells that are made at once (default: one a GPU, or one a core)."""
    launch: str | None = None
    """What starts a training, like "deepspeed --num_gpus 8" (default: one process)."""
    report_only: bool = False
    """Write the report of the cells that are there, and make none."""


class Study:
    """The cells of a study and the threads that make them."""

    def __init__(self, settings: StudySettings):
        self.settings, self.recipe = settings, read_recipe(settings.recipe)
        self.output = Path(settings.output)
        work = Path(settings.work) if settings.work else self.output / "work"
        self.cells = make_cells(self.recipe, settings.collections, self.output, work)
        refuse_other_study(self.output, self.recipe.name, self.cells)
        self.groups: dict[Path, list[Cell]] = {}
        """Cells by the pre-training that they share: a group is made by one worker, one cell after the other."""
        for cell in self.cells:
            self.groups.setdefault(cell.pretrained, []).append(cell)
        self.stopping, self.failure, self.reporting = Stopping(), None, threading.Lock()

    def run(self) -> int:
        """Makes the cells that are missing; returns the exit code."""
        environments = worker_environments(self.settings)
        with self.stopping:
            threads = [threading.Thread(target=self._work, args=(each,)) for each in environments]
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # a signal is handled between two waits
                    thread.join(POLL_SECONDS)
        if self.failure is not None:
            raise self.failure
        return EXIT_PREEMPTED if self.stopping.requested else 0

    def _work(self, environment: Mapping[str, str]) -> None:
        """One worker: first the groups that nobody makes, then those that another process may have left unfinished."""
        try:
            for patient in (False, True):
                for path, cells in self.groups.items():
                    if not self.stopping.requested and not all(map(is_made, cells)):
                        with self._held(path, patient) as lock:
                            if lock is not None:
                                self._make_group(cells, lock, environment)
        except BaseException as error:
            self.failure = self.failure or error
            self.stopping.stop()

    def _make_group(self, cells: Sequence[Cell], lock: IO[str], environment: Mapping[str, str]) -> None:
        for cell in cells:
            if is_made(cell):
                continue
            try:
                with self._held(cell.data, True) as data_lock:
                    if data_lock is not None:
                        make_data(cell, partial(self._command, cell, data_lock, environment))
                        write_record(cell.bm25_file, bm25_record(cell))
                if cell.record() is not None:  # only BM25's was missing
                    continue
                record = run_cell(cell, partial(self._command, cell, lock, environment))
            except CommandFailed as failed:
                if failed.code == EXIT_PREEMPTED:
                    self.stopping.stop()
                    return
                raise
            write_record(cell.record_file, record)
            done = sum(other.record() is not None for other in self.cells)
            outcome = "diverged" if "diverged" in record else describe(record)
            say(f"[{done}/{len(self.cells)}] {cell.label}: {outcome}")
            self.report()

    def _command(
        self,
        cell: Cell,
        lock: IO[str],
        environment: Mapping[str, str],
        script: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Any],
        trains: bool = False,
    ) -> None:
        """Runs one command, which holds the lock too. Raises CommandFailed."""
        launch = shlex.split(self.settings.launch or "") if trains else []
        words = command_line(script, settings, inputs, launch)
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with open(cell.log, "a") as log:
            log.write(f"\n$ {shlex.join(words)}\n")
            log.flush()
            if trains:
                say(f"{cell.label}: {script.removesuffix('.py')} (its output: {cell.log})")
            code = self.stopping.run(words, lock, env={**os.environ, **environment}, stdout=log, stderr=log)
        if code:
            raise CommandFailed(code, script, cell.log)

    @contextlib.contextmanager
    def _held(self, path: Path, wait: bool) -> Iterator[IO[str] | None]:
        """The lock of a folder; None where another process holds it, or, with `wait`, when this one is to stop.

        What a killed study has left running still holds its lock, and is waited for.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"{path.parent} cannot be written ({error.strerror}): give another --work") from None
        with open(path.with_name(f"{path.name}.lock"), "a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not wait or self.stopping.requested:
                        yield None
                        return
                    time.sleep(POLL_SECONDS)
            yield lock

    def report(self) -> list[Path]:
        """Writes the report of the cells that are there; gives its files."""
        from quincunx.engine.retrieval.study_report import make_report

        with self.reporting:
            bm25 = {cell.collection.name: record for cell in self.cells if (record := cell.bm25()) is not None}
            return make_report(
                self.output,
                self.recipe.name,
                list(self.recipe.variants),
                self.recipe.against,
                [record for cell in self.cells if (record := cell.record()) is not None],
                bm25,
                len(self.cells),
            )


def is_made(cell: Cell) -> bool:
    """Whether the cell's record and BM25's beside it are there."""
    return cell.record() is not None and cell.bm25() is not None


def refuse_other_study(output: Path, name: str, cells: Sequence[Cell]) -> None:
    """Raises SettingsError if the output cannot be written, or holds another study."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"output {output} cannot be written ({error.strerror}): give another --output") from None
    report = output / "report.md"
    title = report.read_text(errors="replace").partition("\n")[0].removeprefix("# ") if report.exists() else None
    if title not in (None, f"Study {name}"):
        raise SettingsError(f"{report} is the report of {title}, this one is {name}: give another --output")
    if not os.access(output, os.W_OK):
        raise SettingsError(f"output {output} cannot be written: give another --output")
    own = {cell.record_file for cell in cells}
    if strangers := sorted(str(path) for path in output.glob("cells/*/*/seed-*.json") if path not in own):
        raise SettingsError(
            f"{output} holds cells that this command does not name ({', '.join(strangers[:3])}), and its report would "
            "lose them: give all collections and the recipe that they were made with, or another --output"
        )


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record, one key a line: lists of values stay on theirs."""
    with written_whole(path) as file:
        file.write("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()) + "\n}\n")


def describe(record: Mapping[str, Any]) -> str:
    name, found = next(iter(record["measures"].items()))
    return f"{name} {found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def worker_environments(settings: StudySettings) -> list[dict[str, str]]:
    """One set of environment variables for each worker: a GPU of its own, or its share of the cores."""
    import torch

    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    gpus = [gpu for gpu in gpus if gpu]
    if settings.launch:
        return [{}]
    if gpus:
        count = settings.workers or len(gpus)
        return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(count)]
    cores = len(os.sched_getaffinity(0))
    count = settings.workers or cores
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))}] * count


def check_settings(settings: StudySettings) -> None:
    """Raises SettingsError with the first thing amiss."""
    if settings.workers is not None and settings.workers < 1:
        raise SettingsError(f"workers is {settings.workers}: give 1 or more")
    if not settings.collections or "" in settings.collections:
        raise SettingsError("collections is empty or names an empty path: give at least one BEIR folder")
    if not settings.output:
        raise SettingsError("output is empty: give a folder")
    launch = settings.launch or ""
    if launch and (settings.workers or 1) > 1:
        raise SettingsError("launch gives all GPUs to one training: leave workers out, or launch")
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise SettingsError(f"launch is {launch!r}, which no shell would read ({error}): fix its quotes") from None
    if words and shutil.which(words[0]) is None:
        raise SettingsError(f"launch is {launch!r}, and {words[0]} is no command of this machine: install or fix it")


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(StudySettings, __doc__.split("\n")[0], argv)
    check_settings(settings)
    study = Study(settings)
    missing = sum(not is_made(cell) for cell in study.cells)
    say(f"study {study.recipe.name}: {len(study.cells)} cells, {len(study.cells) - missing} of them there")

    try:
        code = 0 if settings.report_only else study.run()
    except CommandFailed as failed:
        print(f"error: {failed}", file=sys.stderr, flush=True)
        code = failed.code
    for path in study.report():
        if path.suffix in (".md", ".html"):
            say(f"wrote {path}")
    return code


if __name__ == "__main__":
    exit_with_one_sentence(main)
