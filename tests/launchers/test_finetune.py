"""Fine-tuning in real processes: every stage learns, ranks and micro-batches change nothing, exports are whole."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from quincunx.engine.export import consolidated_state_dict
from quincunx.engine.retrieval.candidates import Candidates, write_candidates
from quincunx.launchers.command_line import as_flags

TINY = {
    "global_batch": 8, "num_negatives": 3, "steps": 6, "learning_rate": 1e-3, "max_query_tokens": 16,
    "max_passage_tokens": 32, "adam_eps": 1e-2, "epochs": None, "log_every": 1, "checkpoint_every": 3,
    "tracking": "none", "device": "cpu",
}  # fmt: skip
"""adam_eps: with AdamW's own 1e-8 a weight whose gradient is nothing but rounding still moves by the whole rate."""

QUICK = {"steps": 60, "log_every": 20, "learning_rate": 3e-3, "adam_eps": 1e-8, "checkpoint_every": 60}
"""Enough to learn something."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, save_tiny_bert, write_beir, invented_words) -> SimpleNamespace:
    """40 passages of invented words, 40 queries made of three words of their passage, a BERT of 2 x 32."""
    folder = tmp_path_factory.mktemp("retrieval")
    draw = random.Random(0)
    words = invented_words(draw, 150)
    passages = [" ".join(draw.sample(words, draw.randint(8, 14))) for _ in range(40)]
    queries = [" ".join(draw.sample(passage.split(), 3)) for passage in passages]
    write_beir(folder, passages, queries, dev=[(n, n, 1) for n in range(40)])
    write_candidates(folder / "candidates.jsonl", (candidates(n, draw) for n in range(40)))

    save_tiny_bert(folder / "encoder", passages, 300, pooler=False, max_position_embeddings=48)
    files = {
        "encoder": str(folder / "encoder"), "candidates": str(folder / "candidates.jsonl"), "corpus": str(folder),
        "queries": str(folder),
    }  # fmt: skip
    return SimpleNamespace(folder=folder, passages=passages, queries=queries, files=files)


def candidates(number: int, draw: random.Random) -> Candidates:
    """Its own passage against six others, with a teacher that knows which."""
    others = draw.sample([f"p{n}" for n in range(40) if n != number], 6)
    scores = dict.fromkeys(others, -1.0) | {f"p{number}": 1.0}
    return Candidates(f"q{number}", (f"p{number}",), tuple(others), scores)


@pytest.fixture(scope="module")
def train(tiny, harness):
    """Runs finetune.py on the tiny set; settings over TINY."""

    def run(output: Path, stage: str = "retriever1", launch: dict | None = None, **settings):
        recipe = {**TINY, "stage": stage, **tiny.files, **settings}
        argv = harness.training_command(harness.finetune, output, recipe, **(launch or {}))
        return harness.run_command(argv, output)

    return run


def weights(run) -> dict[str, torch.Tensor]:
    return consolidated_state_dict(max((run.folder / "checkpoints").glob("step-*")))


def assert_same_weights(one, other, tolerance: float) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        differences = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    assert max(differences.values()) < tolerance, max(differences.items(), key=lambda item: item[1])


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """One process, the global batch in one forward, without dropout, plain gradient steps told by their weights."""
    settings = {"dropout": 0.0, "micro_batch": 8, "all_pairs": True}
    return train(tmp_path_factory.mktemp("whole") / "run", launch={"launcher": "python"}, **settings)


def test_two_ranks_and_a_gradient_cache_take_the_same_steps_as_one_forward(whole, train, tmp_path):
    """2 ranks x 2 micro-batches x 2 queries against 1 x 1 x 8: every query sees the same 32 passages as negatives.

    Tolerances: float32 rounding in sums of other orders, over six steps of rate 1e-3.
    """
    assert whole.code == 0, whole.output
    split = train(tmp_path / "run", launch={"ranks": 2}, dropout=0.0, micro_batch=2, all_pairs=True)
    assert split.code == 0, split.output
    for step, loss in whole.losses().items():
        assert split.losses()[step] == pytest.approx(loss, rel=1e-5)
    assert whole.losses()[1] == pytest.approx(split.losses()[1], rel=1e-6)  # before any weight has moved
    assert_same_weights(whole, split, 1e-6)


def test_zero_3_takes_the_same_steps(whole, train, tmp_path):
    run = train(tmp_path / "run", launch={"ranks": 2, "stage": "zero3"}, dropout=0.0, micro_batch=2, all_pairs=True)
    assert run.code == 0, run.output
    assert_same_weights(whole, run, 3e-6)


def test_a_stopped_run_goes_on_where_it_was(whole, train, tmp_path):
    """The run's first half, from its checkpoint on: same losses, bit for bit."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(max((folder / "checkpoints").glob("step-*")))
    resumed = train(folder, launch={"launcher": "python"}, dropout=0.0, micro_batch=8, all_pairs=True)
    assert resumed.code == 0 and "resuming at step 3 of 6" in resumed.output, resumed.output
    assert resumed.losses() == whole.losses()


