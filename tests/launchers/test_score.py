"""score.py as a user runs it: one process and several, killed and rerun; one sentence for what cannot be scored."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quincunx.engine.retrieval.candidates import Candidates, iterate_candidates, write_candidates
from quincunx.engine.retrieval.collection import read_passages, read_queries
from quincunx.engine.retrieval.cross_encoder import load_reranker, save_reranker, score_pairs
from quincunx.engine.retrieval.trec import read_run
from quincunx.launchers.score import main

ROOT = Path(__file__).parents[2]
WORDS = [stem + ending for stem in ("amber", "birch", "cedar", "dune", "elder", "fern") for ending in ("", "s", "y")]
NUM_PAIRS = 600


@pytest.fixture(scope="module")
def data(tmp_path_factory, save_tiny_bert):
    """A tiny random reranker, its encoder without head, one that gives NaN, and a corpus with 600 pairs to score."""
    folder = tmp_path_factory.mktemp("score")
    save_tiny_bert(folder / "encoder", [" ".join(WORDS)] * 3, 120, initializer_range=0.5)
    reranker = load_reranker(str(folder / "encoder"), max_tokens=32)
    save_reranker(folder / "reranker", reranker, card="")
    torch.nn.init.constant_(reranker.model.model.classifier.bias, torch.nan)
    save_reranker(folder / "broken", reranker, card="")
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(3, 30))) for _ in range(200)]
    rows = [{"_id": f"p{n}", "text": text} for n, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.tsv").write_text("".join(f"q{n}\t{' '.join(draw.choice(WORDS, 3))}\n" for n in range(30)))
    candidates = [
        Candidates(f"q{n}", (ids[0],), tuple(ids[1:]))
        for n in range(30)
        for ids in [[f"p{p}" for p in draw.choice(200, NUM_PAIRS // 30, replace=False)]]
    ]
    write_candidates(folder / "candidates.jsonl", candidates)
    return folder


def command(data, output, *flags, model="reranker", source="candidates.jsonl"):
    kind = "--run" if source.endswith(".trec") else "--candidates"
    words = [
        sys.executable, "launchers/score.py", "--model", data / model, kind, data / source, "--corpus",
        data / "corpus.jsonl", "--queries", data / "queries.tsv", "--output", output, "--device=cpu",
        "--pairs_a_part=50", *flags,
    ]  # fmt: skip
    return list(map(str, words))


def run(words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def scored(data):
    """The candidates scored by one process without interruption, a pair a batch."""
    done = run(command(data, data / "scored.jsonl", "--batch_tokens=1"))
    assert done.returncode == 0, done.stderr
    assert f"{NUM_PAIRS} pairs scored" in done.stdout and "were cut" in done.stdout
    return (data / "scored.jsonl").read_bytes()


def score_by_hand(data, query_ids, passage_ids):
    queries, passages = read_queries(data / "queries.tsv"), read_passages(data / "corpus.jsonl")
    texts = queries.texts(queries.rows(query_ids)), passages.texts(passages.rows(passage_ids))
    return score_pairs(load_reranker(str(data / "reranker")), *texts)[0]


def test_every_candidate_gets_the_rerankers_score_and_a_second_call_changes_nothing(data, scored, launched):
    """Tolerance: float32 with other pairs in the batch."""
    rows, asked = list(iterate_candidates(data / "scored.jsonl")), list(iterate_candidates(data / "candidates.jsonl"))
    assert [replace(row, scores=None) for row in rows] == asked
    found = [(row.query_id, id, row.scores[id]) for row in rows for id in row.ids]
    query_ids, passage_ids, scores = zip(*found, strict=True)
    assert len(scores) == NUM_PAIRS and np.std(scores) > 0.01
    np.testing.assert_allclose(scores, score_by_hand(data, query_ids, passage_ids), rtol=0, atol=5e-5)
    written = (data / "scored.jsonl").stat().st_mtime_ns
    assert "nothing to do" in launched(main, *command(data, data / "scored.jsonl")[2:])
    assert (data / "scored.jsonl").stat().st_mtime_ns == written


def test_killed_scoring_goes_on_at_another_number_of_ranks_to_the_bytes_of_one_process(
    data, scored, tmp_path, refused, harness
):
    """Two ranks are killed -9 after their first parts; one process does the rest."""
    output, parts = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.work" / "scratch"
    words = command(data, output, "--batch_tokens=1")
    spawn = [sys.executable, str(ROOT / "tests/launchers/spawn_ranks.py"), "2", *words]
    with harness.started(spawn, tmp_path / "log"):
        harness.wait_until(lambda: len(list(parts.glob("part-*.json"))) >= 3, 120, "three parts")
    left = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.json")}
    assert 3 <= len(left) < NUM_PAIRS / 50 and not output.exists()

    # An unfinished neighbour must not be mixed in: another cut of the same work is refused.
    code, said = refused(main, *command(data, output, "--pairs_a_part=60")[2:])
    assert code == 2 and "begun with other inputs or settings (pairs_a_part was 50 and is 60)" in said
    assert {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.json")} == left

    done = run(words)
    assert done.returncode == 0, done.stderr
    assert not parts.exists() and output.read_bytes() == scored


def test_a_run_is_reranked(data, scored, tmp_path, launched):
    lines = [f"q{n} Q0 p{(3 * n + rank) % 200} {rank} {-rank} x" for n in range(5) for rank in range(1, 9)]
    (data / "first.trec").write_text("\n".join(lines) + "\n")
    launched(main, *command(data, tmp_path / "out.trec", "--depth=4", source="first.trec")[2:])
    found = read_run(tmp_path / "out.trec")
    assert {id: set(scores) for id, scores in found.items()} == {
        f"q{n}": {f"p{3 * n + rank}" for rank in range(1, 5)} for n in range(5)
    }
    for id, scores in found.items():
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        expected = score_by_hand(data, [id] * len(scores), list(scores))
        np.testing.assert_allclose(list(scores.values()), expected, rtol=0, atol=5e-5)


def test_what_cannot_be_scored_is_refused_in_one_sentence_and_nothing_is_written(data, tmp_path, refused):
    write_candidates(data / "unknown.jsonl", [Candidates("q1", ("p1",), ("p2", "p999"))])
    write_candidates(data / "nobody.jsonl", [Candidates("nobody", ("p1",), ())])
    (data / "empty.jsonl").write_text("")
    output = tmp_path / "out.jsonl"
    for words, code, sentence in (
        (command(data, output, model="encoder"), 2, "without a classification head"),
        (command(data, output, model="absent"), 2, "is not a folder"),
        (command(data, output, model="broken"), 3, "the reranker gives nan for query q0 and passage p"),
        (command(data, output, source="unknown.jsonl"), 3, "names 1 passages"),
        (command(data, output, source="nobody.jsonl"), 3, "names 1 queries"),
        (command(data, output, source="empty.jsonl"), 3, "empty.jsonl"),
        (command(data, output, "--run=x"), 2, "either --candidates or --run"),
        (command(data, output, "--depth=3"), 2, "depth is of a --run"),
        (command(data, output, "--max_tokens=100"), 2, "takes pairs of 8 to 40 tokens"),
        (command(data, tmp_path / "out.txt"), 2, "a name in .jsonl"),
    ):
        found, said = refused(main, *words[2:])
        assert found == code and sentence in said, said
    assert not list(tmp_path.iterdir())
