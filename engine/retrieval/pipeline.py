"""Runs a chain of commands so that what is done is done once: after a kill, a changed setting, or a damaged file.

FOLDER/NAME/                   what the stage NAME makes
FOLDER/stages/NAME.json        the stamp of a finished stage, written last: its settings, the digests of what it read
                               and of what it made, how long it took, why it ran
FOLDER/stages/NAME.begun.json  with which settings and inputs the stage was begun: under the same ones it goes on
FOLDER/replaced/NAME-1/ ...    what a stage had made before its settings or inputs changed, or it was damaged
FOLDER/pipeline.lock           held by the pipeline, and by the command it runs

A stage is skipped where its stamp names the settings and inputs of now and its outputs are what the stamp says. Inputs
are compared by content: a stage upstream that ran again and made the same bytes leaves those after it alone.
"""

import contextlib
import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from quincunx.data_shards.errors import EXIT_PREEMPTED, SettingsError
from quincunx.engine.retrieval.commands import Stopping, held
from quincunx.engine.retrieval.files import file_digest, manifest_path, written_whole

STAGES_FOLDER = "stages"
RECIPE_FILE = "recipe.json"
"""The recipe of the last start, as the report reads it."""
REPLACED_FOLDER = "replaced"
LOCK_FILE = "pipeline.lock"
PACKAGES = ("torch", "transformers", "deepspeed", "sentence-transformers", "faiss-cpu", "bm25s", "ir-measures")
CACHES = ("index-*", ".index-*")
"""What search.py keeps in a folder of embeddings belongs to no stage's output."""
MOST_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the chain."""

    name: str
    command: Sequence[str]
    """What is run, as a user would type it."""
    settings: dict[str, Any]
    """All that decides what comes out, other than the inputs' content: JSON, without paths and facts of the machine."""
    inputs: dict[str, Path]
    """Files and folders that it reads: outputs of earlier stages, or a user's own."""
    work: Path
    """The stage's own folder, in which all outputs and unfinished work lie."""
    outputs: Sequence[Path]
    """Files and folders that must be there, unchanged, for the stage to count as done; `work` itself, or in it."""
    resumes: bool = False
    """The command goes on with unfinished work in `work`; of others, what a kill left is cleared away."""


@dataclass(frozen=True)
class Verdict:
    """Whether a stage is to be run, and why."""

    digest: str
    """Of the stage's settings and its inputs' content, now."""
    inputs: dict[str, str]
    reason: str | None
    """Why it is to be run; None: it is done."""
    void: str = ""
    """What of an earlier run has to make way: "all", "outputs", or nothing where the stage goes on with it."""


