"""Vectors of packed texts equal sentence-transformers' on the same folder; what is saved loads in both."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from quincunx.data_shards.batches import join_texts
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.tokenizer import tokenise
from quincunx.data_shards.tokenizer_training import train_wordpiece
from quincunx.engine.retrieval.dual_encoder import encode_texts, load_retriever, model_digest, save_retriever

WORDS = [
    "amber", "birch", "cedar", "dune", "elder", "fern", "grove", "heath", "iris", "juniper", "kelp", "larch", "moss",
]  # fmt: skip
DRAW = np.random.default_rng(0)
TEXTS = [" ".join(DRAW.choice(WORDS, n)) for n in (1, 30, 4, 12, 60, 7, 25, 3)] + ["", "amber [SEP] birch"]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 48,
}  # fmt: skip
FAMILIES = {
    "bert": {},
    "roberta": {},
    "electra": {"embedding_size": 16},
    "xlm-roberta": {},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 3},
}
MAX_TOKENS = 40
# float32 with vectors of order 1; a wrong position, window, pooling or truncation is off by 0.01 and more.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Saves a random encoder of a family with a tokenizer, every weight shaken."""
    tokenizer = train_wordpiece(TEXTS * 3, 90)

    def save(family, seed=0):
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(seed)
        ids = {"pad": tokenizer.pad_token_id, "cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id}
        ids |= {"bos": ids["cls"], "eos": ids["sep"]}
        special = {f"{name}_token_id": value for name, value in ids.items()}
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**SIZES, **special, **FAMILIES[family]})
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def saved(retriever, folder, query_tokens=9, passage_tokens=9, **more):
    """Saves a retriever with these limits, and gives the folder's path."""
    limits = {"query": query_tokens, "passage": passage_tokens}
    save_retriever(folder / "saved", replace(retriever, max_tokens=limits), **{"card": "", **more})
    return str(folder / "saved")


