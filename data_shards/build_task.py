"""One task of a build: reads its part of the corpus and writes its shards, counts and passage-id hashes.

A task depends on the plan and its number alone, so it gives the same bytes on any machine, alone or beside others. Its
result is a part of the artefact and is written last: a task without one is run again from its start.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from quincunx.data_shards.artefact import Work
from quincunx.data_shards.durable import full_disk_is_named
from quincunx.data_shards.generations import Generations
from quincunx.data_shards.passages import Passage, read_passages
from quincunx.data_shards.records import Document, ReadReport
from quincunx.data_shards.shard_writer import Sample, StatisticsCounter, open_writers, shard_to_json, write_file
from quincunx.data_shards.shards import SPLITS, Text
from quincunx.data_shards.tasks import GENERATED
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.data_shards.words import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class TaskPlan:
    """What every task of a build needs.

    path     the corpus
    work     the shard set in the making: shards go to its folder, the rest to its scratch folder
    content  the settings that decide the shards' bytes (build.py), which the manifest will carry
    """

    path: str
    work: Work
    content: dict[str, Any]

    @property
    def num_tasks(self) -> int:
        return self.content["tasks"]

    @property
    def shards_folder(self) -> Path:
        return self.work.folder / "made"

    @property
    def tokenizer_folder(self) -> Path:
        return self.work.scratch("tokenizer")

    @property
    def generations(self) -> Path:
        """The index of generated texts; it is there if any were given."""
        return self.work.scratch("generations.sqlite")

    @property
    def datatrove_folder(self) -> str:
        """Where datatrove keeps logs and marks."""
        return str(self.work.scratch("datatrove"))

    def task_file(self, task: int, kind: str) -> Path:
        return self.work.scratch("tasks") / f"{task:05d}-{kind}"


def run_task(plan: TaskPlan, task: int) -> None:
    """Runs task `task`; a finished one is left alone.

    Raises:
        DataError: a bad record, a full disk.
        SettingsError: a tokenizer that cannot be loaded.
    """
    if plan.work.is_done(task):
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task is one core's work; tasks run beside each other
    content = plan.content
    tokenizer = load_tokenizer(str(plan.tokenizer_folder))
    report = ReadReport()
    counter = StatisticsCounter(len(tokenizer), content["num_buckets"])
    writers = open_writers(
        plan.shards_folder, task, counter, block_samples=content["block_samples"], shard_bytes=content["shard_bytes"]
    )
    documents = read_passages(
        content["format"],
        plan.path,
        tokenizer,
        content["max_tokens"],
        task,
        plan.num_tasks,
        content["on_bad_record"],
        content["with_titles"],
        report,
    )
    hashes: list[int] = []
    counts: Counter[str] = Counter()
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    pairs = content.get("pairs", False)
    kept = {"train": pairs, "heldout": pairs or content["probe_queries"]}
    generated = closing(Generations(plan.generations)) if plan.generations.exists() else nullcontext()
    with full_disk_is_named(plan.work.path.parent), generated as generations:
        for document, passages, samples in make_samples(documents, tokenizer, generations, counts):
            if not samples:
                continue
            split = "heldout" if is_held_out(document.doc_id, content["held_out_share"]) else "train"
            writers[split].add_document(samples)
            counts[f"{split}_documents"] += 1
            hashes += [id_hash(sample.passage_id) for sample in samples]
            if kept[split]:
                texts[split] += [
                    json.dumps({"passage_id": p.passage_id, "text": p.text, "query": p.query}) for p in passages
                ]
        counts += report.counts
        for split, writer in writers.items():
            writer.close()
            counts["lost_neighbours"] += writer.num_lost_neighbours
            for name, tokens in writer.field_tokens.items():
                counts[f"{split}_{name}_tokens"] += tokens
            write_file(plan.task_file(task, f"{split}.jsonl"), "".join(line + "\n" for line in texts[split]).encode())
        write_file(plan.task_file(task, "hashes.bin"), np.array(hashes, "<u8").tobytes())
        write_file(plan.task_file(task, "statistics.npz"), counter.to_bytes())
        result = {
            "shards": [shard_to_json(shard) for split in SPLITS for shard in writers[split].shards],
            "fields": {split: writers[split].field_counts for split in SPLITS},
            "counts": dict(counts),
            "examples": report.examples,
        }
        with plan.work.part(task, ".result.json", published=False, mode="w") as file:
            json.dump(result, file)


def is_held_out(doc_id: str, share: float) -> bool:
    """Whether a document belongs to the heldout split: its id's xxh3_64 is below `share` of 2**64.

    A document stays where it is when the corpus grows, and every corpus of one run splits alike.
    """
    return id_hash(doc_id) < share * 2.0**64


def id_hash(identifier: str) -> int:
    """xxh3_64 of an id."""
    return xxhash.xxh3_64_intdigest(identifier.encode())


def make_samples(
    documents: Iterable[tuple[Document, list[Passage]]],
    tokenizer: "PreTrainedTokenizerFast",
    generations: Generations | None,
    counts: Counter[str],
) -> Iterator[tuple[Document, list[Passage], list[Sample]]]:
    """Each document with its passages and their samples; generated texts are joined by passage id and tokenised.

    A passage without generated queries keeps its natural query, if it has one. Counts `joined_generations`.
    """
    documents = iter(documents)
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        found = []
        for passage in chain.from_iterable(passages for _, passages in batch):
            generated = generations.lookup(passage.passage_id) if generations else {}
            counts["joined_generations"] += bool(generated)
            found.append(({"queries": [passage.query]} if passage.query else {}) | generated)
        texts = {
            name: iter(_tokenize_lists(tokenizer, [of_passage.get(name, []) for of_passage in found]))
            for name in GENERATED
        }
        for document, passages in batch:
            samples = [
                Sample(
                    passage.passage_id,
                    Text(passage.token_ids, passage.word_starts),
                    **{name: next(column) for name, column in texts.items()},
                )
                for passage in passages
            ]
            yield document, passages, samples


def _tokenize_lists(tokenizer: "PreTrainedTokenizerFast", lists: list[list[str]]) -> list[Text | None]:
    """One text for each list: its items' tokens with [SEP] between them; None if there are no tokens."""
    flat = list(chain.from_iterable(lists))
    tokenized = iter(tokenize(tokenizer, flat)) if flat else iter(())
    separator = Text(np.array([tokenizer.sep_token_id], np.int32), np.array([True]))
    texts: list[Text | None] = []
    for items in lists:
        parts: list[Text] = []
        for tokens in islice(tokenized, len(items)):
            if len(tokens.token_ids):
                parts += [separator] * bool(parts) + [Text(tokens.token_ids, tokens.word_starts)]
        texts.append(Text(*map(np.concatenate, zip(*parts))) if parts else None)
    return texts
