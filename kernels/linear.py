"""The linear layer, on a CPU in float32 by oneDNN.

torch takes MKL for float32 products on a CPU whatever its settings, and MKL is slow on AMD's processors: a feed-forward
runs forward at 120 GFLOP/s on two EPYC cores, by oneDNN at 175 (docs/log.md). The operator is the one that
torch.compile uses. On a GPU, in other types and where torch was built without oneDNN, all this is torch's own linear.

Letters: R rows, I input channels, O output channels.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import mm_flop, register_flop_formula

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")

if HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
        """torch's FLOP counter does not know the operator."""
        return mm_flop(x_shape, (weight_shape[1], weight_shape[0]))


def linear(x_RI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, [R, O]; not differentiable by autograd, see Linear."""
    if by_onednn(x_RI):
        return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")
    return F.linear(x_RI, weight_OI, bias_O)


def by_onednn(x: torch.Tensor) -> bool:
    """Whether `linear` of these rows is oneDNN's."""
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    return HAS_ONEDNN and is_plain


class Linear(nn.Linear):
    """nn.Linear, [..., I] -> [..., O], with both its passes through `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not by_onednn(x):
            return super().forward(x)
        return _Linear.apply(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RI, weight_OI, bias_O):
        ctx.save_for_backward(x_RI, weight_OI)
        ctx.has_bias = bias_O is not None
        return linear(x_RI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx, gradient_RO):
        x_RI, weight_OI = ctx.saved_tensors
        x_gradient_RI = linear(gradient_RO, weight_OI.T) if ctx.needs_input_grad[0] else None
        return x_gradient_RI, gradient_RO.T @ x_RI, gradient_RO.sum(0) if ctx.has_bias else None
