"""Generations by passage id."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from quincunx.data_shards.artefact import artefact
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.generations import KIND, Generations, index_generations


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return str(path)


def test_files_of_every_kind_are_joined_by_passage_id(tmp_path):
    first = write(
        tmp_path / "a.jsonl",
        [{"passage_id": "1", "queries": ["was ist é?", " ", "two "]}, {"passage_id": 2, "queries": []}],
    )
    lines = [
        {"passage_id": "1", "continuation": "and so on"},
        {"passage_id": "3", "queries": ["q"], "continuation": ""},
    ]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n\n".join(json.dumps(line) for line in lines).encode()))
    table = pa.Table.from_pylist(
        [{"passage_id": "4", "queries": ["p", "q"], "score": 1.0}, {"passage_id": "5", "queries": None}]
    )
    parquet.write_table(table.slice(0, 1), tmp_path / "c.parquet")
    index = tmp_path / "odd name?#.sqlite"
    counts = index_generations([first, str(tmp_path / "b.jsonl.gz"), str(tmp_path / "c.parquet")], index)
    assert counts == {"passages": 4, "queries": 3, "continuation": 1}
    generations = Generations(index)
    assert generations.count() == counts
    assert generations.lookup("1") == {"queries": ["was ist é?", "two"], "continuation": ["and so on"]}
    assert generations.lookup("2") == {}
    assert generations.lookup("3") == {"queries": ["q"]}
    assert generations.lookup("4") == {"queries": ["p", "q"]}
    assert generations.lookup("unknown") == {}
    generations.close()
    assert not [name for name in os.listdir(tmp_path) if ".tmp" in name]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"passage_id": "1"', "not JSON"),
        ('{"passage_id": "1", "text": "x"}', "queries or continuation are needed"),
        ('{"queries": ["x"]}', "passage_id and queries or continuation"),
        ('{"passage_id": "1", "queries": "x"}', "queries is str"),
        ('{"passage_id": "1", "queries": [1]}', "a text of queries is int"),
        ('{"passage_id": "0", "queries": ["again"]}', "passage '0' has queries a second time"),
    ],
)
def test_a_bad_or_repeated_record_is_named_and_leaves_no_index(tmp_path, line, reason):
    (tmp_path / "g.jsonl").write_text('{"passage_id": "0", "queries": ["x"]}\n' + line + "\n")
    with pytest.raises(DataError, match=r"g\.jsonl:2: ") as refused:
        index_generations([str(tmp_path)], tmp_path / "index")
    assert reason in str(refused.value)
    assert not (tmp_path / "index").exists()


def test_a_folder_that_has_lost_a_part_and_a_path_without_generations_are_refused(tmp_path):
    with pytest.raises(DataError, match="no generations at"):
        index_generations([str(tmp_path / "missing")], tmp_path / "index")
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(DataError, match="no generations at"):
        index_generations([str(folder)], tmp_path / "index")
    with artefact(folder, KIND, {}) as work:
        write(work.made("part-00000.jsonl"), [{"passage_id": "1", "queries": ["x"]}])
        write(work.made("part-00001.jsonl"), [{"passage_id": "2", "queries": ["y"]}])
    assert index_generations([str(folder)], tmp_path / "index")["queries"] == 2
    (folder / "part-00001.jsonl").unlink()
    with pytest.raises(DataError, match=r"part-00001\.jsonl is missing: .*--remake"):
        index_generations([str(folder)], tmp_path / "index")


def test_a_hundred_thousand_generations_need_little_memory(tmp_path):
    with open(tmp_path / "many.jsonl", "w") as file:
        for k in range(100_000):
            file.write(
                json.dumps({"passage_id": f"p{k}", "queries": [f"query {k} number {i} " * 5 for i in range(5)]}) + "\n"
            )
    size = (tmp_path / "many.jsonl").stat().st_size
    program = (
        "import sys, resource; from pathlib import Path; from quincunx.data_shards.generations import *\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(index_generations([sys.argv[1]], Path(sys.argv[2]))['passages'])\n"
        "assert Generations(Path(sys.argv[2])).lookup('p99999')['queries'][4].startswith('query 99999 number 4')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "many.jsonl"), str(tmp_path / "index")]
    passages, growth = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    # SQLite's page cache is bounded by CACHE_KIB = 64 MiB; the records themselves pass through.
    assert int(passages) == 100_000 and size > 30e6
    assert int(growth) < 100e6
