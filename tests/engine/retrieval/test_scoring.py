"""Teacher scores of candidates and runs by a real reranker, tiny and random; ranks and kills in tests/launchers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from quincunx.data_shards.artefact import open_artefact
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.engine.ranks import discover_environment
from quincunx.engine.retrieval.candidates import CANDIDATES, Candidates, iterate_candidates, write_candidates
from quincunx.engine.retrieval.collection import make_collection
from quincunx.engine.retrieval.cross_encoder import load_reranker, save_reranker, score_pairs
from quincunx.engine.retrieval.scoring import RUN, Source, score_source
from quincunx.engine.retrieval.trec import read_run, write_run

WORDS = [stem + ending for stem in ("amber", "birch", "cedar", "dune", "elder", "fern") for ending in ("", "s", "y")]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory, save_tiny_bert):
    folder = tmp_path_factory.mktemp("reranker")
    save_tiny_bert(folder / "encoder", [" ".join(WORDS)] * 3, 120, initializer_range=0.5)
    fresh = load_reranker(str(folder / "encoder"), max_tokens=24)
    save_reranker(folder / "reranker", fresh, card="")
    return load_reranker(str(folder / "reranker"), allow_fresh_head=False)


@pytest.fixture
def collections():
    draw = np.random.default_rng(0)
    passages = [" ".join(draw.choice(WORDS, draw.integers(1, 30))) for _ in range(50)]
    queries = [" ".join(draw.choice(WORDS, 3)) for _ in range(8)]
    return (
        make_collection([f"q{n}" for n in range(8)], queries, "queries"),
        make_collection([f"p{n}" for n in range(50)], passages, "corpus"),
    )


def rows_of_candidates():
    draw = np.random.default_rng(1)
    return [
        Candidates(f"q{n}", tuple(ids[:1]), tuple(ids[1:]))
        for n in (3, 0, 7, 5)
        for ids in [[f"p{p}" for p in draw.choice(50, draw.integers(2, 9), replace=False)]]
    ]


def score(source, output, reranker, collections, made_from=None, pairs_a_part=7, **settings):
    return score_source(
        source, output, reranker, *collections, made_from or {"model": reranker.digest}, discover_environment({}),
        device="cpu", precision="float32", batch_tokens=128, pairs_a_part=pairs_a_part, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_every_candidate_gets_the_rerankers_score(tmp_path, reranker, collections, ending):
    """Tolerance: float32 with other pairs in the batch."""
    rows = rows_of_candidates()
    write_candidates(tmp_path / "in.jsonl", rows)
    output = tmp_path / f"out.{ending}"
    counts = score(Source(str(tmp_path / "in.jsonl"), CANDIDATES), output, reranker, collections)
    found = list(iterate_candidates(output))
    assert [replace(row, scores=None) for row in found] == rows
    queries, passages = collections
    for row in found:
        ids = [*row.positives, *row.negatives]
        assert row.scores.keys() == set(ids)
        asked = queries.texts(queries.rows([row.query_id])) * len(ids)
        expected, _ = score_pairs(reranker, asked, passages.texts(passages.rows(ids)))
        np.testing.assert_allclose([row.scores[id] for id in ids], expected, rtol=0, atol=5e-5)
    assert np.std([score for row in found for score in row.scores.values()]) > 0.01
    assert counts["pairs"] == sum(len(row.scores) for row in found) and 0 < counts["cut"] < counts["pairs"]
    manifest = open_artefact(output, CANDIDATES, single=True, verify=True)
    assert manifest["made_from"] == {"model": reranker.digest, "pairs_a_part": 7}
    assert not (tmp_path / f".out.{ending}.work").exists()


def test_a_run_is_reranked_to_the_depth_asked(tmp_path, reranker, collections):
    run = {f"q{n}": {f"p{(7 * n + rank) % 50}": 50.0 - rank for rank in range(20)} for n in range(8)}
    write_run(tmp_path / "in.trec", ((id, found, list(found.values())) for id, found in run.items()), "first")
    score(Source(str(tmp_path / "in.trec"), RUN, 6), tmp_path / "out.trec", reranker, collections)
    found = read_run(tmp_path / "out.trec")
    queries, passages = collections
    assert list(found) == list(run)
    for query_id, scores in found.items():
        assert set(scores) == set(list(run[query_id])[:6])
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        asked = queries.texts(queries.rows([query_id])) * len(scores)
        expected, _ = score_pairs(reranker, asked, passages.texts(passages.rows(scores)))
        np.testing.assert_allclose(list(scores.values()), expected, rtol=0, atol=5e-5)
    assert open_artefact(tmp_path / "out.trec", RUN, single=True)["details"] == {"queries": 8, "results": 48}


def test_work_begun_by_another_model_or_of_another_file_is_refused_and_nothing_is_overwritten(
    tmp_path, reranker, collections
):
    write_candidates(tmp_path / "in.jsonl", rows_of_candidates())
    source, output = Source(str(tmp_path / "in.jsonl"), CANDIDATES), tmp_path / "out.jsonl"
    assert score(source, output, reranker, collections) is not None
    before = output.read_bytes()
    assert score(source, output, reranker, collections) is None  # made already
    with pytest.raises(SettingsError, match=r"was made from other inputs or settings \(model was \w+ and is another\)"):
        score(source, output, reranker, collections, {"model": "another"})
    assert output.read_bytes() == before


def test_a_kill_between_the_scores_and_their_manifest_is_mended(tmp_path, reranker, collections, monkeypatch):
    write_candidates(tmp_path / "in.jsonl", rows_of_candidates())
    source, output = Source(str(tmp_path / "in.jsonl"), CANDIDATES), tmp_path / "out.jsonl"

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quincunx.data_shards.artefact.Work.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            score(source, output, reranker, collections)
    assert (tmp_path / ".out.jsonl.work").is_dir()
    assert score(source, output, reranker, collections)["cut"] == 0  # nothing was scored again
    assert all(row.scores for row in list(iterate_candidates(output)))


def test_unknown_ids_are_refused_before_anything_is_scored(tmp_path, reranker, collections):
    rows = [Candidates("q1", ("p1",), ("p2", "x1")), Candidates("nobody", ("x2",), ())]
    write_candidates(tmp_path / "in.jsonl", rows)
    source = Source(str(tmp_path / "in.jsonl"), CANDIDATES)
    with pytest.raises(DataError, match=r"names 1 queries that queries does not have \(first: nobody\)"):
        score(source, tmp_path / "out.jsonl", reranker, collections)
    write_candidates(tmp_path / "in.jsonl", rows[:1])
    with pytest.raises(DataError, match=r"names 1 passages that corpus does not have \(first: x1\)"):
        score(source, tmp_path / "out.jsonl", reranker, collections)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_scores_that_are_not_finite_are_refused(tmp_path, reranker, collections):
    write_candidates(tmp_path / "in.jsonl", rows_of_candidates())
    head = reranker.model.model.classifier.bias
    before = head.detach().clone()
    try:
        with torch.no_grad():
            head.fill_(torch.nan)
        with pytest.raises(DataError, match="the reranker gives nan for query q3 and passage p"):
            score(Source(str(tmp_path / "in.jsonl"), CANDIDATES), tmp_path / "out.jsonl", reranker, collections)
    finally:
        with torch.no_grad():
            head.copy_(before)
    assert not (tmp_path / "out.jsonl").exists()
    assert score(Source(str(tmp_path / "in.jsonl"), CANDIDATES), tmp_path / "out.jsonl", reranker, collections)