def sentence_transformer(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize(("pooling", "normalise"), [("cls", True), ("mean", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_equal_sentence_transformers_on_the_saved_folder(family, pooling, normalise, encoder, tmp_path):
    start = load_retriever(encoder(family), pooling=pooling, normalise=normalise)
    folder = saved(start, tmp_path, MAX_TOKENS, MAX_TOKENS)
    ours, theirs = load_retriever(folder), sentence_transformer(folder)
    assert ours.digest == start.digest and ours.model.pooling == pooling and ours.model.normalise == normalise
    assert set(ours.max_tokens.values()) == {theirs.max_seq_length} == {MAX_TOKENS}
    assert theirs.similarity_fn_name == ("cosine" if normalise else "dot")
    vectors = encode_texts(ours, TEXTS, "passage", batch_tokens=64)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, theirs.encode_document(TEXTS), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(vectors, encode_texts(ours, TEXTS, "query"), rtol=0, atol=TOLERANCE)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01, "all texts have one vector: the comparison says nothing"


@pytest.mark.parametrize(("pooling", "normalise"), [("cls", False), ("mean", True)])
def test_two_towers_become_the_router_of_sentence_transformers(pooling, normalise, encoder, tmp_path):
    start = load_retriever(encoder("bert"), pooling=pooling, normalise=normalise)
    start.model.query = load_retriever(encoder("bert", seed=1)).model.passage
    assert not start.model.shared
    folder = saved(start, tmp_path, 12, MAX_TOKENS)
    ours, theirs = load_retriever(folder), sentence_transformer(folder)
    assert ours.max_tokens == {"query": 12, "passage": MAX_TOKENS}
    assert ours.digest == model_digest(start.model, start.tokenizer, start.prompts)
    queries, passages = encode_texts(ours, TEXTS, "query"), encode_texts(ours, TEXTS, "passage")
    np.testing.assert_allclose(queries, theirs.encode_query(TEXTS), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(passages, theirs.encode_document(TEXTS), rtol=0, atol=TOLERANCE)
    assert np.abs(queries - passages).max() > 0.01


@pytest.mark.parametrize("normalise", [True, False])
def test_folders_that_sentence_transformers_saves_load_with_their_prompts(normalise, encoder, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    def tower(seed):
        return [Transformer(encoder("bert", seed), max_seq_length=MAX_TOKENS), Pooling(SIZES["hidden_size"], "mean")]

    ending = [Normalize()] * normalise
    prompts = {"prompts": {"query": "birch: ", "document": "dune "}, "similarity_fn_name": "dot", "device": "cpu"}
    router = Router.for_query_document(query_modules=tower(1), document_modules=tower(2))
    for name, modules in (("one", [*tower(0), *ending]), ("two", [router, *ending])):
        theirs = SentenceTransformer(modules=modules, **prompts)
        theirs.save(str(tmp_path / name))
        ours = load_retriever(str(tmp_path / name))
        assert ours.max_tokens["query"] == MAX_TOKENS and ours.model.normalise == normalise
        for kind, expected in (("query", theirs.encode_query(TEXTS)), ("passage", theirs.encode_document(TEXTS))):
            np.testing.assert_allclose(encode_texts(ours, TEXTS, kind), expected, rtol=0, atol=TOLERANCE)


def test_a_folder_that_scores_by_cosine_is_normalised(encoder, tmp_path):
    start = load_retriever(encoder("bert"), normalise=False)
    folder = saved(start, tmp_path)
    settings = tmp_path / "saved" / "config_sentence_transformers.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"similarity_fn_name": "cosine"}))
    vectors = encode_texts(load_retriever(folder), TEXTS, "query")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_shared_encoder_reads_queries_and_passages_in_one_pass(encoder):
    retriever = load_retriever(encoder("bert"), pooling="mean", normalise=False)
    model, calls = retriever.model, []
    model.passage.register_forward_hook(lambda *_: calls.append(1))
    rows = tokenise(TEXTS, retriever.tokenizer, MAX_TOKENS)
    queries, passages = (join_texts(some) for some in (rows[:3], rows[3:]))
    with torch.no_grad():
        together = model(queries, passages)
        assert len(calls) == 1
        apart = model.encode_packed(queries, "query"), model.encode_packed(passages, "passage")
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def test_state_of_a_checkpoint_is_saved_and_a_kill_leaves_the_old_folder(encoder, tmp_path, monkeypatch):
    retriever = load_retriever(encoder("bert"))
    state = {name: weight * 2 for name, weight in retriever.model.state_dict().items()}
    doubled = load_retriever(saved(retriever, tmp_path, state=state, card="doubled"))
    for name, weight in doubled.model.state_dict().items():
        torch.testing.assert_close(weight, state[name], rtol=0, atol=0)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saved(retriever, tmp_path)
    assert load_retriever(str(tmp_path / "saved")).digest == doubled.digest
    assert (tmp_path / "saved" / "README.md").read_text() == "doubled"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be written"):
        save_retriever(tmp_path / "file" / "saved", retriever, card="")


def test_encoding_leaves_the_mode_and_no_texts_give_no_vectors(encoder):
    retriever = load_retriever(encoder("bert"))
    retriever.model.train()
    told = []
    first = encode_texts(retriever, TEXTS, "passage", progress=told.append, batch_tokens=50)
    assert retriever.model.training and sum(told) == len(TEXTS) and len(told) > 1
    np.testing.assert_array_equal(first, encode_texts(retriever, TEXTS, "passage", batch_tokens=50))
    assert encode_texts(retriever, [], "query").shape == (0, 32)


def test_bfloat16_is_near_float32(encoder):
    retriever = load_retriever(encoder("bert"))
    half = encode_texts(retriever, TEXTS, "passage", precision="bfloat16")
    exact = encode_texts(retriever, TEXTS, "passage")
    assert 0 < np.abs(half - exact).max() < 0.05  # 8 bits of mantissa, three layers


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("modules.json", [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Dense"}], "Dense"),
        ("modules.json", {"a": 1}, "must hold a JSON list"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pools by lasttoken"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by pooling_mode_max_tokens"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "prompt out of the pooling"),
    ],
)
def test_a_folder_that_cannot_be_read_as_it_is_meant_is_refused(file, change, sentence, encoder, tmp_path):
    folder = saved(load_retriever(encoder("bert")), tmp_path)
    (tmp_path / "saved" / file).write_text(json.dumps(change))
    with pytest.raises(SettingsError, match=sentence):
        load_retriever(folder)


def test_towers_of_different_tokenizers_and_lengths_beyond_the_positions_are_refused(encoder, tmp_path):
    start = load_retriever(encoder("bert"))
    with pytest.raises(SettingsError, match=r"max_query_tokens is 49; .* reads 3 to 48 tokens"):
        load_retriever(encoder("bert"), max_tokens={"query": 49})
    start.model.query = load_retriever(encoder("bert", seed=1)).model.passage
    folder = saved(start, tmp_path)
    train_wordpiece(["other words altogether"] * 3, 40).save_pretrained(tmp_path / "saved" / "query_0_Transformer")
    with pytest.raises(SettingsError, match="different tokenizers"):
        load_retriever(folder)
    shutil.rmtree(tmp_path / "saved" / "query_0_Transformer")
    (tmp_path / "saved" / "router_config.json").write_text("{}")
    with pytest.raises(SettingsError, match="routes none"):
        load_retriever(folder)
