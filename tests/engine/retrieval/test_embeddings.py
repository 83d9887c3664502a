"""Embeddings of any number of ranks are the same; foreign, damaged and unfinished ones are refused by name."""

import threading

import numpy as np
import pytest

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.engine.ranks import Environment
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


def rank_of(rank, world_size):
    return Environment(
        launcher="torch", rank=rank, world_size=world_size, local_rank=rank, master_addr="127.0.0.1", master_port=1
    )


def write(folder, retriever, passages, rank=0, world_size=1, kind="passage", **settings):
    settings = {"part_rows": 10, "batch_tokens": 64, "dtype": "float32", "patience_seconds": 20} | settings
    environment = rank_of(rank, world_size)
    return write_embeddings(folder, retriever, passages, kind, environment=environment, details={}, **settings)


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


def test_ranks_share_the_parts_and_rank_0_waits_for_all(retriever, passages, tmp_path):
    write(tmp_path / "alone", retriever, passages)
    main = threading.Thread(target=write, args=(tmp_path / "shared", retriever, passages, 0, 3))
    main.start()
    for rank in (2, 1):
        assert not write(tmp_path / "shared", retriever, passages, rank, 3)
    main.join()
    shared, alone = (open_embeddings(tmp_path / name, verify=True).manifest for name in ("shared", "alone"))
    assert shared == alone


def test_finished_embeddings_are_left_alone_and_damaged_ones_are_made_again_on_request(retriever, passages, tmp_path):
    write(tmp_path / "x", retriever, passages)
    manifest = open_embeddings(tmp_path / "x").manifest
    assert not write(tmp_path / "x", retriever, passages)
    part = tmp_path / "x" / "part-00001.npy"
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"part-00001.npy is damaged: .*--remake"):
        write(tmp_path / "x", retriever, passages)
    assert write(tmp_path / "x", retriever, passages, remake=True)
    assert open_embeddings(tmp_path / "x", verify=True).manifest == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.old-1"]


def test_flipped_bits_are_found_when_asked_for(retriever, passages, tmp_path):
    write(tmp_path, retriever, passages)
    content = bytearray((tmp_path / "part-00002.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "part-00002.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"part-00002.npy is damaged"):
        open_embeddings(tmp_path, verify=True)


def test_embeddings_of_another_model_or_corpus_are_refused_with_both_ids(retriever, passages, tmp_path):
    write(tmp_path, retriever, passages)
    with pytest.raises(DataError, match=f"of model {retriever.digest}, but the model given is 00ff"):
        open_embeddings(tmp_path, model_digest="00ff")
    with pytest.raises(DataError, match="holds embeddings of kind passage, query is needed"):
        open_embeddings(tmp_path, kind="query")
    other = make_collection(IDS, [*TEXTS[:-1], "one more word"], "others")
    with pytest.raises(DataError, match=f"collection {passages.digest}, but the collection given is {other.digest}"):
        open_embeddings(tmp_path, collection_digest=other.digest)


@pytest.mark.parametrize(("settings", "named"), [({"dtype": "float16"}, "dtype"), ({"kind": "query"}, "kind")])
def test_another_work_in_the_same_folder_is_refused_and_leaves_it(settings, named, retriever, passages, tmp_path):
    write(tmp_path, retriever, passages)
    with pytest.raises(SettingsError, match=f"made from other inputs or settings .*{named} was"):
        write(tmp_path, retriever, passages, **settings)
    open_embeddings(tmp_path, verify=True)


def test_without_the_parts_of_another_rank_there_is_no_manifest(retriever, passages, tmp_path):
    with pytest.raises(DataError, match=r"2 of 5 parts of .* are missing"):
        write(tmp_path, retriever, passages, 0, 2, patience_seconds=0.5)
    with pytest.raises(DataError, match="has no finished embeddings"):
        open_embeddings(tmp_path)


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
