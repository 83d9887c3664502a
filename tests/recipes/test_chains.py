"""The shipped chain on 60 invented passages: killed on the way, run again, run twice; and the check of every chain."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAINS = ROOT / "recipes" / "chains"
NUM_PASSAGES = 60
NUM_QUERIES = {"train": 24, "dev": 16, "test": 16}
SMALLER = {
    r"--steps \d+": "--steps 6", "--checkpoint_every 25": "--checkpoint_every 2", "--log_every 5": "--log_every 1",
    r"--global_batch \d+": "--global_batch 8", "--probe_every 25": "--probe_every 3", "--sample 2000": "--sample 20",
    "--probe_queries 100 --probe_passages 200": "--probe_queries 8 --probe_passages 20",
    "--max_passage_tokens 80": "--max_passage_tokens 32", "--max_pair_tokens 96": "--max_pair_tokens 48",
    "--max_tokens 80": "--max_tokens 32",
}  # fmt: skip
"""What of small.sh is replaced by what, so that it takes two minutes."""
pytestmark = pytest.mark.timeout(1800)  # the first test of a module that runs makes the whole chain, too


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, save_tiny_bert, write_beir, invented_words) -> Path:
    """A BEIR folder of passages of invented words and queries of three words of one, and encoder/, a BERT of 2 x 32."""
    folder, draw = tmp_path_factory.mktemp("beir"), random.Random(0)
    words = invented_words(draw, 150)
    passages = [" ".join(draw.sample(words, draw.randint(8, 14))) for _ in range(NUM_PASSAGES)]
    queries, splits = [], {}
    for split, number in NUM_QUERIES.items():
        places = range(len(queries), len(queries) + number)
        queries += [" ".join(draw.sample(passages[place].split(), 3)) for place in places]
        splits[split] = [(place, place, 1) for place in places]
    write_beir(folder, passages, queries, **splits)
    save_tiny_bert(folder / "encoder", passages, 300, pooler=False, max_position_embeddings=64)
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """small.sh with small numbers, beside a copy of stage.sh that finds our launchers."""
    folder = tmp_path_factory.mktemp("chains")
    text = (CHAINS / "small.sh").read_text()
    for pattern, smaller in SMALLER.items():
        assert re.search(pattern, text), pattern
        text = re.sub(pattern, smaller, text)
    (folder / "small.sh").write_text(text)
    stage = (CHAINS / "stage.sh").read_text()
    place = '$(cd "$(dirname "${BASH_SOURCE[0]}")/../../launchers" && pwd)'
    assert place in stage
    (folder / "stage.sh").write_text(stage.replace(place, str(ROOT / "launchers")))
    return folder / "small.sh"


def begin(chain: Path, tiny: Path, output: Path, log: Path, **variables: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {
        "DATA": str(tiny),
        "ENCODER": str(tiny / "encoder"),
        "OUTPUT": str(output),
        "OMP_NUM_THREADS": "1",
        "PATH": path,
    }
    with open(log, "w") as file:
        return subprocess.Popen(
            ["bash", str(chain)],
            env={**os.environ, **given, **variables},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def run(*arguments, **variables: str) -> str:
    """What a chain that runs to its end prints."""
    process = begin(*arguments, **variables)
    code, text = process.wait(900), arguments[-1].read_text()
    assert code == 0, text
    return text


def made(folder: Path) -> dict[str, bytes]:
    """Everything that a chain promises to make byte for byte: but for checkpoints, metrics and the report."""
    kept = re.compile(r"\.(trec|jsonl|tsv|npy|txt|safetensors)$")
    files = (path for path in folder.rglob("*") if path.is_file() and kept.search(path.name))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "metrics.jsonl"}


@pytest.fixture(scope="module")
def whole(chain, tiny, tmp_path_factory) -> Path:
    """The output of a chain that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(chain, tiny, folder / "out", folder / "log")
    return folder / "out"


def test_a_chain_judges_every_system_and_reports(whole):
    systems = ("bm25", "start", "retriever1", "retriever2", "reranker", "distil")
    page = (whole / "report" / "report.md").read_text()
    for system in systems:
        for split in ("dev", "test"):
            record = json.loads((whole / f"{system}.{split}.json").read_text())
            assert record["queries"]["judged"] == NUM_QUERIES[split]
        assert page.partition("## Training")[0].count(f"\n| {system} | ") == 2, page
    assert (whole / "report" / "losses.svg").exists() and "| distil | kl |" in page


def test_a_chain_killed_in_a_training_goes_on_and_makes_the_same(whole, chain, tiny, tmp_path):
    output = tmp_path / "out"
    process = begin(chain, tiny, output, tmp_path / "log")
    deadline = time.monotonic() + 300
    while not list((output / "retriever1" / "checkpoints").glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    text = run(chain, tiny, output, tmp_path / "log")
    assert text.count("nothing to do") >= 5, "splits, results and negatives of BM25 are there"
    assert made(output) == made(whole)
    again = run(chain, tiny, output, tmp_path / "log")
    assert "pairs scored" not in again and made(output) == made(whole)


@pytest.mark.slow
def test_thirty_kills_at_random_moments_leave_the_same_artefacts(whole, chain, tiny, tmp_path):
    """kill -9 of everything that the chain has started, each time after another few seconds."""
    output, draw, kills = tmp_path / "out", random.Random(1), 0
    for number in range(200):
        process = begin(chain, tiny, output, tmp_path / f"log-{number}")
        try:
            code = process.wait(draw.uniform(1, 40) if kills < 30 else None)
            assert code == 0, (tmp_path / f"log-{number}").read_text()
            if kills >= 30:
                break
            shutil.rmtree(output)  # it came through: from the beginning, until thirty have been killed
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills == 30 and made(output) == made(whole)


@pytest.mark.parametrize("name", sorted(path.stem for path in CHAINS.glob("*.sh") if path.stem != "stage"))
def test_every_chain_passes_its_own_check_in_seconds_and_runs_nothing(name, tiny, tmp_path):
    beir = tmp_path / "beir"
    beir.mkdir()
    (beir / "one").symlink_to(tiny)
    text = run(CHAINS / f"{name}.sh", tiny, tmp_path / "out", tmp_path / "log", CHECK="1", BEIR=str(beir))
    assert text.count("settings are sound") == text.count("\n== ") > 8
    assert not (tmp_path / "out").exists()


def test_a_check_finds_a_mistake_in_the_last_stage(chain, tiny, tmp_path):
    text = chain.read_text()
    wrong = chain.with_name("wrong.sh")
    wrong.write_text(text.replace("--contrastive_weight", "--contrastiv_weight"))
    process = begin(wrong, tiny, tmp_path / "out", tmp_path / "log", CHECK="1")
    assert process.wait(120) == 2
    assert "did you mean --contrastive_weight?" in (tmp_path / "log").read_text()
