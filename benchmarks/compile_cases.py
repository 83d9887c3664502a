"""The kernels as they are launched on Ampere and Hopper, to be compiled without a GPU (compiled_kernels.py).

The launchers run on CPU tensors, and what they would launch is noted.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from quincunx.kernels import enhanced_attention_triton as attention
from quincunx.kernels import linear_cross_entropy_triton as loss
from quincunx.kernels.enhanced_attention import TRITON_HEAD_SIZES
from quincunx.kernels.linear_cross_entropy import Gradients

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
WITH_PRODUCTS = (
    loss._exponentials_kernel,
    attention._forward,
    attention._backward_queries,
    attention._backward_keys_values,
)


class CompileCase(NamedTuple):
    """A kernel as it is launched on one architecture."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    """Type of every parameter in the kernel's order: "*bf16", "i32", "fp32", "constexpr"..."""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    """Whether it must use them: every kernel with a matrix product in bf16 or fp16."""


def compile_cases(capability: int) -> list[CompileCase]:
    """Every kernel as it is launched on an architecture (80: Ampere, 90: Hopper), with all constants that it gets."""
    found = {}

    def note(kernel, *values, grid, warmup, num_warps=4, num_stages=3, **constants) -> None:
        arguments = dict(zip(kernel.arg_names, values), **constants)
        constants |= {name: None for name, value in arguments.items() if value is None}
        signature = {x: "constexpr" if x in constants else type_of(arguments[x]) for x in kernel.arg_names}
        dtype = signature[kernel.arg_names[0]].removeprefix("*")
        flags = "".join(f" {name.lower()}" for name, value in constants.items() if value is True)
        flags += f" C{constants['C']}" if "C" in constants else ""
        name = f"{kernel.__module__.rpartition('.')[2].removesuffix('_triton')}.{kernel.__name__[1:]} {dtype}{flags}"
        tensor_cores = kernel in WITH_PRODUCTS and "fp32" not in dtype
        case = CompileCase(name, kernel, signature, constants, num_warps, num_stages, tensor_cores)
        found[str(case)] = case

    with (
        mock.patch.object(triton.JITFunction, "run", note),
        mock.patch.object(loss, "_family", return_value=capability // 10),
        mock.patch.object(loss, "_num_processors", return_value=100),
        mock.patch.object(attention, "_capability", return_value=capability),
    ):
        run_loss()
        run_attention()
    return list(found.values())


def type_of(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return f"*{TYPES[argument.dtype]}"
    if isinstance(argument, int):
        return "i32"
    rows, columns = argument.block_shape
    return f"tensordesc<{TYPES[argument.base.dtype]}[{rows},{columns}]>"


def run_loss(num_words: int = 30522, num_channels: int = 768) -> None:
    """For BERT-base's vocabulary and width, with gradients and without.

    A hidden that starts two bytes late cannot be read by Hopper's copy engine, and takes Ampere's product.
    """
    for dtype, form, late in (
        (torch.bfloat16, "A", 0),
        (torch.float16, "A", 0),
        (torch.float32, "A", 0),
        (torch.bfloat16, "B", 0),
        (torch.bfloat16, "B", 1),
    ):
        hidden = torch.zeros(16 * num_channels + late, dtype=dtype)[late:].view(16, num_channels)
        weight, bias = torch.zeros(num_words, num_channels, dtype=dtype), torch.zeros(num_words, dtype=dtype)
        results = torch.zeros(16, dtype=torch.int64), 16, torch.zeros(16), torch.zeros(16, dtype=torch.bool)
        gradients = Gradients(torch.zeros_like(hidden), torch.ones(16, 1), weight.float(), bias.float())
        for wanted in (gradients, None):
            loss.run_chunks(hidden, weight, bias, *results, wanted, form)


def run_attention() -> None:
    """Forward and backward; fp16 is left out, which compiles to bf16's figures."""
    for dtype, head_size in itertools.product((torch.bfloat16, torch.float32), TRITON_HEAD_SIZES):
        floats = [torch.zeros(rows, 12, head_size, dtype=dtype, requires_grad=True) for rows in (1, 144, 144, 144)]
        bounds = torch.tensor([0, 144], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        rule = [torch.zeros(count, dtype=torch.int32) for count in (1, 144, 144)]
        attention.Attention.apply(*floats, *bounds, *rule, 144).sum().backward()
