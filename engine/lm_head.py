"""The language-model head that the encoder's task and all decoders share, tied to the word embedding."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

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
        word_embeddings: nn.Embedding,
        labels_N: torch.Tensor,
        row_weights_N: torch.Tensor,
        task_slices: Sequence[tuple[int, int]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weighted loss, each task's sum of negative log-likelihoods, and correct rows: see `linear_cross_entropy`.

        The module of the tied weight is passed, not the weight: under ZeRO-3 the weight is partitioned, and DeepSpeed
        gathers it for the module in whose forward it is read.
        """
        return linear_cross_entropy(
            self.transform(hidden_ND), word_embeddings.weight, self.bias, labels_N, row_weights_N, task_slices
        )


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
