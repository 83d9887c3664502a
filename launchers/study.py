"""A study of pre-trainings: variants x seeds x collections, each cell pre-trained, fine-tuned and judged; one table.

    python launchers/study.py --recipe papers --collections DATA/squad DATA/medquad --output studies/papers
    sbatch --array=0-15 launchers/cluster/study.sbatch --recipe papers ...     # the array's tasks share the cells

Every stage of a cell is one of the ordinary commands. A finished cell is a small file in OUTPUT/cells, everything large
lies in --work; the same command again skips finished cells and goes on with the others. Several processes may run it on
one output at once, and --workers starts some. docs/study.md describes recipes and reports.

Exit codes: 0 done, 2 settings, 75 stopped on request (running stages have saved), else that of the command that failed.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from quincunx.data_shards.durable import written_whole
from quincunx.data_shards.errors import EXIT_PREEMPTED, SettingsError, exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.launchers.command_line import parse_settings
from quincunx.launchers.study_cells import (
    LAUNCHERS,
    TRAININGS,
    Cell,
    CommandFailed,
    Recipe,
    bm25_record,
    make_cells,
    make_data,
    read_recipe,
    run_cell,
    words_of,
)

POLL_SECONDS = 0.5
SAVING_PATIENCE_SECONDS = 600.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may wait for a lock


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
    workers: int | None = setting(None, low=1)
    """Processes that make cells at once (default: one a GPU, or one a core)."""
    launch: str | None = None
    """What starts a training, like "deepspeed --num_gpus 8" (default: one process)."""
    report_only: bool = False
    """Write the report of the cells that are there, and make none."""

    def contradictions(self) -> list[str]:
        """What is wrong with values that are each in range, as clauses."""
        found = []
        if not self.collections or "" in self.collections:
            found.append("collections is empty or names an empty path: give at least one BEIR folder")
        if self.launch and (self.workers or 1) > 1:
            found.append("launch gives all GPUs to one training: leave workers out, or launch")
        return found


class Processes:
    """What this process has started, each a process group of its own, so that a request to stop (SIGTERM, SIGUSR1,
    Ctrl-C) reaches every rank whatever the launcher does with it; they get SIGTERM too when this process dies."""

    def __init__(self):
        self.stopping = False
        self.running: list[subprocess.Popen] = []
        for number in SIGNALS:
            signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        """Asks all that run to stop."""
        self.stopping = True
        self._terminate()

    def _terminate(self) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def start(self, command: Sequence[str], **options: Any) -> None:
        """options: of subprocess.Popen."""
        self.running.append(subprocess.Popen(command, start_new_session=True, preexec_fn=follow_parent, **options))
        if self.stopping:  # the request came just before the start
            self._terminate()

    def wait(self) -> int:
        """Waits for all; returns the exit code of the first that fails, which ends the others, else 0.

        75 if they were asked to stop.
        """
        failed = 0
        while self.running:
            process = self.running.pop(0)
            try:
                code = process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                self.running.append(process)
                continue
            if code and not failed:
                failed = EXIT_PREEMPTED if self.stopping else code if code > 0 else 128 - code
                self._terminate()
            if failed:
                wait_for_group(process.pid)
        return failed


def follow_parent() -> None:
    """SIGTERM to this process when its parent dies (Linux; elsewhere it outlives a killed study)."""
    if sys.platform == "linux":
        LIBC.prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def wait_for_group(group: int) -> None:
    """Waits until no process of the group is left: ranks whose launcher is gone may still be saving."""
    deadline = time.monotonic() + SAVING_PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)


def make_all(cells: Sequence[Cell], processes: Processes, settings: StudySettings, recipe: Recipe) -> int:
    """Makes the cells that no other process makes, until all are there; returns the exit code.

    Cells that share a pre-training are one claim, made one after the other.
    """
    claims: dict[Path, list[Cell]] = {}
    for cell in cells:
        claims.setdefault(cell.pretrained, []).append(cell)
    while missing := {path: of for path, of in claims.items() if not all(map(is_made, of))}:
        for path, own in missing.items():
            if processes.stopping:
                return EXIT_PREEMPTED
            with claimed(path) as lock:
                for cell in own if lock else []:
                    if is_made(cell):
                        continue
                    if code := make_cell(cell, lock, processes, settings):
                        return code
                    done = sum(other.record() is not None for other in cells)
                    say(f"[{done}/{len(cells)}] {cell.label}: {describe(cell.record())}")
                    report(cells, settings, recipe)
        time.sleep(POLL_SECONDS)
    return 0


def make_cell(cell: Cell, lock: IO[str], processes: Processes, settings: StudySettings) -> int:
    """Makes one cell and writes its record; returns 0, or the exit code of the command that failed."""
    try:
        with claimed(cell.data, processes) as data_lock:
            if data_lock is None:
                return EXIT_PREEMPTED
            make_data(cell, partial(run_command, cell, data_lock, processes, settings))
            write_record(cell.bm25_file, bm25_record(cell))
        if cell.record() is not None:  # only BM25's was missing
            return 0
        record = run_cell(cell, partial(run_command, cell, lock, processes, settings))
    except CommandFailed as failed:
        if failed.code != EXIT_PREEMPTED:
            print(f"error: {failed}", file=sys.stderr, flush=True)
        return failed.code
    write_record(cell.record_file, record)
    return 0


@contextlib.contextmanager
def claimed(path: Path, waiting: Processes | None = None) -> Iterator[IO[str] | None]:
    """The lock of a folder in the making; None if another process has it (with `waiting`: once these are to stop).

    Commands hold it too: what a killed study has left running is waited for.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{path.parent} cannot be written ({error.strerror}): give another --work") from None
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None and not waiting.stopping:
                    time.sleep(POLL_SECONDS)
                    continue
                yield None
                return
            yield lock
            return


