"""The one protocol for what a stage makes: made once, whole or not at all, known by what it was made from.

    with artefact(path, kind, made_from) as work:
        if work is not None:                      # None: it is there, made from the same
            for part in work.missing(num_parts):  # of this rank
                with work.part(part, ".npy") as file: ...
            if work.leads:
                work.wait()                       # for the parts of the other ranks
                with work.file("ids.txt") as file: ...

An artefact is a folder (or, with `single`, one file). While it is made it lies in .NAME.work beside its place:
begun.json says from what, and finished parts have their digests, so that the same command goes on after a kill, on any
number of ranks. When the block ends well the leading rank writes the manifest, syncs everything, and renames. A
manifest (manifest.json in the folder, NAME.manifest.json beside the file) has kind, made_from, details, and size and
digest of every file.

The leading rank locks .NAME.work. On a file system that cannot lock, two processes that make the same artefact at once
may end in an error for one of them; what is published is whole.
"""

import contextlib
import fcntl
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from quincunx.data_shards.durable import (
    FULL_DISK,
    cannot_write,
    file_digest,
    free_aside,
    publish,
    sync_folder,
    written_whole,
)
from quincunx.data_shards.errors import DataError, SettingsError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
BEGUN = "begun.json"
LOCK_PATIENCE_SECONDS, POLL_SECONDS, REPORT_SECONDS = 5.0, 0.2, 60.0


