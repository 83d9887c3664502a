"""split.py as a user runs it: a split that is there stays only while its files are what it was made from."""

import json

import pytest

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.launchers.split import main


@pytest.fixture
def split(tmp_path, monkeypatch, launched):
    """Runs split.py over three queries and the qrels given, into tmp_path/out."""
    (tmp_path / "queries.tsv").write_text("q0\tfirst\nq1\tsecond\nq2\tthird\n")
    words = ["--queries", "queries.tsv", "--qrels", "qrels.tsv", "--output", "out"]
    monkeypatch.chdir(tmp_path)

    def run(qrels: str, *more: str) -> str:
        (tmp_path / "qrels.tsv").write_text(qrels)
        return launched(main, *words, *more)

    return run


def test_the_same_files_leave_it_and_changed_judgements_refuse_it(split, tmp_path):
    assert "1 queries, 1 judgements" in split("q0\t0\tp1\t1\n")
    assert "nothing to do" in split("q0\t0\tp1\t1\n")
    with pytest.raises(SettingsError, match="out exists and was made from other inputs or settings"):
        split("q0\t0\tp1\t1\nq1\t0\tp2\t1\n")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["details"]["queries"] == 1


def test_a_torn_manifest_and_numbers_out_of_range_are_one_sentence(split, tmp_path):
    with pytest.raises(SettingsError, match="sample is 0; it must be at least 1"):
        split("q0\t0\tp1\t1\n", "--sample=0")
    split("q0\t0\tp1\t1\n")
    (tmp_path / "out" / "manifest.json").write_text("[1")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read as JSON"):
        split("q0\t0\tp1\t1\n")
    split("q0\t0\tp1\t1\n", "--remake")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["details"]["queries"] == 1
