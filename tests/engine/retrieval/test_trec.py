"""Qrels, runs and DPR files: read, written, compared with their collections; complaints name file and line."""

import json

import numpy as np
import pytest

from quincunx.data_shards.errors import DataError
from quincunx.engine.retrieval.collection import make_collection
from quincunx.engine.retrieval.trec import (
    check_against,
    check_qrels,
    read_answers,
    read_dpr,
    read_qrels,
    read_run,
    stream_run,
    write_qrels,
    write_run,
)

QRELS = {"q1": {"p1": 2, "p2": 0}, "q2": {"p1": -1}}
QUERIES = make_collection(["q1", "q2"], ["one", "two"], "queries")
PASSAGES = make_collection(["p1", "p2"], ["one", "two"], "corpus")


def test_qrels_of_every_form_are_the_same(tmp_path):
    (tmp_path / "beir.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t2\nq1\tp2\t0\n\nq2\tp1\t-1\n")
    (tmp_path / "trec.txt").write_text("q1 0 p1 2\nq1  0 p2 0\nq2 Q0 p1 -1")
    (tmp_path / "msmarco.tsv").write_text("q1\t0\tp1\t2\r\nq1\t0\tp2\t0\r\nq1\t0\tp2\t0\r\nq2\t0\tp1\t-1\r\n")
    for name in ("beir.tsv", "trec.txt", "msmarco.tsv"):
        assert read_qrels(tmp_path / name) == QRELS
    write_qrels(tmp_path / "written", QRELS)
    assert read_qrels(tmp_path / "written") == QRELS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q1 0 p1 1\nq1 0 p1\n", ":2: 'q1 0 p1' is neither"),
        ("q1 0 p1 1\nq1 0 p1 1 x\n", ":2: "),
        ("q1\tp1\t1.5\n", ":1: "),
        ("q1 0 p1 1\nq1 0 p1 2\n", ":2: passage p1 of query q1 is judged 2 here and 1 before"),
        ("query-id\tcorpus-id\tscore\n", " holds no judgements"),
    ],
)
def test_bad_qrels_are_named_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "qrels.tsv"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_qrels(path)
    assert f"{path}{message}" in str(caught.value)


def test_a_run_is_read_as_it_was_written_to_the_last_bit(tmp_path):
    generator = np.random.default_rng(0)
    for kind in (np.float32, np.float64):
        scores = (generator.standard_normal(500) * 10.0 ** generator.integers(-30, 30, 500)).astype(kind)
        ids = [f"p{k}" for k in range(500)]
        assert write_run(tmp_path / "run", [("q", ids, scores)], "tag") == {"queries": 1, "results": 500}
        found = read_run(tmp_path / "run")["q"]
        assert all(kind(found[id]) == score for id, score in zip(ids, scores))
        assert list(found.values()) == sorted(found.values(), reverse=True)
        if kind is np.float64:
            write_run(tmp_path / "again", [("q", found, list(found.values()))], "tag")
            assert (tmp_path / "again").read_bytes() == (tmp_path / "run").read_bytes()


def test_ranks_start_at_one_and_equal_scores_stand_by_id(tmp_path):
    write_run(tmp_path / "run", [("q", ["b", "c", "a"], [1.0, 2.0, 1.0])], "me")
    assert (tmp_path / "run").read_text() == "q Q0 c 1 2.0 me\nq Q0 a 2 1.0 me\nq Q0 b 3 1.0 me\n"


def test_a_query_may_come_in_pieces(tmp_path):
    (tmp_path / "run").write_text("q1 Q0 a 1 2 t\nq2 Q0 a 1 2 t\nq1 Q0 b 2 1 t\n")
    assert read_run(tmp_path / "run") == {"q1": {"a": 2.0, "b": 1.0}, "q2": {"a": 2.0}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q Q0 a 1 2 t\nq Q0 b 2 nan t\n", ":2: the score of passage b for query q is nan"),
        ("q Q0 a 1 inf t\n", ":1: the score of passage a for query q is inf"),
        ("q Q0 a 1 2 t\nr Q0 a 1 2 t\nq Q0 a 2 1 t\n", ":3: passage a occurs a second time for query q"),
        ("q Q0 a 1 2 t\nq a 1\n", ":2: 'q a 1' is not query, Q0, passage, rank, score, tag"),
        ("q Q0 a 1 high t\n", ":1: "),
        ("\n", " holds no results"),
    ],
)
def test_bad_runs_are_named_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "run.txt"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_run(path)
    assert f"{path}{message}" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("q", ["a", "b"], [1.0, float("nan")])], "a score of query q is not finite"),
        ([("q", ["a b"], [1.0])], "no place for the id 'a b' with white space"),
    ],
)
def test_a_bad_run_is_not_written_and_the_file_stays(tmp_path, rows, message):
    path = tmp_path / "run"
    write_run(path, [("q", ["a"], [1.0])], "tag")
    before = path.read_bytes()
    with pytest.raises(DataError, match=message):
        write_run(path, rows, "tag")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_unknown_ids_are_counted_and_named_or_dropped():
    qrels = {"q1": {"p1": 1, "x1": 1}, "q9": {"p1": 1}, "q2": {"x1": 1, "x2": 0}}
    with pytest.raises(DataError, match=r"qrels names 1 queries that queries does not have \(first: q9\)"):
        check_against(qrels, QUERIES, PASSAGES, "qrels")
    with pytest.raises(DataError, match=r"qrels names 2 passages that corpus does not have \(first: x1, x2\)"):
        check_against(qrels, None, PASSAGES, "qrels")
    kept, counts = check_against(qrels, QUERIES, PASSAGES, "qrels", drop=True)
    assert kept == {"q1": {"p1": 1}} and counts == {"unknown_queries": 1, "unknown_passages": 3}
    assert check_against(QRELS, QUERIES, PASSAGES, "qrels") == (QRELS, {"unknown_queries": 0, "unknown_passages": 0})
    with pytest.raises(DataError, match="names no query and passage of these collections"):
        check_against({"q9": {"p1": 1}}, QUERIES, None, "qrels", drop=True)


