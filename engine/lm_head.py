"""The language-model head that the encoder's task and all decoders share, tied to the word embedding."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from quincunx.kernels.launching import Implementation
from quincunx.kernels.linear_cross_entropy import linear_cross_entropy


class LMHead(nn.Module):
    """Transform (dense, activation, LayerNorm) and tied output projection with a bias, up to the loss.

    Letters: N labelled rows, D hidden channels, E embedding channels (E < D in small ELECTRAs), V words.
    """

    def __init__(self, hidden: int, embedding: int, vocab_size: int, activation: str, eps: float):
        super().__init__()
        self.dense = nn.Linear(hidden, embedding)
        self.activation = ACT2FN[activation]
        self.norm = nn.LayerNorm(embedding, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def transform(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, E], what the word embeddings are compared with."""
        return self.norm(self.activation(self.dense(hidden_ND)))

    def forward(
        self,
        hidden_ND: torch.Tensor,
        output_weight_VE: torch.Tensor,
        labels_N: torch.Tensor,
        row_weights_N: torch.Tensor,
        task_slices: Sequence[tuple[int, int]],
        kernels: Implementation,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weighted loss, each task's sum of negative log-likelihoods, and correct rows: see `linear_cross_entropy`.

        `output_weight_VE` is the word embedding's weight as `TiedRows` returns it.
        """
        return linear_cross_entropy(
            self.transform(hidden_ND), output_weight_VE, self.bias, labels_N, row_weights_N, task_slices, impl=kernels
        )


class TiedRows(torch.autograd.Function):
    """Rows [T, E] of the tied weight, and the weight [V, E] itself for the output projection.

    Both gradients meet here: the rows' is added into the projection's in place. Under ZeRO-3 the weight is partitioned;
    DeepSpeed gathers it for the module in whose forward it is read.
    """

    @staticmethod
    def forward(ctx, weight_VE, ids_T):
        ctx.save_for_backward(ids_T)
        return weight_VE.index_select(0, ids_T), weight_VE.view_as(weight_VE)

    @staticmethod
    def backward(ctx, rows_gradient_TE, gradient_VE):
        (ids_T,) = ctx.saved_tensors
        if rows_gradient_TE.is_cuda:
            # Sorts, and sums a word's rows in float32: thousands of [MASK]s would be lost in bf16, and index_add_ adds
            # in any order.
            rows_gradient_VE = torch.ops.aten.embedding_dense_backward(
                rows_gradient_TE, ids_T, len(gradient_VE), padding_idx=-1, scale_grad_by_freq=False
            )
            return gradient_VE.add_(rows_gradient_VE), None
        return gradient_VE.index_add_(0, ids_T, rows_gradient_TE), None


def make_lm_head(
    config: PretrainedConfig, vocab_size: int, embedding: int, weights: dict[str, torch.Tensor] | None
) -> LMHead:
    """The head of an encoder: with the `weights` of its checkpoint (`encoder.head_weights`), or fresh (std 0.02).

    A checkpoint without a bias somewhere (ModernBERT's dense and norm) gets one of zeros.
    """
    activation = getattr(config, "classifier_activation", None) or getattr(config, "hidden_act", "gelu")
    head = LMHead(config.hidden_size, embedding, vocab_size, activation, norm_eps(config))
    nn.init.normal_(head.dense.weight, std=getattr(config, "initializer_range", 0.02))
    nn.init.zeros_(head.dense.bias)
    if weights is not None:
        head.load_state_dict(weights, strict=False)
    return head


def norm_eps(config: PretrainedConfig) -> float:
    """Epsilon of the encoder's LayerNorms."""
    return getattr(config, "layer_norm_eps", None) or getattr(config, "norm_eps", 1e-12)
