"""search.py as a user runs it: runs, indexes, the prompt, and one sentence for what does not belong together."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from quincunx.engine.retrieval.collection import read_passages, read_queries
from quincunx.engine.retrieval.dual_encoder import encode_texts, load_retriever
from quincunx.engine.retrieval.trec import read_run
from quincunx.launchers import encode, search

ROOT = Path(__file__).parents[2]
WORDS = [
    "amber", "birch", "cedar", "dune", "elder", "fern", "grove", "heath", "iris", "juniper", "kelp", "larch", "moss",
    "nettle", "oak", "pine",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory, save_tiny_bert, write_beir):
    """Two tiny random encoders, a BEIR folder of 400 passages, and the first encoder's embeddings of it."""
    folder = tmp_path_factory.mktemp("search")
    shape = {"hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.5}
    for seed, name in enumerate(("model", "other")):
        save_tiny_bert(folder / name, [" ".join(WORDS)] * 3, 80, seed, **shape)
    draw = np.random.default_rng(0)
    beir = folder / "beir"
    passages = [" ".join(draw.choice(WORDS, draw.integers(2, 20))) for _ in range(400)]
    queries = [" ".join(draw.choice(WORDS, 3)) for _ in range(12)]
    write_beir(beir, passages, queries, test=[(3, 1, 1), (7, 2, 1)])
    run(
        encode.main, f"--model={folder / 'model'}", f"--corpus={beir}", f"--output={folder / 'embeddings'}",
        "--dtype=float32", "--part_rows=150", "--device=cpu",
    )  # fmt: skip
    return folder


def run(main, *flags):
    """Runs a launcher's main here, with these flags."""
    before, sys.argv = sys.argv, ["launcher", *map(str, flags)]
    try:
        main()
    finally:
        sys.argv = before


def dense(data, *flags):
    run(
        search.main, f"--model={data / 'model'}", f"--embeddings={data / 'embeddings'}", f"--queries={data / 'beir'}",
        "--device=cpu", *flags,
    )  # fmt: skip


def test_a_dense_run_is_the_exact_ranking_with_a_manifest(data, tmp_path, capsys):
    dense(data, f"--output={tmp_path / 'run.trec'}", "--depth=25", f"--corpus={data / 'beir'}")
    found = read_run(tmp_path / "run.trec")
    retriever = load_retriever(str(data / "model"))
    passages, queries = read_passages(data / "beir"), read_queries(data / "beir")
    scores = encode_texts(retriever, queries.texts(), "query") @ encode_texts(retriever, passages.texts(), "passage").T
    for query, row in zip(queries.ids(), scores):
        best = np.argsort(-row, kind="stable")[:25]
        np.testing.assert_allclose(list(found[query].values()), row[best], rtol=0, atol=1e-5)
        assert len(set(found[query]) & set(passages.ids(best))) >= 24  # the last may be a near tie
    manifest = json.loads((tmp_path / "run.trec.manifest.json").read_text())
    made_from = manifest["made_from"]
    assert manifest["details"] == {"queries": 12, "results": 300}
    assert (made_from["model"], made_from["collection"], made_from["depth"]) == (retriever.digest, passages.digest, 25)
    assert made_from["index"] == {"kind": "exact", "shards": 1} and not list(tmp_path.glob(".*"))
    dense(data, f"--output={tmp_path / 'run.trec'}", "--depth=25")
    assert "nothing to do" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.trec.manifest.json").read_text()) == manifest


@pytest.mark.parametrize(("index", "options"), [("HNSW32", []), ("IVF10,PQ4", ["--index_options=nprobe=10"])])
def test_approximate_indexes_write_runs_too_and_say_what_they_miss(index, options, data, tmp_path, capsys):
    dense(data, f"--output={tmp_path / 'exact.trec'}", "--depth=20")
    capsys.readouterr()
    dense(data, f"--output={tmp_path / 'run.trec'}", "--depth=20", f"--index={index}", *options)
    shown = capsys.readouterr().out
    exact, found = read_run(tmp_path / "exact.trec"), read_run(tmp_path / "run.trec")
    share = sum(len(set(exact[query]) & set(found[query])) for query in exact) / (20 * len(exact))
    printed = re.findall(r"recall of the exact first (\d+) on 12 queries: ([\d.]+)", shown)
    assert [depth for depth, _ in printed] == ["10", "20"]
    assert float(printed[1][1]) == pytest.approx(share, abs=1e-4) and share > 0.3


def test_judged_queries_alone_are_searched(data, tmp_path):
    dense(data, f"--output={tmp_path / 'run.trec'}", "--depth=3", f"--qrels={data / 'beir' / 'qrels' / 'test.tsv'}")
    assert list(read_run(tmp_path / "run.trec")) == ["q3", "q7"]


def test_bm25_runs_need_the_corpus_alone(data, tmp_path):
    flags = ["--method=bm25", f"--corpus={data / 'beir'}", f"--queries={data / 'beir'}", "--depth=5", "--k1=0.9"]
    run(search.main, *flags, f"--output={tmp_path / 'run.trec'}")
    found = read_run(tmp_path / "run.trec")
    assert len(found) == 12 and max(map(len, found.values())) == 5
    made_from = json.loads((tmp_path / "run.trec.manifest.json").read_text())["made_from"]
    assert made_from["k1"] == 0.9 and made_from["method"] == "bm25"


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--output=X", "--model={other}"], 3, r"holds embeddings of model \w{16}, but the model given is \w{16}"),
        (["--output=X", "--corpus={shorter}"], 3, r"of collection \w{32}, but the collection given is \w{32}"),
        (["--output=X", "--qrels={qrels}"], 3, "names 1 queries .*elsewhere"),
        (["--output=X", "--index=IVF10,PQ3"], 2, "--index IVF10,PQ3 is not an index of faiss for 16 channels"),
        (["--output=X", "--depth=0"], 2, "depth is 0"),
        (["--output=X", "--method=bm25", "--b=1.5"], 2, "b is 1.5; it must be at least 0 and at most 1"),
        (["--output={qrels}"], 2, "exists, and no stage made it"),
        (["--output=X", "--k1=0.9"], 2, "k1 has no effect with --method dense"),
        (["--output=X", "--index_options=nprobe=3"], 2, "index_options has no effect .* --index exact"),
        (["--output=X", "--interactive"], 2, "give one of --output"),
        (["--page=80"], 2, "print passages and need --corpus"),
        (["--page=80", "--corpus={shorter}", "--depth=150"], 2, "depth is 150; the page shows at most 100 passages"),
        (["--page=70000", "--corpus={shorter}"], 2, "page is 70000; it must be at least 0 and at most 65535"),
    ],
)
def test_what_does_not_belong_together_is_one_sentence_and_no_run(flags, code, sentence, data, tmp_path, refused):
    lines = (data / "beir" / "corpus.jsonl").read_text().splitlines()
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    (tmp_path / "qrels.tsv").write_text("elsewhere\t0\tp1\t1\n")
    places = {"other": data / "other", "shorter": tmp_path / "corpus.jsonl", "qrels": tmp_path / "qrels.tsv"}
    given = [flag.format(**places).replace("=X", f"={tmp_path / 'run.trec'}") for flag in flags]
    base = [f"--model={data / 'model'}", f"--embeddings={data / 'embeddings'}", f"--queries={data / 'beir'}"]
    names = {flag.partition("=")[0] for flag in given}
    base = [flag for flag in base if flag.partition("=")[0] not in names]
    found, said = refused(search.main, *base, *given, "--device=cpu")
    assert found == code and re.search(sentence, said)
    assert (tmp_path / "qrels.tsv").read_text() == "elsewhere\t0\tp1\t1\n"
    assert not (tmp_path / "run.trec").exists()


