"""Passages and queries: texts under ids, in file order, held as Arrow columns so that millions cost bytes, not objects.

The formats, one example line each, stand in docs/evaluation.md. The parsers of corpora are those of the shards
(data_shards/records.py); here every passage stays, an empty one too, because its id may be judged.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.readers import list_inputs
from quincunx.data_shards.records import (
    PARSERS,
    BadRecordError,
    Row,
    check_id,
    check_text,
    parse_lines,
    parse_objects,
    read_lines,
)
from quincunx.engine.retrieval.files import first_of, in_groups, read_questions

PASSAGE_FORMATS = {"beir": "beir", "msmarco": "msmarco", "dpr": "dpr", "jsonl": "documents", "parquet": "parquet"}
"""Format of passages -> the format whose files `readers.list_inputs` finds."""
QUERY_FORMATS = {".jsonl": "jsonl", ".tsv": "tsv", ".txt": "tsv", ".json": "dpr", ".csv": "dpr"}
"""Ending of a file of queries -> its format."""
PASSAGE_COLUMNS = ("_id", "id", "title", "text")
CHUNK_ROWS = 1 << 16


class Collection:
    """Texts under ids, in file order; made by `make_collection`, `read_passages` and `read_queries`.

    name  the path it came from, for messages
    """

    def __init__(self, ids: Any, texts: Any, name: str):
        """ids, texts: pyarrow LargeStringArray of one length, without offset. See make_collection."""
        self.name = name
        self._ids, self._texts = ids, texts
        self._seed = 0
        while not self._hash_ids():  # two ids of one hash (never met; one pair is likely among 5e9 ids)
            self._seed += 1

    def _hash_ids(self) -> bool:
        """Sorts the ids by their hashes; returns whether all hashes differ. Raises DataError for an id twice."""
        chunks = (self._ids.slice(start, CHUNK_ROWS).to_pylist() for start in range(0, len(self), CHUNK_ROWS))
        hashes = np.fromiter((_hash(id, self._seed) for chunk in chunks for id in chunk), np.uint64, len(self))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        for first, second in zip(self._order[same], self._order[same + 1]):
            if self.id_at(first) == self.id_at(second):
                raise DataError(
                    f"{self.name} has the id {self.id_at(first)!r} twice (records {first + 1} and {second + 1}): ids "
                    "must be unique, remove one"
                )
        return not len(same)

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, rows: Sequence[int] | np.ndarray | None = None) -> list[str]:
        """The ids of some rows, in the order given; None: all."""
        return (self._ids if rows is None else self._ids.take(_indices(rows))).to_pylist()

    def id_at(self, row: int) -> str:
        return self._ids[int(row)].as_py()

    def texts(self, rows: Sequence[int] | np.ndarray | None = None) -> list[str]:
        """The texts of some rows, in the order given; None: all."""
        return (self._texts if rows is None else self._texts.take(_indices(rows))).to_pylist()

    def text_at(self, row: int) -> str:
        return self._texts[int(row)].as_py()

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """int64, the row of each id, -1 where unknown."""
        import pyarrow.compute as compute

        ids = list(ids)
        if not ids:
            return np.empty(0, np.int64)
        hashes = np.fromiter((_hash(id, self._seed) for id in ids), np.uint64, len(ids))
        rows = self._order[np.searchsorted(self._hashes, hashes).clip(max=len(self) - 1)]
        equal = compute.equal(self._ids.take(_indices(rows)), _string_array(ids))
        return np.where(equal.to_numpy(zero_copy_only=False), rows, -1)

    def known_rows(self, ids: Sequence[str], what: str, source: str, hint: str = "") -> np.ndarray:
        """int64, the row of each id. Raises DataError if one of the `what` (queries, ...) of `source` is unknown.

        hint: for its message, a remedy besides other files.
        """
        rows = self.rows(ids)
        if unknown := [ids[at] for at in np.flatnonzero(rows < 0)]:
            raise DataError(
                f"{source} names {len(unknown)} {what} that {self.name} does not have {first_of(unknown)}: give the "
                f"files that belong together{hint}"
            )
        return rows

    def __contains__(self, id: str) -> bool:
        return self.rows([id])[0] >= 0

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


def _hash(id: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(id.encode(), seed)


def _string_array(texts: Iterable[str]) -> Any:
    import pyarrow

    return pyarrow.array(texts, pyarrow.large_string())


def _indices(rows: Sequence[int] | np.ndarray) -> Any:
    import pyarrow

    rows = np.asarray(rows, np.int64)
    assert not len(rows) or rows.min() >= 0, "a row of -1 is no row"
    return pyarrow.array(rows)


def make_collection(ids: Iterable[str], texts: Iterable[str], name: str) -> Collection:
    """A collection of ids and their texts, in order. Raises DataError for nothing in it, or an id twice."""
    return _collect(zip(ids, texts, strict=True), name)


def _collect(pairs: Iterable[tuple[str, str]], name: str) -> Collection:
    import pyarrow

    parts = [tuple(map(_string_array, zip(*chunk))) for chunk in in_groups(pairs, CHUNK_ROWS)]
    if not parts:
        raise DataError(f"{name} holds no texts: give a file with at least one record")
    return Collection(*(pyarrow.concat_arrays(column) for column in zip(*parts)), name)


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
    if format in ("msmarco", "dpr"):
        read = partial(parse_lines, parse=partial(_line_passage, PARSERS[format], titles))
    else:
        read = partial(parse_objects, parse=partial(_json_passage, titles), columns=PASSAGE_COLUMNS)
    files = [file for source in list_inputs(PASSAGE_FORMATS[format], path) for file in source.files]
    return _collect((passage for file in files for _, passage in read(file)), path)


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
    for format in ("jsonl", "parquet"):
        if name.endswith(f".{format}"):
            return format
    raise SettingsError(
        f"the name of {path} does not show its format: let it end in .jsonl, .parquet, .tsv or .txt, or give encode.py "
        f"--format, one of {', '.join(PASSAGE_FORMATS)}"
    )


def _passage(titles: bool, id: str, title: str, text: str) -> tuple[str, str]:
    return id, (f"{title} {text}" if titles and title and text else text or title)


def _line_passage(parse: Callable[[str], Row | None], titles: bool, line: str) -> tuple[str, str] | None:
    row = parse(line)
    return row and _passage(titles, row.document.doc_id, row.document.title, "".join(row.document.paragraphs))


def _json_passage(titles: bool, record: dict) -> tuple[str, str]:
    title, text = check_text(record.get("title") or "", "title"), check_text(_first(record, "text"), "text")
    return _passage(titles, check_id(_first(record, "_id", "id"), "the id"), title, text)


def _first(record: dict, *names: str) -> Any:
    """The first of several fields that a record has."""
    for name in names:
        if name in record:
            return record[name]
    raise BadRecordError(f"no field {' or '.join(names)} among {sorted(record)}")


def read_queries(path: str | Path, format: str | None = None) -> Collection:
    """The queries of a file or BEIR folder.

    Args:
        format: beir (folder with queries.jsonl), jsonl ({"query_id", "_id" or "id", "query" or "text"}), tsv (qid,
            text: MS MARCO, TREC DL topics), dpr (NQ, TriviaQA: .json with {"question"} objects, or .csv with question,
            answers; the ids are "0", "1", ...); None: by ending.

    Raises: as read_passages.
    """
    given = Path(path).expanduser()
    if format is None:
        format = "beir" if given.is_dir() else QUERY_FORMATS.get(Path(given.name.removesuffix(".gz")).suffix)
    if format not in (allowed := ("beir", *dict.fromkeys(QUERY_FORMATS.values()))):
        raise SettingsError(f"the format of the queries {path} is {format}: give one of {', '.join(allowed)}")
    if given.is_dir():
        files = [file for file in (given / "queries.jsonl", given / "queries.jsonl.gz") if file.is_file()]
        if not files:
            raise DataError(f"{path} has no queries.jsonl: give a BEIR folder or a file of queries")
        given = files[0]
    if format == "dpr":
        questions = read_questions(given, lambda record: record["question"])
        return _collect(((str(number), text) for number, (_, text) in enumerate(questions)), str(path))
    found = parse_lines(given, _tsv_query) if format == "tsv" else parse_objects(given, _json_query)
    return _collect((query for _, query in found), str(path))


def _json_query(record: dict) -> tuple[str, str]:
    id, text = _first(record, "query_id", "_id", "id"), _first(record, "query", "text")
    return check_id(id, "the id"), check_text(text, "the query")


def _tsv_query(line: str) -> tuple[str, str] | None:
    if not line.strip():
        return None
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) != 2:
        raise BadRecordError(f"{len(columns)} tab-separated columns, 2 (qid, text) are needed")
    return check_id(columns[0], "qid"), columns[1].strip()
