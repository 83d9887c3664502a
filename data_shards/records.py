"""Files of the field record by record (every complaint names file and line, row or record), and corpora's formats.

A parser of a corpus takes a line and gives a Row, or None for a blank line or a header; a record without text gives a
document without paragraphs. docs/corpora.md shows a line of each format.
"""

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quincunx.data_shards.durable import file_digest
from quincunx.data_shards.errors import DataError

MAX_EXAMPLES = 20
BATCH_ROWS = 4096
DPR_HEADER = ["id", "text", "title"]


@dataclass(frozen=True)
class Document:
    """Text in reading order; two passages that follow each other in it are neighbours.

    doc_id       unique in the corpus
    title        of the whole document, or ""; it counts as text (see passages.py)
    paragraphs   in reading order, none of them blank
    passage_ids  () for running text, which is cut into passages that may span paragraphs; else one id per paragraph:
                 each paragraph is a passage of a ready-made collection and is never joined with its neighbour
    queries      () or one natural query per paragraph, "" if there is none (a docstring's summary line)
    """

    doc_id: str
    title: str
    paragraphs: tuple[str, ...]
    passage_ids: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()


@dataclass
class ReadReport:
    """What was read and what was left out, and why; passed to a reader, which fills it.

    on_bad_record  "stop" or "skip"
    counts         documents, records, bad_records, empty_passages, and what a format counts besides
    examples       the first bad records, each as "file:line: reason"
    """

    on_bad_record: str = "stop"
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def refuse(self, where: str, reason: str) -> None:
        """Raises DataError for a record that cannot be read, or skips and counts it."""
        if self.on_bad_record == "stop":
            raise DataError(f"{where}: {reason}; fix the record, or leave such records out with --on_bad_record skip")
        self.skip(where, reason)

    def skip(self, where: str, reason: str) -> None:
        self.counts["bad_records"] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{where}: {reason}")


@dataclass(frozen=True)
class Input:
    """A source of a corpus: one file, or all Python files of one package.

    name   relative to the corpus, the same on every machine
    bytes  of all its files, as they lie on disk (compressed if they are)
    """

    name: str
    files: tuple[Path, ...]
    bytes: int

    def describe(self) -> dict[str, Any]:
        """Name, bytes, and digest of the files' content in order; reads them all."""
        return {"name": self.name, "bytes": self.bytes, "digest": file_digest(*self.files)}


class BadRecordError(Exception):
    """Why a record cannot be read; the reader adds file and line."""


@dataclass(frozen=True)
class Row:
    """One record. Rows that follow each other in a file and share a group are one document.

    group  what they share (an article's name), or None: a document by itself
    order  the row's number in its group, or None if the file's order counts; a gap starts a new document
    """

    document: Document
    group: str | None = None
    order: int | None = None

    def is_followed_by(self, other: "Row") -> bool:
        in_order = self.order is None or other.order is None or other.order == self.order + 1
        same = self.group is not None and self.group == other.group and self.document.title == other.document.title
        return same and in_order


def check_text(value: Any, name: str) -> str:
    """A stripped text, or BadRecordError: not a string, or one that UTF-8 cannot hold (a lone surrogate)."""
    if not isinstance(value, str):
        raise BadRecordError(f"{name} is {type(value).__name__}, a string is needed")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRecordError(f"{name} holds half a surrogate pair, which no encoding can store") from None
    return value.strip()


def check_id(value: Any, name: str) -> str:
    text = check_text(str(value) if type(value) is int else value, name)
    if not text or not text.isprintable():
        raise BadRecordError(f"{name} is {value!r}, a printable string is needed")
    return text


def _passage(passage_id: str, title: str, text: str) -> Document:
    """A one-passage document; if there is a title only, it is the text. Without either: no paragraphs."""
    if title and not text:
        title, text = "", title
    return Document(passage_id, title, (text,) if text else (), (passage_id,) if text else ())


