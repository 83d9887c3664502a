"""Rounding in Triton kernels, right in the interpreter too, and what else the interpreter needs to be told."""

import triton
import triton.language as tl

from quincunx.kernels.launching import INTERPRETED

WIDEN = tl.constexpr(INTERPRETED)
"""Whether products must be widened to float32: the interpreter's of bf16 tiles are wrong."""


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Float32 in another dtype, to nearest even; the interpreter would cut bf16's digits off."""
    if WIDEN and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)