def test_the_prompt_and_the_page_answer(data):
    words = [
        sys.executable, "launchers/search.py", f"--model={data / 'model'}", f"--embeddings={data / 'embeddings'}",
        f"--corpus={data / 'beir'}", "--device=cpu", "--depth=2",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "text": True, "env": environment}
    typed = subprocess.run([*words, "--interactive"], input="amber birch\n", capture_output=True, check=True, **options)
    assert "2 passages in" in typed.stdout and re.search(r"  1  -?[\d.]+  p\d+", typed.stdout)
    with subprocess.Popen([*words, "--interactive"], stdin=-1, stdout=-1, stderr=-1, **options) as unread:
        unread.stdout.close()  # as `| head` does
        assert unread.communicate("amber birch\n")[1] == "" and unread.returncode == -signal.SIGPIPE
    page = subprocess.Popen([*words, "--page=0"], stdout=subprocess.PIPE, **options)
    try:
        address = re.search(r"http://127.0.0.1:\d+/", page.stdout.readline())[0]
        with urllib.request.urlopen(f"{address}api?q=amber+birch") as answer:
            results = json.load(answer)["results"]
        assert [f"{result['score']:.4f}  {result['id']}" in typed.stdout for result in results] == [True, True]
    finally:
        page.kill()
        page.wait()
