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
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from quincunx.data_shards.durable import cannot_write
from quincunx.data_shards.errors import EXIT_PREEMPTED, SettingsError, exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.launchers.command_line import parse_settings
from quincunx.launchers.study_cells import Cell, CommandFailed, make_bm25, make_cell, make_cells, make_data
from quincunx.launchers.study_recipe import TRAININGS, Recipe, read_recipe, words_of

LAUNCHERS = Path(os.path.relpath(Path(__file__).parent))
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
        if not self.output:
            found.append("output is empty: give a folder")
        if self.launch and (self.workers or 1) > 1:
            found.append("launch gives all GPUs to one training: leave workers out, or launch")
        return found + unusable_launch(self.launch or "")


def unusable_launch(launch: str) -> list[str]:
    """What is wrong with a command that is to start a training."""
    try:
        words = shlex.split(launch)
    except ValueError as error:
        return [f"launch is {launch!r}, which no shell would read ({error}): fix its quotes"]
    if words and shutil.which(words[0]) is None:
        return [f"launch is {launch!r}, and {words[0]} is no command of this machine: install or fix it"]
    return []


class Processes:
    """What this process has started, each a process group of its own, so that a request to stop (SIGTERM, SIGUSR1,
    Ctrl-C) reaches every rank whatever the launcher does with it; they get SIGTERM too when this process dies."""

    def __init__(self):
        self.stopping = False
        self.running: list[subprocess.Popen] = []
        for number in SIGNALS:
            signal.signal(number, self._stop)

    def _stop(self, *_: Any) -> None:
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
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.2)


def make_all(cells: Sequence[Cell], processes: Processes, launch: str | None, report: Callable[[], Any]) -> None:
    """Makes the cells that no other process makes, until all are there. Raises CommandFailed.

    Cells that share a pre-training are one claim, made one after the other.
    """
    claims: dict[Path, list[Cell]] = {}
    for cell in cells:
        claims.setdefault(cell.pretrained, []).append(cell)
    while missing := [path for path, own in claims.items() if not all(cell.is_made() for cell in own)]:
        for path in missing:
            with claimed(path) as lock:
                for cell in claims[path] if lock else []:
                    if cell.is_made():
                        continue
                    run = partial(run_command, processes, launch, cell)
                    with claimed(cell.data) as data_lock:
                        if data_lock is None:  # another process is at it: this cell's turn comes again
                            continue
                        make_data(cell, partial(run, data_lock))
                        make_bm25(cell)
                    if cell.record() is None:
                        make_cell(cell, partial(run, lock))
                    say(f"[{sum(c.is_made() for c in cells)}/{len(cells)}] {cell.label}: {cell.outcome()}")
                    report()
        if processes.stopping:
            raise CommandFailed(EXIT_PREEMPTED)
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[IO[str] | None]:
    """The lock of a folder in the making; None if another process has it.

    Commands hold it too: what a killed study has left running is waited for.
    """
    make_folder(path.parent)
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = lock
        except BlockingIOError:
            taken = None
        yield taken


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def run_command(
    processes: Processes, launch: str | None, cell: Cell, lock: IO[str], command: str, /, **flags: Any
) -> None:
    """Runs one launcher, which holds the lock too. Raises CommandFailed."""
    if processes.stopping:
        raise CommandFailed(EXIT_PREEMPTED)
    start = shlex.split(launch) if launch and command in TRAININGS else [sys.executable]
    words = [*start, str(LAUNCHERS / f"{command}.py"), *words_of(command, flags)]
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with open(cell.log, "a") as log:
        log.write(f"\n$ {shlex.join(words)}\n")
        log.flush()
        if command in TRAININGS:
            say(f"{cell.label}: {command} (its output: {cell.log})")
        processes.start(words, pass_fds=(lock.fileno(),), stdout=log, stderr=log)
        code = processes.wait()
    if code:
        lines = cell.log.read_text(errors="replace").splitlines()[-20:]
        said = next((line for line in reversed(lines) if line.startswith("error: ")), "no error line")
        raise CommandFailed(code, f"{command}.py ended with exit code {code} ({said}); its output ends {cell.log}")


def write_report(cells: Sequence[Cell], output: Path, recipe: Recipe) -> list[Path]:
    """Writes the report of the cells that are there; gives its files."""
    from quincunx.engine.retrieval.study_report import make_report

    records = [record for cell in cells if (record := cell.record()) is not None]
    bm25 = {cell.collection.name: record for cell in cells if (record := cell.bm25()) is not None}
    return make_report(output, recipe.name, list(recipe.variants), recipe.against, records, bm25, len(cells))


def refuse_other_study(output: Path, name: str, cells: Sequence[Cell]) -> None:
    """Raises SettingsError if the output cannot be written, or holds another study."""
    make_folder(output)
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
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = parse_settings(StudySettings, __doc__.split("\n")[0], argv)
    recipe, output = read_recipe(settings.recipe), Path(settings.output)
    cells = make_cells(recipe, settings.collections, output, Path(settings.work or output / "work"))
    refuse_other_study(output, recipe.name, cells)
    made, code = sum(cell.is_made() for cell in cells), 0
    say(f"study {recipe.name}: {len(cells)} cells, {made} of them there")
    report = partial(write_report, cells, output, recipe)
    if made < len(cells) and not settings.report_only:
        processes, environments = Processes(), worker_environments(settings)
        if len(environments) > 1:
            for environment in environments:
                words = [sys.executable, __file__, *argv, "--workers=1"]
                processes.start(words, env={**os.environ, **environment})
            code = processes.wait()
        else:
            try:
                make_all(cells, processes, settings.launch, report)
            except CommandFailed as failed:
                code = failed.code
                if code != EXIT_PREEMPTED:
                    print(f"error: {failed}", file=sys.stderr, flush=True)
    for path in report():
        if path.suffix in (".md", ".html"):
            say(f"wrote {path}")
    return code


if __name__ == "__main__":
    exit_with_one_sentence(main)