def test_queries_without_positives_are_named_kept_or_dropped():
    def check(qrels, choice):
        return check_qrels(qrels, "qrels", None, None, False, choice, "pray")

    with pytest.raises(DataError, match=r"relevant to 1 of 2 queries \(first: q2\): remove these queries, or pray"):
        check(QRELS, "stop")
    none = {"unknown_queries": 0, "unknown_passages": 0, "queries_without_positives": 1}
    assert check(QRELS, "keep") == (QRELS, none)
    assert check(QRELS, "drop") == ({"q1": QRELS["q1"]}, none) == check({**QRELS, "q2": {}}, "drop")


def test_a_run_is_read_query_by_query_in_the_order_of_scores(tmp_path):
    lines = ["q1 Q0 a 1 0.5 x", "q1 Q0 b 2 2.5 x", "q1 Q0 c 3 0.5 x", "", "q2\tQ0\td\t1\t-1e-3\tx"]
    (tmp_path / "run").write_text("\n".join(lines) + "\n")
    assert list(stream_run(tmp_path / "run")) == [("q1", ["b", "a", "c"]), ("q2", ["d"])]
    assert next(stream_run(tmp_path / "run", 2)) == ("q1", ["b", "a"])
    (tmp_path / "run").write_text("q1 Q0 a 1 1 x\nq2 Q0 a 1 1 x\nq1 Q0 b 2 1 x\n")
    with pytest.raises(DataError, match="run:3: query q1 continues after other queries"):
        list(stream_run(tmp_path / "run"))


def test_dpr_files_give_questions_answers_and_judgements(tmp_path):
    records = [
        {
            "question": "who flew first", "answers": ["Wright", "the Wrights"],
            "positive_ctxs": [{"passage_id": 12, "text": "t"}, {"psg_id": "12"}, {"psg_id": "13"}],
        },
        {"question": "and then", "answers": [], "positive_ctxs": []},
    ]  # fmt: skip
    path = tmp_path / "nq-dev.json"
    path.write_text(json.dumps(records, indent=4))
    queries, answers, qrels = read_dpr(path)
    assert queries.texts() == ["who flew first", "and then"]
    assert answers == {"0": ["Wright", "the Wrights"], "1": []} == read_answers(path)
    assert qrels == {"0": {"12": 1, "13": 1}, "1": {}}
    for wrong, message in (
        ({"positive_ctxs": ["12"]}, "not a list of objects"),
        ({"question": None}, "question is None"),
    ):
        path.write_text(json.dumps([records[0] | wrong]))
        with pytest.raises(DataError, match=f"record 1: .*{message}"):
            read_dpr(path)


def test_answers_of_every_form(tmp_path):
    (tmp_path / "a.csv").write_text("who\t['x', \"y's\"]\n")
    (tmp_path / "a.jsonl").write_text('{"query_id": "0", "answers": ["x", "y\'s"]}\n')
    for name in ("a.csv", "a.jsonl"):
        assert read_answers(tmp_path / name) == {"0": ["x", "y's"]}
    (tmp_path / "b.jsonl").write_text('{"_id": "0", "answers": "x"}\n')
    with pytest.raises(DataError, match=r"b.jsonl:1: answers is not a list of strings"):
        read_answers(tmp_path / "b.jsonl")
    (tmp_path / "b.csv").write_text("who\t['x'\n")
    with pytest.raises(DataError, match=r"b.csv:1: not a question, a tab and a list"):
        read_answers(tmp_path / "b.csv")
