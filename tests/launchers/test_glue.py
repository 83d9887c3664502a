"""launchers/glue.py in real DeepSpeed processes, on invented paraphrases that a tiny model can learn."""

import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quincunx.data_shards.errors import SettingsError
from quincunx.launchers.glue import main

LAUNCHER = str(Path(__file__).parents[2] / "launchers" / "glue.py")
HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
STEPS = 30
TINY = {
    "task": "mrpc", "max_tokens": 32, "global_batch": 16, "epochs": None, "steps": STEPS, "learning_rate": 3e-3,
    "log_every": 1, "checkpoint_every": 15, "keep_checkpoints": 9, "dev_every": 15, "tracking": "none", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """Pairs of sentences over 40 words; those of class 1 have words of the first half in their second sentence.

    901 dev pairs are three batches of a measurement, so that one of two ranks has one more than the other.
    """
    from transformers import BertConfig, BertModel

    from quincunx.data_shards.tokenizer_training import train_wordpiece

    folder, draw = tmp_path_factory.mktemp("glue"), random.Random(0)
    words = ["".join(draw.choice("aeioubdgkmnprst") for _ in range(draw.randint(3, 6))) for _ in range(40)]

    def pairs(number: int) -> list[tuple[int, str, str]]:
        found = []
        for _ in range(number):
            label, about = draw.randint(0, 1), draw.sample(words, draw.randint(4, 9))
            half = words[:20] if label else words[20:]
            found.append((label, " ".join(about), " ".join(draw.sample(half, draw.randint(3, 6)))))
        return found

    data = {split: pairs(number) for split, number in (("train", 300), ("dev", 901), ("test", 30))}
    for split in ("train", "dev"):
        rows = (f"{label}\t{n}\t{n}\t{first}\t{second}\n" for n, (label, first, second) in enumerate(data[split]))
        (folder / f"{split}.tsv").write_text(HEADER + "".join(rows))
    rows = (f"{n}\t{n}\t{n}\t{first}\t{second}\n" for n, (_, first, second) in enumerate(data["test"]))
    (folder / "test.tsv").write_text(HEADER.replace("Quality", "index") + "".join(rows))
    torch.manual_seed(0)
    tokenizer = train_wordpiece((" ".join(pair[1:]) for pair in data["train"]), 200)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **sizes)).save_pretrained(
        folder / "encoder"
    )
    tokenizer.save_pretrained(folder / "encoder")
    return SimpleNamespace(folder=folder, **data)


@pytest.fixture(scope="module")
def train(tiny, harness):
    """Runs a tiny GLUE run to its end."""

    def run(folder: Path, ranks: int = 2, launcher: str = "ranks", **settings):
        settings = {**TINY, "data": str(tiny.folder), "encoder": str(tiny.folder / "encoder"), **settings}
        return harness.run_command(harness.training_command(LAUNCHER, folder, settings, ranks, launcher), folder)

    return run


@pytest.fixture(scope="module")
def through(train, tmp_path_factory):
    """Two ranks, dropout on, without a break."""
    finished = train(tmp_path_factory.mktemp("through") / "run")
    assert finished.code == 0, finished.output
    return finished


def test_two_ranks_learn_what_is_there_and_measure_it_on_dev(through, tiny):
    dev = through.lines("dev")
    assert list(dev) == [0, 15, STEPS]
    assert {"dev/loss", "dev/accuracy", "dev/f1"} <= set(dev[0])
    share = sum(label for label, *_ in tiny.dev) / len(tiny.dev)
    assert dev[STEPS]["dev/accuracy"] > max(share, 1 - share) + 0.3, "above the larger class"
    assert dev[STEPS]["dev/loss"] < dev[0]["dev/loss"]
    assert list(through.lines()) == list(range(1, STEPS + 1))
    assert "MRPC: 300 examples, an epoch is 18.8 steps, 901 of dev" in through.output
    assert "has 300 examples, GLUE's train file of MRPC 3,668" in through.output


def test_the_exported_classifier_gives_the_dev_numbers_and_the_predictions_in_transformers(through, tiny):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = through.folder / "export" / "classifier"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}

    def classes(pairs):
        texts = [list(side) for side in list(zip(*pairs, strict=True))[1:]]
        rows = tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return model.eval()(**rows).logits.argmax(1).numpy()

    right = np.array([label for label, *_ in tiny.dev]) == classes(tiny.dev)
    assert through.lines("dev")[STEPS]["dev/accuracy"] == pytest.approx(right.mean(), abs=1e-12)
    lines = (through.folder / "export" / "MRPC.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert lines[1:] == [f"{n}\t{label}" for n, label in enumerate(classes(tiny.test))]
    card = (folder / "README.md").read_text()
    assert "| accuracy |" in card and str(tiny.folder) not in card.replace(str(tiny.folder / "encoder"), "")


def test_a_run_cut_short_and_resumed_equals_the_run_through(through, train, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(through.folder, folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(folder / "export")
    resumed = train(folder)
    assert resumed.code == 0 and "resuming at step 15" in resumed.output, resumed.output
    assert resumed.losses() == through.losses()
    for step, record in through.lines("dev").items():
        again = resumed.lines("dev")[step]
        assert {name: again[name] for name in record if "/" in name} == {n: record[n] for n in record if "/" in n}
    name = "export/classifier/model.safetensors"
    assert (folder / name).read_bytes() == (through.folder / name).read_bytes()


def test_wrong_labels_end_with_code_3_and_one_sentence_and_nothing_written(tiny, train, tmp_path):
    bad = tmp_path / "dev.tsv"
    bad.write_text((tiny.folder / "dev.tsv").read_text() + "3\t1\t2\ta\tb\n")
    refused = train(tmp_path / "run", launcher="python", dev=str(bad))
    assert refused.code == 3 and "Traceback" not in refused.output
    sentence = f"error: {bad}:903: the label is '3', MRPC's are 0 and 1: mend the line"
    assert refused.output.strip().splitlines()[-1] == sentence
    assert not (tmp_path / "run").exists()


def test_settings_are_refused_before_anything_is_imported(tiny):
    for arguments, clause in (
        (["--task", "sst2"], "task must be cola or mrpc or stsb or qqp, given sst2"),
        ([], "data is not given; name the folder of mrpc's files, or give train and dev"),
        (["--data", "absent"], "data absent is no folder"),
        (["--data", str(tiny.folder), "--max_tokens", "4"], "max_tokens is 4; it must be at least 8"),
        (["--data", str(tiny.folder), "--global_batch", "0"], "global_batch is 0"),
    ):
        with pytest.raises(SettingsError) as caught:
            main(arguments)
        assert clause in str(caught.value)


def test_help_takes_less_than_a_second_of_processor_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, LAUNCHER, "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "--skip_broken_rows" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_defaults_are_berts(capsys):
    with pytest.raises(SystemExit):
        main(["--print_config"])
    import yaml

    config = yaml.safe_load(capsys.readouterr().out)
    published = {"epochs": 3.0, "global_batch": 32, "learning_rate": 2e-5, "max_tokens": 128, "warmup_share": 0.1}
    assert published | json.loads('{"steps": null}') == {name: config[name] for name in [*published, "steps"]}
