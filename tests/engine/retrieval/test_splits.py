"""Splits in the chain's own form, from BEIR files and from DPR's."""

import json
from pathlib import Path

import pytest

from quincunx.data_shards.errors import DataError
from quincunx.engine.retrieval.collection import make_collection, read_passages, read_queries
from quincunx.engine.retrieval.splits import read_split, sample_ids, write_split
from quincunx.engine.retrieval.trec import read_answers, read_qrels

NUM_QUERIES = 50


@pytest.fixture
def beir(tmp_path) -> Path:
    """50 queries, of which the first 40 are judged."""
    rows = ({"_id": f"q{n}", "text": f"query {n}"} for n in range(NUM_QUERIES))
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"q{n}\tp{n}\t1\n" for n in range(40))
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return tmp_path


def write(output: Path, split: tuple, **changes) -> dict[str, int]:
    queries, qrels, answers, _ = split
    passages = make_collection([f"p{n}" for n in range(60)], [f"passage {n}" for n in range(60)], "passages")
    settings = {"sample": None, "probe_queries": 0, "probe_passages": 20, "seed": 0}
    return write_split(output, queries, qrels, answers, passages, **{**settings, **changes})


def test_a_split_holds_the_judged_queries_alone(beir):
    split = read_split(str(beir / "queries.jsonl"), str(beir / "qrels.tsv"), None, False)
    assert write(beir / "out", split) == {"queries": 40, "judgements": 40}
    assert read_queries(beir / "out" / "queries.jsonl").ids() == [f"q{n}" for n in range(40)]
    assert read_qrels(beir / "out" / "qrels.tsv") == {f"q{n}": {f"p{n}": 1} for n in range(40)}


def test_a_larger_sample_holds_the_smaller_one_in_the_files_order():
    ids = [f"q{n}" for n in range(1000)]
    small, large = sample_ids(ids, 50, 0), sample_ids(ids, 200, 0)
    assert len(small) == 50 and set(small) < set(large)
    assert small == [id for id in ids if id in set(small)]
    assert sample_ids(reversed(ids), 50, 0) == small[::-1]
    assert sample_ids(ids, 50, 1) != small
    assert sample_ids(ids, 5000, 0) == ids


def test_a_probe_is_a_beir_folder_of_its_queries_positives_and_others(beir):
    split = read_split(str(beir / "queries.jsonl"), str(beir / "qrels.tsv"), None, False)
    counts = write(beir / "out", split, sample=30, probe_queries=8)
    assert counts["probe_queries"] == 8 and counts["probe_passages"] == 20
    probe = beir / "out" / "probe"
    qrels, passages = read_qrels(probe / "qrels" / "dev.tsv"), read_passages(probe)
    assert set(qrels) == set(read_queries(probe).ids()) <= set(read_queries(beir / "out").ids())
    assert all(id in passages for grades in qrels.values() for id in grades) and len(passages) == 20


def test_a_probe_takes_no_passage_for_being_judged_irrelevant(beir):
    with open(beir / "qrels.tsv", "a") as file:
        file.write("".join(f"q{n}\tp59\t0\n" for n in range(40)))
    split = read_split(str(beir / "queries.jsonl"), str(beir / "qrels.tsv"), None, False)
    assert write(beir / "out", split, probe_queries=8, probe_passages=8)["probe_passages"] == 8
    assert "p59" not in read_passages(beir / "out" / "probe")


def test_dpr_training_files_bring_judgements_and_answers_of_their_own(tmp_path):
    records = [
        {"question": f"who is {n}?", "answers": [f"name {n}"], "positive_ctxs": [{"passage_id": f"{n}"}],
         "hard_negative_ctxs": [], "negative_ctxs": []}
        for n in range(4)
    ]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(records))
    split = read_split(str(tmp_path / "train.json"), None, None, False)
    assert write(tmp_path / "out", split) == {"queries": 4, "judgements": 4, "answers": 4}
    assert read_qrels(tmp_path / "out" / "qrels.tsv") == {f"{n}": {f"{n}": 1} for n in range(4)}
    assert read_answers(tmp_path / "out" / "answers.jsonl")["2"] == ["name 2"]


def test_dpr_test_files_bring_answers_alone(tmp_path):
    (tmp_path / "test.csv").write_text("who is it?\t['nobody']\nand who was it?\t['somebody']\n")
    split = read_split(str(tmp_path / "test.csv"), None, None, False)
    assert write(tmp_path / "out", split) == {"queries": 2, "answers": 2}
    assert not (tmp_path / "out" / "qrels.tsv").exists()


def test_queries_without_positives_are_refused_or_left_out_and_counted(beir):
    with open(beir / "qrels.tsv", "a") as file:
        file.write("q45\tp1\t0\n")
    paths = (str(beir / "queries.jsonl"), str(beir / "qrels.tsv"), None)
    with pytest.raises(DataError, match=r"no passage as relevant to 1 of 41 queries \(first: q45\)"):
        read_split(*paths, False)
    _, qrels, _, counts = read_split(*paths, True)
    assert "q45" not in qrels and counts["queries_without_positives"] == 1


def test_a_split_that_cannot_be_written_is_refused(beir):
    split = read_split(str(beir / "queries.jsonl"), str(beir / "qrels.tsv"), None, False)
    queries = make_collection(["x"], ["another"], "other queries")
    with pytest.raises(DataError, match="has none of the judged queries"):
        write(beir / "out", (queries, *split[1:]))
    with pytest.raises(DataError, match="a probe needs judgements and the passages"):
        write(beir / "out", (split[0], None, *split[2:]), probe_queries=5)
