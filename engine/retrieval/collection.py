"""Passages and queries: texts under ids, in file order, held as Arrow columns so that millions cost bytes, not objects.

The formats, one example line each, stand in docs/evaluation.md. The parsers of corpora are those of the shards
(data_shards/records.py); here every passage stays, an empty one too, because its id may be judged.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.readers import list_inputs
from quincunx.data_shards.records import BadRecordError, Row, check_id, check_text, load_json, parse_dpr, parse_msmarco
from quincunx.engine.retrieval.files import read_lines
from quincunx.engine.retrieval.questions import read_questions

PASSAGE_FORMATS = {"beir": "beir", "msmarco": "msmarco", "dpr": "dpr", "jsonl": "documents", "parquet": "parquet"}
"""Format of passages -> the format whose files `readers.list_inputs` finds."""
QUERY_FORMATS = ("beir", "jsonl", "tsv", "dpr")
CHUNK_ROWS = 1 << 16


class Collection:
    """Texts under ids, in file order; made by `make_collection`, `read_passages` and `read_queries`.

    name  the path it came from, for messages
    """

    def __init__(self, ids: Any, texts: Any, name: str):
        """ids, texts: pyarrow LargeStringArray of one length, without offset. See make_collection."""
        self.name = name
        self._ids, self._texts = ids, texts
        hashes = np.fromiter((_hash(id) for part in _slices(ids) for id in part), np.uint64, len(ids))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        for first, second in zip(self._order[same], self._order[same + 1]):
            if self.id_at(first) == self.id_at(second):
                raise DataError(
                    f"{name} has the id {self.id_at(first)!r} twice (records {first + 1} and {second + 1}): ids must "
                    "be unique, remove one"
                )

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> list[str]:
        """All ids in order."""
        return self._ids.to_pylist()

    def id_at(self, row: int) -> str:
        return self._ids[int(row)].as_py()

    def ids_at(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of some rows, in the order given."""
        return self._ids.take(_indices(rows)).to_pylist()

    def texts(self, rows: Sequence[int] | np.ndarray | None = None) -> list[str]:
        """The texts of some rows, in the order given; None: all."""
        return (self._texts if rows is None else self._texts.take(_indices(rows))).to_pylist()

    def text_at(self, row: int) -> str:
        return self._texts[int(row)].as_py()

    def row(self, id: str) -> int:
        """Raises KeyError for an unknown id."""
        wanted = np.uint64(_hash(id))
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self) and self._hashes[place] == wanted:
            if self.id_at(self._order[place]) == id:
                return int(self._order[place])
            place += 1
        raise KeyError(id)

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """int64, the row of each id, -1 where unknown."""
        import pyarrow.compute as compute

        ids = list(ids)
        if not ids:
            return np.empty(0, np.int64)
        hashes = np.fromiter(map(_hash, ids), np.uint64, len(ids))
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self) - 1)
        rows = self._order[places]
        equal = compute.equal(self._ids.take(_indices(rows)), _string_array(ids)).to_numpy(zero_copy_only=False)
        rows = np.where(equal, rows, -1)
        # Another id of the same hash (never met; one pair is likely among 5e9 ids): look on along the equal hashes.
        for at in np.flatnonzero(~equal & (self._hashes[places] == hashes)):
            with contextlib.suppress(KeyError):
                rows[at] = self.row(ids[at])
        return rows

    def __contains__(self, id: str) -> bool:
        try:
            return self.row(id) >= 0
        except KeyError:
            return False

    @cached_property
    def empty_rows(self) -> np.ndarray:
        """int64, rows of texts without a visible character: they keep row and id, and no search of ours finds them."""
        import pyarrow.compute as compute

        visible = compute.match_substring_regex(self._texts, r"[^\s\p{C}\p{Z}]")
        return np.flatnonzero(~visible.to_numpy(zero_copy_only=False)).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """xxh3_128 (32 hex digits) of all ids and texts in order: their lengths, then their bytes."""
        digest = xxhash.xxh3_128()
        for array in (self._ids, self._texts):
            _, offsets, data = array.buffers()
            digest.update(np.diff(np.frombuffer(offsets, np.int64)[: len(array) + 1]).astype("<i8"))
            digest.update(data if data is not None else b"")
        return digest.hexdigest()


