"""Files of the retrieval chain, read line by line with file and line in every complaint."""

import contextlib
import gzip
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from quincunx.data_shards.artefact import file_digest
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.records import BadRecordError, load_json


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
            raise DataError(f"{path}:{number}: {error}; fix or remove the record") from None
        if record is not None:
            yield number, record


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


def input_digest(path: str | Path) -> str:
    """The digest of a file that a stage reads. Raises DataError if it cannot be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
