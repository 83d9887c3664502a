"""mine.py as a user runs it: files in, candidates and counts out, one sentence for what cannot be mined."""

import json

import pytest

from quincunx.data_shards.artefact import open_artefact
from quincunx.engine.retrieval.candidates import CANDIDATES, Candidates, iterate_candidates, write_candidates
from quincunx.launchers.mine import main


@pytest.fixture
def data(tmp_path):
    """Six passages (one with a title), two queries, their qrels and a run, in the formats of the field."""
    passages = [{"_id": f"p{n}", "title": "Amber" if n == 5 else "", "text": f"text {n}"} for n in range(6)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    (tmp_path / "queries.tsv").write_text("q0\tfirst\nq1\tsecond\n")
    (tmp_path / "qrels.tsv").write_text("q0\t0\tp3\t1\nq1\t0\tp0\t1\n")
    ranks = {"q0": [1, 3, 5, 2], "q1": [0, 4]}
    (tmp_path / "run.trec").write_text(
        "".join(
            f"{query} Q0 p{n} {rank} {9 - rank} bm25\n" for query, ns in ranks.items() for rank, n in enumerate(ns, 1)
        )
    )
    return tmp_path


def command(data, *flags, run="run.trec", qrels="qrels.tsv"):
    words = [
        "--run", data / run, "--qrels", data / qrels, "--corpus", data / "corpus.jsonl",
        "--queries", data / "queries.tsv", "--output", data / "out.jsonl", *flags,
    ]  # fmt: skip
    return list(map(str, words))


def test_negatives_of_a_run_come_out_with_their_counts_and_a_second_call_changes_nothing(data, launched, refused):
    shown = launched(main, *command(data, "--depth=3"))
    rows = [Candidates("q0", ("p3",), ("p1", "p5")), Candidates("q1", ("p0",), ("p4",))]
    assert list(iterate_candidates(data / "out.jsonl")) == rows
    manifest = open_artefact(data / "out.jsonl", CANDIDATES, single=True, verify=True)
    assert manifest["made_from"]["rules"]["depth"] == 3 and manifest["details"]["queries"] == 2
    assert manifest["details"]["mining"]["left_out_positives"] == 2
    assert "left out positives" in shown

    written = (data / "out.jsonl").stat().st_mtime_ns
    assert "nothing to do" in launched(main, *command(data, "--depth=3"))
    code, said = refused(main, *command(data, "--depth=4"))
    assert code == 2 and "was made from other inputs or settings (rules.depth was 3 and is 4)" in said
    assert (data / "out.jsonl").stat().st_mtime_ns == written


def test_answers_the_teachers_margin_and_random_fill_work_together(data, launched):
    (data / "answers.jsonl").write_text('{"query_id": "q0", "answers": ["text 1", "amber"]}\n')
    scored = [
        Candidates("q0", ("p3",), ("p1", "p5", "p2"), {"p3": 5.0, "p1": 0.0, "p5": 4.5, "p2": 3.0}),
        Candidates("q1", ("p0",), ("p4",), {"p0": 1.0, "p4": 2.0}),
    ]
    write_candidates(data / "scored.jsonl", scored)
    flags = ["--answers", data / "answers.jsonl", "--teacher_scores", data / "scored.jsonl", "--margin=1"]
    launched(main, *command(data, *flags, "--random_fill=3"))
    first, second = list(iterate_candidates(data / "out.jsonl"))
    assert first.negatives[0] == "p2" and set(first.negatives[1:]) <= {"p0", "p4", "p5"}
    assert len(first.negatives) == len(second.negatives) == 3
    counts = open_artefact(data / "out.jsonl", CANDIDATES, single=True)["details"]["mining"]
    assert (counts["mined"], counts["random"]) == (1, 5)
    assert (counts["left_out_with_an_answer"], counts["left_out_above_the_teachers_margin"]) == (1, 2)
    assert counts["queries_without_answers"] == 1


def test_what_cannot_be_mined_is_refused_in_one_sentence_and_nothing_is_written(data, refused):
    (data / "unjudged.tsv").write_text("q0\t0\tp3\t1\n")
    for words, code, sentence in (
        (command(data, qrels="unjudged.tsv"), 3, "1 queries of the run (first: q1): give the qrels of these queries"),
        (command(data, "--depth=0"), 2, "depth is 0"),
    ):
        found, said = refused(main, *words)
        assert found == code and sentence in said, said
    assert not list(data.glob("*out.jsonl*"))
