"""Modules that keep less for the backward pass than torch's own, and their place in a Hugging Face encoder.

Letters: R rows, F feed-forward channels, D channels.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


class LeanDropout(nn.Dropout):
    """nn.Dropout that keeps one byte an element for the backward pass; a CPU's keeps a float."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p > 0 else x


class ActivatedLinear(nn.Linear):
    """Linear(activation(x)) that keeps x alone for the backward pass and applies the activation again there.

    A fifth of a Transformer layer's activations, for one elementwise operation.
    """

    def __init__(self, inputs: int, outputs: int, activation: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__(inputs, outputs)
        self.activation = activation

    def forward(self, x_RF: torch.Tensor) -> torch.Tensor:
        """[..., F] -> [..., D]."""
        if torch.compiler.is_compiling():  # the compiler decides itself what to keep
            return F.linear(self.activation(x_RF), self.weight, self.bias)
        y_RD = _ActivatedLinear.apply(x_RF.flatten(0, -2), self.weight, self.bias, self.activation)
        return y_RD.unflatten(0, x_RF.shape[:-1])


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RF, weight_DF, bias_D, activation):
        ctx.save_for_backward(x_RF, weight_DF)
        ctx.activation, ctx.has_bias = activation, bias_D is not None
        return F.linear(activation(x_RF), weight_DF, bias_D)

    @staticmethod
    def backward(ctx, gradient_RD):
        x_RF, weight_DF = ctx.saved_tensors
        with torch.enable_grad():
            x_RF = x_RF.detach().requires_grad_()
            active_RF = ctx.activation(x_RF)
        (x_gradient_RF,) = torch.autograd.grad(active_RF, x_RF, gradient_RD @ weight_DF)
        return x_gradient_RF, gradient_RD.T @ active_RF.detach(), gradient_RD.sum(0) if ctx.has_bias else None, None


def make_lean(encoder: nn.Module, dropout: float | None) -> None:
    """Replaces every dropout (rate `dropout`, None: its own) and BERT-like feed-forward inside a Hugging Face encoder.

    Parameters, their names and what is computed stay.
    """
    for module in list(encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, LeanDropout(child.p if dropout is None else dropout))
        activation = getattr(getattr(module, "intermediate", None), "intermediate_act_fn", None)
        if activation is not None and type(module.output.dense) is nn.Linear:  # as in BERT and its kin
            module.intermediate.intermediate_act_fn = nn.Identity()
            module.output.dense.__class__ = ActivatedLinear
            module.output.dense.activation = activation
