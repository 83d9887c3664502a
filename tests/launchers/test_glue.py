"""launchers/glue.py in real processes, on invented paraphrases that a tiny model can learn."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quincunx.launchers.command_line import as_flags

LAUNCHER = str(Path(__file__).parents[2] / "launchers" / "glue.py")
HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
TINY = {
    "task": "mrpc", "max_tokens": 32, "batch": 16, "epochs": 2.0, "learning_rate": 3e-3, "dev_every": 19,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, save_tiny_bert) -> SimpleNamespace:
    """Pairs of sentences over 40 words; those of class 1 have words of the first half in their second sentence.

    901 dev pairs are three batches of a measurement, so that one of two ranks has one more than the other.
    """
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
    save_tiny_bert(folder / "encoder", [" ".join(pair[1:]) for pair in data["train"]], 200, max_position_embeddings=48)
    return SimpleNamespace(folder=folder, **data)


def run(tiny, output: Path, ranks: int = 1, **settings) -> subprocess.CompletedProcess:
    """A GLUE run of two epochs, 38 steps."""
    given = {**TINY, "data": tiny.folder, "encoder": tiny.folder / "encoder", "output": output, **settings}
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(ranks)]
    words = [*(torchrun if ranks > 1 else [sys.executable]), LAUNCHER, *as_flags(given)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def through(tiny, tmp_path_factory) -> Path:
    """Two ranks, without a break."""
    output = tmp_path_factory.mktemp("through") / "run"
    done = run(tiny, output, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "MRPC, dev: loss" in done.stdout
    return output


def test_two_ranks_learn_what_is_there_and_the_classifier_gives_its_numbers_in_transformers(through, tiny):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    dev = json.loads((through / "dev.json").read_text())
    assert dev.keys() == {"loss", "accuracy", "f1"}
    share = sum(label for label, *_ in tiny.dev) / len(tiny.dev)
    assert dev["accuracy"] > max(share, 1 - share) + 0.3, "above the larger class"
    tokenizer = AutoTokenizer.from_pretrained(through / "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(through / "classifier").eval()
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}

    def classes(pairs):
        texts = [list(side) for side in list(zip(*pairs, strict=True))[1:]]
        rows = tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return model(**rows).logits.argmax(1).numpy()

    right = np.array([label for label, *_ in tiny.dev]) == classes(tiny.dev)
    assert dev["accuracy"] == pytest.approx(right.mean(), abs=1e-12)
    lines = (through / "MRPC.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{n}\t{label}" for n, label in enumerate(classes(tiny.test)))]


def test_a_run_cut_short_goes_on_from_its_checkpoint_and_ends_the_same(tiny, tmp_path):
    whole = run(tiny, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    half = "checkpoints/checkpoint-19"
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "cut" / half)
    resumed = run(tiny, tmp_path / "cut")
    assert resumed.returncode == 0, resumed.stderr
    name = "classifier/model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_wrong_files_and_models_end_with_one_sentence_and_nothing_written(tiny, through, tmp_path):
    bad = tmp_path / "dev.tsv"
    bad.write_text((tiny.folder / "dev.tsv").read_text() + "3\t1\t2\ta\tb\n")
    for code, sentence, settings in (
        (3, f"{bad}:903: the label is '3', MRPC's are 0 and 1: fix the line", {"dev": bad}),
        (2, "gives 2 labels, 1 wanted", {"task": "stsb", "encoder": through / "classifier", **stsb(tmp_path)}),
    ):
        refused = run(tiny, tmp_path / "run", **settings)
        assert refused.returncode == code and "Traceback" not in refused.stderr
        assert refused.stderr.strip().splitlines()[-1].startswith("error: ") and sentence in refused.stderr
        assert not (tmp_path / "run").exists()


def stsb(folder: Path) -> dict[str, Path | str]:
    """Two pairs with scores."""
    rows = [{"sentence1": "a", "sentence2": "b", "label": score} for score in (0.0, 5.0)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": "", "train": folder / "scores.jsonl", "dev": folder / "scores.jsonl"}
