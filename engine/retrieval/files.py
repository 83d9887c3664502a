"""Files of the retrieval chain: read line by line with file and line in every complaint, written whole or not at all.

A file of ours has a manifest beside it, FILE.manifest.json, written last: what kind it is, how many of what it holds,
its digest, and the command that made it. A file that does not match its manifest is refused.
"""

import contextlib
import glob
import gzip
import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.records import BadRecordError, load_json

SCHEMA_VERSION = 1


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 text file (.gz: unpacked), line ends kept, a byte order mark removed.

    Raises:
        DataError: no such file, not UTF-8, or damaged gzip.
    """
    path = Path(path)
    opener = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix("\ufeff")
                yield line
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise DataError(f"{path} is a damaged gzip file ({error}): fetch it again") from None
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): fetch it again") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 after line {number} ({error.reason}): convert it") from None


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) of each line of a JSONL file that is not blank. Raises DataError (file:line)."""
    for number, line in enumerate(read_lines(path), 1):
        try:
            record = load_json(line)
        except BadRecordError as error:
            raise DataError(f"{path}:{number}: {error}; mend or remove the record") from None
        if record is not None:
            yield number, record


@contextlib.contextmanager
def written_whole(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that takes its name when the block ends well, synced to disk; after an error nothing has changed.

    mode: "w" (UTF-8 text) or "wb".

    Raises:
        SettingsError: the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        file = open(temporary, mode) if "b" in mode else open(temporary, mode, encoding="utf-8", newline="\n")  # noqa: SIM115
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sweep(path: Path) -> None:
    """Removes what processes of this machine that are dead have left of this file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-{glob.escape(socket.gethostname())}-*"):
        try:
            os.kill(int(left.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            continue


def refuse_input(output: str | Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Raises SettingsError where an output is one of the inputs (by the names of their flags)."""
    for name, path in inputs.items():
        if path is not None and Path(output).resolve() == Path(path).resolve():
            raise SettingsError(f"{output} is the {name} itself: give another name to write to")


@contextlib.contextmanager
def folder_written_whole(folder: str | Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` when the block ends well.

    A kill between the two renames leaves the old one beside it, as .NAME.replaced. Raises SettingsError where nothing
    can be written there.
    """
    folder = Path(folder)
    staging, replaced = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.replaced")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(staging, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def file_digest(path: str | Path) -> str:
    """xxh3_128 of a file's content, 32 hex digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def manifest_path(path: str | Path) -> Path:
    return Path(f"{path}.manifest.json")


def write_manifest(path: str | Path, kind: str, counts: dict[str, int], made_by: dict[str, Any]) -> None:
    """Writes FILE.manifest.json for a finished file."""
    path = Path(path)
    manifest = {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "counts": counts,
        "bytes": path.stat().st_size,
        "digest": file_digest(path),
        "made_by": made_by,
    }
    with written_whole(manifest_path(path)) as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest beside the file `path`: schema, kind, counts, bytes, digest, made_by.

    Raises:
        DataError: there is none, or it is no manifest of ours.
    """
    file = manifest_path(path)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} has no manifest {file.name} beside it: make the file again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}): make {path} again") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA_VERSION or "digest" not in manifest:
        raise DataError(f"{file} is not a manifest of schema {SCHEMA_VERSION}: make {path} again")
    return manifest


def check_manifest(path: str | Path, kind: str) -> dict[str, Any] | None:
    """Compares a file with the manifest beside it; None where there is no manifest (a file of another project).

    Raises:
        DataError: the file is of another kind, or is not the one that the manifest names.
    """
    if not manifest_path(path).exists():
        return None
    manifest = read_manifest(path)
    if manifest["kind"] != kind:
        raise DataError(f"{path} holds {manifest['kind']}, {kind} are needed: give another file")
    if not Path(path).is_file():
        raise DataError(f"{path} is missing, its manifest is there: make the file again")
    if Path(path).stat().st_size != manifest["bytes"] or file_digest(path) != manifest["digest"]:
        raise DataError(
            f"{path} does not match {manifest_path(path).name}: make the file again, or remove the manifest"
        )
    return manifest