def _hash(id: str) -> int:
    return xxhash.xxh3_64_intdigest(id.encode())


def _string_array(texts: list[str]) -> Any:
    import pyarrow

    return pyarrow.array(texts, pyarrow.large_string())


def _indices(rows: Sequence[int] | np.ndarray) -> Any:
    import pyarrow

    rows = np.asarray(rows, np.int64)
    assert not len(rows) or rows.min() >= 0, "a row of -1 is no row"
    return pyarrow.array(rows)


def _slices(array: Any) -> Iterator[list[str]]:
    for start in range(0, len(array), CHUNK_ROWS):
        yield array.slice(start, CHUNK_ROWS).to_pylist()


def make_collection(ids: Iterable[str], texts: Iterable[str], name: str) -> Collection:
    """A collection of ids and their texts, in order.

    Raises:
        DataError: nothing in it, or an id twice.
    """
    return _collect(zip(ids, texts, strict=True), name)


def _collect(pairs: Iterable[tuple[str, str]], name: str) -> Collection:
    import pyarrow

    id_parts, text_parts, ids, texts = [], [], [], []
    for id, text in pairs:
        ids.append(id)
        texts.append(text)
        if len(ids) == CHUNK_ROWS:
            id_parts.append(_string_array(ids))
            text_parts.append(_string_array(texts))
            ids, texts = [], []
    id_parts.append(_string_array(ids))
    text_parts.append(_string_array(texts))
    if not sum(map(len, id_parts)):
        raise DataError(f"{name} holds no texts: give a file with at least one record")
    return Collection(pyarrow.concat_arrays(id_parts), pyarrow.concat_arrays(text_parts), name)


def read_passages(path: str | Path, *, format: str | None = None, titles: bool = True) -> Collection:
    """The passages of a corpus, each as title, a space, text.

    Args:
        path: a BEIR folder, a file, or a pattern like "part-*.tsv".
        format: beir ({"_id", "title", "text"}), msmarco (pid, text or pid, title, text), dpr (id, text, title), jsonl
            ({"id" or "_id", "title" (optional), "text"}), parquet (the same as columns); None: by ending and header.
        titles: False leaves titles out (a passage that has nothing else is its title).

    Raises:
        SettingsError: an unknown format.
        DataError: nothing there, a record that cannot be read (file and line named), or an id twice.
    """
    path = str(path)
    format = format or _guess_passage_format(path)
    if format not in PASSAGE_FORMATS:
        raise SettingsError(f"the format of passages {format!r} is not known: give one of {', '.join(PASSAGE_FORMATS)}")
    files = [file for source in list_inputs(PASSAGE_FORMATS[format], path) for file in source.files]
    if format == "parquet":
        pairs = (pair for file in files for pair in _parquet_passages(file, titles))
    else:
        parse = {"msmarco": _msmarco_passage, "dpr": _dpr_passage}.get(format, _json_passage)
        pairs = (pair for file in files for pair in _parsed_lines(file, parse, titles))
    return _collect(pairs, path)


def _guess_passage_format(path: str) -> str:
    given = Path(path).expanduser()
    name = given.name.removesuffix(".gz")
    if given.is_dir():
        for format, pattern in (("beir", "corpus.jsonl*"), ("parquet", "*.parquet"), ("jsonl", "*.jsonl*")):
            if next(given.glob(pattern), None):
                return format
        return "beir"  # whose absence is then named
    if name.endswith((".tsv", ".txt")):
        first = next(read_lines(given), "") if given.is_file() else ""
        return "dpr" if first.rstrip("\r\n").split("\t") == ["id", "text", "title"] else "msmarco"
    for format, ending in (("jsonl", ".jsonl"), ("parquet", ".parquet")):
        if name.endswith(ending):
            return format
    raise SettingsError(f"the format of {path} is not clear from its name: give one of {', '.join(PASSAGE_FORMATS)}")


def _parsed_lines(file: Path, parse: Callable, *arguments: Any) -> Iterator[Any]:
    """What `parse` makes of each line, without the Nones; a bad record becomes a DataError with file and line."""
    for number, line in enumerate(read_lines(file), 1):
        try:
            parsed = parse(line, *arguments)
        except BadRecordError as error:
            raise DataError(f"{file}:{number}: {error}; mend or remove the record") from None
        if parsed is not None:
            yield parsed


