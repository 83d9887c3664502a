"""Held-out losses and the probe: right for one rank, and the same, without a dead-lock, for two ranks under ZeRO-3."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.packer import Packer
from quincunx.data_shards.shards import open_shards
from quincunx.data_shards.tasks import TaskSpec
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.engine.evaluations import (
    labels_by_task,
    load_held_out,
    load_probe,
    log_probabilities,
    pack_spread,
    run_held_out,
    run_probe,
)
from quincunx.engine.model import PretrainModel, build_model

ROOT = Path(__file__).parents[2]
TASKS = [TaskSpec(name="mkp", decoder="masked"), TaskSpec(name="dor", decoder="enhanced")]
CPU = torch.device("cpu")


def make_packer(shard_sets: list, split: str) -> Packer:
    return Packer(
        shard_sets,
        TASKS,
        encoder_mask_rate=0.3,
        decoder_mask_rate=0.5,
        corruption="80-10-10",
        neighbour="next",
        max_tokens=40,
        seed=1,
        split=split,
    )


def make_model(vocab_size: int) -> PretrainModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    return build_model("bert", TASKS, max_tokens=40, from_scratch=shape, vocab_size=vocab_size)


@pytest.fixture(scope="module")
def shards(small_shards):
    return open_shards(str(small_shards))


@pytest.fixture(scope="module")
def tokenizer(shards):
    return load_tokenizer(shards.tokenizer_folder)


def test_losses_are_means_over_all_labelled_tokens_whatever_the_batches(shards):
    held_out, train = make_packer([shards], "heldout"), make_packer([shards], "train")
    model = make_model(shards.manifest.vocab_size).train()
    small = run_held_out(model, load_held_out(held_out, train, 20, 3), CPU)
    assert model.training, "the evaluation left the model in evaluation mode"

    (batch,) = pack_spread(held_out, 20, 20)
    with torch.no_grad():
        output = model.eval()(batch, torch.tensor(batch.num_labels(), dtype=torch.float32))
    for row, task in enumerate(("mlm", "mkp", "dor")):
        assert small[f"held_out/loss/{task}"] == pytest.approx(
            float(output.nll_sums[row]) / batch.num_labels()[row], rel=1e-5
        )
        assert small[f"held_out/accuracy/{task}"] == int(output.correct[row]) / batch.num_labels()[row]
    # Means over the whole batch, weighted 1 each: the loss of the training step itself.
    total = sum(small[f"held_out/loss/{task}"] for task in ("mlm", "mkp", "dor"))
    assert total == pytest.approx(float(output.loss), rel=1e-5)
    assert run_held_out(model, load_held_out(held_out, train, 20, 3), CPU) == small


def test_the_unigram_scores_the_same_tokens_by_their_frequency_as_labels_in_training(shards):
    held_out, train = make_packer([shards], "heldout"), make_packer([shards], "train")
    loaded = load_held_out(held_out, train, 20, 7)
    trained = pack_spread(train, 4096, 50)
    counted = labels_by_task(trained)
    assert {task: len(ids) for task, ids in counted.items()} == dict(
        zip(("mlm", "mkp", "dor"), np.sum([batch.num_labels() for batch in trained], axis=0), strict=True)
    )
    counts, labels = Counter(counted["dor"].tolist()), labels_by_task(loaded.batches)["dor"].tolist()
    total, size = sum(counts.values()), shards.manifest.vocab_size
    # log_probabilities chooses the pseudo-count from these, by leave-one-out likelihood of the counts.
    candidates = [
        -np.mean([np.log((counts[label] + pseudo) / (total + pseudo * size)) for label in labels])
        for pseudo in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    ]
    assert min(abs(loaded.unigram["dor"] - value) for value in candidates) < 1e-12
    assert 3 < loaded.unigram["dor"] < np.log(size) + 1


def test_passages_are_shared_by_the_sets_of_a_mixture_and_none_held_out_is_none(
    shards, small_shards, write_shard_set, tmp_path, monkeypatch
):
    mixture, number = make_packer([shards, shards], "heldout"), shards.num_samples("heldout")
    monkeypatch.setattr(mixture, "pack", lambda rows: rows)
    first, second = pack_spread(mixture, 9, 5)
    assert first.datasets.tolist() == [0] * 5 and second.datasets.tolist() == [1] * 4
    assert first.sample_ids.tolist() == [number * i // 5 for i in range(5)], "spread"
    assert second.sample_ids.tolist() == [number * i // 4 for i in range(4)], "spread"
    in_rows = pack_spread(mixture, 9, 5, in_a_row=2)[0].sample_ids.tolist()
    assert in_rows == [0, 1, number * 2 // 5, number * 2 // 5 + 1, number * 4 // 5], "two side by side"
    for in_a_row in (1, 4):
        (rows,) = pack_spread(mixture, 1000, 1000, in_a_row)
        assert rows.sample_ids.tolist() == [*range(number), *range(number)], "all of them, each once"

    from quincunx.data_shards.shard_writer import Sample

    text = shards.read_block("train", 0).text("passage", 0)
    documents = [[Sample("only", text, text, None)]]
    write_shard_set(tmp_path / "shards", small_shards / "tokenizer", documents, max_tokens=40)
    alone = open_shards(str(tmp_path / "shards"))
    assert load_held_out(make_packer([alone], "heldout"), make_packer([alone], "train"), 20, 4) is None


def test_many_labels_have_the_entropy_of_their_distribution():
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(500, 0.3))
    counts = np.bincount(rng.choice(500, 200_000, p=share), minlength=500)
    held_out = rng.choice(500, 50_000, p=share)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    surprise = -log_probabilities(counts)[held_out]
    assert abs(surprise.mean() - entropy) < 5 * surprise.std() / len(held_out) ** 0.5 + 500 / 200_000


def test_few_labels_in_a_large_vocabulary_are_smoothed_less_than_by_add_one():
    rng = np.random.default_rng(1)
    share = 1.0 / np.arange(1, 30_001)
    share /= share.sum()
    counts = np.bincount(rng.choice(30_000, 20_000, p=share), minlength=30_000)
    held_out = rng.choice(30_000, 20_000, p=share)
    add_one = np.log((counts + 1) / (counts.sum() + 30_000))
    assert -log_probabilities(counts)[held_out].mean() < -add_one[held_out].mean() - 0.05


@pytest.mark.parametrize("counts", [np.zeros(8, np.int64), np.eye(8, dtype=np.int64)[3], np.arange(8)])
def test_any_labels_give_a_distribution(counts):
    assert np.exp(log_probabilities(counts)).sum() == pytest.approx(1, abs=1e-12)


def test_the_probe_equals_ir_measures_on_the_whole_ranking_of_padded_vectors(tokenizer, beir_folder):
    model = make_model(len(tokenizer))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # fresh weights give all texts the same vector but for rounding: no ranking to compare
            parameter.data *= 10 if "layer" in name else 50
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


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("corpus.jsonl", b'{"_id": "d0", "text": "a"}\n{"_id": "d1"}\n', r"corpus.jsonl line 2 .*text"),
        ("corpus.jsonl", '{"_id": "x", "text": "café"}\n'.encode("latin-1"), r"corpus.jsonl line 1 .*decode"),
        ("queries.jsonl", b"no json\n", r"queries.jsonl line 1 is not an object with _id and text"),
        ("qrels/test.tsv", b"query-id\tcorpus-id\tscore\nq0\td0\n", r"test.tsv line 2 "),
        ("qrels/test.tsv", b"query-id\tcorpus-id\tscore\nq0\telsewhere\t1\n", r"judges no passage"),
        ("qrels/test.tsv", None, r"no qrels/test.tsv"),
        ("corpus.jsonl", None, r"no corpus.jsonl"),
    ],
)
def test_a_malformed_folder_is_named_by_file_and_line(tokenizer, beir_folder, tmp_path, file, content, sentence):
    shutil.copytree(beir_folder, tmp_path / "beir")
    (tmp_path / "beir" / file).unlink()
    if content is not None:
        (tmp_path / "beir" / file).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_probe(tmp_path / "beir", tokenizer, 40)


SCRIPT = """
import json, os, sys
import deepspeed, torch
import torch.distributed as dist
sys.path.insert(0, os.path.dirname({test_file!r}))
from test_evaluations import TASKS, make_model, make_packer
from quincunx.data_shards.shards import open_shards
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.engine.evaluations import load_held_out, run_held_out
from quincunx.engine.evaluations import load_probe, run_probe


torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
shards = open_shards({shards!r})
model = make_model(shards.manifest.vocab_size)
config = {{
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-3, "torch_adam": True}}}},
    "zero_optimization": {{"stage": 3, "stage3_param_persistence_threshold": 0}},
}}
engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
held_out = load_held_out(make_packer([shards], "heldout"), make_packer([shards], "train"), 20, 4)  # 5 batches, 2 ranks
probe = load_probe({beir!r}, load_tokenizer(shards.tokenizer_folder), 40)
import quincunx.engine.evaluations as module
object.__setattr__(probe, "batches", module.batches_by_length(probe.texts, 150))
assert len(held_out.batches) % 2 == 1 and len(probe.batches) % 2 == 1, (len(held_out.batches), len(probe.batches))
metrics = run_held_out(model, held_out, torch.device("cpu")) | run_probe(model, probe, torch.device("cpu"))
with open({output!r} + str(dist.get_rank()), "w") as file:
    json.dump(metrics, file)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_under_zero_3_agree_with_one_process_with_uneven_shares(shards, small_shards, beir_folder, tmp_path):
    script = tmp_path / "script.py"
    output = str(tmp_path / "metrics-")
    script.write_text(SCRIPT.format(test_file=__file__, shards=str(small_shards), beir=str(beir_folder), output=output))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads(Path(f"{output}{rank}").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]

    model = make_model(shards.manifest.vocab_size)
    held_out = load_held_out(make_packer([shards], "heldout"), make_packer([shards], "train"), 20, 20)
    probe = load_probe(beir_folder, load_tokenizer(shards.tokenizer_folder), 40)
    alone = run_held_out(model, held_out, CPU) | run_probe(model, probe, CPU)
    # Other batches, other order of float32 sums.
    assert ranks[0] == {name: pytest.approx(value, rel=1e-5) for name, value in alone.items()}


@pytest.mark.gpu
def test_on_a_card_the_held_out_losses_are_those_of_the_cpu(shards):
    """Tolerance: float32 products in another order."""
    batches = load_held_out(make_packer([shards], "heldout"), make_packer([shards], "train"), 20, 3)
    model = make_model(shards.manifest.vocab_size)
    alone = run_held_out(model, batches, CPU)
    on_card = run_held_out(model.to("cuda"), batches, torch.device("cuda"))
    assert on_card == pytest.approx(alone, rel=1e-4)
