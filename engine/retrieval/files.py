"""DPR's files of questions record by record, and small things that every stage does with its files."""

import ast
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from quincunx.data_shards.durable import file_digest, written_whole
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.records import BadRecordError, check_text, parse_each, parse_lines
from quincunx.data_shards.setting import names_of

Item = TypeVar("Item")
BETWEEN = re.compile(r"[\s,]*")
CHUNK = 1 << 24
MAX_RECORD = 1 << 28
"""Characters of one question with its passages; DPR's have about 100,000."""
MAX_NAMED = 3


def read_questions(path: str | Path, parse: Callable[[dict], Any]) -> Iterator[tuple[str, Any]]:
    """(where it stands, what `parse` makes of it) of each question of DPR's files: .json, a list of objects that
    have a question, or .csv with question and answers.

    The list is read object by object, so that a file of gigabytes costs the memory of one question.

    Raises:
        DataError: not such a file; a record for which `parse` raises BadRecordError.
    """

    def parse_object(record: Any) -> Any:
        if not isinstance(record, dict):
            raise BadRecordError(f"a JSON {type(record).__name__}, an object is needed")
        return parse({**record, "question": check_text(record.get("question"), "question")})

    def parse_line(line: str) -> Any:
        if not line.strip():
            return None
        try:
            question, answers = next(csv.reader([line.rstrip("\r\n")], delimiter="\t"))
            record = {"question": question.strip(), "answers": ast.literal_eval(answers)}
        except (ValueError, TypeError, SyntaxError, csv.Error) as error:
            raise BadRecordError(f"not a question, a tab and a list of answers ({error})") from None
        return parse(record)

    if str(path).removesuffix(".gz").endswith(".csv"):
        return parse_lines(path, parse_line)
    return parse_each(path, _json_list(path), parse_object, ": record ")


def _json_list(path: str | Path) -> Iterator[Any]:
    """The elements of a JSON file that is one list."""
    decode = json.JSONDecoder().raw_decode
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            text = file.read(CHUNK).lstrip()
            if not text.startswith("["):
                raise DataError(f"{path} is not a JSON list: a list of objects with a question is needed")
            at = 1
            while True:
                at = BETWEEN.match(text, at).end()
                if text[at : at + 1] == "]":
                    return
                try:
                    element, at = decode(text, at)
                except ValueError as error:
                    chunk = file.read(CHUNK)
                    if not chunk or len(text) - at > MAX_RECORD:
                        raise DataError(f"{path} is not whole JSON ({error.msg}): fetch it again") from None
                    text, at = text[at:] + chunk, 0
                    continue
                yield element
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def write_json_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes an object a line, the file whole or not at all."""
    with written_whole(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def in_groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`; the last one may be shorter."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def first_of(names: Iterable[str]) -> str:
    """`(first: a, b, c)`, for messages."""
    return f"(first: {', '.join(list(names)[:MAX_NAMED])})"


def refuse_input(output: str | Path, settings: Any) -> None:
    """Raises SettingsError if an output is one of the files that the settings name as data."""
    for name in names_of(settings, "data"):
        path = getattr(settings, name)
        if path is not None and Path(output).resolve() == Path(path).resolve():
            raise SettingsError(f"{output} is the {name} itself: give another name to write to")


def input_digest(path: str | Path) -> str:
    """The digest of a file that a stage reads. Raises DataError if it cannot be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
