"""Generated queries and continuations by passage id, in bounded memory.

Generation files (of `launchers/generate.py` or ready-made) hold records {"passage_id", "queries": [...]} and/or
{"passage_id", "continuation": "..."} as JSONL, JSONL.gz or Parquet, in any order. They are indexed once in an SQLite
file, which any number of processes then reads; 10 M passages need about 5 GB of disk and 100 MB of memory.
"""

import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quincunx.data_shards.artefact import MANIFEST, open_artefact
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.records import BadRecordError, check_id, check_text, parse_objects
from quincunx.data_shards.tasks import GENERATED

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
KIND = "generations"
CACHE_KIB = 65536


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


def index_generations(paths: Sequence[str], index_file: Path) -> dict[str, int]:
    """Writes the index of all generations, through a temporary file; `index_file` is replaced. Returns its counts.

    Raises:
        DataError: no generations there, a record that cannot be read (file and line named), or a field given twice for
            one passage.
    """
    files = list_generation_files(paths)
    unfinished = index_file.with_name(f".{index_file.name}.tmp")
    unfinished.unlink(missing_ok=True)
    with closing(sqlite3.connect(unfinished)) as connection:
        for pragma in (f"cache_size = -{CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            connection.execute(f"PRAGMA {pragma}")
        columns = ", ".join(f"{name} TEXT" for name in GENERATED)
        connection.execute(f"CREATE TABLE generations (passage_id TEXT PRIMARY KEY, {columns}) WITHOUT ROWID")
        for file in files:
            _insert_file(connection, file)
        connection.commit()
    os.replace(unfinished, index_file)
    with closing(Generations(index_file)) as generations:
        return generations.count()


def _insert_file(connection: sqlite3.Connection, file: Path) -> None:
    insert = f"INSERT OR REPLACE INTO generations VALUES (?{', ?' * len(GENERATED)})"
    for where, (passage_id, texts) in parse_objects(file, parse_generation, columns=("passage_id", *GENERATED)):
        # A second file may bring the other field; the same field twice is a mix-up that must not be settled by order.
        before = _lookup(connection, passage_id)
        if twice := sorted(before.keys() & texts.keys()):
            raise DataError(f"{where}: passage {passage_id!r} has {twice[0]} a second time; keep one")
        texts |= before
        columns = [json.dumps(texts[name], ensure_ascii=False) if name in texts else None for name in GENERATED]
        connection.execute(insert, (passage_id, *columns))


def _lookup(connection: sqlite3.Connection, passage_id: str) -> dict[str, list[str]]:
    rows = connection.execute(f"SELECT {', '.join(GENERATED)} FROM generations WHERE passage_id = ?", (passage_id,))
    return {name: json.loads(texts) for row in rows for name, texts in zip(GENERATED, row) if texts}


def parse_generation(record: dict[str, Any]) -> tuple[str, dict[str, list[str]]]:
    """(passage id, its texts by field); blank texts are dropped, and a field without any."""
    record = {name: value for name, value in record.items() if value is not None}  # a cell of a Parquet row
    if "passage_id" not in record or not GENERATED.keys() & record.keys():
        fields = " or ".join(GENERATED)
        raise BadRecordError(f"the fields are {sorted(record)}; passage_id and {fields} are needed")
    texts = {}
    for name, kind in GENERATED.items():
        value = record.get(name, kind())
        if kind is list and not isinstance(value, list):
            raise BadRecordError(f"{name} is {type(value).__name__}, a list of strings is needed")
        given = [check_text(text, f"a text of {name}") for text in (value if kind is list else [value])]
        texts[name] = [text for text in given if text]
    return check_id(record["passage_id"], "passage_id"), {name: given for name, given in texts.items() if given}


class Generations:
    """An index opened for reading, by as many processes as like."""

    def __init__(self, index_file: Path):
        self._connection = sqlite3.connect(f"file:{quote(str(index_file.absolute()))}?mode=ro&immutable=1", uri=True)

    def count(self) -> dict[str, int]:
        """The passages, and how many of them have each field; reads the whole index."""
        columns = ", ".join(f"COUNT({name})" for name in GENERATED)
        found = self._connection.execute(f"SELECT COUNT(*), {columns} FROM generations").fetchone()
        return dict(zip(("passages", *GENERATED), found, strict=True))

    def lookup(self, passage_id: str) -> dict[str, list[str]]:
        """The texts of a passage by field, without those that it has not."""
        return _lookup(self._connection, passage_id)

    def close(self) -> None:
        self._connection.close()
