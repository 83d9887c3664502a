"""Exact search equals numpy's, in blocks as in one; approximate indexes come near it and are kept for the next time."""

import numpy as np
import pytest
import torch

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval import index as index_file
from quincunx.engine.retrieval.embeddings import Embeddings
from quincunx.engine.retrieval.index import Index, recall_against_exact

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


def search(queries_QD, embeddings, depth, *index, **arguments):
    return Index(embeddings, *index, **arguments).search(queries_QD, depth)


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


@pytest.mark.parametrize("block_rows", [400, 10**6])
@pytest.mark.parametrize("cuts", [[], [1, 500, 505, 1000]])
def test_search_in_blocks_and_in_one_are_the_same(block_rows, cuts, vectors, queries, monkeypatch):
    monkeypatch.setattr(index_file, "BLOCK_ROWS", block_rows)
    embeddings = Embeddings(np.split(vectors, cuts))
    for depth in (1, DEPTH, 300):
        assert_same(search(queries, embeddings, depth), by_numpy(queries, vectors, depth))
    index = Index(embeddings)
    assert len(index.blocks) == (1 if not cuts or block_rows > ROWS else 5)
    monkeypatch.setattr(index_file, "RESIDENT_BYTES", 0)
    assert_same(search(queries, embeddings, DEPTH), by_numpy(queries, vectors, DEPTH))


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


@pytest.mark.parametrize(
    ("kind", "options", "least"),
    [("IVF30,PQ4", "nprobe=30", 0.5), ("HNSW32", "efSearch=256", 0.97), ("PCA12,HNSW32", "", 0.5), ("Flat", "", 1)],
)
def test_approximate_indexes_find_most_of_the_exact_results(kind, options, least, vectors, queries):
    embeddings = Embeddings(np.split(vectors, [600, 700]))
    scores, rows = search(queries, embeddings, DEPTH, kind, options)
    _, exact = by_numpy(queries, vectors, DEPTH)
    assert recall_against_exact(rows, exact) >= least
    assert (np.diff(scores, axis=1) <= 0).all() and len(set(rows[0])) == DEPTH


def test_a_graph_looks_at_as_many_candidates_as_passages_are_asked_for(vectors, queries, tmp_path):
    """From one kept graph: two builds by several threads may differ."""
    embeddings = Embeddings([vectors], {"parts": ["a"]}, tmp_path)
    few, enough = (search(queries, embeddings, 300, "HNSW4", f"efSearch={number}") for number in (2, 300))
    np.testing.assert_array_equal(few[1], enough[1])


def test_an_index_is_kept_for_its_string_its_building_options_and_its_embeddings(vectors, queries, tmp_path):
    built = []

    def found(kind="HNSW32", options="", parts="a"):
        embeddings = Embeddings([vectors], {"parts": [parts]}, tmp_path)
        return search(queries, embeddings, DEPTH, kind, options, report=built.append)

    first = found(options="efSearch=300")
    assert_same(found(options="efSearch=300"), first)
    found()
    assert len(built) == 1
    for number, other in enumerate([{"kind": "HNSW16"}, {"options": "efConstruction=50"}, {"parts": "b"}], 2):
        found(**other)
        assert len(built) == number
    for path in tmp_path.glob("index-*.faiss"):
        path.write_bytes(path.read_bytes()[:-100])  # cut off
    found()
    found()
    assert len(built) == 5


def test_an_index_that_cannot_be_kept_is_used_all_the_same(vectors, queries, tmp_path):
    said = []
    (tmp_path / "file").touch()
    embeddings = Embeddings([vectors], {"parts": ["a"]}, tmp_path / "file")
    _, rows = search(queries, embeddings, DEPTH, "Flat", report=said.append)
    np.testing.assert_array_equal(rows, by_numpy(queries, vectors, DEPTH)[1])
    assert "the index is not kept" in " ".join(said)


def test_recall_counts_what_was_found():
    exact = np.array([[1, 2, 3], [4, 5, -1]])
    assert recall_against_exact(exact, exact) == 1
    assert recall_against_exact(np.array([[3, 9, 1], [7, 8, -1]]), exact) == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (("hnsw",), "--index hnsw is not an index of faiss for 16 channels .*could not parse.*: give --index exact"),
        (("IVF20,PQ7",), "IVF20,PQ7 is not an index .*multiple of the number of subquantizers"),
        (("HNSW99999999999999999999",), "is not an index"),
        (("HNSW1",), "HNSW1 is not an index .*a graph needs 2 links or more"),
        (("HNSW32", "nprobe=3"), "HNSW32 --index_options nprobe=3 is not .*could not set parameter nprobe"),
        (("HNSW32", "efSearch=x"), "could not interpret parameters efSearch=x"),
    ],
)
def test_strings_that_faiss_does_not_take_are_one_sentence_at_once(index, sentence, vectors):
    with pytest.raises(SettingsError, match=sentence):
        Index(Embeddings([vectors]), *index)


def test_what_only_the_search_can_find_is_one_sentence_too(vectors, queries, monkeypatch):
    with pytest.raises(SettingsError, match=r"IVF20,PQ4 cannot be built over 100 vectors .*Number of training points"):
        search(queries, Embeddings([vectors[:100]]), DEPTH, "IVF20,PQ4")
    with pytest.raises(SettingsError, match="nprobe=0 cannot be searched"):
        search(queries, Embeddings([vectors]), DEPTH, "IVF20,Flat", "nprobe=0")
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(SettingsError, match="index HNSW32 needs faiss, which is not installed"):
        Index(Embeddings([vectors]), "HNSW32")
    assert_same(search(queries, Embeddings([vectors]), DEPTH), by_numpy(queries, vectors, DEPTH))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_search_on_a_gpu_is_the_same(vectors, queries):
    embeddings = Embeddings(np.split(vectors, [100]))
    scores, rows = search(queries, embeddings, DEPTH, device="cuda")
    expected = by_numpy(queries, vectors, DEPTH)
    assert np.mean(rows == expected[1]) > 0.999  # near ties may change places
    np.testing.assert_allclose(scores, expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "Flat", "HNSW32", "IVF20,PQ4"])
@pytest.mark.parametrize("block_rows", [400, 10**6])
def test_rows_without_text_are_never_found_and_cost_no_result(kind, block_rows, vectors, queries, monkeypatch):
    """Rows that every query would find first, in the first, a middle and the last part."""
    monkeypatch.setattr(index_file, "BLOCK_ROWS", block_rows)
    empty = [0, 3, 700, ROWS - 1]
    near = vectors.copy()
    near[empty] = 4 * queries.mean(0)
    parts = np.split(near, [400, 800])
    embeddings = Embeddings(parts, {"empty_rows": empty})
    scores_QK, rows_QK = search(queries, embeddings, DEPTH, kind, "nprobe=20" if "IVF" in kind else "")
    assert (rows_QK >= 0).all() and np.isfinite(scores_QK).all() and not np.isin(rows_QK, empty).any()
    others = np.setdiff1d(np.arange(ROWS), empty)
    if kind in ("exact", "Flat"):
        expected = by_numpy(queries, near[others], DEPTH)
        assert_same((scores_QK, rows_QK), (expected[0], others[expected[1]]))
    whole = search(queries, embeddings, ROWS, "exact")[1]
    assert ((whole >= 0).sum(1) == ROWS - len(empty)).all() and (whole[:, -len(empty) :] == -1).all()
