"""What it takes to compile a kernel without a GPU."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class CompileCase(NamedTuple):
    """A kernel as it is launched on one architecture, to be compiled ahead of time (benchmarks/compiled_kernels.py)."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    """Type of every parameter in the kernel's order: "*bf16", "i32", "fp32", "constexpr"..."""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    """Whether it must use them: every kernel with a matrix product in bf16 or fp16."""
