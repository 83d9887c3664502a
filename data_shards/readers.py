"""Corpora in the formats of the field to documents; any part of a corpus without reading the rest.

The formats, one example line each, are in docs/corpora.md. A corpus of B bytes is cut into n parts at byte k*B/n; a
record belongs to the part that holds its first byte, a document of several records to the part of its first record, so
that the parts together give the same documents for every n. Parquet is cut at row groups, a compressed file is one
piece, and python_docs is cut between packages.
"""

import glob
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.python_docs import list_packages, read_package
from quincunx.data_shards.records import PARSERS, BadRecordError, Document, Input, ReadReport, Row, parse_parquet_row

PATTERNS = {
    "beir": ("corpus.jsonl", "corpus.jsonl.gz"),
    "msmarco": ("*.tsv", "*.tsv.gz"),
    "dpr": ("*.tsv", "*.tsv.gz"),
    "documents": ("*.jsonl", "*.jsonl.gz"),
    "parquet": ("*.parquet",),
}
LOOK_BACK_BYTES = 1 << 16


def list_inputs(format: str, path: str) -> list[Input]:
    """The files of a corpus (or packages, for python_docs), sorted by name.

    path: a file, a folder, or a pattern like "part-*.jsonl.gz"; for python_docs see `python_docs.list_packages`.

    Raises:
        DataError: no such file, or nothing in it.
    """
    if format == "python_docs":
        return list_packages(path)
    given = Path(path).expanduser()
    if given.is_dir():
        files = sorted(file for pattern in PATTERNS[format] for file in given.glob(pattern))
    else:
        files = sorted(Path(name) for name in glob.glob(str(given), recursive=True) if os.path.isfile(name))
    if not files:
        wanted = " or ".join(PATTERNS[format])
        raise DataError(f"no {format} corpus at {path}: give a file, a pattern, or a folder with {wanted}")
    folder = os.path.commonpath([file.parent.absolute() for file in files])
    inputs = [Input(os.path.relpath(file, folder), (file,), file.stat().st_size) for file in files]
    if not sum(source.bytes for source in inputs):
        raise DataError(f"the corpus {path} is empty: give {format} files with at least one record")
    return inputs


def part_range(total: int, task: int, num_tasks: int) -> range:
    """The part `task` of `num_tasks` of range(total)."""
    return range(task * total // num_tasks, (task + 1) * total // num_tasks)


def read_documents(
    format: str, path: str, task: int = 0, num_tasks: int = 1, report: ReadReport | None = None
) -> Iterator[Document]:
    """The documents of part `task` of `num_tasks` of a corpus, in order; empty records are left out and counted.

    report: says what happens to bad records, and is filled.

    Raises:
        DataError: no corpus there, or a bad record, named by file and line.
    """
    report = report or ReadReport()
    inputs = list_inputs(format, path)
    if format == "parquet":
        documents = _read_parquet(inputs, task, num_tasks, report)
    else:
        documents = _read_inputs(format, inputs, task, num_tasks, report)
    for document in documents:
        report.counts["documents"] += 1
        yield document


def _read_inputs(format: str, inputs: list[Input], task: int, num_tasks: int, report: ReadReport) -> Iterator[Document]:
    part = part_range(sum(source.bytes for source in inputs), task, num_tasks)
    position = 0
    for source in inputs:
        owned = range(max(part.start - position, 0), min(part.stop - position, source.bytes))
        position += source.bytes
        packed = source.name.endswith(".gz")
        if not owned or (owned.start and (packed or format == "python_docs")):  # one piece, of its first byte's owner
            continue
        if format == "python_docs":
            yield from read_package(source, report)
            continue
        if packed:
            owned = range(1 << 62)
        try:
            with _open(source) as file:
                yield from _read_rows(source, file, owned, PARSERS[format], report)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{source.name} is a damaged gzip file ({error}): fetch it again") from None


def _read_rows(
    source: Input, file: BinaryIO, owned: range, parse: Callable[[str], Row | None], report: ReadReport
) -> Iterator[Document]:
    """The documents whose first line begins at an owned byte. A blank, empty or bad line ends a document."""
    start = offset = _line_start_before(file, owned.start)  # where this document begins, and this line
    file.seek(offset)
    rows: list[Row] = []
    for line in file:
        row = None
        try:
            row = parse(_decode(line, offset))
        except BadRecordError as error:
            if offset in owned:
                report.refuse(f"{source.name}:{_line_number(source, offset)}", str(error))
        if row and offset in owned:
            report.counts["records"] += 1
            report.counts["empty_passages"] += not row.document.paragraphs
        if row and not row.document.paragraphs:
            row = None
        if not (rows and row and rows[-1].is_followed_by(row)):
            if rows and start in owned:
                yield _join_rows(rows)
            if offset >= owned.stop:
                return
            rows, start = [], offset
        if row:
            rows.append(row)
        offset += len(line)
    if rows and start in owned:
        yield _join_rows(rows)


def _line_start_before(file: BinaryIO, position: int) -> int:
    """Where the line that holds the byte before `position` begins; 0 for 0."""
    end = max(position - 1, 0)
    while end > 0:
        start = max(end - LOOK_BACK_BYTES, 0)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _line_number(source: Input, offset: int) -> int:
    """The number of the line at byte `offset` of the (unpacked) file; read only to name a bad record."""
    with _open(source) as file:
        for number, line in enumerate(file, 1):
            offset -= len(line)
            if offset < 0:
                return number


def _open(source: Input) -> BinaryIO:
    """The file of an input, unpacked."""
    return (gzip.open if source.name.endswith(".gz") else open)(source.files[0], "rb")


def _decode(line: bytes, offset: int) -> str:
    try:
        return line.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from None


def _join_rows(rows: list[Row]) -> Document:
    documents = [row.document for row in rows]
    return replace(
        documents[0],
        paragraphs=tuple(paragraph for document in documents for paragraph in document.paragraphs),
        passage_ids=tuple(passage_id for document in documents for passage_id in document.passage_ids),
    )


def _read_parquet(inputs: list[Input], task: int, num_tasks: int, report: ReadReport) -> Iterator[Document]:
    """Row groups whose first row is in the part; columns doc_id, title, paragraphs or id, title, text."""
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        files = [parquet.ParquetFile(source.files[0]) for source in inputs]
    except ArrowException as error:
        raise DataError(f"a file of the corpus is not Parquet ({error}): check {inputs[0].files[0].parent}") from None
    part = part_range(sum(file.metadata.num_rows for file in files), task, num_tasks)
    position = 0
    for source, file in zip(inputs, files):
        names = file.schema_arrow.names
        columns = next((c for c in (["doc_id", "paragraphs"], ["id", "text"]) if set(c) <= set(names)), None)
        if columns is None:
            raise DataError(
                f"{source.name} has the columns {', '.join(names)}: doc_id, title, paragraphs or id, title, text "
                "are needed"
            )
        columns += ["title"] * ("title" in names)
        number = 0
        for group in range(file.num_row_groups):
            first, number = number, number + file.metadata.row_group(group).num_rows
            if position + first not in part:
                continue
            for row, record in enumerate(file.read_row_group(group, columns).to_pylist(), first + 1):
                report.counts["records"] += 1
                try:
                    document = parse_parquet_row(record)
                except BadRecordError as error:
                    report.refuse(f"{source.name}: row {row}", str(error))
                    continue
                if document.paragraphs:
                    yield document
                else:
                    report.counts["empty_passages"] += 1
        position += number
