"""Triton kernels run on the GPU where there is one, else in Triton's interpreter on CPU tensors."""

import os

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
