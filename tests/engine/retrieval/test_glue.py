"""A GLUE job without its loop: what a batch holds, what a loss is, and that packing changes no logit."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.tokenizer_training import train_wordpiece
from quincunx.engine.environment import discover_environment
from quincunx.engine.retrieval.glue import predict, prepare, sum_losses
from quincunx.engine.retrieval.glue_settings import GlueSettings

DRAW = np.random.default_rng(0)
SENTENCES = [" ".join(DRAW.choice(["ba", "ku", "mole", "rin", "sota", "tum"], size=n)) for n in DRAW.integers(2, 9, 24)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    tokenizer = train_wordpiece(SENTENCES, 60)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=24, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def job_of(task, encoder, folder, **settings):
    """A job on 12 sentences or pairs, the same to train and to measure."""
    pair = task != "cola"
    rows = [
        {"sentence1": SENTENCES[n], **({"sentence2": SENTENCES[n + 12]} if pair else {}), "label": n % 2}
        for n in range(12)
    ]
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {"max_tokens": 12, "global_batch": 4, "micro_batch": 2, "device": "cpu", "dropout": 0.0}
    settings = {**defaults, "task": task, "data": str(folder), "encoder": str(encoder), **settings}
    settings = GlueSettings(**settings)
    return prepare(settings, discover_environment({}))


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb"])
def test_packed_batches_give_the_logits_of_the_padded_model_cut_as_transformers_cuts(task, encoder, tmp_path):
    job = job_of(task, encoder, tmp_path, max_tokens=8)
    job.write_model_files(tmp_path)
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.model_max_length == 8
    texts = [SENTENCES[:12]] if task == "cola" else [SENTENCES[:12], SENTENCES[12:]]
    rows = tokenizer(*texts, truncation=True, max_length=8, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = reference(**rows).logits.numpy()
    job.model.eval()
    found = predict(job.model, *job.dev_tokens, torch.device("cpu"))
    assert found.shape == ((12,) if task == "stsb" else (12, 2))
    # 1e-5: float32 sums over packed and over padded rows.
    np.testing.assert_allclose(found.reshape(12, -1), expected, atol=1e-5)
    assert np.abs(found - found.mean(axis=0)).max() > 1e-3, "the model tells the sentences apart"
    lengths = tokenizer(*texts)["input_ids"]
    batches = [batch for step in range(3) for batch in job.stream.step(step)]
    assert sum(batch.num_cut_texts for batch in batches) == sum(len(ids) > 8 for ids in lengths) > 0
    names = {"cola": {0: "unacceptable", 1: "acceptable"}, "mrpc": {0: "not_equivalent", 1: "equivalent"}}
    assert task == "stsb" or reference.config.id2label == names[task]
    assert reference.config.num_labels == (1 if task == "stsb" else 2)


def test_an_epoch_takes_every_example_once_with_its_own_label_and_another_seed_another_order(encoder, tmp_path):
    job = job_of("mrpc", encoder, tmp_path)
    orders = [job.sample_ids(step)["examples"] for step in range(3)]
    assert sorted(row for rows in orders for row in rows) == list(range(12))
    for step, rows in enumerate(orders):
        batches = job.stream.step(step)
        assert [len(batch) for batch in batches] == [2, 2]
        assert np.concatenate([batch.labels for batch in batches]).tolist() == [row % 2 for row in rows]
        ids, types = job.dev_tokens
        assert np.array_equal(batches[0].text.input_ids, np.concatenate([ids[row] for row in rows[:2]]))
        assert np.array_equal(batches[0].token_types, np.concatenate([types[row] for row in rows[:2]]))
    other = job_of("mrpc", encoder, tmp_path, seed=7)
    assert [other.sample_ids(step)["examples"] for step in range(3)] != orders


def test_losses_are_shares_of_the_mean_over_the_global_batch(encoder, tmp_path):
    """One rank's two micro-batches of a step of 8 examples, against plain float64 formulas."""
    for task in ("mrpc", "stsb"):
        job = job_of(task, encoder, tmp_path)
        job.model.eval()
        batches = job.stream.step(0)
        outputs = list(job.forward_passes(job.model, batches, torch.tensor([8.0]), [1, 2]))
        rows = job.sample_ids(0)["examples"]
        logits = predict(job.model, *job.dev_tokens, torch.device("cpu")).astype(np.float64)[rows]
        labels = np.array(rows) % 2
        if task == "mrpc":
            each = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), labels]
            right = logits.argmax(1) == labels
        else:
            each, right = (logits - labels) ** 2, np.abs(logits - labels) <= 0.5
        for output, part in zip(outputs, (slice(0, 2), slice(2, 4)), strict=True):
            assert float(output.loss.detach()) == pytest.approx(each[part].sum() / 8, rel=1e-5)  # float32
            assert float(output.nll_sums) == pytest.approx(each[part].sum(), rel=1e-5)
            assert float(output.correct) == right[part].sum()
        loss, _ = sum_losses(torch.from_numpy(logits), torch.from_numpy(labels if task == "mrpc" else labels * 1.0))
        assert float(loss) == pytest.approx(each.sum(), rel=1e-12)


def test_a_classifier_with_another_number_of_labels_is_refused(encoder, tmp_path):
    job_of("mrpc", encoder, tmp_path).write_model_files(tmp_path)
    with pytest.raises(SettingsError, match="gives 2 labels, 1 wanted"):
        job_of("stsb", tmp_path / "model", tmp_path)
