"""The published pre-training steps, to be measured against: RetroMAE's and MASTER's, rebuilt from their behaviour.

Hugging Face's BertForMaskedLM and BertLayers on padded batches, the LM head over all positions of every text, dropout
0.1 in attention too. RetroMAE pads to the longest passage of the batch and masks with a dense [B, L, L] tensor. MASTER
pads every text to the model's length and runs the encoder three times: the passage (mkp, dor, gor decode from it), its
first half (npr decodes the second), and the passage under a second mask (cmp). At 128 tokens that is 109.5 and 404.6
GFLOP a passage, the published code's figures. tests/test_replay_case.py compares the losses and gradients of the
model that trains with this one's.

Nobody published the quincunx recipe; it stands here as five of RetroMAE's decoders over one pass.

Letters: B passages, L padded length, D channels, V words.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from synthetic import CLS, DECODER_RATE, ENCODER_RATE, FIRST_WORD, MASK, SEP
from torch import nn
from transformers import BertConfig, BertForMaskedLM
from transformers.models.bert.modeling_bert import BertLayer

IGNORED = -100
# Each encoder pass of a recipe: its mask rate, the share of the passage it reads, and the decoders that start from it
# with the share of a passage's length that their texts have.
PASSES = {
    "retromae": [(ENCODER_RATE, 1.0, {"retromae": 1.0})],
    "master": [
        (ENCODER_RATE, 1.0, {"mkp": 1.0, "dor": 1.0, "gor": 1.0}),
        (ENCODER_RATE, 0.5, {"npr": 0.5}),
        (DECODER_RATE, 1.0, {"cmp": 1.0}),
    ],
    "quincunx": [(ENCODER_RATE, 1.0, {"mkp": 1.0, "cmp": 1.0, "npr": 1.0, "dor": 1.0, "gor": 1.0})],
}


@dataclass(frozen=True)
class PaddedText:
    """A padded text of B passages."""

    ids: torch.Tensor
    """int64 [B, L]"""
    labels: torch.Tensor
    """int64 [B, L], IGNORED where nothing is to be recovered."""
    attention_mask: torch.Tensor
    """int64 [B, L], 1 at real tokens."""
    visible: torch.Tensor | None = None
    """bool [B, L, L] of enhanced decoding: which columns a row sees."""


PaddedPass = tuple[PaddedText, Mapping[str, PaddedText]]
"""What the encoder reads and what each decoder of that pass decodes."""


class PublishedModel(nn.Module):
    """Encoder with its LM head, and decoders by task: BertLayers, one (enhanced) or `num_layers` (masked)."""

    def __init__(self, config: BertConfig, tasks: list[str], enhanced: bool, num_layers: int = 2):
        super().__init__()
        self.lm = BertForMaskedLM(config)
        self.enhanced = enhanced
        self.decoders = nn.ModuleDict(
            {
                task: nn.ModuleList(BertLayer(self.lm.config) for _ in range(1 if enhanced else num_layers))
                for task in tasks
            }
        )

    def forward(self, passes: list[PaddedPass]) -> dict[str, torch.Tensor]:
        """The losses, each a mean over its labels: `encoder` and the tasks of every pass, numbered by pass."""
        losses = {}
        for number, (text, decoded) in enumerate(passes):
            hidden_BLD = self.lm.bert(input_ids=text.ids, attention_mask=text.attention_mask).last_hidden_state
            losses[f"encoder {number}"] = self.loss(hidden_BLD, text.labels)
            for task, task_text in decoded.items():
                losses[f"{task} {number}"] = self.loss(
                    self.decode(task, hidden_BLD[:, :1], task_text), task_text.labels
                )
        return losses

    def decode(self, task: str, h_B1D: torch.Tensor, text: PaddedText) -> torch.Tensor:
        """Hidden states [B, L, D] of a decoder over `text` with the sentence vectors at position 0."""
        embedded_BLD = self.lm.bert.embeddings(input_ids=text.ids)
        context_BLD = torch.cat([h_B1D, embedded_BLD[:, 1:]], dim=1)
        layers = self.decoders[task]
        if self.enhanced:
            return self.enhanced_decoding(layers[0], h_B1D, context_BLD, text.visible[:, None])
        for layer in layers:
            context_BLD = layer(context_BLD, text.attention_mask.bool()[:, None, None, :])
        return context_BLD

    def enhanced_decoding(
        self, layer: BertLayer, h_B1D: torch.Tensor, context_BLD: torch.Tensor, visible_B1LL: torch.Tensor
    ) -> torch.Tensor:
        """RetroMAE, Eq. 4 to 7: every query h + position projected, the query stream is the residual."""
        attention = layer.attention.self
        positions_L = torch.arange(context_BLD.shape[1], device=context_BLD.device)
        query_BLD = h_B1D + self.lm.bert.embeddings.position_embeddings(positions_L)
        sources = ((attention.query, query_BLD), (attention.key, context_BLD), (attention.value, context_BLD))
        q, k, v = (
            project(x).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2) for project, x in sources
        )
        dropout = attention.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_B1LL, dropout_p=dropout)
        return layer.feed_forward_chunk(layer.attention.output(attended.transpose(1, 2).flatten(-2), query_BLD))

    def loss(self, hidden_BLD: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.lm.cls(hidden_BLD).flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED)


def build_published_model(recipe: str, vocab_size: int, hidden: int, layers: int, heads: int) -> PublishedModel:
    """The model of a recipe with random weights, BERT's dropout of 0.1, SDPA in the encoder and masked decoders."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        attn_implementation="sdpa",
    )
    tasks = [task for _, _, decoded in PASSES[recipe] for task in decoded]
    return PublishedModel(config, tasks, enhanced=recipe != "master")


def make_padded_passes(
    recipe: str, lengths: np.ndarray, vocab_size: int, max_tokens: int, device: str = "cpu"
) -> list[PaddedPass]:
    """Random passages of the given lengths as the published collators pad them."""
    rng = np.random.default_rng(0)
    padded_length = max_tokens if recipe == "master" else int(lengths.max())

    def text(share: float, rate: float, enhanced: bool) -> PaddedText:
        columns = np.arange(padded_length)
        ends = np.maximum(np.rint(lengths * share), 4).astype(int)[:, None]
        inner = (columns > 0) & (columns < ends - 1)
        ids = np.where(inner, rng.integers(FIRST_WORD, vocab_size, inner.shape), 0)
        ids[:, 0] = CLS
        np.put_along_axis(ids, ends - 1, SEP, axis=1)
        hidden = inner & (rng.random(inner.shape) < rate)
        real = columns < ends
        if not enhanced:
            labels, ids = np.where(hidden, ids, IGNORED), np.where(hidden, MASK, ids)
            return PaddedText(*(torch.from_numpy(x).to(device) for x in (ids, labels, real.astype(np.int64))))
        seen = (rng.random((*inner.shape, padded_length)) >= rate) & (columns[:, None] != columns) & real[:, None, :]
        seen[:, :, 0] = True
        labels = np.where(inner, ids, IGNORED)
        return PaddedText(*(torch.from_numpy(x).to(device) for x in (ids, labels, real.astype(np.int64), seen)))

    return [
        (
            text(share, rate, False),
            {task: text(part, DECODER_RATE, recipe != "master") for task, part in decoded.items()},
        )
        for rate, share, decoded in PASSES[recipe]
    ]
