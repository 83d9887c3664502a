"""The recipes as they are commonly written, to be measured against: padded batches, logits at every position.

Hugging Face's BertForMaskedLM and BertLayers with SDPA, one encoder pass, each decoder with its own pass and the LM
head over all of its positions; RetroMAE's enhanced decoder with a dense [B, 1, L, L] mask. The same method and sizes as
ours, none of its savings.
"""

import numpy as np
import torch
import torch.nn.functional as F
from synthetic import RECIPES
from torch import nn
from transformers import BertConfig, BertForMaskedLM
from transformers.models.bert.modeling_bert import BertLayer

from quincunx.data_shards.batches import PackedBatch
from quincunx.kernels.hashing import visibility

IGNORED = -100


class PaddedModel(nn.Module):
    """Encoder, LM head and the recipe's decoders. Letters: B passages, L longest text, D channels."""

    def __init__(self, recipe: str, vocab_size: int, hidden: int, layers: int, heads: int, dropout: float):
        super().__init__()
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        names, self.kind = RECIPES[recipe]
        self.lm = BertForMaskedLM(config)
        self.decoders = nn.ModuleDict(
            {name: nn.ModuleList(BertLayer(config) for _ in range(2 if self.kind == "masked" else 1)) for name in names}
        )

    def forward(self, batch: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
        """The summed loss of a batch of `pad_batch`."""
        text = batch["encoder"]
        hidden_BLD = self.lm.bert(input_ids=text["ids"], attention_mask=text["mask"]).last_hidden_state
        loss = self.loss(hidden_BLD, text["labels"])
        for name, layers in self.decoders.items():
            text = batch[name]
            embedded_BLD = self.lm.bert.embeddings(input_ids=text["ids"])
            context_BLD = torch.cat([hidden_BLD[:, :1], embedded_BLD[:, 1:]], dim=1)
            if self.kind == "masked":
                for layer in layers:
                    context_BLD = layer(context_BLD, text["mask"].bool()[:, None, None, :])
                decoded_BLD = context_BLD
            else:
                decoded_BLD = self.enhanced(layers[0], hidden_BLD[:, :1], context_BLD, text["visible"])
            loss = loss + self.loss(decoded_BLD, text["labels"])
        return loss

    def enhanced(
        self, layer: BertLayer, h_B1D: torch.Tensor, context_BLD: torch.Tensor, visible_B1LL: torch.Tensor
    ) -> torch.Tensor:
        """RetroMAE's Eq. 4 to 7 with every query projected."""
        attention = layer.attention.self
        positions_L = torch.arange(context_BLD.shape[1])
        query_BLD = h_B1D + self.lm.bert.embeddings.position_embeddings(positions_L)
        q, k, v = (
            project(x).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for project, x in (
                (attention.query, query_BLD),
                (attention.key, context_BLD),
                (attention.value, context_BLD),
            )
        )
        attended_BLD = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_B1LL).transpose(1, 2).flatten(-2)
        return layer.feed_forward_chunk(layer.attention.output(attended_BLD, query_BLD))

    def loss(self, hidden_BLD: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.lm.cls(hidden_BLD).flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED)


def pad_batch(batch: PackedBatch) -> dict[str, dict[str, torch.Tensor]]:
    """Padded tensors of every text: ids, mask, labels [B, L]; `visible` bool [B, 1, L, L] for enhanced decoders."""

    def pad(flat: np.ndarray, cu_seqlens: np.ndarray, padding: int) -> torch.Tensor:
        parts = torch.from_numpy(flat.astype(np.int64)).split(np.diff(cu_seqlens).tolist())
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=padding)

    def text(packed, positions, labels) -> dict[str, torch.Tensor]:
        flat_labels = np.full(len(packed.input_ids), IGNORED)
        flat_labels[positions] = labels
        return {
            "ids": pad(packed.input_ids, packed.cu_seqlens, 0),
            "mask": pad(np.ones_like(packed.input_ids), packed.cu_seqlens, 0),
            "labels": pad(flat_labels, packed.cu_seqlens, IGNORED),
        }

    padded = {"encoder": text(batch.encoder, batch.encoder_label_positions, batch.encoder_labels)}
    for name, task in batch.tasks.items():
        padded[name] = text(task.text, task.label_positions, task.labels)
        if task.keys is not None:
            words, thresholds = (pad(x, task.text.cu_seqlens, 0).int() for x in (task.word_ids, task.keep_thresholds))
            rows = torch.arange(words.shape[1], dtype=torch.int32).expand_as(words)
            visible = visibility(torch.from_numpy(task.keys), rows, words, thresholds)
            visible[:, :, 0] = True  # padded rows must see something
            padded[name]["visible"] = visible[:, None]
    return padded
