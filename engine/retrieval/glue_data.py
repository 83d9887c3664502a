"""GLUE's CoLA, MRPC, STS-B and QQP from local files: the download's own tsv layouts, or JSONL.

The tsv files know no quoting: a quotation mark is a character of its sentence. docs/glue.md shows a line of each.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quincunx.data_shards.artefact import file_digest
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.records import BadRecordError, check_text, load_json
from quincunx.engine.retrieval.files import read_lines

SPLITS = ("train", "dev", "test")
COLA_COLUMNS = ("source", "label", "note", "sentence")


@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks."""

    title: str
    sentences: tuple[str, ...]
    """Columns of its sentences, one or two."""
    label: str
    """Column of its label."""
    classes: tuple[str, ...]
    """Names of the labels 0 and 1; empty for a score from 0 to HIGHEST_SCORE."""
    rows: dict[str, int]
    """Rows of the published train and dev files that can be read."""
    header: tuple[str, ...] = ()
    """Columns of train and dev files, which have no header line where this is given."""

    @property
    def allowed(self) -> str:
        return "0 and 1" if self.classes else f"numbers from 0 to {HIGHEST_SCORE}"


HIGHEST_SCORE = 5
TASKS = {
    "cola": Task(
        "CoLA", ("sentence",), "label", ("unacceptable", "acceptable"), {"train": 8551, "dev": 1043}, COLA_COLUMNS
    ),
    "mrpc": Task(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        ("not_equivalent", "equivalent"),
        {"train": 3668, "dev": 408},
    ),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), {"train": 5749, "dev": 1500}),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        {"train": 363846, "dev": 40430},
    ),
}


@dataclass(frozen=True)
class GlueExamples:
    """The examples of one file, in its order."""

    path: Path
    firsts: list[str]
    seconds: list[str] | None
    """None where the task reads one sentence."""
    labels: np.ndarray | None
    """int64 [N] classes or float32 [N] scores; None in a test file."""
    num_broken: int
    """Rows left out, with another number of columns than the file's others."""
    digest: str
    """Of the file's content, 32 hex digits."""

    def __len__(self) -> int:
        return len(self.firsts)


def find_files(folder: str, given: dict[str, str | None]) -> dict[str, Path | None]:
    """The file of each split: as given, else SPLIT.tsv or SPLIT.jsonl of the folder; None where there is no test file.

    Raises:
        DataError: no file for train or dev, or one that was given and is not there.
    """
    found: dict[str, Path | None] = {}
    for split in SPLITS:
        candidates = [Path(folder) / f"{split}.tsv", Path(folder) / f"{split}.jsonl"] if folder else []
        if given.get(split):
            candidates = [Path(given[split])]
        found[split] = next((path for path in candidates if path.is_file()), None)
        if found[split] is None and (split != "test" or given.get(split)):
            looked_for = " nor ".join(map(str, candidates)) or "no file"
            raise DataError(f"there is no {split} file ({looked_for}): give --data a folder that has one, or --{split}")
    return found


def read_examples(name: str, path: str | Path, split: str, *, skip_broken: bool = False) -> GlueExamples:
    """Reads a train, dev or test file of the task `name` (a key of TASKS).

    skip_broken: rows of train and dev files with a wrong number of columns are left out and counted, not refused. The
        published QQP files have some, where a question holds a line break.

    Raises:
        DataError: no such file, a column that is missing, a row with a wrong number of columns, a label that is missing
            or not one of the task's, labels that are all alike, or no examples. Names file and line.
    """
    task, path = TASKS[name], Path(path)
    texts: list[list[str]] = []
    labels: list[float] = []
    num_broken = 0
    read = _jsonl_rows if path.name.removesuffix(".gz").endswith(".jsonl") else _tsv_rows
    for number, sentences, label in read(task, path, split):
        if sentences is None:
            if skip_broken and split != "test":
                num_broken += 1
                continue
            remedy = "mend or remove the line" if split == "test" else "mend the line, or pass --skip_broken_rows"
            raise DataError(f"{path}:{number}: {label}: {remedy}")
        texts.append(sentences)
        if split != "test":
            labels.append(_label(task, label, f"{path}:{number}"))
    if not texts:
        raise DataError(f"{path} holds no examples: give a {split} file of {task.title} with at least one")
    if split != "test" and len(set(labels)) == 1:
        raise DataError(
            f"all {len(labels)} labels of {path} are {labels[0]:g}, {task.title}'s are {task.allowed}: give a file "
            "with different ones"
        )
    columns = list(map(list, zip(*texts, strict=True)))
    return GlueExamples(
        path=path,
        firsts=columns[0],
        seconds=columns[1] if len(columns) == 2 else None,
        labels=None if split == "test" else np.array(labels, np.int64 if task.classes else np.float32),
        num_broken=num_broken,
        digest=file_digest(path),
    )


