"""Generated queries and continuations by passage id, in bounded memory.

Generation files (of `launchers/generate.py` or ready-made) hold records {"passage_id", "queries": [...]} and/or
{"passage_id", "continuation": "..."} as JSONL, JSONL.gz or Parquet, in any order. They are indexed once in an SQLite
file, which any number of processes then reads; 10 M passages need about 5 GB of disk and 100 MB of memory.
"""

import gzip
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quincunx.data_shards.artefact import MANIFEST, open_artefact
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.records import BadRecordError, check_id, check_text, load_json

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
KIND = "generations"
CACHE_KIB = 65536
FIELDS = ("queries", "continuation")


@dataclass(frozen=True)
class GenerationCounts:
    """What an index holds: passages with at least one field, and how many have each."""

    passages: int
    queries: int
    continuation: int


def list_generation_files(paths: Sequence[str]) -> list[Path]:
    """The generation files named by files or folders, in order.

    Raises:
        DataError: a path without generation files, or a folder of generate.py that is damaged.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
            if (path / MANIFEST).is_file():  # of generate.py
                open_artefact(path, KIND)
        else:
            found = [path] if path.is_file() and path.name.endswith(ENDINGS) else []
        if not found:
            raise DataError(f"no generations at {path}: give a file or folder of {', '.join(ENDINGS)}")
        files += found
    return files


def index_generations(paths: Sequence[str], index_file: Path) -> GenerationCounts:
    """Writes the index of all generations, through a temporary file; `index_file` is replaced.

    Raises:
        DataError: no generations there, a record that cannot be read (file and line named), or a field given twice for
            one passage.
    """
    files = list_generation_files(paths)
    unfinished = index_file.with_name(f".{index_file.name}.tmp")
    unfinished.unlink(missing_ok=True)
    with closing(sqlite3.connect(unfinished)) as connection:
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(
            "CREATE TABLE generations (passage_id TEXT PRIMARY KEY, queries TEXT, continuation TEXT) WITHOUT ROWID"
        )
        for file in files:
            _insert_file(connection, file)
        connection.commit()
        counts = _count(connection)
    os.replace(unfinished, index_file)
    return counts


def _insert_file(connection: sqlite3.Connection, file: Path) -> None:
    for where, record in _records(file):
        try:
            passage_id, queries, continuation = parse_generation(record)
        except BadRecordError as error:
            raise DataError(f"{file.name}:{where}: {error}; fix or remove the record") from None
        # A second file may bring the other field; the same field twice is a mix-up that must not be settled by order.
        old = connection.execute(
            "SELECT queries, continuation FROM generations WHERE passage_id = ?", (passage_id,)
        ).fetchone() or (None, None)
        new = (json.dumps(queries, ensure_ascii=False) if queries else None, continuation or None)
        for name, before, after in zip(FIELDS, old, new):
            if before is not None and after is not None:
                raise DataError(
                    f"{file.name}:{where}: {name} of passage {passage_id!r} are given twice; keep one of them"
                )
        connection.execute(
            "INSERT OR REPLACE INTO generations VALUES (?, ?, ?)",
            (passage_id, *(before if after is None else after for before, after in zip(old, new))),
        )


def _records(file: Path) -> Iterator[tuple[int, dict]]:
    """(line or row number from 1, record) of a generation file."""
    if file.name.endswith(".parquet"):
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException

        try:
            table = parquet.ParquetFile(file)
            columns = [name for name in ("passage_id", *FIELDS) if name in table.schema_arrow.names]
            batches = table.iter_batches(1024, columns=columns)
            records = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, record in enumerate(records, 1):
                yield number, {name: value for name, value in record.items() if value is not None}
        except ArrowException as error:
            raise DataError(f"{file} is not a Parquet file that can be read ({error})") from None
        return
    try:
        with (gzip.open if file.name.endswith(".gz") else open)(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = load_json(line.decode())
                except (BadRecordError, UnicodeDecodeError) as error:
                    raise DataError(f"{file.name}:{number}: {error}; fix or remove the line") from None
                if record is not None:
                    yield number, record
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.name} is a damaged gzip file ({error}): fetch or generate it again") from None


def parse_generation(record: dict[str, Any]) -> tuple[str, list[str], str]:
    """(passage id, queries, continuation); blank queries are dropped, [] and "" if a field is missing."""
    if "passage_id" not in record or not set(FIELDS) & set(record):
        raise BadRecordError(f"the fields are {sorted(record)}; passage_id and queries or continuation are needed")
    queries = record.get("queries", [])
    if not isinstance(queries, list):
        raise BadRecordError(f"queries is {type(queries).__name__}, a list of strings is needed")
    texts = [check_text(query, "a query") for query in queries]
    continuation = check_text(record.get("continuation", ""), "continuation")
    return check_id(record["passage_id"], "passage_id"), [text for text in texts if text], continuation


def _count(connection: sqlite3.Connection) -> GenerationCounts:
    return GenerationCounts(
        *connection.execute("SELECT COUNT(*), COUNT(queries), COUNT(continuation) FROM generations").fetchone()
    )


class Generations:
    """An index opened for reading, by as many processes as like."""

    def __init__(self, index_file: Path):
        self._connection = sqlite3.connect(f"file:{quote(str(index_file.absolute()))}?mode=ro&immutable=1", uri=True)
        self.counts = _count(self._connection)

    def lookup(self, passage_id: str) -> tuple[list[str] | None, str | None]:
        """(queries, continuation) of a passage; None for what it has not."""
        row = self._connection.execute(
            "SELECT queries, continuation FROM generations WHERE passage_id = ?", (passage_id,)
        ).fetchone()
        if row is None:
            return None, None
        return (json.loads(row[0]) if row[0] else None), row[1]

    def close(self) -> None:
        self._connection.close()
