"""The end of a build: the tasks' results become one shard set.

Passage ids are checked over the whole corpus, statistics are added up, and everything is written that lies beside the
shards. Every step can be repeated after a kill.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from quincunx.data_shards.build_task import TaskPlan, id_hash
from quincunx.data_shards.durable import written_whole
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.generations import Generations
from quincunx.data_shards.shard_writer import StatisticsCounter, finish_shard_set, write_file
from quincunx.data_shards.shards import SPLITS, FileEntry, Manifest, ShardEntry, Statistics
from quincunx.data_shards.tokenizer import load_tokenizer


def merge_tasks(plan: TaskPlan, sources: tuple[FileEntry, ...], record: dict[str, Any]) -> Manifest:
    """Makes a shard set of the finished tasks' shards; `record` becomes build.json.

    Raises:
        DataError: a corpus without passages or without training passages, duplicate passage ids, no natural queries
            for a probe or pairs that were asked for.
    """
    tokenizer = load_tokenizer(str(plan.tokenizer_folder))
    counter = StatisticsCounter(len(tokenizer), plan.content["num_buckets"])
    counts: Counter[str] = Counter()
    fields: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    entries: list[ShardEntry] = []
    examples: list[str] = []
    for task in range(plan.num_tasks):
        result = json.loads(plan.work.part_file(task).read_text())
        counts.update(result["counts"])
        for split in SPLITS:
            fields[split].update(result["fields"][split])
        entries += map(ShardEntry.from_json, result["shards"])
        examples += result["examples"]
        counter.add_statistics(Statistics.from_bytes(plan.task_file(task, "statistics.npz").read_bytes()))
    if plan.generations.exists():
        with closing(Generations(plan.generations)) as generations:
            counts["unknown_generations"] = generations.count()["passages"] - counts["joined_generations"]
    shards = [shard for split in SPLITS for shard in entries if shard.split == split]
    if not shards:
        raise DataError(
            f"the corpus {plan.path} holds no passage ({counts['bad_records']} bad records, {counts['empty_passages']} "
            "empty passages): check the path and the format"
        )
    check_duplicates(plan, shards)
    record = record | {"bad_record_examples": examples}
    if plan.content["probe_queries"]:
        write_probe(plan, plan.shards_folder / "probe")
    if plan.content.get("pairs"):
        record["pairs"] = write_pairs(plan, plan.shards_folder / "pairs")
    write_file(plan.shards_folder / "build.json", (json.dumps(record, indent=1) + "\n").encode())
    return finish_shard_set(
        plan.shards_folder,
        tokenizer,
        counter,
        shards=shards,
        fields={split: dict(fields[split]) for split in SPLITS},
        max_tokens=plan.content["max_tokens"],
        settings=plan.content,
        counts=dict(sorted(counts.items())),
        sources=sources,
    )


def check_duplicates(plan: TaskPlan, shards: list[ShardEntry]) -> None:
    """Raises DataError naming passage ids that occur more than once in the corpus.

    Takes 8 bytes a passage: 64-bit hashes are sorted, and ids compared only if two hashes agree.
    """
    hashes = np.fromiter(map(id_hash, read_passage_ids(plan, shards)), np.uint64)
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return
    found = Counter(passage_id for passage_id in read_passage_ids(plan, shards) if id_hash(passage_id) in suspects)
    duplicates = {passage_id: count for passage_id, count in found.items() if count > 1}
    if duplicates:
        listed = ", ".join(f"{passage_id!r} ({count} times)" for passage_id, count in islice(duplicates.items(), 5))
        raise DataError(
            f"{len(duplicates)} passage ids of {plan.path} occur more than once: {listed}; give every passage its "
            "own id and build again with --remake"
        )


def read_passage_ids(plan: TaskPlan, shards: list[ShardEntry]) -> Iterator[str]:
    """Every passage id of the shards."""
    for shard in shards:
        with open(plan.shards_folder / shard.name, "rb") as file:
            for block in shard.blocks:
                file.seek(block.ids_offset)
                yield from file.read(block.ids_size).decode().split("\n")


def write_probe(plan: TaskPlan, folder: Path) -> None:
    """Writes held-out passages with natural queries as a BEIR folder: the retrieval probe's queries, corpus and qrels.

    All held-out passages are the corpus; at most `probe_queries` of those with a query, those of the smallest id
    hashes, are asked for.
    """
    limit = plan.content["probe_queries"]
    passages = list(read_texts(plan, "heldout"))
    asked = sorted((p for p in passages if p["query"]), key=lambda passage: id_hash(passage["passage_id"]))
    if not asked:
        raise DataError(
            f"probe_queries is {limit}, but no held-out passage of {plan.path} has a natural query: give 0, a format "
            "with queries (python_docs), or a larger held_out_share"
        )
    write_beir(folder, passages, [[passage] for passage in asked[:limit]], "test")


def write_pairs(plan: TaskPlan, folder: Path) -> dict[str, int]:
    """Writes the training split's passages and their natural queries as a BEIR folder to fine-tune on, qrels/train.tsv.

    Passages that share a query's text share the query. A query that some held-out passage has too is left out, so that
    the probe asks for nothing that was trained on. Returns the counts.
    """
    held_out = {folded(passage["query"]) for passage in read_texts(plan, "heldout")}
    asked: dict[str, list[dict[str, str]]] = {}
    for passage in read_texts(plan, "train"):
        if passage["query"]:
            asked.setdefault(folded(passage["query"]), []).append(passage)
    groups = [group for text, group in asked.items() if text not in held_out]
    if not groups:
        raise DataError(
            f"pairs is set, but no training passage of {plan.path} has a natural query: leave --pairs out, or "
            "give a format with queries (python_docs)"
        )
    write_beir(folder, read_texts(plan, "train"), groups, "train")
    return {"queries": len(groups), "judgements": sum(map(len, groups)), "left_out": len(asked) - len(groups)}


def folded(query: str) -> str:
    """The query as far as it counts when two are compared: case and white space do not."""
    return " ".join(query.lower().split())


def read_texts(plan: TaskPlan, split: str) -> Iterator[dict[str, str]]:
    """{"passage_id", "text", "query"} of every passage that the tasks kept of a split, in order."""
    for task in range(plan.num_tasks):
        with open(plan.task_file(task, f"{split}.jsonl")) as lines:
            yield from map(json.loads, lines)


def write_beir(
    folder: Path, passages: Iterable[dict[str, str]], groups: list[list[dict[str, str]]], split: str
) -> None:
    """Writes a BEIR folder; a group's passages are all judged, with grade 1, to answer the query of its first."""
    asked = [(f"q-{group[0]['passage_id']}", group) for group in groups]
    judged = (f"{query}\t{passage['passage_id']}\t1" for query, group in asked for passage in group)
    files: dict[str, Iterable[str]] = {
        "corpus.jsonl": (json.dumps({"_id": p["passage_id"], "title": "", "text": p["text"]}) for p in passages),
        "queries.jsonl": (json.dumps({"_id": query, "text": group[0]["query"]}) for query, group in asked),
        f"qrels/{split}.tsv": chain(["query-id\tcorpus-id\tscore"], judged),
    }
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
    for name, lines in files.items():
        with written_whole(folder / name) as file:
            file.writelines(f"{line}\n" for line in lines)
