"""Teacher scores: a reranker reads every (query, candidate) pair of a candidates file or of a run.

The pairs are cut into parts of a fixed number, shared over the ranks through files (data_shards/artefact.py): killed
work goes on with the parts that are missing, on any number of ranks, and gives the same scores. Rank 0 writes the
whole: the candidates with their scores, or the run in the reranker's order.

Letters: N pairs.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quincunx.data_shards.artefact import artefact
from quincunx.data_shards.errors import DataError
from quincunx.engine.ranks import Environment
from quincunx.engine.retrieval.candidates import KIND as CANDIDATES
from quincunx.engine.retrieval.candidates import Candidates, iterate_candidates, write_candidates
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.judgements import write_run
from quincunx.engine.retrieval.mining import Unfit, stream_run
from quincunx.engine.retrieval.progress import progress_bar

if TYPE_CHECKING:
    from quincunx.engine.retrieval.cross_encoder import Reranker

RUN = "run"
QUERIES_A_LOOK = 1024


@dataclass(frozen=True)
class Source:
    """What is scored: a candidates file, or the `depth` best passages of every query of a run."""

    path: str
    kind: str
    """CANDIDATES or RUN."""
    depth: int | None = None

    def rows(self) -> Iterator[tuple[str, list[str]]]:
        """(query id, passage ids) in the file's order; of candidates the positives first."""
        if self.kind == RUN:
            yield from stream_run(self.path, self.depth)
        else:
            for row in iterate_candidates(self.path):
                yield row.query_id, [*row.positives, *row.negatives]


@dataclass(frozen=True)
class Pairs:
    """N pairs as rows of their collections."""

    queries: np.ndarray
    """int32 [N]"""
    passages: np.ndarray
    """int32 [N]"""


def find_pairs(source: Source, queries: Collection, passages: Collection) -> Pairs:
    """All pairs of the source.

    Raises DataError where it is empty, or names ids that the collections do not have (with counts and the first three).
    """
    unknown = {"queries": Unfit(), "passages": Unfit()}
    query_parts, passage_parts = [], []
    for group in _groups(source.rows(), QUERIES_A_LOOK):
        query_rows = queries.rows([query_id for query_id, _ in group])
        passage_ids = [id for _, ids in group for id in ids]
        passage_rows = passages.rows(passage_ids)
        unknown["queries"].add(*(id for (id, _), row in zip(group, query_rows, strict=True) if row < 0))
        unknown["passages"].add(*(id for id, row in zip(passage_ids, passage_rows, strict=True) if row < 0))
        query_parts.append(np.repeat(query_rows, [len(ids) for _, ids in group]).astype(np.int32))
        passage_parts.append(passage_rows.astype(np.int32))
    if not query_parts:
        raise DataError(f"{source.path} holds no {source.kind} to score: give a file with at least one query")
    for what, collection in (("queries", queries), ("passages", passages)):
        if unknown[what].count:
            raise DataError(
                f"{source.path} names {unknown[what].count} {what} that {collection.name} does not have "
                f"{unknown[what]}: give the files that belong together"
            )
    return Pairs(np.concatenate(query_parts), np.concatenate(passage_parts))


def _groups(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def score_source(
    source: Source,
    output: Path,
    reranker: "Reranker",
    queries: Collection,
    passages: Collection,
    made_from: dict[str, Any],
    environment: Environment,
    *,
    device: str,
    precision: str,
    batch_tokens: int,
    pairs_a_part: int,
    patience_seconds: float = 3600.0,
    remake: bool = False,
) -> dict[str, int] | None:
    """Scores a source and, on rank 0, writes `output`; every rank calls this.

    made_from: JSON of all that decides the scores (digests, settings). Returns {"pairs": N, "cut": pairs of this call
    beyond max_tokens} on rank 0, None on the others and if all was done before. Raises DataError for unknown ids and
    for scores that are not finite, and as artefact.
    """
    made_from = {**made_from, "pairs_a_part": pairs_a_part}
    place = {"rank": environment.rank, "world_size": environment.world_size}
    with artefact(output, source.kind, made_from, single=True, remake=remake, **place) as work:
        if work is None:
            return None
        pairs, num_cut = find_pairs(source, queries, passages), 0
        parts = [
            slice(start, min(start + pairs_a_part, len(pairs.queries)))
            for start in range(0, len(pairs.queries), pairs_a_part)
        ]
        own = {n: part.stop - part.start for n, part in enumerate(parts) if n % work.world_size == work.rank}
        done = sum(size for number, size in own.items() if work.is_done(number))
        with progress_bar(sum(own.values()), "score", "pair", initial=done, show=work.leads) as bar:
            for number in work.missing(len(parts)):
                scores, cut = score_rows(
                    reranker, pairs, parts[number], queries, passages, device, precision, batch_tokens, bar.update
                )
                num_cut += cut
                with work.part(number, ".npy", published=False) as file:
                    np.save(file, scores, allow_pickle=False)
        if not work.leads:
            return None
        scores = np.concatenate([np.load(file, allow_pickle=False) for file in work.wait(patience_seconds)])
        write = write_scored_candidates if source.kind == CANDIDATES else write_scored_run
        work.details = write(source, work.made(), scores)
        return {"pairs": len(scores), "cut": num_cut}


def score_rows(
    reranker: "Reranker",
    pairs: Pairs,
    own: slice,
    queries: Collection,
    passages: Collection,
    device: str,
    precision: str,
    batch_tokens: int,
    progress: Callable[[int], Any],
) -> tuple[np.ndarray, int]:
    """(float32 [pairs of `own`], pairs cut): the scores of one part."""
    from quincunx.engine.retrieval.cross_encoder import score_tokenised, tokenise_pairs

    query_texts, passage_texts = queries.texts(pairs.queries[own]), passages.texts(pairs.passages[own])
    ids, types, num_cut = tokenise_pairs(reranker.tokenizer, query_texts, passage_texts, reranker.max_tokens)
    scores = score_tokenised(reranker.model, ids, types, device, batch_tokens, progress, precision)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        first = own.start + bad[0]
        raise DataError(
            f"the reranker gives {scores[bad[0]]} for query {queries.id_at(pairs.queries[first])} and passage "
            f"{passages.id_at(pairs.passages[first])}: give --precision float32, or another model"
        )
    return scores, num_cut


def write_scored_candidates(source: Source, output: Path, scores: np.ndarray) -> dict[str, int]:
    """The candidates of the source, the same ids in the same order, each with its score."""

    def rows() -> Iterator[Candidates]:
        position = 0
        for row in iterate_candidates(source.path):
            ids = [*row.positives, *row.negatives]
            own = scores[position : position + len(ids)].tolist()
            position += len(ids)
            yield Candidates(row.query_id, row.positives, row.negatives, dict(zip(ids, own, strict=True)))

    return write_candidates(output, rows())


def write_scored_run(source: Source, output: Path, scores: np.ndarray) -> dict[str, int]:
    """The run of the source in the order of the scores."""
    counts = {"queries": 0, "results": len(scores)}

    def rows() -> Iterator[tuple[str, list[str], np.ndarray]]:
        position = 0
        for query_id, ids in source.rows():
            counts["queries"] += 1
            yield query_id, ids, scores[position : position + len(ids)]
            position += len(ids)

    write_run(output, rows(), "reranked")
    return counts
