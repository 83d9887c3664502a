"""The retrieval probe equals a plain padded encoder and ir-measures on the whole ranking; bad folders are named."""

import json
import shutil

import ir_measures
import numpy as np
import pytest
import torch

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.shards import open_shards
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.engine.evaluations import load_probe, measure, run_probe, search
from quincunx.engine.model import PretrainModel, build_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(small_shards):
    return load_tokenizer(open_shards(str(small_shards)).tokenizer_folder)


@pytest.fixture(scope="module")
def model(tokenizer) -> PretrainModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    model = build_model("bert", [], max_tokens=64, from_scratch=shape, vocab_size=len(tokenizer))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # fresh weights give all texts the same vector but for rounding: no ranking to compare
            parameter.data *= 10 if "layer" in name else 50
    return model


def test_the_probe_equals_ir_measures_on_the_whole_ranking_of_padded_vectors(model, tokenizer, beir_folder):
    probe = load_probe(beir_folder, tokenizer, 40)
    measured = run_probe(model.train(), probe, CPU)
    assert model.training, "the probe left the model in evaluation mode"

    rows = [json.loads(line) for line in (beir_folder / "corpus.jsonl").read_text().splitlines()]
    docs = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in rows}
    rows = [json.loads(line) for line in (beir_folder / "queries.jsonl").read_text().splitlines()]
    queries = {row["_id"]: row["text"] for row in rows if row["_id"] != "q12"}
    hugging_face = model.encoder.model.eval()

    def encode(text: str) -> np.ndarray:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=40)["input_ids"]])
        cu_seqlens = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
        with torch.no_grad():
            output = hugging_face(input_ids=ids, cu_seqlens=cu_seqlens, max_length=ids.shape[1])
        vector = output.last_hidden_state[0, 0].double().numpy()
        return vector / np.linalg.norm(vector)

    doc_vectors = {doc: encode(text) for doc, text in docs.items()}
    query_vectors = {query: encode(text) for query, text in queries.items()}
    ranking = [
        ir_measures.ScoredDoc(query, doc, float(query_vector @ doc_vector))
        for query, query_vector in query_vectors.items()
        for doc, doc_vector in doc_vectors.items()
    ]
    lines = (beir_folder / "qrels" / "test.tsv").read_text().splitlines()[1:]
    qrels = [ir_measures.Qrel(query, doc, int(grade)) for query, doc, grade in (line.split("\t") for line in lines)]
    expected = ir_measures.calc_aggregate([ir_measures.RR @ 10, ir_measures.nDCG @ 10], qrels, ranking)
    assert measured["probe/mrr@10"] == pytest.approx(expected[ir_measures.RR @ 10], abs=1e-12)
    assert measured["probe/ndcg@10"] == pytest.approx(expected[ir_measures.nDCG @ 10], abs=1e-12)
    assert 0 < measured["probe/ndcg@10"] < 1


def test_perfect_and_useless_vectors_score_one_and_zero(tokenizer, beir_folder):
    probe = load_probe(beir_folder, tokenizer, 40)
    docs = torch.eye(len(probe.doc_ids))
    best = {qrel.query_id: qrel.doc_id for qrel in probe.qrels if qrel.relevance == 2}
    second = {qrel.query_id: qrel.doc_id for qrel in probe.qrels if qrel.relevance == 1}

    def query(grades: list[tuple[dict, float]]) -> torch.Tensor:
        vectors = torch.zeros(len(probe.query_ids), len(probe.doc_ids))
        for row, name in enumerate(probe.query_ids):
            for judged, weight in grades:
                if name in judged:
                    vectors[row, probe.doc_ids.index(judged[name])] = weight
        return vectors

    assert measure(probe, *search(query([(best, 2.0), (second, 1.0)]), docs, 100)) == {
        "probe/mrr@10": 1.0,
        "probe/ndcg@10": 1.0,
    }
    away = measure(probe, *search(query([(best, -2.0), (second, -1.0)]), docs, 100))
    assert away == {"probe/mrr@10": 0.0, "probe/ndcg@10": 0.0}


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("corpus.jsonl", '{"_id": "d0", "text": "a"}\n{"_id": "d1"}\n', r"corpus.jsonl line 2 .*text"),
        ("queries.jsonl", "no json\n", r"queries.jsonl line 1 "),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\n", r"test.tsv line 2 "),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\telsewhere\t1\n", r"judges no passage"),
        ("qrels/test.tsv", None, r"no qrels/test.tsv"),
        ("corpus.jsonl", None, r"no corpus.jsonl"),
    ],
)
def test_a_malformed_folder_is_named_by_file_and_line(tokenizer, beir_folder, tmp_path, file, content, sentence):
    shutil.copytree(beir_folder, tmp_path / "beir")
    (tmp_path / "beir" / file).unlink()
    if content is not None:
        (tmp_path / "beir" / file).write_text(content)
    with pytest.raises(DataError, match=sentence):
        load_probe(tmp_path / "beir", tokenizer, 40)


def test_a_corpus_that_is_not_utf_8_is_refused_with_its_line(tokenizer, beir_folder, tmp_path):
    shutil.copytree(beir_folder, tmp_path / "beir")
    corpus = tmp_path / "beir" / "corpus.jsonl"
    corpus.write_bytes(corpus.read_bytes() + '{"_id": "x", "text": "café"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"corpus\.jsonl line \d+ is not an object with _id and text .*decode"):
        load_probe(tmp_path / "beir", tokenizer, 40)
