"""Documentation installed on this machine as a corpus: CPython's language topics and the docstrings of packages.

Every machine that can run us has it, it is real text, and the first sentence of a docstring is a natural query for the
rest. Source files are parsed, never imported. What is a document:

- each topic of `pydoc_data.topics` (what `help("LOOPING")` prints), as running text;
- each class: its docstring, then those of its methods in source order;
- each module: its docstring, then those of its top-level functions in source order;

with one passage per docstring, so that neighbours are methods of one class or functions of one module. A passage is
the document's title (the dotted name of class or module), the method's or function's name and arguments, and the
docstring without its first sentence, which is the passage's query. Docstrings that are little more than that sentence
and repetitions inside a package are left out and counted.
"""

import ast
import importlib.metadata
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import xxhash

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.records import Document, Input, ReadReport
from quincunx.data_shards.words import sentence_starts

STDLIB = "stdlib"
# Direct dependencies of ours, so that every machine has them: about 24,000 passages, 20,000 of them with a query.
DEFAULT_PACKAGES = (STDLIB, "datatrove", "deepspeed", "matplotlib", "numpy", "torch", "transformers")
SKIPPED_FOLDERS = {
    "test", "tests", "testing", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages",
    "_vendor", "vendor", "vendored", "third_party", "externals", "__pycache__",
}  # fmt: skip
MIN_QUERY_WORDS, MAX_QUERY_WORDS = 3, 40
MIN_BODY_WORDS = 8
SIGNATURE = re.compile(r"[\w.]+\s*\([^\n]*\)(\s*->\s*\S.*)?")
UNDERLINE = re.compile(r"^\s*([-=~^*#\"'`+.])\1{2,}\s*$", re.MULTILINE)
Scope = ast.Module | ast.ClassDef


def list_packages(names: str) -> list[Input]:
    """The packages to read, in order of name; their files in order of path.

    names: "default" (DEFAULT_PACKAGES), or names separated by commas: "stdlib,numpy,torch".

    Raises:
        SettingsError: a name that is not installed. DataError: no Python file in all of them.
    """
    wanted = {re.sub(r"[-_.]+", "-", name.strip()).lower() for name in names.split(",") if name.strip()}
    inputs: list[Input] = []
    for name in sorted(DEFAULT_PACKAGES if wanted == {"default"} else wanted):
        files = _stdlib_files() if name == STDLIB else _distribution_files(name)
        kept = [file for path, file in files if not SKIPPED_FOLDERS & set(path.split("/")[:-1]) and file.is_file()]
        if kept:
            inputs.append(Input(name, tuple(kept), sum(file.stat().st_size for file in kept)))
    if not inputs:
        raise DataError(f"{names!r} has no Python source file: name packages that are written in Python, or {STDLIB}")
    return inputs


def _distribution_files(name: str) -> list[tuple[str, Path]]:
    """(path in its folder, file) of the Python files of an installed distribution, sorted."""
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        raise SettingsError(
            f"the package {name!r} is not installed: give default, {STDLIB}, or names that `pip list` shows, separated "
            "by commas"
        ) from None
    return sorted((file.as_posix(), Path(str(file.locate()))) for file in files if file.suffix == ".py")


def _stdlib_files() -> list[tuple[str, Path]]:
    """(path in the standard library, file) of its Python files, sorted."""
    top = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted((file.relative_to(top).as_posix(), file) for file in files)


def read_package(source: Input, report: ReadReport) -> Iterator[Document]:
    """The documents of one package (for the standard library: the topics first), in order of file and line.

    Counts in the report: modules, bad_records (a file that does not parse), docstrings, trivial_docstrings and
    duplicate_docstrings.
    """
    if source.name == STDLIB:
        yield from _read_topics()
    seen: set[int] = set()
    used: dict[str, int] = {}
    for file in source.files:
        report.counts["modules"] += 1
        module = _module_name(file)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's sources
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError) as error:
            report.skip(f"{source.name}: {module}", f"not Python {sys.version_info[0]}: {error}")
            continue
        for name, scope in _scopes(tree, module):
            document = _document_of(scope, name, source.name, seen, used, report)
            if document.paragraphs:
                yield document


def _read_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        paragraphs = [_one_line(part) for part in re.split(r"\n\s*\n", UNDERLINE.sub("\n", topics[name]))]
        title, *rest = [paragraph for paragraph in paragraphs if paragraph]
        yield Document(f"topics/{name}", title, tuple(rest)) if rest else Document(f"topics/{name}", "", (title,))


def _scopes(scope: Scope, name: str) -> Iterator[tuple[str, Scope]]:
    """A module or class and every class in it with their dotted names, in source order."""
    yield name, scope
    for node in scope.body:
        if isinstance(node, ast.ClassDef):
            yield from _scopes(node, f"{name}.{node.name}")


def _document_of(
    scope: Scope, title: str, package: str, seen: set[int], used: dict[str, int], report: ReadReport
) -> Document:
    """A module's or class's docstring and those of its functions; `seen` and `used` are the package's so far."""
    functions = [node for node in scope.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    paragraphs, passage_ids, queries = [], [], []
    for node in [scope, *functions]:
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        report.counts["docstrings"] += 1
        query, body = split_summary(docstring)
        if len(body.split()) < MIN_BODY_WORDS:
            report.counts["trivial_docstrings"] += 1
            continue
        digest = xxhash.xxh3_64_intdigest(body.encode(errors="replace"))
        if digest in seen:
            report.counts["duplicate_docstrings"] += 1
            continue
        seen.add(digest)
        name = title if node is scope else f"{title}.{node.name}"
        used[name] = used.get(name, 0) + 1
        heading = "" if node is scope else f"{node.name}({_argument_names(node)}) "
        paragraphs.append(f"{heading}{body}".encode(errors="replace").decode())
        passage_ids.append(f"{package}/{name}" if used[name] == 1 else f"{package}/{name}~{used[name]}")
        queries.append(query.encode(errors="replace").decode())
    doc_id = passage_ids[0] if passage_ids else f"{package}/{title}"
    return Document(doc_id, title, tuple(paragraphs), tuple(passage_ids), tuple(queries))


def split_summary(docstring: str) -> tuple[str, str]:
    """(query, body): the first sentence of a docstring and the rest, both on one line.

    A first paragraph that is a signature (C extensions write one) stays in the body. The query is "" and the body is
    everything if the first sentence has fewer than 3 or more than 40 words.
    """
    text = UNDERLINE.sub("", inspect.cleandoc(docstring))
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    signature = [paragraphs.pop(0)] if len(paragraphs) > 1 and SIGNATURE.fullmatch(paragraphs[0].strip()) else []
    if not paragraphs:
        return "", _one_line(" ".join(signature))
    first = _one_line(paragraphs[0])
    starts = [*sentence_starts(first), len(first)]
    query = first[: starts[1]].strip()
    if not MIN_QUERY_WORDS <= len(query.split()) <= MAX_QUERY_WORDS:
        return "", _one_line(" ".join([*signature, *paragraphs]))
    return query, _one_line(" ".join([*signature, first[starts[1] :], *paragraphs[1:]]))


def _argument_names(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    arguments = node.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return ", ".join(name for name in names if name not in ("self", "cls"))


def _module_name(file: Path) -> str:
    """Dotted name of a module from its path, up to the last folder that is no package."""
    parts = [] if file.stem == "__init__" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts) or file.parent.name


def _one_line(text: str) -> str:
    return " ".join(text.split())