def _msmarco_passage(line: str, titles: bool) -> tuple[str, str] | None:
    """records.parse_msmarco without its Document, which would be most of the time of 8.8 M lines."""
    columns = line.split("\t")
    if len(columns) not in (2, 3) or not columns[0].isalnum():
        return _pair_of(parse_msmarco(line), titles)  # blank, bad, or an id to look at
    text, title = columns[-1].strip(), columns[1].strip() if len(columns) == 3 else ""
    return columns[0], (f"{title} {text}" if title and text and titles else text or title)


def _dpr_passage(line: str, titles: bool) -> tuple[str, str] | None:
    return _pair_of(parse_dpr(line), titles)


def _pair_of(row: Row | None, titles: bool) -> tuple[str, str] | None:
    if row is None:
        return None
    document = row.document
    text = document.paragraphs[0] if document.paragraphs else ""
    return document.doc_id, (f"{document.title} {text}" if titles and document.title else text)


def _json_passage(line: str, titles: bool) -> tuple[str, str] | None:
    record = load_json(line)
    return None if record is None else _passage_of(record, titles)


def _passage_of(record: dict, titles: bool) -> tuple[str, str]:
    id = check_id(_first(record, "_id", "id"), "the id")
    title, text = check_text(record.get("title") or "", "title"), check_text(_first(record, "text"), "text")
    if not text:
        return id, title
    return id, (f"{title} {text}" if titles and title else text)


def _first(record: dict, *names: str) -> Any:
    """The first of several fields that a record has."""
    for name in names:
        if name in record:
            return record[name]
    raise BadRecordError(f"no field {' or '.join(names)} among {sorted(record)}")


def _parquet_passages(file: Path, titles: bool) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        table = parquet.ParquetFile(file)
        columns = [name for name in ("_id", "id", "title", "text") if name in table.schema_arrow.names]
        batches = table.iter_batches(columns=columns)
        for number, record in enumerate((record for batch in batches for record in batch.to_pylist()), 1):
            try:
                yield _passage_of(record, titles)
            except BadRecordError as error:
                raise DataError(f"{file}: row {number}: {error}; mend or remove the record") from None
    except ArrowException as error:
        raise DataError(f"{file} is not Parquet ({error}): check the file") from None


def read_queries(path: str | Path, format: str | None = None) -> Collection:
    """The queries of a file or BEIR folder.

    Args:
        format: beir (folder with queries.jsonl), jsonl ({"query_id", "_id" or "id", "query" or "text"}), tsv (qid,
            text: MS MARCO, TREC DL topics), dpr (NQ, TriviaQA: .json with {"question"} objects, or .csv with question,
            answers; the ids are "0", "1", ...); None: by ending.

    Raises: as read_passages.
    """
    given = Path(path).expanduser()
    name = given.name.removesuffix(".gz")
    if format is None:
        endings = {".jsonl": "jsonl", ".tsv": "tsv", ".txt": "tsv", ".json": "dpr", ".csv": "dpr"}
        format = "beir" if given.is_dir() else endings.get(Path(name).suffix)
    if format not in QUERY_FORMATS:
        raise SettingsError(f"the format of the queries {path} is {format}: give one of {', '.join(QUERY_FORMATS)}")
    if given.is_dir():
        files = [file for file in (given / "queries.jsonl", given / "queries.jsonl.gz") if file.is_file()]
        if not files:
            raise DataError(f"{path} has no queries.jsonl: give a BEIR folder or a file of queries")
        given = files[0]
    if format == "dpr":
        questions = (question for question, _ in read_questions(given))
        return _collect(((str(number), question) for number, question in enumerate(questions)), str(path))
    return _collect(_parsed_lines(given, _tsv_query if format == "tsv" else _json_query), str(path))


def _json_query(line: str) -> tuple[str, str] | None:
    record = load_json(line)
    if record is None:
        return None
    return (
        check_id(_first(record, "query_id", "_id", "id"), "the id"),
        check_text(_first(record, "query", "text"), "the query"),
    )


def _tsv_query(line: str) -> tuple[str, str] | None:
    if not line.strip():
        return None
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) != 2:
        raise BadRecordError(f"{len(columns)} tab-separated columns, 2 (qid, text) are needed")
    return check_id(columns[0], "qid"), columns[1].strip()
