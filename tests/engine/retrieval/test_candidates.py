"""Candidate files: what is written is read back, SimLM's shape too; what is wrong is named, nothing overwritten."""

import json

import pytest
from pyarrow import parquet
from pyarrow.json import read_json as json_table

from quincunx.data_shards.artefact import artefact
from quincunx.data_shards.errors import DataError
from quincunx.engine.retrieval import candidates
from quincunx.engine.retrieval.candidates import (
    Candidates,
    check_negatives,
    check_scores,
    iterate_candidates,
    write_candidates,
)

ROWS = [
    Candidates("q1", ("p1", "p2"), ("n1", "n2"), {"p1": 0.1, "p2": 1 / 3, "n1": -2.5, "n2": 1e-12}),
    Candidates("q2", ("p3",), (), None),
    Candidates("q3", ("ü",), ("n1",), {"ü": 2.0}),
]


def test_candidates_are_read_as_they_were_written_and_from_parquet_too(tmp_path):
    path = tmp_path / "mined.jsonl"
    counts = write_candidates(path, iter(ROWS))
    assert list(iterate_candidates(path)) == ROWS
    assert counts == {"queries": 3, "positives": 4, "negatives": 3, "scores": 5}
    parquet.write_table(json_table(path), tmp_path / "mined.parquet")
    assert list(iterate_candidates(tmp_path / "mined.parquet")) == ROWS


def test_equal_ids_are_one_object(tmp_path):
    write_candidates(tmp_path / "c.jsonl", ROWS)
    rows = list(iterate_candidates(tmp_path / "c.jsonl"))
    assert rows[0].negatives[0] is rows[2].negatives[0]


def test_simlm_files_are_read_and_their_scores_where_whole(tmp_path):
    record = {
        "query_id": "7", "query": "what", "answers": [],
        "positives": {"doc_id": ["p"], "score": [9.5]},
        "negatives": {"doc_id": ["a", "b", "a"], "score": [3.0, 2.0, 1.0]},
    }  # fmt: skip
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert list(iterate_candidates(path)) == [Candidates("7", ("p",), ("a", "b"), {"p": 9.5, "a": 3.0, "b": 2.0})]
    del record["positives"]["score"]
    path.write_text(json.dumps(record) + "\n")
    assert list(iterate_candidates(path)) == [Candidates("7", ("p",), ("a", "b"))]


def test_no_candidates_are_not_written_and_the_file_stays(tmp_path):
    path = tmp_path / "mined.jsonl"
    write_candidates(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(DataError, match="no candidates to write"):
        write_candidates(path, [])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query_id": "q2", "positives": [], "negatives": ["n"]}', "2: the query 'q2' has no positive"),
        ('{"query_id": "q2", "positives": ["p"], "negatives": ["p"]}', "2: the negative 'p'"),
        ('{"query_id": "q1", "positives": ["p"], "negatives": []}', "2: the query 'q1' comes a second time"),
        ('{"query_id": "q2", "positives": ["p"]', "2: not JSON"),
        ('{"query_id": "q2", "positives": ["p"]}', "2: negatives is NoneType, a list of passage ids is needed"),
        ('{"query_id": "q2", "positives": ["p"], "negatives": [""]}', "2: negatives holds an empty id"),
        ('{"positives": ["p"], "negatives": []}', "2: query_id is NoneType"),
        (
            '{"query_id": "q2", "positives": ["p"], "negatives": [], "positive_scores": [1, 2]}',
            "2: positives and their",
        ),
        (
            '{"query_id": "q2", "positives": ["p"], "negatives": [], "positive_scores": ["x"]}',
            "2: a score is no number",
        ),
    ],
)
def test_bad_records_are_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    path.write_text('{"query_id": "q1", "positives": ["p"], "negatives": ["n"]}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        list(iterate_candidates(path))
    assert f"{path}:{message}" in str(caught.value)


def test_a_file_that_is_not_its_manifests_is_refused(tmp_path):
    path = tmp_path / "mined.jsonl"
    with artefact(path, candidates.CANDIDATES, {}, single=True) as work:
        write_candidates(work.made(), ROWS)
    assert list(iterate_candidates(path)) == ROWS
    path.write_text(path.read_text().replace("n2", "n7"))
    with pytest.raises(DataError, match=r"mined\.jsonl is damaged"):
        list(iterate_candidates(path))
    path.unlink()
    with pytest.raises(DataError, match=r"mined\.jsonl is missing"):
        list(iterate_candidates(path))


def test_missing_teacher_scores_and_empty_negatives_are_counted():
    check_scores(ROWS[:1], "mined")
    with pytest.raises(DataError, match=r"mined lacks .* of 2 candidates of 2 queries \(first: q2 p3, q3 n1\)"):
        check_scores(ROWS, "mined")
    with pytest.raises(DataError, match=r"mined has no negatives for 1 queries \(first: q2\)"):
        check_negatives(ROWS, "mined")
