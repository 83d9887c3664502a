"""A small shard set, a BEIR folder over the same words, and one finished training run, made once for all tests here."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from quincunx.launchers.command_line import as_flags

ROOT = Path(__file__).parents[2]
WORDS_DRAWN = random.Random(7)
WORDS = ["".join(WORDS_DRAWN.choice("aeioubdgkmnprst") for _ in range(WORDS_DRAWN.randint(3, 7))) for _ in range(150)]


def passage(draw: random.Random) -> str:
    return " ".join(WORDS[min(int(draw.expovariate(1 / 30)), 149)] for _ in range(draw.randint(6, 18)))


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory, write_text_shards) -> Path:
    """A shard set of 90 training and 21 held-out passages, three a document; every second one has a query."""
    draw = random.Random(1)
    documents = [[passage(draw) for _ in range(3)] for _ in range(37)]
    folder = tmp_path_factory.mktemp("small")
    return write_text_shards(folder, documents, num_train=30, max_tokens=40, has_queries=lambda d: d % 2 == 1)


@pytest.fixture(scope="session")
def beir_folder(tmp_path_factory) -> Path:
    """40 passages and 12 queries with graded judgements, in BEIR's format; a 13th query is not judged."""
    draw, folder = random.Random(2), tmp_path_factory.mktemp("beir")
    passages = [passage(draw) for _ in range(40)]
    corpus = [{"_id": f"d{n}", "title": "" if n % 3 else WORDS[n], "text": text} for n, text in enumerate(passages)]
    queries = [{"_id": f"q{n}", "text": " ".join(passages[3 * n % 40].split()[:5])} for n in range(13)]
    qrels = [f"q{n}\td{3 * n % 40}\t2" for n in range(12)] + [f"q{n}\td{(3 * n + 1) % 40}\t1" for n in range(6)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *qrels]) + "\n")
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, small_shards, beir_folder) -> Path:
    """The run folder of six real optimizer steps in one process, with probe, held-out losses, MLflow and export."""
    folder = tmp_path_factory.mktemp("run")
    flags = {
        "shards": [small_shards], "output": folder / "six-steps", "encoder": "bert", "from_scratch": True,
        "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 48,
        "tasks": ["mkp", "cmp", "npr", "dor"], "decoder": "enhanced", "max_tokens": 40, "global_batch": 8,
        "micro_batch": 4, "learning_rate": 1e-2, "steps": 6, "log_every": 1, "checkpoint_every": 3, "held_out_every": 3,
        "held_out_passages": 21, "probe": beir_folder, "probe_every": 3, "tracking": "sqlite", "export": True,
        "device": "cpu", "num_workers": 1, "deepspeed": ROOT / "ds_configs" / "zero1.json",
    }  # fmt: skip
    command = [sys.executable, "launchers/pretrain.py", *as_flags(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "six-steps"
