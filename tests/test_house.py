"""The house rules of docs/architecture.md that a machine can check."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = ["kernels", "data_shards", "engine", "launchers"]
HEAVY = {
    "deepspeed": {"engine/training.py", "engine/checkpoint.py", "engine/export.py"},
    "mlflow": {"engine/tracking.py"},
    "ir_measures": {"engine/retrieval/evaluation.py", "engine/evaluations.py"},
    "faiss": {"engine/retrieval/index.py"},
    "bm25s": {"engine/retrieval/bm25.py"},
}


def code_files() -> list[Path]:
    return sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            modules.add(node.module)
    return modules


def test_no_code_folder_is_a_regular_package():
    assert not [path for floor in FLOORS for path in (ROOT / floor).rglob("__init__.py")]
    assert not (ROOT / "__init__.py").exists()


def test_every_code_folder_is_packaged():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"quincunx." + ".".join(path.parent.relative_to(ROOT).parts) for path in code_files()}
    assert found <= listed, f"not in pyproject's packages: {sorted(found - listed)}"


def test_imports_go_down_only():
    for path in code_files():
        floor = FLOORS.index(path.relative_to(ROOT).parts[0])
        for module in imported_modules(path):
            if module.split(".")[0] == "quincunx":
                target = module.split(".")[1]
                assert FLOORS.index(target) <= floor, f"{path.relative_to(ROOT)} imports upwards: {module}"
            assert module.split(".")[0] not in FLOORS, f"{path.relative_to(ROOT)}: write quincunx.{module}"


def test_heavy_libraries_stay_in_their_files():
    for path in code_files():
        roots = {module.split(".")[0] for module in imported_modules(path)}
        for library, allowed in HEAVY.items():
            name = str(path.relative_to(ROOT))
            assert library not in roots or name in allowed, f"{name} imports {library}, allowed: {sorted(allowed)}"


def test_what_a_reader_of_pretrain_must_open_does_not_grow():
    """The files of ours that launchers/pretrain.py imports, transitively: the number to bring down, not up.

    Triton files do not count: what they compute stands in the torch twin beside them.
    """
    files, queue = set(), [ROOT / "launchers" / "pretrain.py"]
    while queue:
        path = queue.pop()
        if path not in files:
            files.add(path)
            own = (module.split(".")[1:] for module in imported_modules(path) if module.startswith("quincunx."))
            queue += [ROOT.joinpath(*parts).with_suffix(".py") for parts in own if not parts[-1].endswith("_triton")]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert len(files) <= 29 and lines <= 5_750, f"{len(files)} files, {lines} lines"


def test_no_file_is_longer_than_500_lines():
    lengths = {path: len(path.read_text().splitlines()) for path in [*code_files(), *(ROOT / "tests").rglob("*.py")]}
    assert not [f"{path.relative_to(ROOT)}: {lines}" for path, lines in lengths.items() if lines > 500]
