"""One task of a build: reads its part of the corpus and writes its shards and counts.

A task depends on the plan and its number alone, so it gives the same bytes on any machine, alone or beside others. Its
result is a part of the artefact and is written last: a task without one is run again from its start.
"""

import json
import os
from collections import Counter
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from quincunx.data_shards.artefact import Work
from quincunx.data_shards.generations import Generations
from quincunx.data_shards.passages import Passage, split_documents
from quincunx.data_shards.readers import read_documents
from quincunx.data_shards.records import ReadReport
from quincunx.data_shards.shard_writer import Sample, ShardWriter, StatisticsCounter, shard_to_json, write_file
from quincunx.data_shards.shards import SPLITS, Text
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.data_shards.words import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
    def kept_splits(self) -> list[str]:
        """The splits whose texts the merge needs, for the probe or the pairs."""
        pairs = self.content.get("pairs", False)
        return ["train"] * pairs + ["heldout"] * bool(pairs or self.content["probe_queries"])

    @property
    def datatrove_folder(self) -> str:
        """Where datatrove keeps logs and marks."""
        return str(self.work.scratch("datatrove"))

    def task_file(self, task: int, kind: str) -> Path:
        return self.work.scratch("tasks") / f"{task:05d}-{kind}"


def run_task(plan: TaskPlan, task: int) -> None:
    """Runs task `task`; a finished one is left alone.

    Raises:
        DataError: a bad record.
        SettingsError: a tokenizer that cannot be loaded.
    """
    if plan.work.is_done(task):
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task is one core's work; tasks run beside each other
    content = plan.content
    tokenizer = load_tokenizer(str(plan.tokenizer_folder))
    report = ReadReport(content["on_bad_record"])
    counter = StatisticsCounter(len(tokenizer), content["num_buckets"])
    limits = {name: content[name] for name in ("block_samples", "shard_bytes")}
    writers = {split: ShardWriter(plan.shards_folder, split, task, counter, **limits) for split in SPLITS}
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    documents = read_documents(content["format"], plan.path, task, plan.num_tasks, report)
    split_up = split_documents(documents, tokenizer, content["max_tokens"], content["with_titles"], report)
    with closing(Generations(plan.generations)) if plan.generations.exists() else nullcontext() as generations:
        for document, passages in split_up:
            if not passages:
                continue
            split = "heldout" if is_held_out(document.doc_id, content["held_out_share"]) else "train"
            report.counts[f"{split}_documents"] += 1
            writers[split].add_document(make_samples(passages, tokenizer, generations, report.counts))
            if split in plan.kept_splits:
                rows[split] += [{"passage_id": p.passage_id, "text": p.text, "query": p.query} for p in passages]
    counts = +report.counts  # without zeros, which would change old sets' manifests
    for split, writer in writers.items():
        writer.close()
        counts["lost_neighbours"] += writer.num_lost_neighbours
        for name, tokens in writer.field_tokens.items():
            counts[f"{split}_{name}_tokens"] += tokens
    for split in plan.kept_splits:
        text = "".join(json.dumps(row) + "\n" for row in rows[split])
        write_file(plan.task_file(task, f"{split}.jsonl"), text.encode())
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
    passages: list[Passage], tokenizer: "PreTrainedTokenizerFast", generations: Generations | None, counts: Counter[str]
) -> list[Sample]:
    """A document's samples, with the generated texts of each passage by its id; counts `joined_generations`.

    A passage without generated queries keeps its natural query, if it has one.
    """
    samples = []
    for passage in passages:
        generated = generations.lookup(passage.passage_id) if generations else {}
        counts["joined_generations"] += bool(generated)
        given = ({"queries": [passage.query]} if passage.query else {}) | generated
        companions = {name: join_texts(texts, tokenizer) for name, texts in given.items()}
        samples.append(Sample(passage.passage_id, Text(passage.token_ids, passage.word_starts), **companions))
    return samples


def join_texts(texts: list[str], tokenizer: "PreTrainedTokenizerFast") -> Text | None:
    """The texts' tokens with [SEP] between them; None if there are no tokens."""
    separator = Text(np.array([tokenizer.sep_token_id], np.int32), np.array([True]))
    parts: list[Text] = []
    for tokens in tokenize(tokenizer, texts):
        if len(tokens.token_ids):
            parts += [separator] * bool(parts) + [Text(tokens.token_ids, tokens.word_starts)]
    return Text(*map(np.concatenate, zip(*parts))) if parts else None
