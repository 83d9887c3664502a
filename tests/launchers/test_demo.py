"""launchers/demo.py and demo_retrieval.py: what is skipped, what fails, and what the end prints."""

import json
import socket
import sys
from pathlib import Path

import pytest

from quincunx.engine.retrieval.measures import Comparison
from quincunx.launchers import demo, demo_retrieval
from quincunx.launchers.demo_retrieval import TUNED

MEANS = {"bm25": 0.44, "start": 0.53, "pre-trained": 0.38, TUNED: 0.59}


def record_of(mean: float) -> dict:
    return {
        "queries": {"judged": 4},
        "measures": {"RR@10": {"mean": mean, "low": mean - 0.05, "high": mean + 0.06}, "R@100": {"mean": 0.9}},
    }


@pytest.fixture
def output(tmp_path) -> Path:
    """What a demo leaves behind, made up: four queries whose right passage is first, second, fourth and not found."""
    held_out, results = tmp_path / "shards" / "probe", tmp_path / "results"
    (held_out / "qrels").mkdir(parents=True)
    results.mkdir()
    passages = [{"_id": f"p{k}", "title": "", "text": f"passage {k} " + "and so on " * 30} for k in range(6)]
    queries = [{"_id": f"q{k}", "text": f"What is number {k}?"} for k in range(4)]
    for name, rows in (("corpus", passages), ("queries", queries)):
        (held_out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qrels = "".join(f"q{k}\tp{k}\t1\n" for k in range(4))
    (held_out / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    found = {"q0": "p0 p1 p2 p3", "q1": "p0 p1 p2 p3", "q2": "p4 p0 p1 p2", "q3": "p0 p1 p2 p4"}
    lines = [
        f"{query} Q0 {id} {rank} {1 - rank / 10} tag\n"
        for query, ids in found.items()
        for rank, id in enumerate(ids.split(), 1)
    ]
    (results / f"{TUNED}.trec").write_text("".join(lines))
    for name, mean in MEANS.items():
        if name != TUNED:
            (results / f"{name}.trec").write_text("q0 Q0 p5 1 0.5 tag\n")
        (results / f"{name}.json").write_text(json.dumps(record_of(mean)))
    return tmp_path


def test_the_table_has_a_line_for_every_system_with_its_interval_and_the_difference_to_the_last(output, capsys):
    demo_retrieval.print_comparison(output)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 held-out queries")
    for (name, mean), line in zip(MEANS.items(), lines[2:6], strict=True):
        label = next(system.label for system in demo_retrieval.systems(output) if system.name == name)
        assert line.startswith(label)
        cells = line.removeprefix(label).split()
        assert cells[:4] == [f"{mean:.3f}", f"{mean - 0.05:.3f}", "to", f"{mean + 0.06:.3f}"]
        # The other runs find nothing: the difference is the retriever's MRR@10 itself, (1 + 1/2 + 1/4 + 0) / 4.
        assert cells[4:5] == ([] if name == TUNED else ["+0.438"])


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.01, 0.2, "better than"), (-0.2, -0.01, "worse than"), (-0.1, 0.1, "not clearly different from")],
)
def test_the_sentence_under_the_table_follows_the_numbers_whichever_way_they_fall(low, high, words):
    gain = Comparison(
        mean=0.5,
        other_mean=0.5,
        difference=(low + high) / 2,
        low=low,
        high=high,
        t_test_p=0.5,
        randomisation_p=0.5,
        wins=1,
        losses=1,
        ties=1,
    )
    text = " ".join(demo_retrieval.how_to_read(dict.fromkeys(("pre-trained", "start", "bm25"), gain)).split())
    assert f"is {words} what it started from, {words} BM25, and {words} all-MiniLM-L6-v2 as it comes" in text


def test_examples_go_from_well_to_badly_answered_and_mark_the_right_passage(output, capsys):
    demo_retrieval.print_comparison(output)
    blocks = capsys.readouterr().out.split("\n\n")[-3:]
    firsts = [block.splitlines()[0] for block in blocks]
    assert firsts == ["query: What is number 0?", "query: What is number 2?", "query: What is number 3?"]
    marked = [[line for line in block.splitlines() if line.startswith(" *")] for block in blocks]
    assert marked[0][0].split()[1:5] == ["1", "0.900", "passage", "0"]
    assert marked[1][0].split()[1:5] == ["4", "0.600", "passage", "2"] and len(blocks[1].splitlines()) == 5
    assert marked[2][0].startswith(" *not in the first 4:  passage 3")
    assert [len(lines) for lines in marked] == [1, 1, 1]
    assert all(len(line) <= 120 for block in blocks for line in block.splitlines())


def test_what_is_there_is_not_made_again_and_a_failure_ends_the_demo_with_its_code(tmp_path, capsys):
    made = tmp_path / "made"
    write = [sys.executable, "-c", f"open({str(made)!r}, 'a').write('x')"]
    demo.make(write, made)
    demo.make(write, made)
    assert made.read_text() == "x"
    with pytest.raises(SystemExit) as stopped:
        demo.make([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "other")
    assert stopped.value.code == 3
    assert "ended with exit code 3" in capsys.readouterr().err


def test_the_chain_asks_held_out_queries_only_in_measuring_and_training_ones_only_in_training(tmp_path):
    commands: list[list[str]] = []
    demo_retrieval.fine_tune("python", ["deepspeed"], tmp_path, lambda command, made: commands.append(command))
    assert commands and not any("probe" in word for command in commands for word in command)
    training = len(commands)
    demo_retrieval.measure_all("python", tmp_path, lambda command, made: commands.append(command))
    assert len(commands) > training
    assert not any("pairs" in word for command in commands[training:] for word in command)


def test_beside_another_run_the_ranks_meet_at_a_port_of_their_own():
    with socket.socket() as other_run:
        other_run.bind(("127.0.0.1", 0))
        port = other_run.getsockname()[1]
        assert demo.launcher_of_two_ranks(port) == ["deepspeed", "--num_gpus", "2"]  # bound, nobody listens
        other_run.listen()
        *launcher, flag, own = demo.launcher_of_two_ranks(port)
    assert launcher == ["deepspeed", "--num_gpus", "2"] and flag == "--master_port" and int(own) not in (0, port)


def test_a_run_that_was_past_the_interruption_is_not_interrupted_again(tmp_path):
    """The command outlives the half second after which the demo looks; a signal would end it with -15."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 60, "kind": "train"}\n')
    command = [sys.executable, "-c", "import time; time.sleep(1.2); raise SystemExit(5)"]
    assert demo.train_until(command, tmp_path, 60) == 5


def test_an_output_folder_with_something_else_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    assert demo.main() == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert "holds something else than a demo" in capsys.readouterr().err
