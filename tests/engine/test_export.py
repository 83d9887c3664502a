"""Export of a real run: folders that transformers and sentence-transformers load, and a bundle to go on from."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from quincunx.data_shards.batches import join_texts
from quincunx.data_shards.errors import CheckpointError
from quincunx.data_shards.shards import open_shards
from quincunx.data_shards.tasks import TaskSpec
from quincunx.engine.checkpoint import find_newest, step_name
from quincunx.engine.export import consolidated_state_dict, export_run, find_step
from quincunx.engine.model import BUNDLE_FILE, PretrainModel, build_model, is_bundle, load_bundle
from quincunx.engine.tracking import read_metrics

TASKS = ("mkp", "cmp", "npr", "dor")
SHORT_AND_LONG = 12


@pytest.fixture(scope="module")
def texts(beir_folder) -> list[str]:
    rows = [json.loads(line) for line in (beir_folder / "corpus.jsonl").read_text().splitlines()]
    return [row["text"] for row in rows[:SHORT_AND_LONG]] + [" ".join(row["text"] for row in rows)]


@pytest.fixture(scope="module")
def bundle_model(finished_run) -> PretrainModel:
    """The model that `--encoder BUNDLE` starts from."""
    return from_bundle(finished_run / "export" / "bundle", TASKS)


def from_bundle(folder: Path, tasks, report=print) -> PretrainModel:
    specs = [TaskSpec(name=task, decoder="enhanced") for task in tasks]
    model = build_model(str(folder), specs, max_tokens=40)
    load_bundle(model, folder, report)
    return model.eval()


@pytest.fixture(scope="module")
def packed_vectors(bundle_model, finished_run, texts) -> torch.Tensor:
    """What the training model's packed encoder makes of the texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished_run / "export" / "encoder")
    ids = [tokenizer(text, truncation=True, max_length=40, return_tensors="np")["input_ids"][0] for text in texts]
    with torch.no_grad():
        return bundle_model.encode(join_texts([row.astype("int32") for row in ids]))


def test_the_bundle_gives_back_every_weight_of_the_checkpoint(finished_run, bundle_model):
    checkpoint = find_newest(finished_run / "checkpoints")
    weights, own = consolidated_state_dict(checkpoint.folder), bundle_model.state_dict()
    assert checkpoint.step == 6
    trained = {name for name, _ in bundle_model.named_parameters()}
    assert trained <= weights.keys() and any(name.startswith("decoders.dor.") for name in trained)
    for name in trained:
        assert torch.equal(own[name], weights[name]), name
    assert is_bundle(str(finished_run / "export" / "bundle")) and not is_bundle(
        str(finished_run / "export" / "encoder")
    )


def test_transformers_alone_loads_the_encoder_and_gives_the_same_vectors(finished_run, texts, packed_vectors):
    from transformers import AutoModel, AutoTokenizer

    folder = finished_run / "export" / "encoder"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    assert (
        model.config._attn_implementation != "quincunx_packed"
        and "quincunx" not in (folder / "config.json").read_text()
    )
    assert tokenizer.model_max_length == 48 and tokenizer("[MASK]")["input_ids"][1] == tokenizer.mask_token_id
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=40)
    with torch.no_grad():
        vectors = model(**batch).last_hidden_state[:, 0]
    torch.testing.assert_close(vectors, packed_vectors, rtol=0, atol=1e-6)


def test_sentence_transformers_gives_the_same_vectors(finished_run, texts, packed_vectors, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(finished_run / "export" / "sentence-transformers"), device="cpu")
    vectors = model.encode(texts, convert_to_tensor=True, batch_size=5)
    torch.testing.assert_close(vectors, packed_vectors, rtol=0, atol=1e-6)
    assert model.max_seq_length == 40

    export_run(finished_run, tmp_path, normalise=True)
    normalised = SentenceTransformer(str(tmp_path / "sentence-transformers"), device="cpu").encode(
        texts, convert_to_tensor=True
    )
    torch.testing.assert_close(normalised, torch.nn.functional.normalize(packed_vectors), rtol=0, atol=1e-6)


def test_the_model_card_says_what_was_trained_on_what_and_how_it_went(finished_run, small_shards):
    lines = list(read_metrics(finished_run))
    held_out = [line for line in lines if line["kind"] == "held_out"]
    probes = [line for line in lines if line["kind"] == "probe"]
    assert [line["step"] for line in held_out] == [line["step"] for line in probes] == [0, 3, 6]
    for name in ("encoder", "sentence-transformers", "bundle"):
        card = (finished_run / "export" / name / "README.md").read_text()
        assert open_shards(str(small_shards)).manifest.dataset_id in card
        for task in ("mlm", *TASKS):
            before, after = held_out[0][f"held_out/loss/{task}"], held_out[-1][f"held_out/loss/{task}"]
            assert f"| {task} | {before:.3f} | {after:.3f} | {held_out[-1][f'held_out/unigram/{task}']:.3f} |" in card
        assert f"| MRR@10 | {probes[0]['probe/mrr@10']:.3f} | {probes[-1]['probe/mrr@10']:.3f} |" in card
        assert "learning_rate: 0.01" in card and str(finished_run) not in card
        for path in (finished_run / "export" / name).glob("*.json"):
            assert str(finished_run.parent) not in path.read_text(), f"{path.name} tells where it was made"
        assert (finished_run / "export" / name / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_bundle_of_other_tasks_keeps_its_own_and_starts_the_new_ones_fresh(finished_run, bundle_model):
    said = []
    model = from_bundle(finished_run / "export" / "bundle", ("dor", "gor"), said.append)
    assert len(said) == 1 and "gor" in said[0] and "dor" not in said[0].split("no decoder for")[1]
    own, bundled = model.state_dict(), bundle_model.state_dict()
    assert all(torch.equal(own[name], bundled[name]) for name in own if name.startswith(("decoders.dor", "lm_head")))


def test_a_bundle_that_does_not_fit_is_one_clear_sentence(finished_run, bundle_model, tmp_path):
    bundle = finished_run / "export" / "bundle"
    masked = build_model(str(bundle), [TaskSpec(name="mkp", decoder="masked")], max_tokens=40)
    with pytest.raises(CheckpointError, match="kind enhanced for mkp, the recipe asks for masked"):
        load_bundle(masked, bundle)
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle, damaged)
    (damaged / "decoders.safetensors").write_bytes((bundle / "decoders.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_bundle(bundle_model, damaged)
    content = json.loads((bundle / BUNDLE_FILE).read_text())
    (damaged / "decoders.safetensors").write_bytes((bundle / "decoders.safetensors").read_bytes())
    (damaged / BUNDLE_FILE).write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(CheckpointError, match="format 2"):
        load_bundle(bundle_model, damaged)


def test_a_folder_without_a_checkpoint_cannot_be_exported(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        export_run(tmp_path, tmp_path / "export")


def test_a_step_without_a_checkpoint_is_refused_with_those_that_are_kept(tmp_path):
    for step in (2, 10):
        (tmp_path / step_name(step)).mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3; it has those of steps 10, 2"):
        find_step(tmp_path, 3)
