"""A study of pre-trainings: variants x seeds x collections, each cell pre-trained, fine-tuned and judged; one table.

    python launchers/study.py --recipe papers --collections DATA/squad DATA/medquad --output studies/papers
    sbatch --array=0-15 launchers/cluster/study.sbatch --recipe papers ...     # the array's tasks share the cells

Every stage of a cell is one of the ordinary commands. A finished cell is a small file in OUTPUT/cells, everything large
lies in --work; the same command again skips finished cells and goes on with the others. --workers cells are made at
once, and several processes may share an output. docs/study.md describes recipes and reports.

Exit codes: 0 done, 2 settings, 75 stopped on request (running stages have saved), else that of the command that failed.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from quincunx.data_shards.durable import cannot_write
from quincunx.data_shards.errors import EXIT_PREEMPTED, SettingsError, exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.engine.ranks import SIGNALS
from quincunx.engine.retrieval.study_report import make_report
from quincunx.launchers.command_line import parse_settings
from quincunx.launchers.study_cells import Cell, CommandFailed, make_cell, make_cells, make_data
from quincunx.launchers.study_recipe import TRAININGS, Recipe, read_recipe, words_of

LAUNCHERS = Path(os.path.relpath(Path(__file__).parent))
POLL_SECONDS = 0.5
SAVING_PATIENCE_SECONDS = 600.0
STOPPED = "stopped on request, and saved: the same command again goes on"
REPORTING = threading.Lock()


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
    """Maximum number of cells that are made at once (default: one a GPU, or one a core)."""
    launch: str | None = None
    """What starts a training, like "deepspeed --num_gpus 8" (default: one process)."""
    report_only: bool = False
    """Write the report of the cells that are there, and make none."""

    def contradictions(self) -> list[str]:
        """What is wrong with values that are each in range, as clauses."""
        found = []
        if not self.collections or "" in self.collections:
            found.append("collections is empty or names an empty path: give at least one BEIR folder")
        if not self.output:
            found.append("output is empty: give a folder")
        if self.launch and (self.workers or 1) > 1:
            found.append("launch gives all GPUs to one training: leave workers out, or launch")
        try:
            words = shlex.split(self.launch or "")
            if words and shutil.which(words[0]) is None:
                found.append(f"this machine has no command {words[0]}, which launch names: install it, or fix its name")
        except ValueError as error:
            found.append(f"launch is {self.launch!r}, which no shell would read ({error}): fix its quotes")
        return found


class Commands:
    """The commands that the study's threads run, each a process group of its own, so that a request to stop reaches
    every rank whatever starts them. If the study is killed, trainings save and stop; other commands finish."""

    def __init__(self, launch: str | None):
        self.launch = shlex.split(launch or "") or [sys.executable]
        self.ended: BaseException | None = None
        """Why no further command begins."""
        self.running: set[subprocess.Popen] = set()
        for number in SIGNALS:
            signal.signal(number, lambda *_: self.end(CommandFailed(EXIT_PREEMPTED, STOPPED)))

    def end(self, reason: BaseException) -> None:
        """Begins no further command, and asks those that run to save and end. The first reason counts."""
        self.ended = self.ended or reason
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def run(self, cell: Cell, environment: Mapping[str, str], lock: IO[str], command: str, /, **flags: Any) -> None:
        """Runs one launcher, which holds the lock too. Raises CommandFailed, or why no further command begins."""
        if self.ended:
            raise self.ended
        start = self.launch if command in TRAININGS else [sys.executable]
        words = [*start, str(LAUNCHERS / f"{command}.py"), *words_of(command, flags)]
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with open(cell.log, "a") as log:
            print(f"\n$ {shlex.join(words)}", file=log, flush=True)
            if command in TRAININGS:
                say(f"{cell.label}: {command} (its output: {cell.log})")
            own = {**os.environ, **environment}
            process = subprocess.Popen(
                words, env=own, stdout=log, stderr=log, pass_fds=[lock.fileno()], start_new_session=True
            )
            self.running.add(process)
            if self.ended:  # since the check above
                self.end(self.ended)
            code = process.wait()
        if code:
            wait_for_group(process.pid)
        self.running.remove(process)
        if self.ended:
            raise self.ended
        if code:
            lines = cell.log.read_text(errors="replace").splitlines()[-20:]
            said = next((line for line in reversed(lines) if line.startswith("error: ")), "no error line")
            code = code if code > 0 else 128 - code
            raise CommandFailed(code, f"{command}.py ended with exit code {code} ({said}); its output ends {cell.log}")


def wait_for_group(group: int) -> None:
    """Waits until no process of the group is left: ranks whose launcher is gone may still be saving."""
    deadline = time.monotonic() + SAVING_PATIENCE_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.2)


def make_all(
    cells: Sequence[Cell], commands: Commands, report: Callable[[], Any], environment: Mapping[str, str]
) -> None:
    """Makes the cells that no other thread or process makes, until all are there. Raises CommandFailed.

    environment: what the commands have of their own in it. Cells that share a pre-training wait for each other.
    """
    try:
        while missing := [cell for cell in cells if not cell.is_made()]:
            for cell in missing:
                run = partial(commands.run, cell, environment)
                with claimed(cell.data) as lock:
                    if lock is None:  # this cell's turn comes again
                        continue
                    make_data(cell, partial(run, lock))
                with claimed(cell.pretrained) as lock:
                    if lock and cell.record.read() is None:
                        make_cell(cell, partial(run, lock))
                        say(f"[{sum(c.is_made() for c in cells)}/{len(cells)}] {cell.label}: {cell.outcome()}")
                        report()
            if commands.ended:
                raise commands.ended
            time.sleep(POLL_SECONDS)
    except BaseException as error:
        commands.end(error)
        raise


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[IO[str] | None]:
    """The lock of a folder in the making; None if another thread or process has it.

    Commands hold it too: what a killed study has left running is waited for.
    """
    make_folder(path.parent)
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_report(cells: Sequence[Cell], output: Path, recipe: Recipe) -> list[Path]:
    """Writes the report of the cells that are there; gives its files."""
    with REPORTING:  # of one thread at a time
        records = [record for cell in cells if (record := cell.record.read()) is not None]
        bm25 = {cell.collection.name: record for cell in cells if (record := cell.bm25.read()) is not None}
        return make_report(output, recipe.name, list(recipe.variants), recipe.against, records, bm25, len(cells))


def refuse_other_study(output: Path, cells: Sequence[Cell]) -> None:
    """Raises SettingsError if the output cannot be written, or holds cells of another study."""
    make_folder(output)
    if not os.access(output, os.W_OK):
        raise SettingsError(f"output {output} cannot be written: give another --output")
    own = {cell.record.path for cell in cells}
    if strangers := sorted(str(path) for path in output.glob("cells/*/*/seed-*.json") if path not in own):
        raise SettingsError(
            f"{output} holds cells that this command does not name ({', '.join(strangers[:3])}), and its report would "
            "lose them: give all collections and the recipe that they were made with, or another --output"
        )


def worker_environments(settings: StudySettings) -> list[dict[str, str]]:
    """What each worker has of its own in the environment: a GPU, or its share of the cores."""
    if settings.launch or settings.workers == 1:
        return [{}]
    import torch

    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    if gpus := [gpu for gpu in gpus if gpu]:
        return [{"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} for n in range(settings.workers or len(gpus))]
    cores = len(os.sched_getaffinity(0))
    count = settings.workers or cores
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))}] * count


def say(text: str) -> None:
    print(f"{text}\n", end="", flush=True)  # in one piece: threads share the terminal


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(StudySettings, __doc__.split("\n")[0], argv)
    recipe, output = read_recipe(settings.recipe), Path(settings.output)
    cells = make_cells(recipe, settings.collections, output, Path(settings.work or output / "work"))
    refuse_other_study(output, cells)
    made = sum(cell.is_made() for cell in cells)
    say(f"study {recipe.name}: {len(cells)} cells, {made} of them there")
    report = partial(write_report, cells, output, recipe)
    try:
        if made < len(cells) and not settings.report_only:
            make = partial(make_all, cells, Commands(settings.launch), report)
            environments = worker_environments(settings)
            with ThreadPoolExecutor(len(environments)) as pool:
                list(pool.map(make, environments))
    finally:
        for path in report():
            if path.suffix in (".md", ".html"):
                say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    exit_with_one_sentence(main)
