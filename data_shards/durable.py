"""Files and folders that are written whole or not at all: synced to the disk, then renamed; and their digests."""

import contextlib
import errno
import glob
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

from quincunx.data_shards.errors import SettingsError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def written_whole(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that takes its name when the block ends well, synced to disk; after an error nothing has changed.

    mode: "w" (UTF-8 text) or "wb". Raises SettingsError if the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_dead(path)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        file = open(temporary, mode) if "b" in mode else open(temporary, mode, encoding="utf-8", newline="\n")  # noqa: SIM115
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise cannot_write(path, error) from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_dead(path: Path) -> None:
    """Removes what processes of this machine that are dead have left of this file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-{glob.escape(socket.gethostname())}-*"):
        try:
            os.kill(int(left.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            continue


def publish(staging: Path, path: Path) -> None:
    """Gives a finished folder its name, everything in it on the disk before."""
    for folder in [staging, *(entry for entry in staging.rglob("*") if entry.is_dir())]:
        sync_folder(folder)
    if path.is_dir():  # empty, as is_made has seen
        path.rmdir()
    os.rename(staging, path)


def free_aside(path: Path) -> Path:
    """The first of NAME.old-1, NAME.old-2 ... that is free: where what has the name is moved aside to."""
    asides = (path.with_name(f"{path.name}.old-{number}") for number in itertools.count(1))
    return next(aside for aside in asides if not aside.exists())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> SettingsError:
    return SettingsError(f"{path} cannot be written ({error.strerror}): give a place that you may write to")


def file_digest(*paths: str | Path) -> str:
    """xxh3_128 of the files' content in order, 32 hex digits."""
    digest = xxhash.xxh3_128()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
