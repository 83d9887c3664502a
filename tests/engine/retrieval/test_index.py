"""Exact search equals numpy's, in shards as in one; approximate indexes come near it and are kept for the next time."""

import numpy as np
import pytest
import torch

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval import index as index_file
from quincunx.engine.retrieval.embeddings import Embeddings
from quincunx.engine.retrieval.index import Index, recall_against_exact
from quincunx.engine.retrieval.search import IndexOptions

WIDTH, DEPTH, ROWS = 16, 20, 1200


def random_vectors(rows, seed=0):
    """float32 [rows, WIDTH] of length 1, gathered around 30 centres so that lists and graphs have something to find."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(30, WIDTH))
    vectors = centres[draw.integers(0, 30, rows)] + 0.5 * draw.normal(size=(rows, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    return random_vectors(ROWS)


@pytest.fixture(scope="module")
def queries():
    return random_vectors(40, seed=1)


def search(queries_QD, embeddings, depth, kind="exact", **arguments):
    return Index(embeddings, kind, **arguments).search(queries_QD, depth)


def by_numpy(queries_QD, vectors_ND, depth):
    """(scores, rows) of the whole sorted ranking in float64, equal scores by row."""
    scores = queries_QD.astype(np.float64) @ vectors_ND.T.astype(np.float64)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return np.take_along_axis(scores, rows, axis=1), rows


def assert_same(found, expected):
    """The same scores within the rounding of 16 products of order 1 / 16 in float32, the same rows but for ties."""
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-6)
    other = found[1] != expected[1]
    gaps = np.abs(np.diff(expected[0], axis=1))
    near = np.pad(gaps < 1e-6, ((0, 0), (1, 1)), constant_values=False)
    assert not (other & ~(near[:, 1:] | near[:, :-1])).any()
    assert other.mean() < 1e-3 and all(len(set(rows)) == len(rows) for rows in found[1].tolist())
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64


@pytest.mark.parametrize("kind", ["exact", "flat"])
@pytest.mark.parametrize("block_rows", [400, 10**6])
@pytest.mark.parametrize("cuts", [[], [1, 500, 505, 1000]])
def test_sharded_single_torch_and_faiss_searches_are_one(kind, block_rows, cuts, vectors, queries, monkeypatch):
    monkeypatch.setattr(index_file, "BLOCK_ROWS", block_rows)
    embeddings = Embeddings(np.split(vectors, cuts))
    for depth in (1, DEPTH, 300):
        assert_same(search(queries, embeddings, depth, kind), by_numpy(queries, vectors, depth))
    index = Index(embeddings, kind)
    assert len(index.shards) == (1 if not cuts or block_rows > ROWS else 5)
    monkeypatch.setattr(index_file, "RESIDENT_BYTES", 0)
    assert_same(Index(embeddings, kind).search(queries, DEPTH), by_numpy(queries, vectors, DEPTH))


@pytest.mark.parametrize("cuts", [[], [10, 30, 70]])
def test_equal_scores_are_ordered_by_row_even_where_the_depth_cuts_through_them(cuts, monkeypatch):
    monkeypatch.setattr(index_file, "BLOCK_ROWS", 25)
    draw = np.random.default_rng(3)
    vectors = draw.integers(-1, 2, size=(100, 4)).astype(np.float32)  # whole numbers: no rounding, many ties
    queries = draw.integers(-2, 3, size=(30, 4)).astype(np.float32)
    for depth in (1, 7, 50, 100):
        found = search(queries, Embeddings(np.split(vectors, cuts)), depth)
        expected = by_numpy(queries, vectors, depth)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])


def test_more_results_than_passages_are_padded(queries):
    scores, rows = search(queries, Embeddings([random_vectors(5)]), 8)
    assert (rows[:, 5:] == -1).all() and np.isneginf(scores[:, 5:]).all()
    assert (np.sort(rows[:, :5]) == np.arange(5)).all()


def test_half_precision_parts_are_searched_in_single_precision(vectors, queries):
    halves = vectors.astype(np.float16)
    found = search(queries, Embeddings([halves]), DEPTH)
    np.testing.assert_allclose(found[0], by_numpy(queries, halves, DEPTH)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "least"), [("ivfpq", 0.5), ("hnsw", 0.97)])
@pytest.mark.parametrize("shard_rows", [None, 600])
def test_approximate_indexes_find_most_of_the_exact_results(kind, least, shard_rows, vectors, queries):
    embeddings = Embeddings(np.split(vectors, [600, 700]))
    index = Index(embeddings, kind, shard_rows=shard_rows)
    assert len(index.shards) == (1 if shard_rows is None else 2)
    scores, rows = index.search(queries, DEPTH)
    _, exact = by_numpy(queries, vectors, DEPTH)
    assert recall_against_exact(rows, exact) >= least
    assert (np.diff(scores, axis=1) <= 0).all() and len(set(rows[0])) == DEPTH


def test_more_lists_looked_through_find_more(vectors, queries):
    embeddings = Embeddings([vectors])
    _, exact = by_numpy(queries, vectors, DEPTH)
    few, many = (
        recall_against_exact(
            search(queries, embeddings, DEPTH, "ivfpq", options=IndexOptions(num_lists=20, num_probes=probes))[1], exact
        )
        for probes in (1, 20)
    )
    assert few < many


def test_an_index_is_kept_for_its_embeddings_and_options_only(vectors, queries, tmp_path):
    manifest = {"parts": ["a"]}
    built = []

    def found(manifest, links=32, ef_search=256):
        embeddings = Embeddings([vectors], manifest, tmp_path)
        options = IndexOptions(links=links, ef_search=ef_search)
        return Index(embeddings, "hnsw", options=options, report=built.append).search(queries, DEPTH)

    first = found(manifest)
    again = found(manifest, ef_search=300)
    assert len(built) == 1 and np.mean(first[1] == again[1]) > 0.9
    found(manifest, links=16)
    assert len(built) == 2
    found({"parts": [{"digest": "b"}]}, links=16)
    assert len(built) == 3
    path = tmp_path / "index-hnsw-00000.faiss"
    path.write_bytes(path.read_bytes()[:-100])  # cut off
    assert_same(found({"parts": [{"digest": "b"}]}), found({"parts": [{"digest": "b"}]}))
    assert len(built) == 4


def test_recall_counts_what_was_found():
    exact = np.array([[1, 2, 3], [4, 5, -1]])
    assert recall_against_exact(exact, exact) == 1
    assert recall_against_exact(np.array([[3, 9, 1], [7, 8, -1]]), exact) == pytest.approx(2 / 5)


def test_what_cannot_be_searched_is_refused_in_one_sentence(vectors, queries, monkeypatch):
    embeddings = Embeddings([vectors])
    with pytest.raises(SettingsError, match="code_bytes is 7, which does not divide the 16 channels"):
        Index(embeddings, "ivfpq", options=IndexOptions(code_bytes=7))
    with pytest.raises(SettingsError, match="cannot be trained on 100 vectors"):
        Index(Embeddings([vectors[:100]]), "ivfpq")
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(SettingsError, match="index hnsw needs faiss, which is not installed"):
        Index(embeddings, "hnsw")
    assert_same(search(queries, embeddings, DEPTH), by_numpy(queries, vectors, DEPTH))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_search_on_a_gpu_is_the_same(vectors, queries):
    embeddings = Embeddings(np.split(vectors, [100]))
    scores, rows = search(queries, embeddings, DEPTH, device="cuda")
    expected = by_numpy(queries, vectors, DEPTH)
    assert np.mean(rows == expected[1]) > 0.999  # near ties may change places
    np.testing.assert_allclose(scores, expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "flat", "hnsw", "ivfpq"])
@pytest.mark.parametrize("shard_rows", [None, 400])
def test_rows_without_text_are_never_found_and_cost_no_result(kind, shard_rows, vectors, queries, monkeypatch):
    """Rows that every query would find first, in the first, a middle and the last part."""
    monkeypatch.setattr(index_file, "BLOCK_ROWS", shard_rows or 10**6)
    empty = [0, 3, 700, ROWS - 1]
    near = vectors.copy()
    near[empty] = 4 * queries.mean(0)
    parts = np.split(near, [400, 800])
    embeddings = Embeddings(parts, {"empty_rows": empty})
    scores_QK, rows_QK = search(queries, embeddings, DEPTH, kind, shard_rows=shard_rows)
    assert (rows_QK >= 0).all() and np.isfinite(scores_QK).all() and not np.isin(rows_QK, empty).any()
    others = np.setdiff1d(np.arange(ROWS), empty)
    if kind in ("exact", "flat"):
        expected = by_numpy(queries, near[others], DEPTH)
        assert_same((scores_QK, rows_QK), (expected[0], others[expected[1]]))
    whole = search(queries, embeddings, ROWS, "exact")[1]
    assert ((whole >= 0).sum(1) == ROWS - len(empty)).all() and (whole[:, -len(empty) :] == -1).all()
