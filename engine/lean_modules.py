"""Modules that compute less, or keep less for the backward pass, than an encoder's own, and their place in it.

Letters: T tokens, R rows, H heads, C channels of a head, F feed-forward channels, D channels.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from quincunx.engine.tensors import TensorRows
from quincunx.kernels.packed_attention import packed_attention


class LeanDropout(nn.Dropout):
    """nn.Dropout that keeps one byte an element for the backward pass; a CPU's keeps a float.

    On a CPU it draws 16 bits an element, a seventh of torch's time for it: the rate is the nearest multiple of 2**-16.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        dropped = round(self.p * 2**16)
        if x.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < dropped < 2**16:
            return torch.native_dropout(x, self.p, True)[0]
        return _Dropout16.apply(x, dropped)


class _Dropout16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropped):
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        ctx.save_for_backward(kept)
        ctx.scale = 2**16 / (2**16 - dropped)
        return torch.mul(x, kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient):
        return torch.ops.aten.native_dropout_backward(gradient, *ctx.saved_tensors, ctx.scale), None


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


READING_FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
"""Model types whose layers are BERT's to the letter, so that a ReadingLayer computes what theirs do."""


class ReadingLayer:
    """A BERT-like layer that finishes only the rows somebody reads, as an encoder's last layer may.

    Keys and values come from all rows; queries, output projection and feed-forward of the others are never computed.
    """

    def forward(self, hidden_1TD: torch.Tensor, *arguments, read: TensorRows | None = None, **named) -> torch.Tensor:
        """[1, R, D], the rows that `read` names; [1, T, D] where it is None."""
        if read is None:
            return super().forward(hidden_1TD, *arguments, **named)
        attention, context_TD = self.attention.self, hidden_1TD[0]
        rows_RD = context_TD.index_select(0, read.positions)
        projected = attention.query(rows_RD), attention.key(context_TD), attention.value(context_TD)
        q_RHC, k_THC, v_THC = (x.unflatten(-1, (attention.num_attention_heads, -1)) for x in projected)
        attended_RHC = packed_attention(
            q_RHC, k_THC, v_THC, named["cu_seqlens"], named["max_length"], read.cu_seqlens, read.max_rows
        )
        return self.feed_forward_chunk(self.attention.output(attended_RHC.flatten(-2), rows_RD))[None]


def encoder_layers(encoder: nn.Module) -> list[nn.Module]:
    """A Hugging Face encoder's layers in their order; none where it keeps them elsewhere than BERT and ModernBERT."""
    stack = getattr(encoder, "encoder", encoder)
    return list(getattr(stack, "layer", getattr(stack, "layers", [])))


def reads_rows(encoder: nn.Module) -> bool:
    """Whether a Hugging Face encoder takes `read`: its last layer is a ReadingLayer."""
    return any(isinstance(layer, ReadingLayer) for layer in encoder_layers(encoder)[-1:])


def make_lean(model: nn.Module, dropout: float | None) -> None:
    """Replaces every dropout (rate `dropout`, None: its own) inside a Hugging Face encoder, or a model with one inside.

    In BERT and its kin also every feed-forward's activation, and in READING_FAMILIES the last layer, by a ReadingLayer.
    Parameters, their names and what is computed stay.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, LeanDropout(child.p if dropout is None else dropout))
        activation = getattr(getattr(module, "intermediate", None), "intermediate_act_fn", None)
        if activation is not None and type(module.output.dense) is nn.Linear:  # as in BERT and its kin
            module.intermediate.intermediate_act_fn = nn.Identity()
            module.output.dense.__class__ = ActivatedLinear
            module.output.dense.activation = activation
    if model.config.model_type in READING_FAMILIES and not reads_rows(model.base_model):
        last = encoder_layers(model.base_model)[-1]
        last.__class__ = type(f"Reading{type(last).__name__}", (ReadingLayer, type(last)), {})
