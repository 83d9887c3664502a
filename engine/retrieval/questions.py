"""Questions of open-domain question answering in DPR's files: .json lists and .csv of question and answers."""

import ast
import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.records import BadRecordError, check_text
from quincunx.engine.retrieval.files import read_lines

CHUNK = 1 << 24
MAX_RECORD = 1 << 28
"""Characters of one question with its passages; DPR's have about 100,000."""


def read_questions(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(question, record) of each question of a DPR file: a .json list of objects, or a .csv of question, answers.

    The list is read object by object, so that a file of gigabytes costs the memory of one question.

    Raises:
        DataError: not such a file; file and line or record named.
    """
    path = Path(path)
    if path.name.removesuffix(".gz").endswith(".csv"):
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                yield _csv_question(line, f"{path}:{number}")
        return
    for number, record in enumerate(_json_list(path), 1):
        try:
            if not isinstance(record, dict):
                raise BadRecordError(f"a JSON {type(record).__name__}, an object is needed")
            yield check_text(record.get("question"), "question"), record
        except BadRecordError as error:
            raise DataError(f"{path}: record {number}: {error}; mend or remove the record") from None


def _csv_question(line: str, where: str) -> tuple[str, dict]:
    try:
        question, answers = next(csv.reader([line.rstrip("\r\n")], delimiter="\t"))
        return question.strip(), {"question": question, "answers": ast.literal_eval(answers)}
    except (ValueError, TypeError, SyntaxError, csv.Error) as error:
        raise DataError(
            f"{where}: not a question, a tab and a list of answers ({error}); mend or remove the line"
        ) from None


def _json_list(path: Path) -> Iterator[Any]:
    """The elements of a JSON file that is one list."""
    decode = json.JSONDecoder().raw_decode
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            text, at, opened, more = "", 0, False, True
            while True:
                while at < len(text) and (text[at].isspace() or text[at] == "," or (text[at] == "[" and not opened)):
                    opened = opened or text[at] == "["
                    at += 1
                if opened and text[at : at + 1] == "]":
                    return
                if not opened and at < len(text):
                    raise DataError(f"{path} is not a JSON list: a list of objects with a question is needed")
                try:
                    element, at = decode(text, at)
                except ValueError as error:
                    if not more or len(text) - at > MAX_RECORD:
                        raise DataError(f"{path} is not whole JSON ({error.msg}): fetch it again") from None
                    chunk = file.read(CHUNK)
                    text, at, more = text[at:] + chunk, 0, bool(chunk)
                    continue
                yield element
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
