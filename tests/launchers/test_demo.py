"""launchers/demo.py and demo.py: what is skipped, what fails, and what the end prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quincunx.engine.retrieval.evaluation import Comparison
from quincunx.launchers import demo
from quincunx.launchers.demo import LABELS

SCRIPT = Path(__file__).parents[2] / "recipes" / "chains" / "demo.sh"
RIGHT_AT = {"bm25": 4, "random": 8, "mlm": 5, "ours": 1, "untuned": 2}
"""System -> rank of the right passage, for every query of `output`."""


def write_run(path: Path, rank: int, num_queries: int) -> None:
    """A TREC run whose right passage (p7 for q7) is at `rank` for every query."""
    lines = []
    for query in range(num_queries):
        found = [f"wrong{k}" for k in range(1, 10)]
        found.insert(rank - 1, f"p{query}")
        lines += [f"q{query} Q0 {id} {place} {1 / place} tag\n" for place, id in enumerate(found, 1)]
    path.write_text("".join(lines))


@pytest.fixture
def output(tmp_path) -> Path:
    """What a demo leaves behind for its end, made up: 40 queries."""
    qrels = tmp_path / "shards" / "probe" / "qrels" / "test.tsv"
    qrels.parent.mkdir(parents=True)
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{k}\tp{k}\t1\n" for k in range(40)))
    for name, rank in RIGHT_AT.items():
        write_run(tmp_path / f"{name}.trec", rank, 40)
    return tmp_path


def test_the_table_has_a_line_for_every_system_with_its_interval_and_what_ours_has_more(output, capsys):
    assert demo.print_worth(output) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("40 held-out queries")
    for name, line in zip(LABELS, lines[1:6], strict=True):
        mean = 1 / RIGHT_AT[name]
        cells = line.removeprefix(LABELS[name]).split()
        assert cells[:4] == [f"{mean:.3f}", f"{mean:.3f}", "to", f"{mean:.3f}"]
        assert cells[4:8] == (
            [] if name == "ours" else [f"{1 - mean:+.3f}", f"{1 - mean:+.3f}", "to", f"{1 - mean:+.3f}"]
        )
    assert "was worth +0.875 MRR@10 over random weights and +0.800 MRR@10 over MLM alone" in " ".join(lines)


@pytest.mark.parametrize("rank", [1, 5, 8])
def test_a_rival_that_is_as_good_or_better_fails_the_demo(output, rank):
    write_run(output / "ours.trec", 5, 40)
    write_run(output / "mlm.trec", rank, 40)
    failures = demo.print_worth(output)
    assert [LABELS["mlm"] in failure for failure in failures] == ([True] if rank <= 5 else [])


def gain(difference: float, t_test_p: float, randomisation_p: float) -> Comparison:
    low, high = difference - 0.1, difference + 0.1
    return Comparison(0.5, 0.5 - difference, difference, low, high, t_test_p, randomisation_p, wins=1, losses=1, ties=1)


def test_a_difference_counts_only_if_both_tests_say_so():
    assert demo.is_better(gain(0.1, 0.009, 0.002))
    assert not demo.is_better(gain(0.1, 0.011, 0.002))
    assert not demo.is_better(gain(0.1, 0.002, 0.011))
    assert not demo.is_better(gain(-0.1, 0.002, 0.002))


def test_the_sentence_says_which_difference_is_not_significant():
    text = demo.sentence({"random": gain(0.2, 0.001, 0.001), "mlm": gain(-0.02, 0.4, 0.3)})
    assert "+0.200 MRR@10 over random weights and -0.020 MRR@10 over MLM alone (not significant, p = 0.4)" in text


@pytest.mark.parametrize(
    ("loss", "probe", "failed"),
    [
        (5.0, 0.2, []),
        (6.0, 0.2, ["the held-out loss of mkp"]),
        (5.0, 0.19, ["the probe"]),
        (float("nan"), 0.2, ["mkp"]),
    ],
)
def test_a_loss_above_its_unigram_or_a_probe_that_does_not_double_fails_the_demo(tmp_path, capsys, loss, probe, failed):
    rows = []
    for step, (value, found) in enumerate([(8.0, 0.1), (loss, probe)]):
        values = {"held_out/loss/mkp": value, "held_out/unigram/mkp": 5.5, "held_out/accuracy/mkp": 0.25}
        at = {"step": step, "time": 0.0}
        rows += [{**at, "kind": "held_out", **values}, {**at, "kind": "probe", "probe/mrr@10": found}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row).replace("NaN", '"nan"') + "\n" for row in rows))
    failures = demo.print_learned(tmp_path)
    assert len(failures) == len(failed) and all(what in failure for what, failure in zip(failed, failures))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"8.00 {loss:.2f} 5.50" in printed and f"0.100 {probe:.3f}" in printed


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> list[list[str]]:
    """The words of every command of the demo, as its check shows them."""
    out = tmp_path_factory.mktemp("demo") / "out"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"CHECK": "1", "OUTPUT": str(out), "SEED": "7", "PATH": path}
    done = subprocess.run(["bash", SCRIPT], env=os.environ | given, capture_output=True, text=True, check=True)
    shown = [line.removeprefix("== ").replace(str(out), "OUT") for line in done.stdout.splitlines() if "== " in line]
    return [line.split() for line in shown]


def test_held_out_queries_are_for_measuring_only_and_training_ones_for_training_only(commands):
    for words in commands:
        command, trained = " ".join(words), words[0] in ("mine", "finetune") or "OUT/bm25.train.trec" in words
        assert not trained or "shards/probe" not in command, command
        if words[0] in ("encode", "search") and not trained:
            assert "shards/probe" in command and "pairs" not in command, command


def test_every_training_has_the_seed_and_mlm_alone_differs_from_ours_in_its_tasks_only(commands):
    trainings = [words for words in commands if words[0] in ("pretrain", "finetune")]
    assert len(trainings) == 6 and all("--seed 7" in " ".join(words) for words in trainings)
    ours, mlm, _ = (set(words) for words in trainings[:3])
    assert ours ^ mlm == {"OUT/ours", "OUT/mlm", "--tasks", "--task_weights", "None", "--tracking", "none"}


def shell(tmp_path: Path, lines: str) -> subprocess.CompletedProcess:
    """The demo's functions, then other lines in place of its stages."""
    text = SCRIPT.read_text().partition("\nstage build_shards")[0]
    text = text.replace('"$(dirname "$0")/stage.sh"', str(SCRIPT.with_name("stage.sh")))
    (tmp_path / "demo.sh").write_text(text + "\n" + lines)
    environment = os.environ | {"OUTPUT": str(tmp_path / "out"), "CHECK": ""}
    return subprocess.run(["bash", tmp_path / "demo.sh"], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (f"interrupt 30 run {sys.executable} -c 'raise SystemExit(3)'", 3, ""),
        ("lose() { echo lost a wheel; return 4; }\nbeside c lose; beside d true; all", 4, "lost a wheel"),
    ],
    ids=["before its interruption", "beside another"],
)
def test_a_command_that_fails_ends_the_demo_with_its_code(tmp_path, lines, code, said):
    done = shell(tmp_path, f"{lines}\necho after")
    assert done.returncode == code and said in done.stderr and "after" not in done.stdout.splitlines()


@pytest.mark.slow
def test_the_demo_shows_what_pre_training_is_worth(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"OUTPUT": str(tmp_path / "demo"), "PATH": path}
    root = Path(__file__).parents[2]
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "The ranks saved step" in done.stdout and "it goes on where it stopped" in done.stdout
