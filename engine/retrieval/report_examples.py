"""Queries of a report that a person can read: what was asked, what is relevant, what each system put first."""

from collections.abc import Mapping
from pathlib import Path

from quincunx.engine.retrieval.collection import Collection
from quincunx.engine.retrieval.mining import stream_run
from quincunx.engine.retrieval.report_blocks import Example

NUM_EXAMPLES = 4
"""Queries won, and as many lost."""
DEPTH = 1000
CHARACTERS = 420


def best_and_worst(differences: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """(queries with the largest gains, those with the largest losses), the clearest first."""
    ordered = sorted(differences, key=lambda query_id: (differences[query_id], query_id))
    won = [query_id for query_id in reversed(ordered[-NUM_EXAMPLES:]) if differences[query_id] > 0]
    return won, [query_id for query_id in ordered[:NUM_EXAMPLES] if differences[query_id] < 0]


def rankings_of(run: str | Path, queries: set[str]) -> dict[str, list[str]]:
    """The rankings of some queries of a run, which is read line by line."""
    return {query_id: ids for query_id, ids in stream_run(run, DEPTH) if query_id in queries}


def example(
    query_id: str,
    queries: Collection,
    passages: Collection,
    grades: Mapping[str, int],
    rankings: Mapping[str, Mapping[str, list[str]]],
    relevant_from: int = 1,
) -> Example:
    """One query. grades: of its judged passages. rankings: system -> query -> passage ids, best first."""
    best = max(grades, key=lambda id: grades[id])
    relevant = text_of(best, passages) if best in passages else "(not in the corpus)"
    together: dict[tuple[str, str], list[str]] = {}  # systems that found the same are shown as one
    for system, runs in rankings.items():
        ids = runs.get(query_id, [])
        places = [place for place, id in enumerate(ids, 1) if grades.get(id, 0) >= relevant_from]
        if not ids:
            found = ("not found", "nothing was found")
        elif ids[0] == best and places:
            found = ("rank 1", "the relevant passage")
        else:
            found = (f"rank {places[0]}" if places else f"not in the top {len(ids)}", text_of(ids[0], passages))
        together.setdefault(found, []).append(system)
    firsts = [(", ".join(systems), place, text) for (place, text), systems in together.items()]
    return Example(queries.text_at(queries.row(query_id)), best, relevant, firsts)


def text_of(passage_id: str, passages: Collection) -> str:
    """A passage's text, cut at a word."""
    text = " ".join(passages.text_at(passages.row(passage_id)).split())
    return text if len(text) <= CHARACTERS else text[:CHARACTERS].rsplit(" ", 1)[0] + " …"