def unlike_published(name: str, split: str, examples: GlueExamples) -> str | None:
    """A sentence where a tsv file has another number of rows than GLUE's own; numbers then compare with nobody's."""
    published = TASKS[name].rows[split]
    if examples.path.suffix == ".jsonl" or len(examples) == published:
        return None
    return f"{examples.path} has {len(examples):,} examples, GLUE's {split} file of {TASKS[name].title} {published:,}"


def _tsv_rows(task: Task, path: Path, split: str) -> Iterator[tuple[int, list[str] | None, str]]:
    """(line number, sentences, label as written) of every row; without sentences, what is wrong with the row."""
    header: list[str] = [] if split == "test" else list(task.header)
    place = 0
    for number, line in enumerate(read_lines(path), 1):
        line = line.rstrip("\r\n")
        if not line:
            continue
        cells = line.split("\t")
        if not header:
            header = cells
            wanted = task.sentences if split == "test" else (*task.sentences, task.label)
            if missing := [column for column in wanted if column not in header]:
                hint = " (a test file has none)" if missing == [task.label] else ""
                raise DataError(
                    f"{path}:{number}: the header has no column {' nor '.join(missing)}{hint}: give a {split} file of "
                    f"{task.title}, tab-separated"
                )
            continue
        if len(cells) != len(header):
            columns = f"{len(cells)} column{'s' * (len(cells) != 1)}"
            yield number, None, f"{columns} where {task.title} has {len(header)} ({', '.join(header)})"
            continue
        row = dict(zip(header, cells, strict=True))
        index = row.get("index", row.get("id", str(place)))
        if split == "test" and index != str(place):
            raise DataError(
                f"{path}:{number}: the index is {index!r} where {place} comes next, and predictions are numbered "
                "from 0 in the file's order: give the test file as GLUE publishes it"
            )
        place += 1
        yield number, [row[column].strip() for column in task.sentences], row.get(task.label, "")


def _jsonl_rows(task: Task, path: Path, split: str) -> Iterator[tuple[int, list[str], Any]]:
    """(line number, sentences, label) of every line with sentence1, sentence2 (where the task has two) and label."""
    names = ["sentence1", "sentence2"][: len(task.sentences)]
    for number, line in enumerate(read_lines(path), 1):
        try:
            record = load_json(line)
            if record is None:
                continue
            if len(names) == 1 and record.get("sentence2"):
                raise BadRecordError(f"a sentence2, and {task.title} reads one sentence")
            sentences = [check_text(record.get(name), name) for name in names]
        except BadRecordError as error:
            raise DataError(f"{path}:{number}: {error}: mend or remove the line") from None
        yield number, sentences, record.get("label")


def _label(task: Task, given: Any, where: str) -> float:
    """A label as a number. Raises DataError where it is none, or not one of the task's."""
    try:
        if given is None or isinstance(given, bool):
            raise ValueError
        value = float(given)
        fits = value in (0, 1) if task.classes else math.isfinite(value) and 0 <= value <= HIGHEST_SCORE
        if not fits:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        shown = "missing" if given in (None, "") else repr(given)
        raise DataError(f"{where}: the label is {shown}, {task.title}'s are {task.allowed}: mend the line") from None
    return value
