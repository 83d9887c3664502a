"""The kernels as they are launched on Ampere and Hopper, to be compiled without a GPU (compiled_kernels.py)."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from quincunx.kernels import enhanced_attention_triton as attention
from quincunx.kernels import linear_cross_entropy_triton as loss
from quincunx.kernels.enhanced_attention import TRITON_HEAD_SIZES


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


def loss_cases(capability: int, num_words: int = 30522, num_channels: int = 768) -> Iterator[CompileCase]:
    """Every kernel as it is launched for a vocabulary and a width (BERT-base's)."""

    def case(name, kernel, constants, dtype="bf16", num_warps=4, num_stages=3, product_types=None, tensor_cores=False):
        types = {"logits_KP": f"*{dtype}", "workspace_KP": f"*{dtype}", "labels_K": "*i64", "correct_K": "*i1"}
        types |= product_types or {}
        types |= dict.fromkeys(("redo_flags", "redo"), "*i32")
        types |= dict.fromkeys(("num_rows", "hidden_stride", "weight_stride"), "i32")
        return CompileCase(
            name=f"linear_cross_entropy {name} {dtype}",
            kernel=kernel,
            signature={x: "constexpr" if x in constants else types.get(x, "*fp32") for x in kernel.arg_names},
            constants=constants,
            num_warps=num_warps,
            num_stages=num_stages,
            tensor_cores=tensor_cores,
        )

    for dtype in ("bf16", "fp16", "fp32"):
        yield case("A statistics", loss._statistics_kernel, loss._statistics_constants(num_words), dtype)
        yield case("A gradient", loss._gradient_kernel, loss._gradient_constants(num_words, "A"), dtype)
    yield case("B gradient", loss._gradient_kernel, loss._gradient_constants(num_words, "B"))
    products = dict.fromkeys([loss.PRODUCTS[capability // 10], loss.PRODUCTS[8]])
    for product, redo in itertools.product(products, (False, True)):
        unused = {} if redo else {"redo": None}
        suffix = f" {product.rows}x{product.words}{' redo' * redo}"
        yield case("B rows" + suffix, loss._rows_kernel, loss._rows_constants(num_words, product, redo) | unused)
        types = {
            name: f"tensordesc<bf16[{m},{n}]>" if product.descriptors else "*bf16"
            for name, (m, n) in zip(("hidden_KD", "weight_VD", "exponentials_KP"), loss._tiles(product))
        }
        for store in (True, False):
            constants = loss._exponentials_constants(num_words, num_channels, product, store, redo) | unused
            if not store:
                constants["exponentials_KP"] = None
            name = f"B exponentials{suffix}{'' if store else ' forward only'}"
            yield case(
                name, loss._exponentials_kernel, constants, "bf16", product.num_warps, product.num_stages, types, True
            )


RULE = ("keys", "word_ids", "keep_thresholds")
INTEGERS = ("L", "B", "h_stride", "position_stride", "k_stride", "v_stride", "width")
COUNTS = ("num_tiles", "num_tokens", "num_sequences")
PARAMETER_TYPES = (
    dict.fromkeys(("lse", "delta"), "*fp32")
    | dict.fromkeys(("cu_seqlens", "position_starts", *RULE, "visible_bits", "packed"), "*i32")
    | dict.fromkeys((*INTEGERS, *COUNTS), "i32")
)
"""Of every kernel's parameters, by name; the others point to tensors of the dtype at hand."""


def attention_cases(capability: int) -> Iterator[CompileCase]:
    """The kernels as they are launched on an architecture (80: Ampere, 90: Hopper).

    Left out: fp16, which compiles to bf16's figures, and explicit masks but for one, because they replay small cases.
    """
    for short, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        for kernel in (attention._forward, attention._backward_queries, attention._backward_keys_values):
            for head_size in TRITON_HEAD_SIZES:
                tile = attention.tiling(kernel, dtype, head_size, capability)
                sizes = attention._sizes(kernel, tile, head_size)
                name = f"{short} C{head_size}"
                yield _attention_case(
                    kernel, name, short, sizes | {"visible_bits": None}, tile.num_warps, tile.num_stages
                )
                if name == "bf16 C64":
                    explicit = sizes | dict.fromkeys(RULE)
                    yield _attention_case(kernel, f"{name} explicit", short, explicit, tile.num_warps, tile.num_stages)
        for kernel in (attention._sum_rows, attention._sum_sequences):
            yield _attention_case(kernel, short, short, attention.SUM_SIZES)
    yield _attention_case(attention._pack_visible, "", "i32", attention.PACK_SIZES)


def _attention_case(
    kernel: Any, variant: str, dtype: str, constants: dict, num_warps: int = 4, num_stages: int = 3
) -> CompileCase:
    """With Triton's own default of 4 warps and 3 stages."""
    signature = {name: PARAMETER_TYPES.get(name, f"*{dtype}") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"enhanced_attention.{kernel.__name__[1:]} {variant}".strip()
    return CompileCase(name, kernel, signature, constants, num_warps, num_stages, dtype == "bf16" and "C" in constants)
