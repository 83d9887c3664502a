"""Teacher scores: a reranker reads every (query, candidate) pair of a candidates file or of a run.

The pairs are cut into parts of a fixed number, shared over the ranks through files (data_shards/artefact.py): killed
work goes on with the parts that are missing, on any number of ranks, and gives the same scores. Rank 0 writes the
whole: the candidates with their scores, or the run in the reranker's order.

Letters: N pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quincunx.data_shards.artefact import artefact
from quincunx.data_shards.errors import DataError
from quincunx.engine.ranks import Environment
from quincunx.engine.retrieval.candidates import iterate_candidates, write_candidates
from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.files import in_groups
from quincunx.engine.retrieval.progress import progress_bar
from quincunx.engine.retrieval.trec import RUN, stream_run, write_run

if TYPE_CHECKING:
    from quincunx.engine.retrieval.cross_encoder import Reranker

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
            yield from ((row.query_id, list(row.ids)) for row in iterate_candidates(self.path))

    def write(self, output: Path, scores: np.ndarray) -> dict[str, int]:
        """Writes the candidates with their scores, or the run in the order of the scores; returns counts."""
        scores_left = iter(scores)

        def own(ids: Any) -> np.ndarray:
            return np.fromiter(scores_left, scores.dtype, len(ids))

        if self.kind == RUN:
            return write_run(output, ((query, ids, own(ids)) for query, ids in self.rows()), "reranked")
        rows = iterate_candidates(self.path)
        return write_candidates(output, (replace(row, scores=dict(zip(row.ids, own(row.ids)))) for row in rows))


def find_pairs(source: Source, queries: Collection, passages: Collection) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of the source: int32 [N] rows of `queries`, int32 [N] rows of `passages`.

    Raises DataError if it is empty, or names ids that the collections do not have.
    """
    query_parts, passage_parts = [], []
    for group in in_groups(source.rows(), QUERIES_A_LOOK):
        query_rows = queries.known_rows([query for query, _ in group], "queries", source.path)
        query_parts.append(np.repeat(query_rows, [len(ids) for _, ids in group]).astype(np.int32))
        passage_ids = [id for _, ids in group for id in ids]
        passage_parts.append(passages.known_rows(passage_ids, "passages", source.path).astype(np.int32))
    if not query_parts:
        raise DataError(f"{source.path} holds no {source.kind} to score: give a file with at least one query")
    return np.concatenate(query_parts), np.concatenate(passage_parts)


def score_source(
    source: Source,
    output: Path,
    reranker: "Reranker",
    queries: Collection,
    passages: Collection,
    made_from: dict[str, Any],
    environment: Environment,
    *,
    pairs_a_part: int,
    remake: bool = False,
    **scoring: Any,
) -> dict[str, int] | None:
    """Scores a source and, on rank 0, writes `output`; every rank calls this.

    made_from: JSON of all that decides the scores (digests, settings). scoring: device, precision and batch_tokens of
    score_pairs. Returns {"pairs": N, "cut": pairs of this call beyond max_tokens} on rank 0, None on the others and
    if all was done before. Raises DataError for unknown ids and for scores that are not finite, and as artefact.
    """
    from quincunx.engine.retrieval.cross_encoder import score_pairs

    made_from = {**made_from, "pairs_a_part": pairs_a_part}
    place = {"rank": environment.rank, "world_size": environment.world_size}
    with artefact(output, source.kind, made_from, single=True, remake=remake, **place) as work:
        if work is None:
            return None
        (query_rows, passage_rows), num_cut = find_pairs(source, queries, passages), 0
        parts = [slice(start, start + pairs_a_part) for start in range(0, len(query_rows), pairs_a_part)]
        own = {number: len(query_rows[parts[number]]) for number in range(work.rank, len(parts), work.world_size)}
        done = sum(size for number, size in own.items() if work.is_done(number))
        with progress_bar("score", "pair", total=sum(own.values()), initial=done, show=work.leads) as bar:
            for number in work.missing(len(parts)):
                asked, found = query_rows[parts[number]], passage_rows[parts[number]]
                texts = queries.texts(asked), passages.texts(found)
                scores, cut = score_pairs(reranker, *texts, progress=bar.update, **scoring)
                for bad in np.flatnonzero(~np.isfinite(scores))[:1]:
                    raise DataError(
                        f"the reranker gives {scores[bad]} for query {queries.id_at(asked[bad])} and passage "
                        f"{passages.id_at(found[bad])}: give --precision float32, or another model"
                    )
                num_cut += cut
                with work.part(number, ".npy", published=False) as file:
                    np.save(file, scores, allow_pickle=False)
        if not work.leads:
            return None
        scores = np.concatenate([np.load(file, allow_pickle=False) for file in work.wait()])
        work.details = source.write(work.made(), scores)
        return {"pairs": len(scores), "cut": num_cut}
