"""Readers: every format, any number of parts, and records that cannot be read."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.readers import list_inputs, read_documents
from quincunx.data_shards.records import Document, ReadReport


def read_all(format: str, path: Path, num_tasks: int = 1, **options) -> list[Document]:
    return [doc for task in range(num_tasks) for doc in read_documents(format, str(path), task, num_tasks, **options)]


def write_beir(path: Path) -> Path:
    records = [
        {"_id": "a#0", "title": "Ants", "text": "Ants dig.", "metadata": {"article": "a", "paragraph": 0}},
        {"_id": "a#1", "title": "Ants", "text": "Ants walk.", "metadata": {"article": "a", "paragraph": 1}},
        {"_id": "a#3", "title": "Ants", "text": "Ants rest.", "metadata": {"article": "a", "paragraph": 3}},
        {"_id": "b", "title": "Bees only", "text": ""},
        {"_id": 7, "text": "no title"},
        {"_id": "empty", "title": "", "text": "  "},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_beir_joins_the_paragraphs_of_an_article_that_follow_each_other(tmp_path):
    report = ReadReport()
    documents = read_all("beir", write_beir(tmp_path / "corpus.jsonl").parent, report=report)
    assert documents == [
        Document("a#0", "Ants", ("Ants dig.", "Ants walk."), ("a#0", "a#1")),
        Document("a#3", "Ants", ("Ants rest.",), ("a#3",)),
        Document("b", "", ("Bees only",), ("b",)),
        Document("7", "", ("no title",), ("7",)),
    ]
    assert report.counts == {"records": 6, "documents": 4, "empty_passages": 1}


def test_msmarco_takes_two_and_three_columns(tmp_path):
    (tmp_path / "collection.tsv").write_text('0\tA "quoted" passage\r\n1\tA title\tAnd text\n')
    assert read_all("msmarco", tmp_path / "collection.tsv") == [
        Document("0", "", ('A "quoted" passage',), ("0",)),
        Document("1", "A title", ("And text",), ("1",)),
    ]


def test_dpr_rows_of_one_title_are_one_document(tmp_path):
    rows = [("id", "text", "title"), (1, 'He said ""no"".', "Aaron"), (2, "tab\tinside", "Aaron"), (3, "Other", "Abel")]
    with open(tmp_path / "psgs_w100.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
    assert read_all("dpr", tmp_path) == [
        Document("1", "Aaron", ('He said ""no"".', "tab\tinside"), ("1", "2")),
        Document("3", "Abel", ("Other",), ("3",)),
    ]


DOCUMENTS = [
    {"doc_id": "d1", "title": "One", "paragraphs": ["First.", " ", "Second."], "topic": "left alone"},
    {"doc_id": "d2", "paragraphs": ["Only."]},
    {"doc_id": "d3", "title": "Title only", "paragraphs": []},
    {"doc_id": "d4", "title": "", "paragraphs": [""]},
]
READ_DOCUMENTS = [
    Document("d1", "One", ("First.", "Second.")),
    Document("d2", "", ("Only.",)),
    Document("d3", "", ("Title only",)),
]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl with BOM", "jsonl.gz", "parquet"])
def test_documents_come_from_jsonl_gzip_and_parquet_alike(tmp_path, kind):
    lines = "".join(json.dumps(record) + "\n" for record in DOCUMENTS).encode()
    if kind == "parquet":
        table = pa.Table.from_pylist([{"title": "", **record} for record in DOCUMENTS])
        parquet.write_table(table, tmp_path / "docs.parquet", row_group_size=1)
    elif kind == "jsonl.gz":
        (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(lines))
    else:
        (tmp_path / "docs.jsonl").write_bytes(b"\xef\xbb\xbf" * ("BOM" in kind) + lines)
    report = ReadReport()
    documents = read_all("parquet" if kind == "parquet" else "documents", tmp_path, 3, report=report)
    assert documents == READ_DOCUMENTS
    assert report.counts == {"records": 4, "documents": 3, "empty_passages": 1}


def test_parquet_takes_passages_too(tmp_path):
    table = pa.table({"id": [1, 2], "text": ["One.", "Two."], "score": [0.5, 0.5]})
    parquet.write_table(table, tmp_path / "passages.parquet")
    assert read_all("parquet", tmp_path) == [
        Document("1", "", ("One.",), ("1",)),
        Document("2", "", ("Two.",), ("2",)),
    ]


# Lines of every kind: articles of one to many rows, blank, empty and bad lines, long and short, several files.
LINES = st.one_of(
    st.sampled_from(["", "   ", "{not json", '{"_id": "x"}', "[]"]),
    st.tuples(st.sampled_from("AB"), st.integers(0, 3), st.integers(1, 90)).map(
        lambda t: json.dumps(
            {"_id": "ID", "title": t[0], "text": "é" * t[2], "metadata": {"article": t[0], "paragraph": t[1]}}
        )
    ),
    st.integers(1, 200).map(lambda n: json.dumps({"_id": "ID", "title": "", "text": "y" * n})),
)


@given(
    files=st.lists(st.lists(LINES, max_size=12), min_size=1, max_size=3),
    num_tasks=st.integers(1, 40),
    last_newline=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_are_disjoint_and_together_the_corpus_for_any_number_of_tasks(
    tmp_path_factory, files, num_tasks, last_newline
):
    folder = tmp_path_factory.mktemp("parts")
    for number, lines in enumerate(files):
        numbered = [line.replace('"ID"', f'"{number}-{k}"') for k, line in enumerate(lines)]
        text = "\n".join(numbered) + ("\n" if last_newline else "")
        (folder / f"{number}.jsonl").write_bytes(text.encode())
    pattern = folder / "*.jsonl"
    if not any(file.stat().st_size for file in folder.iterdir()):
        with pytest.raises(DataError, match="is empty"):
            list_inputs("beir", str(pattern))
        return
    whole, parts = ReadReport("skip"), ReadReport("skip")
    expected = read_all("beir", pattern, report=whole)
    assert read_all("beir", pattern, num_tasks, report=parts) == expected
    assert parts.counts == whole.counts
    assert sorted(parts.examples) == sorted(whole.examples)


@pytest.mark.parametrize(
    ("format", "line", "reason"),
    [
        ("beir", '{"_id": "x", "text": "y"', "not JSON"),
        ("beir", '{"_id": "x"}', "no field 'text'"),
        ("beir", '{"_id": "x", "text": 3}', "text is int"),
        ("beir", '{"_id": "", "text": "y"}', "a printable string is needed"),
        ("beir", '{"_id": "x", "text": "half a pair \\ud800"}', "surrogate"),
        ("beir", '["x", "y"]', "a JSON list"),
        ("documents", '{"doc_id": "x", "paragraphs": "one"}', "paragraphs is str"),
        ("documents", '{"doc_id": "x\\ny", "paragraphs": ["one"]}', "a printable string is needed"),
        ("msmarco", "one column", "1 tab-separated columns"),
        ("msmarco", "1\turl\ttitle\tbody", "4 tab-separated columns"),
        ("dpr", "1\ttext", "2 tab-separated columns"),
        ("beir", b'{"_id": "x", "text": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_record_stops_with_file_and_line_or_is_skipped_and_counted(tmp_path, format, line, reason):
    good = {
        "beir": '{"_id": "%d", "text": "good"}',
        "documents": '{"doc_id": "%d", "paragraphs": ["good"]}',
        "msmarco": "%d\tgood",
        "dpr": "%d\tgood\ttitle %d",
    }[format]
    good_lines = [(good % ((k,) * good.count("%d"))).encode() for k in range(3)]
    bad = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "corpus.file"
    path.write_bytes(b"\n".join([good_lines[0], good_lines[1], bad, good_lines[2]]) + b"\n")
    for num_tasks in (1, 5):
        with pytest.raises(DataError, match=r"^corpus\.file:3: .*--on_bad_record skip$") as stopped:
            read_all(format, path, num_tasks)
        assert reason in str(stopped.value)
        report = ReadReport("skip")
        assert len(read_all(format, path, num_tasks, report=report)) == 3
        assert report.counts["bad_records"] == 1
        assert report.examples[0].startswith("corpus.file:3: ")


def test_a_bad_line_of_a_compressed_file_and_a_bad_row_are_named_too(tmp_path):
    (tmp_path / "c.tsv.gz").write_bytes(gzip.compress(b"1\tgood\n2 bad\n"))
    with pytest.raises(DataError, match=r"^c\.tsv\.gz:2: 1 tab-separated"):
        read_all("msmarco", tmp_path)
    parquet.write_table(pa.table({"id": [1, 2], "text": ["good", None]}), tmp_path / "p.parquet", row_group_size=1)
    with pytest.raises(DataError, match=r"^p\.parquet: row 2: text is NoneType"):
        read_all("parquet", tmp_path, 2)
    (tmp_path / "c.tsv.gz").write_bytes(gzip.compress(b"1\tgood\n" * 1000)[:-20])
    with pytest.raises(DataError, match="damaged gzip"):
        read_all("msmarco", tmp_path)


def test_what_is_no_corpus_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"no beir corpus at .* folder with corpus\.jsonl"):
        list_inputs("beir", str(tmp_path))
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(DataError, match="is empty"):
        list_inputs("beir", str(tmp_path))
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not Parquet"):
        read_all("parquet", tmp_path)
    parquet.write_table(pa.table({"name": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="has the columns name"):
        read_all("parquet", tmp_path)


def test_inputs_are_described_alike_wherever_the_corpus_lies(tmp_path):
    described = {}
    for place, document in (("here", DOCUMENTS[1]), ("there", DOCUMENTS[1]), ("changed", DOCUMENTS[2])):
        for name in ("x", "y"):
            (tmp_path / place / name).mkdir(parents=True)
            (tmp_path / place / name / "docs.jsonl").write_text(json.dumps(document) + "\n")
        inputs = list_inputs("documents", str(tmp_path / place / "*" / "docs.jsonl"))
        described[place] = [source.describe() for source in inputs]
        assert [source.name for source in inputs] == ["x/docs.jsonl", "y/docs.jsonl"]
    assert described["here"] == described["there"]
    assert described["here"][0]["digest"] != described["changed"][0]["digest"]
