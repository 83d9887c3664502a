"""One split of a data set as the chain's commands read it: only queries that are judged, in files of one form.

OUTPUT/queries.jsonl   {"_id", "text"} of the split's queries, in the order of their file
OUTPUT/qrels.tsv       their judgements, BEIR's form (if there are any)
OUTPUT/answers.jsonl   {"query_id", "answers"} (if there are any)
OUTPUT/probe/          a small BEIR folder of some of the queries, for curves along a training
OUTPUT/manifest.json   written last: what it was made from, and counts (data_shards/artefact.py)
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from quincunx.data_shards.durable import written_whole
from quincunx.data_shards.errors import DataError
from quincunx.engine.retrieval.collection import Collection, read_queries
from quincunx.engine.retrieval.trec import Qrels, load_qrels, read_answers, read_dpr, write_qrels


def sample_ids(ids: Iterable[str], number: int | None, seed: int) -> list[str]:
    """`number` of the ids (None: all), in their order: those with the smallest hashes, so that a larger sample holds a
    smaller one."""
    ids = list(ids)
    if number is None or number >= len(ids):
        return ids
    chosen = set(sorted(ids, key=lambda id: xxhash.xxh3_64_intdigest(id.encode(), seed))[:number])
    return [id for id in ids if id in chosen]


def read_split(
    queries: str, qrels: str | None, answers: str | None, drop: bool
) -> tuple[Collection, Qrels | None, dict[str, list[str]] | None, dict[str, int]]:
    """(queries, judgements of known queries with positives, answers, counts of what was left out).

    qrels None: those of a DPR file's own positives, if it has them. answers None: a DPR file's own.
    drop: leave out judgements of unknown queries and queries without positives, instead of refusing the files.

    Raises:
        DataError: files that cannot be read, ids that do not fit, or queries without positives.
    """
    counts = {"unknown_queries": 0, "queries_without_positives": 0}
    judged: Qrels | None = None
    own_answers = None
    if qrels is None and queries.removesuffix(".gz").endswith(".json"):
        asked, own_answers, found = read_dpr(queries, drop)
        if found:
            judged, counts["queries_without_positives"] = found, len(asked) - len(found)
    else:
        asked = read_queries(queries)
        if qrels is not None:
            choice = "drop" if drop else "stop"
            judged, counts = load_qrels(qrels, asked, None, drop, choice, "leave them out with --unknown_ids drop")
        if answers is None and queries.removesuffix(".gz").endswith((".json", ".csv")):
            own_answers = read_answers(queries)
    return asked, judged, own_answers if answers is None else read_answers(answers), counts


def write_split(
    folder: Path,
    queries: Collection,
    qrels: Qrels | None,
    answers: dict[str, list[str]] | None,
    passages: Collection | None,
    *,
    sample: int | None,
    probe_queries: int,
    probe_passages: int,
    seed: int,
) -> dict[str, int]:
    """Writes the split into a folder and returns its counts.

    passages: the corpus, needed for a probe only. sample: how many of the judged queries are kept (None: all).
    probe_passages: passages of the probe, its queries' positives among them.
    """
    judged = qrels if qrels is not None else answers if answers is not None else dict.fromkeys(queries.ids())
    ids = sample_ids((id for id in queries.ids() if id in judged), sample, seed)
    if not ids:
        raise DataError(f"{queries.name} has none of the judged queries: give the files that belong together")
    _write_queries(folder / "queries.jsonl", queries, ids)
    counts = {"queries": len(ids)}
    if qrels is not None:
        kept = {id: qrels[id] for id in ids}
        counts["judgements"] = sum(map(len, kept.values()))
        write_qrels(folder / "qrels.tsv", kept)
    if answers is not None:
        counts["answers"] = sum(id in answers for id in ids)
        _write_lines(
            folder / "answers.jsonl", ({"query_id": id, "answers": answers[id]} for id in ids if id in answers)
        )
    if probe_queries:
        counts |= _write_probe(folder / "probe", queries, qrels, ids, passages, probe_queries, probe_passages, seed)
    return counts


def _write_probe(
    folder: Path,
    queries: Collection,
    qrels: Qrels | None,
    ids: list[str],
    passages: Collection | None,
    num_queries: int,
    num_passages: int,
    seed: int,
) -> dict[str, int]:
    if qrels is None or passages is None:
        raise DataError("a probe needs judgements and the passages: give --qrels and --corpus, or --probe_queries 0")
    asked = sample_ids(ids, num_queries, seed)
    judged = dict.fromkeys(
        id for query_id in asked for id, grade in qrels[query_id].items() if grade > 0 and id in passages
    )
    others = sample_ids((id for id in passages.ids() if id not in judged), max(0, num_passages - len(judged)), seed)
    docs = [*judged, *others]
    texts = passages.texts(passages.rows(docs))
    _write_lines(folder / "corpus.jsonl", ({"_id": id, "text": text} for id, text in zip(docs, texts)))
    _write_queries(folder / "queries.jsonl", queries, asked)
    write_qrels(folder / "qrels" / "dev.tsv", {id: qrels[id] for id in asked})
    return {"probe_queries": len(asked), "probe_passages": len(docs)}


def _write_queries(path: Path, queries: Collection, ids: list[str]) -> None:
    texts = queries.texts(queries.rows(ids))
    _write_lines(path, ({"_id": id, "text": text} for id, text in zip(ids, texts)))


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with written_whole(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