def test_the_exported_retriever_has_the_weights_of_the_checkpoint(whole):
    stored = load_file(whole.folder / "export" / "retriever" / "model.safetensors")
    exported = {name: value for name, value in weights(whole).items() if name.startswith("passage.model.")}
    assert all(torch.equal(stored[name.removeprefix("passage.model.")], value) for name, value in exported.items())


@pytest.mark.parametrize("loss", ["kl", "margin_mse"])
def test_distillation_brings_the_student_to_its_teacher(loss, train, tmp_path):
    run = train(tmp_path / "run", "distil", launch={"launcher": "python"}, distil_loss=loss, pooling="mean", **QUICK)
    assert run.code == 0, run.output
    lines = run.lines()
    assert lines[60][f"loss/{loss}"] < 0.9 * lines[20][f"loss/{loss}"]
    total = lines[60][f"loss/{loss}"] + 0.2 * lines[60]["loss/contrastive"]
    assert lines[60]["loss/total"] == pytest.approx(total)


def test_a_reranker_learns_and_two_ranks_take_the_steps_of_one(train, tmp_path):
    """The gradient goes through 3 of 4 candidates; with R-Drop weight 0 and no dropout ranks change nothing."""
    settings = {"gradient_candidates": 3, "r_drop": 0.0, "dropout": 0.0, "max_pair_tokens": 48}
    one = train(tmp_path / "one", "reranker", launch={"launcher": "python"}, micro_batch=8, **settings)
    two = train(tmp_path / "two", "reranker", launch={"ranks": 2}, micro_batch=2, **settings)
    assert one.code == two.code == 0, one.output + two.output
    assert one.losses()[1] == pytest.approx(two.losses()[1], rel=1e-6)
    assert_same_weights(one, two, 1e-6)

    from quincunx.engine.retrieval.cross_encoder import load_reranker

    exported = load_reranker(str(one.folder / "export" / "reranker"), allow_fresh_head=False).model.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in weights(one).items())


def test_r_drop_pulls_two_dropout_passes_together(train, tmp_path):
    """The divergence of two passes after the same steps: small where it weighs much, large where it hardly weighs."""
    divergence = {}
    for weight in (10.0, 0.001):
        settings = {"dropout": 0.3, "r_drop": weight, "gradient_candidates": None, "max_pair_tokens": 48, **QUICK}
        run = train(tmp_path / str(weight), "reranker", launch={"launcher": "python"}, **settings)
        assert run.code == 0, run.output
        divergence[weight] = run.lines()[60]["loss/r_drop"]
    assert divergence[10.0] < 0.5 * divergence[0.001], divergence


def test_separate_towers_part_and_export_as_two(train, tiny, tmp_path):
    settings = {"towers": "separate", "probe": str(tiny.folder), "probe_every": 6}
    run = train(tmp_path / "run", launch={"ranks": 2}, **settings)
    assert run.code == 0, run.output
    trained = weights(run)
    name = "model.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(trained[f"query.{name}"], trained[f"passage.{name}"])
    assert set(run.lines("probe")) == {0, 6}

    from quincunx.engine.retrieval.dual_encoder import load_retriever

    exported = load_retriever(str(run.folder / "export" / "retriever")).model.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in trained.items())


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"num_negatives": -1}, 2, "num_negatives is -1; it must be at least 0"),
        ({"candidates": ""}, 2, "candidates is not given"),
        ({"stage": "distil"}, 2, "a recipe chooses the stage: give --recipe"),
        ({"candidates": "foreign.jsonl"}, 3, "p99"),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(settings, code, words, tiny, tmp_path, monkeypatch, capsys):
    from quincunx.data_shards.errors import DataError, SettingsError
    from quincunx.launchers.finetune import main

    row = {"query_id": "q1", "positives": ["p1"], "negatives": ["p99"]}
    (tmp_path / "foreign.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    given = {**TINY, **tiny.files, "output": str(tmp_path / "run"), **settings}
    with pytest.raises((SettingsError, DataError), match=words) as refused:
        main([*as_flags(given), "--deepspeed=zero2"])
    assert refused.value.exit_code == code and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
