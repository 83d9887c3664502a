"""The documentation installed on this machine as a corpus."""

from pathlib import Path

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.python_docs import list_packages, read_package, split_summary
from quincunx.data_shards.readers import read_documents
from quincunx.data_shards.records import Document, Input, ReadReport

SOURCE = '''
"""Tools for walking about in the garden.

The tools here are meant for gardens of at most one acre, with or without trees.
"""

raise RuntimeError("this file must never be imported")


def walk(path, /, *steps, slowly=False, **options):
    """
    Walk along a path. Each of the given steps is taken in turn, and
    none of them is left out.

    Notes
    -----
    Walking is slower than running.
    """
    def inner():
        """Never read. It is inside a function and so nobody can ask for help about it."""


class Gardener:
    """Someone who looks after plants.

    A gardener has a hat and two gloves, and knows every plant by its Latin name.
    """

    def water(self, plant):
        """Give water to one plant.

        The plant gets one can of water, unless it has rained within the last day.
        """

    def prune(self):
        """Cut what is dead."""

    async def copy(self):
        """Another text for the same body.

        The plant gets one can of water, unless it has rained within the last day.
        """

    class Hat:
        """Shade. For the head of the gardener, who works outside in the sun all day."""
'''


@pytest.fixture
def package(tmp_path: Path) -> Input:
    folder = tmp_path / "garden"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "tools.py").write_text(SOURCE)
    (folder / "broken.py").write_text("def (:")
    files = tuple(sorted(folder.iterdir()))
    return Input("garden", files, sum(file.stat().st_size for file in files))


def test_a_module_and_each_class_is_a_document_with_a_passage_per_docstring(package):
    report = ReadReport()
    documents = list(read_package(package, report))
    assert documents == [
        Document(
            "garden/garden.tools",
            "garden.tools",
            (
                "The tools here are meant for gardens of at most one acre, with or without trees.",
                "walk(path, *steps, slowly, **options) Each of the given steps is taken in turn, and none of them is "
                "left out. Notes Walking is slower than running.",
            ),
            ("garden/garden.tools", "garden/garden.tools.walk"),
            ("Tools for walking about in the garden.", "Walk along a path."),
        ),
        Document(
            "garden/garden.tools.Gardener",
            "garden.tools.Gardener",
            (
                "A gardener has a hat and two gloves, and knows every plant by its Latin name.",
                "water(plant) The plant gets one can of water, unless it has rained within the last day.",
            ),
            ("garden/garden.tools.Gardener", "garden/garden.tools.Gardener.water"),
            ("Someone who looks after plants.", "Give water to one plant."),
        ),
        Document(
            "garden/garden.tools.Gardener.Hat",
            "garden.tools.Gardener.Hat",
            ("Shade. For the head of the gardener, who works outside in the sun all day.",),
            ("garden/garden.tools.Gardener.Hat",),
            ("",),
        ),
    ]
    assert report.counts == {
        "modules": 3,
        "docstrings": 7,
        "trivial_docstrings": 1,
        "duplicate_docstrings": 1,
        "bad_records": 1,
    }
    assert report.examples[0].startswith("garden: garden.broken: not Python 3")


@pytest.mark.parametrize(
    ("docstring", "query", "body"),
    [
        ("dot(a, b) -> c\n\nThe product of two arrays.\n\nMore.", "The product of two arrays.", "dot(a, b) -> c More."),
        ("Deprecated.", "", "Deprecated."),
        ("A summary that runs\nover two lines.\n\n====\n\nBody.", "A summary that runs over two lines.", "Body."),
        ("word " * 41 + ".\n\nBody.", "", "word " * 41 + ". Body."),
        ("dot(a, b)", "", "dot(a, b)"),
    ],
)
def test_the_first_sentence_is_the_query_and_nothing_else_is_lost(docstring, query, body):
    assert split_summary(docstring) == (query, body)


def test_the_standard_library_is_a_corpus_in_a_fixed_order():
    (source,) = list_packages("stdlib")
    few = Input(source.name, tuple(f for f in source.files if f.name in ("heapq.py", "argparse.py")), 1)
    documents = list(read_package(few, ReadReport()))
    by_id = {document.doc_id: document for document in documents}
    assert len(by_id) == len(documents)
    assert "for" in by_id["topics/for"].paragraphs[1] and by_id["topics/for"].title == 'The "for" statement'
    heapq = by_id["stdlib/heapq"]
    assert "stdlib/heapq.merge" in heapq.passage_ids
    assert heapq.queries[heapq.passage_ids.index("stdlib/heapq.merge")].startswith("Merge multiple sorted inputs")
    assert documents == list(read_package(few, ReadReport()))


def test_packages_are_listed_by_name_and_an_unknown_one_is_refused():
    names = [source.name for source in list_packages("stdlib, xxhash,Jinja2")]
    assert names == ["jinja2", "stdlib", "xxhash"]
    default = list_packages("default")
    assert {source.name for source in default} >= {"stdlib", "numpy", "torch"}
    files = [file for source in default for file in source.files]
    assert len(files) == len(set(files)) and not [file for file in files if "tests" in file.parts]
    with pytest.raises(SettingsError, match="'no-such-package' is not installed"):
        list_packages("stdlib,no_such_package")


def test_parts_are_cut_between_packages():
    names = "xxhash,jinja2,click,packaging"
    whole = [document.doc_id for document in read_documents("python_docs", names)]
    parts = [[d.doc_id for d in read_documents("python_docs", names, task, 3)] for task in range(3)]
    assert [doc_id for part in parts for doc_id in part] == whole and len(whole) == len(set(whole)) > 50
    assert sum(map(bool, parts)) > 1
