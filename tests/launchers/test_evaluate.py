"""launchers/evaluate.py as users start it: tables, files, and one sentence with its exit code for every mistake."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from quincunx.launchers.evaluate import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, write_beir) -> Path:
    """A BEIR set of 30 queries and 50 passages, and two runs of 20 of them each."""
    generator = np.random.default_rng(0)
    passages, queries = [f"the number {k}" for k in range(50)], [f"which is {k}" for k in range(30)]
    write_beir(tmp_path / "set", passages, queries)
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"query_id": f"q{k}", "answers": [str(k)]}) + "\n" for k in range(30))
    )
    lines = [f"q{k}\tp{k}\t{1 + k % 3}\nq{k}\tp{k + 1}\t1\n" for k in range(30)]
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    (tmp_path / "qrels.trec").write_text("".join(f"q{k} 0 p{k} {1 + k % 3}\nq{k} 0 p{k + 1} 1\n" for k in range(30)))
    for name, noise in (("good.run", 3), ("bad.run", 9)):
        with open(tmp_path / name, "w") as file:
            for k in range(28):
                ids = generator.permutation(50)
                scores = -np.abs(ids - k) + noise * generator.standard_normal(50)
                best = np.argsort(-scores)[:20]
                for rank, at in enumerate(best, 1):
                    file.write(f"q{k} Q0 p{ids[at]} {rank} {scores[at]} test\n")
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, launched):
    monkeypatch.chdir(folder)
    return partial(launched, main)


def test_the_table_the_json_and_the_queries_say_the_same(folder, run):
    shown = run(
        "--run", "good.run", "--qrels", "qrels.tsv", "--compare", "bad.run", "--corpus", "set", "--queries", "set",
        "--output", "out/result.json", "--per_query", "out/all.jsonl",
    )  # fmt: skip
    record = json.loads((folder / "out" / "result.json").read_text())
    assert record["queries"] == {"judged": 30, "answered": 28, "missing": 2, "unjudged": 0, "below_relevant_from": 0}
    for name, value in record["measures"].items():
        assert value["low"] <= value["mean"] <= value["high"]
        assert f"{value['mean']:.4f}  {value['low']:.4f} to {value['high']:.4f}" in shown
        compared = record["comparison"]["measures"][name]
        assert compared["difference"] == pytest.approx(compared["mean"] - compared["other_mean"], abs=1e-12)
        assert f"{compared['wins']}/{compared['losses']}/{compared['ties']}" in shown
    lines = [json.loads(line) for line in (folder / "out" / "all.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and lines[29]["values"]["AP"] == 0.0
    mean = np.mean([line["values"]["nDCG@10"] for line in lines])
    assert mean == pytest.approx(record["measures"]["nDCG@10"]["mean"], abs=1e-12)


def test_trec_dl_grades_and_tsv_per_query(folder, run):
    shown = run(
        "--run", "good.run", "--qrels", "qrels.trec", "--relevant_from", "2", "--measures", "MRR@10", "nDCG@10", "AP",
        "--per_query", "all.tsv", "--compare", "bad.run",
    )  # fmt: skip
    assert "10 queries have no passage of grade 2 or more" in shown
    header, *rows = [line.split("\t") for line in (folder / "all.tsv").read_text().splitlines()]
    names = ["RR(rel=2)@10", "nDCG@10", "AP(rel=2)"]
    assert header == ["query_id", *names, *(f"other {name}" for name in names)] and len(rows) == 30


def test_answer_match_with_and_without_qrels(folder, run):
    arguments = ["--run", "good.run", "--answers", "answers.jsonl", "--corpus", "set", "--answer_depths", "1", "20"]
    run(*arguments, "--output", "a.json")
    run(*arguments, "--qrels", "qrels.tsv", "--output", "b.json", "--compare", "bad.run")
    measures = [json.loads((folder / name).read_text())["measures"] for name in ("a.json", "b.json")]
    assert list(measures[0]) == ["AnswerHit@1", "AnswerHit@20"]
    assert all(measures[1][name] == value for name, value in measures[0].items()) and "RR@10" in measures[1]
    with open(folder / "good.run") as file:
        hits = sum(line.split()[2].removeprefix("p") == line.split()[0].removeprefix("q") for line in file)
    assert measures[0]["AnswerHit@20"]["mean"] == pytest.approx(hits / 30)


@pytest.mark.parametrize(
    ("changes", "arguments", "code", "message"),
    [
        ({"good.run": "q99 Q0 p1 1 2 t\n"}, [], 3, "answers none of the 30 judged queries"),
        ({"qrels.tsv": "q1\tx9\t1\n"}, ["--corpus", "set"], 3, "qrels.tsv names 1 passages that set does not"),
        ({}, ["--qrels", "none.tsv"], 3, "none.tsv cannot be read: No such file"),
        ({}, ["--relevant_from", "7"], 3, "no passage has grade 7 or more"),
        ({}, ["--answers", "answers.jsonl"], 2, "answer match reads the passages: give --corpus"),
        (
            {"answers.jsonl": '{"query_id": "q1", "answers": ["1"]}\n'},
            ["--answers", "answers.jsonl", "--corpus", "set"],
            3,
            "the qrels judge 30 queries and the answers cover 1, of which 1 are the same",
        ),
        (
            {"answers.jsonl": '{"query_id": "z9", "answers": ["1"]}\n'},
            ["--answers", "answers.jsonl", "--corpus", "set", "--queries", "set"],
            3,
            "answers.jsonl names 1 queries that set does not",
        ),
        ({}, ["--output", "result.txt"], 2, "give a name ending in .json"),
        ({}, ["--per_query", "good.run"], 2, "give a name ending in .jsonl or .tsv"),
        ({}, ["--per_query", "qrels.tsv"], 2, "qrels.tsv is the qrels itself"),
        ({}, ["--queries", "set/queries.jsonl", "--per_query", "set/queries.jsonl"], 2, "is the queries itself"),
    ],
)
def test_mistakes_end_with_one_sentence_their_exit_code_and_nothing_overwritten(
    folder, changes, arguments, code, message, monkeypatch, refused
):
    for name, content in changes.items():
        (folder / name).write_text(content)
    (folder / "result.json").write_text("earlier")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    given = {"--run": "good.run", "--qrels": "qrels.tsv", "--output": "result.json"}
    given |= dict(zip(arguments[::2], arguments[1::2]))
    monkeypatch.chdir(folder)
    found, said = refused(main, *(word for pair in given.items() for word in pair))
    assert found == code and message in said
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_unknown_ids_and_queries_without_positives_can_be_left_out_and_are_counted(folder, run):
    base = ["--run", "good.run", "--output", "r.json", "--qrels"]
    with open(folder / "qrels.tsv", "a") as file:
        file.write("q1\tx9\t1\nz9\tp1\t1\nq29\tp7\t0\n")
    (folder / "none.tsv").write_text((folder / "qrels.tsv").read_text() + "q30\tp1\t0\n")
    shown = run(*base, "qrels.tsv", "--corpus", "set", "--queries", "set", "--unknown_ids", "drop")
    assert "left out of the qrels: 1 unknown queries" in shown and "1 unknown passages" in shown
    for choice, judged in (("keep", 32), ("drop", 31)):
        run(*base, "none.tsv", "--no_positives", choice)
        assert json.loads((folder / "r.json").read_text())["queries"]["judged"] == judged