def load_json(line: str) -> dict | None:
    """The object of a JSON line; None for a blank one."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadRecordError(f"a JSON {type(record).__name__}, an object is needed")
    return record


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 text file (.gz: unpacked), line ends kept, a byte order mark removed.

    Raises:
        DataError: no such file, not UTF-8, or damaged gzip.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield line.removeprefix("\ufeff") if number == 1 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): fetch it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 after line {number} ({error.reason}): convert it") from None


def parse_lines(path: str | Path, parse: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """(where it stands, what `parse` makes of it) of each line, without the Nones.

    Raises:
        DataError: as read_lines; a line for which `parse` raises BadRecordError.
    """
    return parse_each(path, read_lines(path), parse, ":")


def parse_objects(
    path: str | Path, parse: Callable[[dict], Any], columns: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """parse_lines of objects: the rows of a .parquet file, else the lines of JSON.

    columns: those that are read of a .parquet file, if it has them; none given: all.
    """
    if str(path).endswith(".parquet"):
        return parse_each(path, _parquet_rows(path, columns), parse, ": row ")
    return parse_lines(path, lambda line: None if (record := load_json(line)) is None else parse(record))


def parse_each(path: str | Path, records: Iterable[Any], parse: Callable[[Any], Any], place: str) -> Iterator:
    """As parse_lines, of `records` whose numbers stand after `place` in messages."""
    for number, record in enumerate(records, 1):
        try:
            parsed = parse(record)
        except BadRecordError as error:
            raise DataError(f"{path}{place}{number}: {error}; fix or remove the record") from None
        if parsed is not None:
            yield f"{path}{place}{number}", parsed


def _parquet_rows(path: str | Path, columns: Sequence[str]) -> Iterator[dict]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        table = parquet.ParquetFile(path)
        wanted = [name for name in columns if name in table.schema_arrow.names] or None
        for batch in table.iter_batches(BATCH_ROWS, columns=wanted):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}): fetch it or make it again") from None


def _field(record: dict, name: str) -> Any:
    if name not in record:
        raise BadRecordError(f"no field {name!r} among {sorted(record)}")
    return record[name]


def parse_beir(line: str) -> Row | None:
    """{"_id", "title" (optional), "text"}; rows of one metadata.article in order are neighbours."""
    record = load_json(line)
    if record is None:
        return None
    passage_id = check_id(_field(record, "_id"), "_id")
    title, text = check_text(record.get("title") or "", "title"), check_text(_field(record, "text"), "text")
    metadata = record["metadata"] if isinstance(record.get("metadata"), dict) else {}
    article, order = metadata.get("article"), metadata.get("paragraph")
    return Row(
        _passage(passage_id, title, text),
        None if article is None else str(article),
        order if isinstance(order, int) else None,
    )


def parse_msmarco(line: str) -> Row | None:
    """pid, text or pid, title, text, separated by tabs, without quoting."""
    if not line.strip():
        return None
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) not in (2, 3):
        raise BadRecordError(f"{len(columns)} tab-separated columns, 2 (pid, text) or 3 (pid, title, text) are needed")
    title = columns[1] if len(columns) == 3 else ""
    return Row(_passage(check_id(columns[0], "pid"), title.strip(), columns[-1].strip()))


def parse_dpr(line: str) -> Row | None:
    """id, text, title, separated by tabs, quoted as CSV, with a header; rows of one title in order are neighbours."""
    if not line.strip():
        return None
    try:
        columns = next(csv.reader([line.rstrip("\r\n")], delimiter="\t"))
    except csv.Error as error:
        raise BadRecordError(f"not tab-separated CSV ({error})") from None
    if columns == DPR_HEADER:
        return None
    if len(columns) != 3:
        raise BadRecordError(f"{len(columns)} tab-separated columns, 3 (id, text, title) are needed")
    title = columns[2].strip()
    return Row(_passage(check_id(columns[0], "id"), title, columns[1].strip()), title or None)


def parse_document(line: str) -> Row | None:
    """{"doc_id", "title" (optional), "paragraphs": [...] in reading order}."""
    record = load_json(line)
    return None if record is None else Row(_document(record))


def _document(record: dict) -> Document:
    doc_id = check_id(_field(record, "doc_id"), "doc_id")
    title, paragraphs = check_text(record.get("title") or "", "title"), _field(record, "paragraphs")
    if not isinstance(paragraphs, list):
        raise BadRecordError(f"paragraphs is {type(paragraphs).__name__}, a list of strings is needed")
    texts = tuple(text for text in (check_text(paragraph, "a paragraph") for paragraph in paragraphs) if text)
    return Document(doc_id, "", (title,)) if title and not texts else Document(doc_id, title, texts)


PARSERS = {"beir": parse_beir, "msmarco": parse_msmarco, "dpr": parse_dpr, "documents": parse_document}


def parse_parquet_row(record: dict) -> Document:
    """Columns doc_id, title (optional), paragraphs, or id, title (optional), text."""
    if "paragraphs" in record:
        return _document(record)
    title, text = check_text(record.get("title") or "", "title"), check_text(record["text"], "text")
    return _passage(check_id(record["id"], "id"), title, text)