class Work:
    """An artefact in the making."""

    def __init__(self, path: Path, folder: Path, single: bool = False, rank: int = 0, world_size: int = 1):
        self.path, self.folder, self.single = path, folder, single
        self.rank, self.world_size = rank, world_size
        self.details: dict[str, Any] = {}
        """What else the manifest says, such as counts; it is not compared."""
        self.left_unfinished = False
        """Set by the leading rank if others go on with the work: nothing is published, and what is there stays."""
        self.num_parts = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def missing(self, num_parts: int) -> Iterator[int]:
        """The parts of this rank that are not there yet, one after the other: rank r makes r, r + ranks, ..."""
        self.num_parts = num_parts
        for number in range(self.rank, num_parts, self.world_size):
            if not self.is_done(number):
                if not self.folder.exists():  # the leading rank had all parts, and has published them
                    return
                yield number

    @contextlib.contextmanager
    def part(self, number: int, ending: str, *, published: bool = True, mode: str = "wb") -> Iterator[IO[Any]]:
        """Part `number`, whole or not at all; unpublished ones are removed when the artefact is finished."""
        path = self.folder / ("made" if published else "scratch") / f"part-{number:05d}{ending}"
        with written_whole(path, mode) as file:
            yield file
        with written_whole(self._note(number)) as file:
            json.dump({"file": str(path.relative_to(self.folder)), "digest": file_digest(path)}, file)

    def part_file(self, number: int) -> Path | None:
        """The file of a finished part; None if it is not there as it was written."""
        try:
            note = json.loads(self._note(number).read_bytes())
            path = self.folder / note["file"]
            return path if file_digest(path) == note["digest"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_done(self, number: int) -> bool:
        return self.part_file(number) is not None

    def wait(self, patience_seconds: float = 3600.0) -> list[Path]:
        """All parts' files in order, once every rank's are there.

        Raises DataError if none comes for `patience_seconds`.
        """
        missing = set(range(self.num_parts))
        give_up_at, report_at = time.monotonic() + patience_seconds, time.monotonic() + REPORT_SECONDS
        while left := {number for number in missing if not self.is_done(number)}:
            now = time.monotonic()
            if len(left) < len(missing):
                give_up_at = now + patience_seconds
            if now > give_up_at:
                ranks = sorted({number % self.world_size for number in left})
                raise DataError(
                    f"{len(left)} of {self.num_parts} parts of {self.path} are missing (ranks {ranks}), and none "
                    f"arrived in {patience_seconds:.0f} s: run the same command again; it makes only the missing parts"
                )
            if now > report_at:
                print(f"waiting for {len(left)} of {self.num_parts} parts of other ranks", file=sys.stderr)
                report_at = now + REPORT_SECONDS
            missing = left
            time.sleep(POLL_SECONDS)
        return [self.part_file(number) for number in range(self.num_parts)]

    def file(self, name: str = "", mode: str = "w") -> contextlib.AbstractContextManager[IO[Any]]:
        """A file of the artefact (of a single one: the file), whole or not at all."""
        return written_whole(self.made(name), mode)

    def made(self, name: str = "") -> Path:
        """Where a file of the artefact lies until it is finished; the folder is there."""
        path = self.folder / "made" / (name or self.path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def scratch(self, name: str) -> Path:
        """A place for what is not part of the artefact."""
        return self.folder / "scratch" / name

    def _note(self, number: int) -> Path:
        return self.folder / "scratch" / f"part-{number:05d}.json"

    def finish(self, begun: Mapping[str, Any], own_manifest: bool) -> None:
        """Gives the artefact its manifest, unless its maker has written its own, and its name."""
        made = self.folder / "made"
        for left in made.rglob(".*.tmp*"):  # of processes that were killed
            left.unlink()
        if not own_manifest:
            paths = [path for path in sorted(made.rglob("*")) if path.is_file() and path != made / MANIFEST]
            files = {
                str(path.relative_to(made)): {"bytes": path.stat().st_size, "digest": file_digest(path)}
                for path in paths
            }
            manifest = {"schema": SCHEMA_VERSION, **begun, "details": self.details, "files": files}
        if self.single:
            os.replace(made / self.path.name, self.path)
            sync_folder(self.path.parent)
        if not own_manifest:
            with written_whole(manifest_path(self.path) if self.single else made / MANIFEST) as file:
                file.write(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        if not self.single:
            publish(made, self.path)
        sync_folder(self.path.parent)
        (self.folder / BEGUN).unlink(missing_ok=True)  # first, so that nothing goes on with a half of what follows
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def artefact(
    path: str | Path,
    kind: str,
    made_from: Mapping[str, Any],
    *,
    single: bool = False,
    remake: bool = False,
    rank: int = 0,
    world_size: int = 1,
    read_own: Callable[[Path], dict[str, Any] | None] | None = None,
) -> Iterator[Work | None]:
    """Work on what is to lie at `path`; None if it is there, made from the same. Every rank calls this.

    made_from: JSON of all that decides the bytes: settings, and digests of the inputs. remake: what is there, finished
    or begun, is moved aside to NAME.old-N and made anew. read_own: of a kind whose maker writes a manifest.json of its
    own form: what it says as kind, made_from and files, None if there is none.

    Raises:
        SettingsError: something else is there, or other work was begun there; another process is at it; the folder
            cannot be written.
        DataError: a full disk; an artefact that has lost a file.
    """
    path, folder = Path(path), work_folder(Path(path))
    begun = {"kind": kind, "made_from": json.loads(json.dumps(made_from))}
    read = read_own or functools.partial(read_manifest, single=single)
    if remake and rank == 0:
        move_aside(path, folder)
    if not is_made(path, begun, read, single):
        try:
            (folder / "made").mkdir(parents=True, exist_ok=True)
            (folder / "scratch").mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from None
        with full_disk_is_named(path.parent), held(folder, path) if rank == 0 else contextlib.nullcontext():
            take_up(path, folder, begun, rank)
            if not is_made(path, begun, read, single):  # by another process meanwhile
                own = folder / f"begun-by-{rank}.json"  # all ranks write the same, and none waits for another
                with written_whole(own) as file:
                    json.dump(begun, file)
                os.replace(own, folder / BEGUN)
                work = Work(path, folder, single, rank, world_size)
                try:
                    yield work
                except BaseException:
                    if rank == 0 and not has_parts(folder):
                        shutil.rmtree(folder, ignore_errors=True)
                    raise
                if work.leads and not work.left_unfinished:
                    work.finish(begun, own_manifest=read_own is not None)
                return
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    yield None


def work_folder(path: Path) -> Path:
    """Where an artefact lies while it is made."""
    return path.with_name(f".{path.name}.work")


def take_up(path: Path, folder: Path, begun: dict[str, Any], rank: int) -> None:
    """Returns once begun.json says nothing else than `begun`. Raises SettingsError for parts of other work."""
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    while (found := read_begun(folder)) not in (None, begun):
        if has_parts(folder) or time.monotonic() > deadline:
            raise SettingsError(
                f"{path} was begun with other inputs or settings "
                f"({differences(found['made_from'], begun['made_from'])}): give those again to finish it, give another "
                "--output, or give --remake to begin anew"
            )
        if rank == 0:  # nothing of it was finished
            for name in ("made", "scratch"):
                shutil.rmtree(folder / name)
                (folder / name).mkdir()
            (folder / BEGUN).unlink()
        else:
            time.sleep(POLL_SECONDS)


def has_parts(folder: Path) -> bool:
    """Whether something was finished that is worth keeping."""
    return any((folder / "scratch").glob("[!.]*"))


def open_artefact(path: str | Path, kind: str, *, single: bool = False, verify: bool = False) -> dict[str, Any]:
    """The manifest of a finished artefact, whose files are there with their sizes (with `verify`: and digests).

    Raises DataError if it is unfinished, damaged, of another kind or of a newer schema.
    """
    path = Path(path)
    manifest = read_manifest(path, single)
    if manifest is None:
        what = f"no {manifest_path(path).name} beside it" if single else f"no {MANIFEST} in it"
        raise DataError(f"{path} has no finished {kind} ({what}): run the command that makes it")
    check_files(path, kind, manifest, single, verify)
    return manifest


def check_files(path: Path, kind: str, manifest: dict[str, Any], single: bool, verify: bool = False) -> None:
    """Raises DataError if the manifest is of another kind, or a file is not there as it says."""
    if manifest["kind"] != kind:
        raise DataError(f"{path} holds {manifest['kind']}, {kind} are needed: give another --output of a stage")
    for name, entry in manifest["files"].items():
        file = path if single else path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"] or (verify and file_digest(file) != entry["digest"]):
            state = "is missing" if size is None else "is damaged"
            raise DataError(f"{file} {state}: run the command that made it with --remake, or put the file back")


def read_manifest(path: Path, single: bool) -> dict[str, Any] | None:
    """The manifest; None if there is none. Raises DataError if it is not ours, or newer than this version."""
    file = manifest_path(path) if single else path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}): make {path} again with --remake") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA_VERSION or not {"kind", "made_from", "files"} <= manifest.keys():
        age = "a newer" if isinstance(schema, int) and schema > SCHEMA_VERSION else "another"
        raise DataError(
            f"{file} is a manifest of {age} schema ({schema}, this version reads {SCHEMA_VERSION}): make {path} again "
            "with --remake"
        )
    return manifest


def is_made(path: Path, begun: dict[str, Any], read: Callable[[Path], dict[str, Any] | None], single: bool) -> bool:
    """Whether the artefact is there, with its files; `read` gives its manifest."""
    if not path.exists() and not manifest_path(path).exists():
        return False
    manifest = read(path)
    if manifest is None:
        if read_begun(work_folder(path)) == begun or (path.is_dir() and not any(path.iterdir())):
            return False  # a file whose manifest is still to come, or an empty folder
        raise SettingsError(f"{path} exists, and no stage made it: remove it, or give another --output")
    check_files(path, begun["kind"], manifest, single)
    if manifest["made_from"] != begun["made_from"]:
        raise SettingsError(
            f"{path} exists and was made from other inputs or settings "
            f"({differences(manifest['made_from'], begun['made_from'])}): give another --output, or give --remake to "
            "make it anew"
        )
    return True


def differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """What differs, as clauses: `depth was 3 and is 4`."""
    clauses = []
    for key in dict.fromkeys([*then, *now]):
        before, after = (side.get(key, "left out") for side in (then, now))
        if isinstance(before, dict) and isinstance(after, dict):
            clauses += [differences(before, after, f"{prefix}{key}.")] if before != after else []
        elif before != after:
            short = all(not isinstance(value, list) and len(str(value)) < 80 for value in (before, after))
            clauses.append(f"{prefix}{key} was {before} and is {after}" if short else f"{prefix}{key} differs")
    return "; ".join(clauses)


def manifest_path(path: str | Path) -> Path:
    """Where the manifest of a single file lies."""
    return Path(f"{path}.manifest.json")


def read_begun(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / BEGUN).read_bytes())
    except (OSError, ValueError):
        return None


def move_aside(path: Path, folder: Path) -> None:
    """Moves what is there, finished or begun, to NAME.old-N."""
    shutil.rmtree(folder, ignore_errors=True)
    aside = free_aside(path)
    if path.exists():
        os.replace(path, aside)
    if manifest_path(path).exists():
        os.replace(manifest_path(path), manifest_path(aside))


@contextlib.contextmanager
def full_disk_is_named(folder: Path) -> Iterator[None]:
    """Turns a full disk or quota into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise DataError(
            f"the disk of {folder} is full ({error.strerror}): free space and run the same command again, what is "
            "finished is kept"
        ) from None


@contextlib.contextmanager
def held(folder: Path, path: Path) -> Iterator[None]:
    """The lock of an artefact in the making. Raises SettingsError if another process keeps it."""
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS  # a process that was killed may still be dying
    with open(folder / "lock", "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SettingsError(
                        f"{path} is being made by another process: wait for it, or stop it first"
                    ) from None
                time.sleep(POLL_SECONDS)
            except OSError:  # a file system that cannot lock
                break
        yield