@dataclass
class Pipeline:
    """The stages in order, over a folder."""

    folder: Path
    stages: Sequence[Stage]
    _digests: dict[Path, tuple[Any, str]] = field(default_factory=dict)

    def maker(self, path: Path) -> str | None:
        """The stage in whose folder `path` lies, or whose stamp it is."""
        if path.parent == self.folder / STAGES_FOLDER:
            return path.stem
        return next((stage.name for stage in self.stages if stage.work in (path, *path.parents)), None)

    def stamp_path(self, stage: Stage) -> Path:
        return self.folder / STAGES_FOLDER / f"{stage.name}.json"

    def begun_path(self, stage: Stage) -> Path:
        return self.folder / STAGES_FOLDER / f"{stage.name}.begun.json"

    def digest_of(self, path: Path) -> str:
        """Digest of a file or of a folder's names and files; taken once unless a size or time has changed."""
        files = [path]
        if path.is_dir():
            files = sorted(
                part for part in path.rglob("*") if part.is_file() and not any(part.match(cache) for cache in CACHES)
            )
        state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        if self._digests.get(path, (None,))[0] != state:
            named = [(str(file.relative_to(path)), file_digest(file)) for file in files]
            digest = named[0][1] if path.is_file() else hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]
            self._digests[path] = (state, digest)
        return self._digests[path][1]

    def judge(self, stage: Stage) -> Verdict:
        """Whether the stage is to be run. Raises SettingsError where an input is not there."""
        inputs = {role: self._input_digest(stage, role, path) for role, path in stage.inputs.items()}
        state = {"settings": json.loads(json.dumps(stage.settings)), "inputs": inputs}
        digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
        stamp, begun = read_json(self.stamp_path(stage)), read_json(self.begun_path(stage))
        if stamp is None:
            if begun is None:
                return Verdict(digest, inputs, "not done yet", "all" if stage.work.exists() else "")
            if begun["digest"] == digest:
                return Verdict(digest, inputs, "not finished")
            return Verdict(digest, inputs, "not finished, and " + changes(begun, state), "all")
        if stamp["digest"] != digest:
            return Verdict(digest, inputs, changes(stamp, state), "all")
        for path in stage.outputs:
            name = str(path.relative_to(self.folder))
            if not path.exists():
                return Verdict(digest, inputs, f"output {name} is missing", "outputs")
            if self.digest_of(path) != stamp["outputs"].get(name):
                return Verdict(digest, inputs, f"output {name} is damaged", "outputs")
        return Verdict(digest, inputs, None)

    def _input_digest(self, stage: Stage, role: str, path: Path) -> str:
        if path.exists():
            return self.digest_of(path)
        maker = self.maker(path)
        remedy = f"run stage {maker} first" if maker else f"name another {role} in the recipe"
        raise SettingsError(f"stage {stage.name} reads {path}, which is not there: {remedy}")

    def make_way(self, stage: Stage, verdict: Verdict) -> Path | None:
        """Moves what is void into `replaced`; that folder, None where there is nothing to move.

        What a kill left of a command that cannot go on with it is not worth keeping, and is removed.
        """
        if not verdict.void:
            if not stage.resumes:
                shutil.rmtree(stage.work, ignore_errors=True)
            return None
        aside = next(
            path
            for number in range(1, 10_000)
            if not (path := self.folder / REPLACED_FOLDER / f"{stage.name}-{number}").exists()
        )
        if verdict.void == "all" or not stage.resumes:
            if not stage.work.exists():
                return None
            aside.parent.mkdir(exist_ok=True)
            stage.work.rename(aside)
            return aside
        void = [path for path in (*stage.outputs, *map(manifest_path, stage.outputs)) if path.exists()]
        if not void:
            return None
        aside.mkdir(parents=True)
        for path in void:
            path.rename(aside / path.name)
        return aside

    def run(self, stages: Sequence[Stage] | None = None) -> int:
        """Runs the stages that are not done (of `stages`, default: all), in order; returns the exit code.

        0 when all are done, 75 when stopped on request, else the code of the command that failed (128 + its number
        where a signal ended it). Raises SettingsError where the folder is in use or an input is missing.
        """
        stages = self.stages if stages is None else stages
        self.folder.mkdir(parents=True, exist_ok=True)
        with held(self.folder / LOCK_FILE) as lock, Stopping() as stopping:
            started = time.monotonic()
            for number, stage in enumerate(stages, 1):
                verdict = self.judge(stage)
                where = f"[{number}/{len(stages)}] {stage.name}"
                if verdict.reason is None:
                    say(f"{where}: done before")
                    continue
                say(f"\n{where}: {verdict.reason}; {minutes(time.monotonic() - started)} so far")
                code = self._run_stage(stage, verdict, lock, stopping)
                if code:
                    return code
            return 0

    def _run_stage(self, stage: Stage, verdict: Verdict, lock: IO[str], stopping: Stopping) -> int:
        aside = self.make_way(stage, verdict)
        if aside is not None:
            say(f"what it had made before is set aside in {aside}; delete it when you no longer need it")
        begun = read_json(self.begun_path(stage)) or {}
        again = begun.get("digest") == verdict.digest
        attempts = 1 + (begun.get("attempts", 0) if again else 0)
        reason = begun["reason"] if again and not verdict.void else verdict.reason
        state = {"settings": stage.settings, "inputs": verdict.inputs}
        write_json(self.begun_path(stage), {"digest": verdict.digest, **state, "attempts": attempts, "reason": reason})
        self.stamp_path(stage).unlink(missing_ok=True)  # not earlier: it says what has to make way
        started = time.monotonic()
        say(f"$ {shlex.join(stage.command)}")
        code = stopping.run(stage.command, lock)
        seconds = time.monotonic() - started
        if code:
            if code == EXIT_PREEMPTED:
                say(f"stage {stage.name} was stopped on request; the same command goes on from there")
            else:
                print(f"error: stage {stage.name} ended with exit code {code}.", file=sys.stderr, flush=True)
            return code
        missing = [path for path in stage.outputs if not path.exists()]
        if missing:
            raise SettingsError(f"stage {stage.name} ended well but did not write {missing[0]}; see its output above")
        write_json(
            self.stamp_path(stage),
            {
                "name": stage.name,
                "digest": verdict.digest,
                **state,
                "outputs": {str(path.relative_to(self.folder)): self.digest_of(path) for path in stage.outputs},
                "command": list(stage.command),
                "reason": reason,
                "attempts": attempts,
                "seconds": round(seconds, 1),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "versions": versions(),
            },
        )
        self.begun_path(stage).unlink()
        return EXIT_PREEMPTED if stopping.requested and stage is not self.stages[-1] else 0

    def preview(self, stages: Sequence[Stage] | None = None) -> None:
        """Prints what `run` would do, command by command, and does nothing."""
        stale: set[str] = set()
        for number, stage in enumerate(self.stages if stages is None else stages, 1):
            upstream = sorted({self.maker(path) for path in stage.inputs.values()} & stale)
            if upstream:
                reason = f"after {', '.join(upstream) if len(upstream) <= MOST_NAMED else f'{len(upstream)} stages'}"
            else:
                try:
                    reason = self.judge(stage).reason
                except SettingsError as error:
                    reason = str(error)
            if reason is not None:
                stale.add(stage.name)
            say(f"[{number}] {stage.name}: {reason or 'done before'}\n$ {shlex.join(stage.command)}")


def changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two states of a stage, as one clause."""
    clauses = []
    for name in dict.fromkeys([*then["settings"], *now["settings"]]):
        before, after = then["settings"].get(name), now["settings"].get(name)
        if before != after:
            clauses.append(f"{name} was {before} and is {after}")
    inputs = [
        role for role in {**then["inputs"], **now["inputs"]} if then["inputs"].get(role) != now["inputs"].get(role)
    ]
    if inputs:
        clauses.append(f"its {', '.join(inputs)} changed")
    return "; ".join(clauses) or "its stamp is of another version"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none or it is torn."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of what computes results; packages that are not installed are left out."""
    found = {"python": sys.version.split()[0]}
    for package in ("quincunx", *PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def minutes(seconds: float) -> str:
    """75.2 -> "1:15" (minutes and seconds), with hours before them from the first one on."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def say(text: str) -> None:
    print(text, flush=True)
