"""Triton kernels run on the GPU where there is one, else in Triton's interpreter on CPU tensors."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

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
