"""A report of a pipeline's folder made by hand: runs of known ranks, judged by the real evaluation."""

import html.parser
import json
import re
from pathlib import Path

import pytest

from quincunx.data_shards.errors import DataError
from quincunx.engine.metrics_file import MetricsWriter
from quincunx.engine.retrieval.collection import make_collection
from quincunx.engine.retrieval.evaluation import (
    Judgement,
    judge,
    load_run,
    make_record,
    write_per_query,
    write_record,
)
from quincunx.engine.retrieval.judgements import write_qrels, write_run
from quincunx.engine.retrieval.pipeline import write_json
from quincunx.engine.retrieval.report import load_chain, make_blocks
from quincunx.engine.retrieval.report_blocks import Example, Figure, Heading, Table, write_report
from quincunx.engine.retrieval.report_examples import example

NUM_QUERIES, NUM_PASSAGES = 12, 30
RANKS = {"bm25": [1, 3, 2, 9, 1, 4, 1, 2, 5, 1, 12, 1], "distil": [1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 4]}
"""Of each query's relevant passage: distil wins queries 1 2 3 5 7 8 10 and loses 6 and 11."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "chain"
    folder.mkdir()
    corpus = folder.parent / "corpus.jsonl"
    passages = ({"_id": f"p{n}", "text": f"Passage {n} <b>about</b> nothing & all."} for n in range(NUM_PASSAGES))
    corpus.write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    split = folder / "split.dev"
    split.mkdir()
    queries = ({"_id": f"q{n}", "text": f"what is number {n}?"} for n in range(NUM_QUERIES))
    (split / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    qrels = {f"q{n}": {f"p{n}": 1} for n in range(NUM_QUERIES)}
    write_qrels(split / "qrels.tsv", qrels, style="beir")
    stages = ["split.dev", "distil"]
    for system, ranks in RANKS.items():
        run = {}
        for number, rank in enumerate(ranks):
            others = [f"p{n}" for n in range(NUM_PASSAGES) if n != number]
            ids = [*others[: rank - 1], f"p{number}", *others[rank - 1 : 15]]
            run[f"q{number}"] = {id: float(-place) for place, id in enumerate(ids)}
        path = folder / f"search.{system}.dev" / "run.trec"
        write_run(path, run, system)
        result = judge(load_run(str(path))[0], Judgement(qrels=qrels, measures=("RR@10", "R@5")))
        output = folder / f"evaluate.{system}.dev"
        files = {"run": str(path), "qrels": str(split / "qrels.tsv")}
        write_record(output / "result.json", make_record(result, files, 1))
        write_per_query(output / "queries.jsonl", result)
        stages += [f"search.{system}.dev", f"evaluate.{system}.dev"]
    (folder / "distil").mkdir()
    metrics = MetricsWriter(folder / "distil" / "metrics.jsonl", 0)
    metrics.append(0, "event", {"event": "started"})
    for step in range(1, 41):
        metrics.append(step, "train", {"loss/total": 3.0 / step, "loss/kl": 2.5 / step, "loss/contrastive": 0.5 / step})
        if step % 20 == 0:
            metrics.append(step, "probe", {"probe/mrr@10": 0.5 + step / 100, "probe/ndcg@10": 0.6})
    metrics.append(40, "event", {"event": "resumed"})
    metrics.close()
    for stage in stages:
        write_stamp(folder, stage, settings={"learning_rate": 2e-5} if stage == "distil" else {})
    recipe = {
        "recipe": "tiny", "data": {"folder": "x", "titles": True}, "models": {"encoder": "bert", "reranker": None},
        "splits": {"dev": {"corpus": str(corpus)}}, "evaluated": ["dev"], "systems": ["bm25", "distil"],
        "sections": {"distil": {"steps": 40}}, "stages": [*stages, "score"],
    }  # fmt: skip
    write_json(folder / "recipe.json", recipe)
    return folder


def write_stamp(folder: Path, stage: str, settings: dict) -> None:
    stamp = {
        "name": stage, "digest": "0" * 16, "settings": settings, "inputs": {"queries": "abc"}, "attempts": 1,
        "outputs": {f"{stage}/out": "f" * 32}, "command": ["python", "x.py", "--queries", "my queries.jsonl"],
        "reason": "not done yet", "seconds": 61.0, "finished": "2026-01-01T00:00:00+0000", "versions": {"torch": "2"},
    }  # fmt: skip
    write_json(folder / "stages" / f"{stage}.json", stamp)


@pytest.fixture(scope="module")
def blocks(folder) -> list:
    return make_blocks(load_chain(folder))


@pytest.fixture(scope="module")
def written(folder, blocks) -> dict[str, str]:
    return {path.name: path.read_text() for path in write_report(folder / "report", blocks)}


def tables(blocks: list) -> list[Table]:
    return [block for block in blocks if isinstance(block, Table)]


def test_the_stage_table_holds_every_mean_with_its_interval(blocks, folder):
    table = tables(blocks)[0]
    assert list(table.header) == ["stage", "MRR@10", "R@5"]
    assert [row[0] for row in table.rows] == ["BM25", "distilled retriever"]
    for row, ranks in zip(table.rows, RANKS.values()):
        mean = sum(1 / rank for rank in ranks if rank <= 10) / NUM_QUERIES
        found, low, high = map(float, re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", row[1]).groups())
        assert found == pytest.approx(mean, abs=5e-5)  # four decimals
        assert low <= found <= high and low < high


def test_the_tests_compare_with_the_stage_before_and_with_bm25(blocks):
    table = next(table for table in tables(blocks) if "against BM25" in table.header)
    row = table.rows[0]
    difference = sum((1 / b) - (1 / a if a <= 10 else 0) for a, b in zip(*RANKS.values())) / NUM_QUERIES
    assert row[:3] == ["distilled retriever", "MRR@10", "BM25"]
    assert float(row[3].split()[0]) == pytest.approx(difference, abs=5e-5)
    assert row[3] == row[5]  # BM25 is the stage before


def test_wins_and_losses_are_counted_query_by_query(blocks):
    table = next(table for table in tables(blocks) if "won" in table.header)
    assert table.rows == [["distilled retriever", "7", "2", "3"]]


def test_examples_show_the_query_the_relevant_passage_and_what_each_system_put_first(blocks):
    examples = [block for block in blocks if isinstance(block, Example)]
    won, lost = examples[:4], examples[4:]
    assert won[0].query == "what is number 10?"  # rank 12, which counts 0, against rank 1
    assert won[0].passage_id == "p10" and won[0].passage.startswith("Passage 10 ")
    assert won[0].firsts[0] == ("BM25", "rank 12", "Passage 0 <b>about</b> nothing & all.")
    assert won[0].firsts[1] == ("distilled retriever", "rank 1", "the relevant passage")
    assert [example.query for example in lost] == ["what is number 11?", "what is number 6?"]


def test_curves_are_drawn_for_losses_probes_and_differences(blocks):
    figures = {block.name: block.svg for block in blocks if isinstance(block, Figure)}
    assert set(figures) == {"losses", "probes", "differences"}
    assert ">contrastive<" in figures["losses"] and ">total<" not in figures["losses"]
    assert ">mrr@10<" in figures["probes"]


def test_the_training_table_counts_starts(blocks):
    table = next(table for table in tables(blocks) if "starts" in table.header)
    assert ["distil", "kl", "40", "2.500", "0.062", "2"] in [list(row) for row in table.rows]


class Page(html.parser.HTMLParser):
    """Checks that elements are closed, and collects what the page would load."""

    VOID = frozenset({"meta", "br", "img", "link", "path", "use", "rect"})

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.loads += [tag] if tag in ("img", "link", "iframe") else []

    def handle_startendtag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(written):
    page = Page()
    page.feed(written["report.html"])
    assert page.open == []
    assert [link for link in page.loads if not link.startswith("#")] == []
    assert "url(http" not in written["report.html"] and "@import" not in written["report.html"]
    assert 'name="viewport"' in written["report.html"]
    assert "prefers-color-scheme: dark" in written["report.html"] and "@media print" in written["report.html"]


def test_what_a_corpus_holds_is_text_in_the_page_not_markup(written):
    assert "&lt;b&gt;about&lt;/b&gt; nothing &amp; all." in written["report.html"]
    assert "<b>about" not in written["report.html"]


def test_markdown_holds_the_same_tables_and_names_the_plots_beside_it(written, blocks):
    text = written["report.md"]
    for block in blocks:
        if isinstance(block, Heading):
            assert f"{'#' * block.level} {block.text}" in text
    assert "| distilled retriever | 7 | 2 | 3 |" in text
    for name in re.findall(r"\]\((\w+\.svg)\)", text):
        assert written[name].startswith("<svg") and "currentColor" not in written[name]


def test_a_stage_that_is_not_finished_is_named(written):
    assert "Not finished: score." in written["report.md"]


def test_the_same_folder_gives_the_same_report(folder, written, tmp_path):
    again = {path.name: path.read_text() for path in write_report(tmp_path, make_blocks(load_chain(folder)))}
    assert again == written


def test_a_folder_without_a_pipeline_or_without_an_evaluation_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"has no recipe\.json"):
        load_chain(tmp_path)
    recipe = json.loads((folder / "recipe.json").read_text())
    write_json(tmp_path / "recipe.json", {**recipe, "stages": []})
    with pytest.raises(DataError, match="no finished evaluation yet"):
        load_chain(tmp_path)


def test_an_example_calls_a_passage_relevant_from_the_grade_that_the_measures_count():
    queries, passages = (
        make_collection(["q"], ["who?"], "q"),
        make_collection(["half", "full"], ["Partly", "Fully"], "p"),
    )
    shown = {"a": {"q": ["half", "full"]}, "b": {"q": ["full"]}}
    graded = example("q", queries, passages, {"half": 1, "full": 2}, shown, relevant_from=2)
    assert graded.firsts == [("a", "rank 2", "Partly"), ("b", "rank 1", "the relevant passage")]
    plain = example("q", queries, passages, {"half": 1, "full": 2}, shown)
    assert plain.firsts[0] == ("a", "rank 1", "Partly")