def run_command(
    cell: Cell, lock: IO[str], processes: Processes, settings: StudySettings, command: str, /, **flags: Any
) -> None:
    """Runs one launcher, which holds the lock too. Raises CommandFailed."""
    if processes.stopping:
        raise CommandFailed(EXIT_PREEMPTED, command, cell.log)
    launch = shlex.split(settings.launch or "") if command in TRAININGS else []
    words = [*(launch or [sys.executable]), str(LAUNCHERS / f"{command}.py"), *words_of(command, flags)]
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with open(cell.log, "a") as log:
        log.write(f"\n$ {shlex.join(words)}\n")
        log.flush()
        if command in TRAININGS:
            say(f"{cell.label}: {command} (its output: {cell.log})")
        processes.start(words, pass_fds=(lock.fileno(),), stdout=log, stderr=log)
        code = processes.wait()
    if code:
        raise CommandFailed(code, command, cell.log)


def report(cells: Sequence[Cell], settings: StudySettings, recipe: Recipe) -> list[Path]:
    """Writes the report of the cells that are there; gives its files."""
    from quincunx.engine.retrieval.study_report import make_report

    records = [record for cell in cells if (record := cell.record()) is not None]
    bm25 = {cell.collection.name: record for cell in cells if (record := cell.bm25()) is not None}
    variants = list(recipe.variants)
    return make_report(Path(settings.output), recipe.name, variants, recipe.against, records, bm25, len(cells))


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
    own = {cell.record_file.parent for cell in cells}
    if strangers := sorted(str(path) for path in output.glob("cells/*/*") if path.is_dir() and path not in own):
        raise SettingsError(
            f"{output} holds cells that this command does not name ({', '.join(strangers[:3])}), and its report would "
            "lose them: give all collections and the recipe that they were made with, or another --output"
        )


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record, one key a line: lists of values stay on theirs."""
    with written_whole(path) as file:
        file.write("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()) + "\n}\n")


def describe(record: Mapping[str, Any]) -> str:
    if "diverged" in record:
        return "diverged"
    name, found = next(iter(record["measures"].items()))
    return f"{name} {found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def worker_environments(settings: StudySettings) -> list[dict[str, str]]:
    """What each worker has of its own in the environment: a GPU, or its share of the cores."""
    if settings.launch or settings.workers == 1:
        return [{}]
    import torch

    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    gpus = [gpu for gpu in gpus if gpu]
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} for n in range(settings.workers or len(gpus))]
    cores = len(os.sched_getaffinity(0))
    count = settings.workers or cores
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))}] * count


def check_launch(launch: str) -> None:
    """Raises SettingsError for a command that is not there."""
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise SettingsError(f"launch is {launch!r}, which no shell would read ({error}): fix its quotes") from None
    if words and shutil.which(words[0]) is None:
        raise SettingsError(f"launch is {launch!r}, and {words[0]} is no command of this machine: install or fix it")


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = parse_settings(StudySettings, __doc__.split("\n")[0], argv)
    recipe, output = read_recipe(settings.recipe), Path(settings.output)
    if settings.launch is not None:
        check_launch(settings.launch)
    cells = make_cells(recipe, settings.collections, output, Path(settings.work or output / "work"))
    refuse_other_study(output, recipe.name, cells)
    missing, code = sum(not is_made(cell) for cell in cells), 0
    say(f"study {recipe.name}: {len(cells)} cells, {len(cells) - missing} of them there")
    if missing and not settings.report_only:
        processes, environments = Processes(), worker_environments(settings)
        if len(environments) == 1:
            code = make_all(cells, processes, settings, recipe)
        else:
            for environment in environments:
                words = [sys.executable, __file__, *argv, "--workers=1"]
                processes.start(words, env={**os.environ, **environment})
            code = processes.wait()
    for path in report(cells, settings, recipe):
        if path.suffix in (".md", ".html"):
            say(f"wrote {path}")
    return code


if __name__ == "__main__":
    exit_with_one_sentence(main)
