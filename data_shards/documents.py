"""What every reader takes and gives: inputs, documents, and the report of what had to be left out."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import xxhash

MAX_EXAMPLES = 20


@dataclass(frozen=True)
class Document:
    """Text in reading order; two passages that follow each other in it are neighbours.

    doc_id       unique in the corpus
    title        of the whole document, or ""; it counts as text (see passages.py)
    paragraphs   in reading order, none of them blank
    passage_ids  () for running text, which is cut into passages that may span paragraphs; else one id per paragraph:
                 each paragraph is a passage of a ready-made collection and is never joined with its neighbour
    queries      () or one natural query per paragraph, "" where there is none (a docstring's summary line)
    """

    doc_id: str
    title: str
    paragraphs: tuple[str, ...]
    passage_ids: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()


@dataclass
class ReadReport:
    """What was read and what was left out, and why; passed to a reader, which fills it.

    counts    documents, records, bad_records, empty_passages, and what a format counts besides
    examples  the first bad records, each as "file:line: reason"
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add_bad_record(self, where: str, reason: str) -> None:
        self.counts["bad_records"] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{where}: {reason}")


@dataclass(frozen=True)
class Input:
    """A source of a corpus: one file, or all Python files of one package.

    name   relative to the corpus, the same on every machine
    bytes  of all its files, as they lie on disk (compressed where they are)
    """

    name: str
    files: tuple[Path, ...]
    bytes: int

    @cached_property
    def digest(self) -> str:
        """xxh3_128 (32 hex digits) of the files' content in order; reads them all, once."""
        digest = xxhash.xxh3_128()
        for file in self.files:
            with open(file, "rb") as content:
                while chunk := content.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()
