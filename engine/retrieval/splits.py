"""One split of a data set as the chain's commands read it: only queries that are judged, in files of one form.

OUTPUT/queries.jsonl   {"_id", "text"} of the split's queries, in the order of their file
OUTPUT/qrels.tsv       their judgements, BEIR's form (if there are any)
OUTPUT/answers.jsonl   {"query_id", "answers"} (if there are any)
OUTPUT/probe/          a small BEIR folder of some of the queries, for curves along a training
OUTPUT/manifest.json   written last: what it was made from, and counts (data_shards/artefact.py)
"""

from collections.abc import Iterable
from pathlib import Path

import xxhash

from quincunx.data_shards.errors import DataError
from quincunx.engine.retrieval.collection import Collection, read_queries
from quincunx.engine.retrieval.files import write_json_lines
from quincunx.engine.retrieval.trec import Qrels, check_qrels, read_answers, read_dpr, read_qrels, write_qrels


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
    is_dpr = queries.removesuffix(".gz").endswith((".json", ".csv"))
    judged, own_answers, counts = None, None, {}
    if is_dpr and None in (qrels, answers):
        asked, own_answers, judged = read_dpr(queries)
    else:
        asked = read_queries(queries)
    if qrels is not None:
        judged = read_qrels(qrels)
    if judged is not None:
        choice, hint = "drop" if drop else "stop", "leave them out with --unknown_ids drop"
        judged, counts = check_qrels(judged, qrels or queries, asked, None, drop, choice, hint)
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
    counts = {"queries": len(ids)}
    _write_texts(folder / "queries.jsonl", queries, ids)
    if qrels is not None:
        kept = {id: qrels[id] for id in ids}
        counts["judgements"] = sum(map(len, kept.values()))
        write_qrels(folder / "qrels.tsv", kept)
    if answers is not None:
        counts["answers"] = sum(id in answers for id in ids)
        lines = ({"query_id": id, "answers": answers[id]} for id in ids if id in answers)
        write_json_lines(folder / "answers.jsonl", lines)
    if probe_queries:
        if qrels is None or passages is None:
            raise DataError(
                "a probe needs judgements and the passages: give --qrels and --corpus, or --probe_queries 0"
            )
        asked = sample_ids(ids, probe_queries, seed)
        positives = dict.fromkeys(
            id for query_id in asked for id, grade in qrels[query_id].items() if grade > 0 and id in passages
        )
        others = (id for id in passages.ids() if id not in positives)
        docs = [*positives, *sample_ids(others, max(0, probe_passages - len(positives)), seed)]
        _write_texts(folder / "probe" / "corpus.jsonl", passages, docs)
        _write_texts(folder / "probe" / "queries.jsonl", queries, asked)
        write_qrels(folder / "probe" / "qrels" / "dev.tsv", {id: qrels[id] for id in asked})
        counts |= {"probe_queries": len(asked), "probe_passages": len(docs)}
    return counts


def _write_texts(path: Path, collection: Collection, ids: list[str]) -> None:
    texts = collection.texts(collection.rows(ids))
    write_json_lines(path, ({"_id": id, "text": text} for id, text in zip(ids, texts)))
