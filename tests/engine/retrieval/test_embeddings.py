"""Embeddings are the vectors of the texts; foreign and damaged ones are refused by name."""

import numpy as np
import pytest

from quincunx.data_shards.errors import DataError
from quincunx.engine.ranks import discover_environment
from quincunx.engine.retrieval.collection import make_collection
from quincunx.engine.retrieval.dual_encoder import encode_texts, load_retriever
from quincunx.engine.retrieval.embeddings import Embeddings, open_embeddings, write_embeddings

WORDS = ["amber", "birch", "cedar", "dune", "elder", "fern", "grove", "heath", "iris", "juniper"]
DRAW = np.random.default_rng(0)
TEXTS = [" ".join(DRAW.choice(WORDS, DRAW.integers(1, 20))) for _ in range(47)] + [""]
IDS = [f"p{n}" for n in range(len(TEXTS))]


@pytest.fixture(scope="module")
def retriever(tmp_path_factory, save_tiny_bert):
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "max_position_embeddings": 32}
    save_tiny_bert(folder, TEXTS, 60, **shape)
    return load_retriever(str(folder), pooling="mean")


@pytest.fixture
def passages():
    return make_collection(IDS, TEXTS, "the passages")


def write(folder, retriever, passages, **settings):
    settings = {"part_rows": 10, "batch_tokens": 64, "dtype": "float32"} | settings
    environment = discover_environment({})
    return write_embeddings(folder, retriever, passages, "passage", environment=environment, details={}, **settings)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_gives_the_vectors_of_the_texts_in_their_order(dtype, retriever, passages, tmp_path):
    assert write(tmp_path, retriever, passages, dtype=dtype)
    embeddings = open_embeddings(
        tmp_path, model_digest=retriever.digest, collection_digest=passages.digest, verify=True
    )
    assert len(embeddings) == embeddings.manifest["count"] == len(TEXTS)
    assert [len(part) for part in embeddings.parts] == [10, 10, 10, 10, 8] and embeddings.width == 16
    assert all(part.dtype == dtype and isinstance(part, np.memmap) for part in embeddings.parts)
    expected = encode_texts(retriever, TEXTS, "passage")
    tolerance = 1e-6 if dtype == "float32" else 1e-3  # rounding to 11 bits of numbers below 1
    np.testing.assert_allclose(np.concatenate(embeddings.parts), expected, rtol=0, atol=tolerance)
    rows = [47, 0, 10, 9, 10]
    np.testing.assert_allclose(embeddings.vectors(rows), expected[rows], rtol=0, atol=tolerance)
    assert embeddings.vectors(rows).dtype == np.float32 and embeddings.ids() == IDS


def test_embeddings_of_another_model_or_corpus_are_refused_with_both_ids(retriever, passages, tmp_path):
    write(tmp_path, retriever, passages)
    with pytest.raises(DataError, match=f"of model {retriever.digest}, but the model given is 00ff"):
        open_embeddings(tmp_path, model_digest="00ff")
    with pytest.raises(DataError, match="holds embeddings of kind passage, query is needed"):
        open_embeddings(tmp_path, kind="query")
    other = make_collection(IDS, [*TEXTS[:-1], "one more word"], "others")
    with pytest.raises(DataError, match=f"collection {passages.digest}, but the collection given is {other.digest}"):
        open_embeddings(tmp_path, collection_digest=other.digest)


def test_vectors_that_are_not_finite_are_named_by_their_text(retriever, passages, tmp_path, monkeypatch):
    def broken(retriever, texts, *_, **__):
        vectors = np.zeros((len(texts), 16), np.float32)
        vectors[3] = 1e6  # no float16
        return vectors

    monkeypatch.setattr("quincunx.engine.retrieval.dual_encoder.encode_texts", broken)
    with pytest.raises(DataError, match=r"vector of passage p3 is not finite in float16.*--dtype float32"):
        write(tmp_path, retriever, passages, dtype="float16")


def test_ids_that_were_tampered_with_are_refused(retriever, passages, tmp_path):
    write(tmp_path, retriever, passages)
    ids = (tmp_path / "ids.txt").read_text()
    (tmp_path / "ids.txt").write_text(ids.replace("p1\n", "p2\n"))
    with pytest.raises(DataError, match=r"ids.txt is damaged"):
        open_embeddings(tmp_path).ids()


def test_vectors_in_memory_are_embeddings_too():
    vectors = np.arange(12, dtype=np.float32).reshape(6, 2)
    embeddings = Embeddings(np.split(vectors, [2, 3]))
    np.testing.assert_array_equal(embeddings.vectors([5, 2, 0]), vectors[[5, 2, 0]])
    assert len(embeddings) == 6 and embeddings.width == 2
