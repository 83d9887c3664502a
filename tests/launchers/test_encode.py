"""encode.py as a user runs it: one process and several, killed and rerun; one sentence for what cannot be encoded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quincunx.engine.retrieval.embeddings import open_embeddings
from quincunx.launchers import encode

ROOT = Path(__file__).parents[2]
WORDS = ["amber", "birch", "cedar", "dune", "elder", "fern", "grove", "heath", "iris", "juniper"]
NUM_PASSAGES = 700


@pytest.fixture(scope="module")
def data(tmp_path_factory, save_tiny_bert):
    """A tiny random encoder and a corpus."""
    folder = tmp_path_factory.mktemp("encode")
    save_tiny_bert(folder / "model", [" ".join(WORDS)] * 3, 60)
    draw = np.random.default_rng(0)
    rows = [
        {"_id": f"p{n}", "title": draw.choice(WORDS), "text": " ".join(draw.choice(WORDS, draw.integers(3, 30)))}
        for n in range(NUM_PASSAGES)
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.tsv").write_text("q1\tamber birch\nq2\tdune\n")
    return folder


def command(data, output, *flags):
    words = [
        sys.executable, "launchers/encode.py", "--model", data / "model", "--corpus", data / "corpus.jsonl",
        "--output", output, "--device=cpu", "--part_rows=20", "--dtype=float32", *flags,
    ]  # fmt: skip
    return list(map(str, words))


def run(words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def encoded(data):
    """The parts' bytes by name, made by one process without interruption."""
    done = run(command(data, data / "alone"))
    assert done.returncode == 0, done.stderr
    assert "700 vectors of 32 channels, float32, in 35 parts" in done.stdout
    return {path.name: path.read_bytes() for path in sorted((data / "alone").iterdir())}


def test_two_ranks_killed_and_run_again_make_what_one_process_makes(data, encoded, tmp_path, harness):
    output, work = tmp_path / "out", tmp_path / ".out.work" / "scratch"
    words = [sys.executable, "tests/launchers/spawn_ranks.py", "2", *command(data, output)]
    with harness.started(words, tmp_path / "log"):
        harness.wait_until(lambda: len(list(work.glob("part-*.json"))) >= 3, 120, "three parts")
    made = work.parent / "made"
    kept = {f"{path.stem}.npy": (made / f"{path.stem}.npy").stat().st_mtime_ns for path in work.glob("part-*.json")}
    assert 3 <= len(kept) < 35 and not output.exists(), "the kill came too late to prove anything"
    done = run(words)
    assert done.returncode == 0, done.stderr
    found = {path.name: path.read_bytes() for path in sorted(output.iterdir())}
    assert found == encoded  # bit for bit: parts are a function of the rows alone
    assert all((output / name).stat().st_mtime_ns == when for name, when in kept.items()), "a part was made twice"


def test_titles_and_lengths_decide_the_vectors_and_queries_have_their_own_side(data, encoded, tmp_path, launched):
    launched(encode.main, *command(data, tmp_path / "bare", "--no_titles", "--max_tokens=9")[2:])
    bare = open_embeddings(tmp_path / "bare")
    with_titles = open_embeddings(data / "alone")
    assert bare.manifest["max_tokens"] == 9 and with_titles.manifest["max_tokens"] == 40
    assert bare.manifest["collection_digest"] != with_titles.manifest["collection_digest"]
    words = command(data, tmp_path / "queries", "--kind=query")
    words[words.index("--corpus") + 1] = str(data / "queries.tsv")
    launched(encode.main, *words[2:])
    queries = open_embeddings(tmp_path / "queries", kind="query")
    assert queries.ids() == ["q1", "q2"] and queries.manifest["kind"] == "query"


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--part_rows=0"], 2, "part_rows is 0; it must be at least 1"),
        (["--model=/no/such/folder"], 2, "is not a folder"),
        (["--corpus=/no/such/corpus.jsonl"], 3, "/no/such/corpus.jsonl"),
        (["--dtype=float16"], 2, "was made from other inputs or settings (dtype was float32 and is float16)"),
    ],
)
def test_what_cannot_be_encoded_is_one_sentence_and_changes_nothing(flags, code, sentence, data, encoded, refused):
    words = command(data, data / "alone")
    for flag in flags:
        name, _, value = flag.partition("=")
        place = next(place for place, word in enumerate(words) if word.partition("=")[0] == name)
        words[place : place + (1 if "=" in words[place] else 2)] = [f"{name}={value}"]
    found, said = refused(encode.main, *words[2:])
    assert found == code and sentence in said
    assert {path.name: path.read_bytes() for path in sorted((data / "alone").iterdir())} == encoded
