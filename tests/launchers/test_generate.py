"""launchers/generate.py as users start it: real processes, killed and started again, alone and under torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = str(ROOT / "launchers" / "generate.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """The arguments of a run over 60 passages in 12 parts with a small GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from quincunx.data_shards.tokenizer_training import train_wordpiece

    folder = tmp_path_factory.mktemp("generate")
    texts = [f"passage number {k} says that {k * 7919} is a number and nothing else" for k in range(60)]
    corpus = folder / "docs.jsonl"
    corpus.write_text(
        "".join(json.dumps({"doc_id": f"d{k}", "paragraphs": [text]}) + "\n" for k, text in enumerate(texts))
    )
    tokenizer = train_wordpiece(texts, 300)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return [
        "--task", "continuation", "--model", str(folder / "model"), "--format", "documents", "--path", str(corpus),
        "--tokenizer", str(folder / "model"), "--max_new_tokens", "40", "--batch_size", "2", "--device", "cpu",
        "--part_megabytes", str(corpus.stat().st_size / 12e6),
    ]  # fmt: skip


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("[!.]*"))}


def run(arguments: list[str], launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    command = [*launcher, LAUNCHER, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300)


def test_a_killed_run_and_two_ranks_end_with_the_files_of_an_undisturbed_run(given, tmp_path):
    done = run([*given, "--output", str(tmp_path / "whole")])
    assert done.returncode == 0, done.stderr
    whole = content(tmp_path / "whole")
    assert len(whole) == 13 and "passages 60" in done.stderr
    records = [
        json.loads(line) for name in sorted(whole) if name != "manifest.json" for line in whole[name].splitlines()
    ]
    assert [record["passage_id"] for record in records] == [f"d{k}#0" for k in range(60)]

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, LAUNCHER, *given, "--output", str(killed)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    work = tmp_path / ".killed.work"
    second = work / "scratch" / "part-00001.json"
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = content(work / "made")
    assert 2 <= len(left) < 12 and all(whole[name] == data for name, data in left.items())
    done = run([*given, "--output", str(killed)])
    assert done.returncode == 0 and re.search(rf"parts ({12 - len(left)}|{13 - len(left)}),", done.stderr), done.stderr
    assert content(killed) == whole

    torchrun = (str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2")
    done = run([*given, "--output", str(tmp_path / "ranks")], torchrun)
    assert done.returncode == 0, done.stderr
    assert "rank 0: parts 6" in done.stderr and "rank 1: parts 6" in done.stderr
    assert content(tmp_path / "ranks") == whole


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["--format", "bier"], 2, "Expected one of ('beir', "),
        (["--top_p", "0"], 2, "error: top_p is 0.0; it must be above 0 and at most 1"),
        (["--temprature", "1"], 2, "did you mean --temperature?"),
        (["--path", "/no/such/corpus"], 3, "error: no documents corpus at /no/such/corpus"),
    ],
)
def test_mistakes_end_with_one_sentence_and_their_exit_code(given, tmp_path, changes, code, message):
    done = run([*given, "--output", str(tmp_path / "out"), *changes])
    assert done.returncode == code and message in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
