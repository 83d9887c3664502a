"""The shallow decoders: masked (MASTER, section 4.2) and enhanced (RetroMAE, section 3.3), on packed text.

Both are BERT's post-LayerNorm layers, and both finish only the rows that carry a label: output projection and
feed-forward of a last layer are never computed where no loss reads them.

Letters: T tokens, S sequences, M labelled rows, R rows that ask, D channels, H heads, C channels of a head, P rows of
the position table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from quincunx.data_shards.batches import Labels, Task, Text
from quincunx.data_shards.errors import SettingsError
from quincunx.engine.encoder import init_std, norm_eps
from quincunx.kernels.enhanced_attention import enhanced_attention, visible_attention
from quincunx.kernels.launching import Implementation
from quincunx.kernels.packed_attention import packed_attention


class DecoderLayer(nn.Module):
    """One Transformer layer whose queries, keys and residual may come from different rows; sizes are the encoder's."""

    def __init__(self, config: PretrainedConfig, dropout: float):
        super().__init__()
        hidden, self.heads = config.hidden_size, config.num_attention_heads
        # Gated feed-forwards (no hidden_act in the configuration) count their width differently: take BERT's.
        intermediate = config.intermediate_size if hasattr(config, "hidden_act") else 4 * hidden
        self.query = nn.Linear(hidden, hidden, bias=False)
        # Apart from the matrix: an enhanced decoder projects h and positions separately and adds the bias once.
        self.query_bias = nn.Parameter(torch.zeros(hidden))
        self.key_value = nn.Linear(hidden, 2 * hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=norm_eps(config))
        self.intermediate = nn.Linear(hidden, intermediate)
        self.activation = ACT2FN[getattr(config, "hidden_act", "gelu")]
        self.output = nn.Linear(intermediate, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=norm_eps(config))
        self.dropout = nn.Dropout(dropout)
        for module in (self.query, self.key_value, self.attention_output, self.intermediate, self.output):
            nn.init.normal_(module.weight, std=init_std(config))
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def split_heads(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """[R, D] -> [R, H, C]"""
        return rows_RD.unflatten(-1, (self.heads, -1))

    def keys_and_values(self, context_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the context in one product: [T, H, C] each."""
        k_TD, v_TD = self.key_value(context_TD).chunk(2, dim=-1)
        return self.split_heads(k_TD), self.split_heads(v_TD)

    def forward(self, attended_RHC: torch.Tensor, residual_RD: torch.Tensor) -> torch.Tensor:
        """Everything after the attention, [R, D]."""
        attended_RD = self.dropout(self.attention_output(attended_RHC.flatten(-2)))
        attended_RD = self.attention_norm(attended_RD + residual_RD)
        output_RD = self.dropout(self.output(self.activation(self.intermediate(attended_RD))))
        return self.output_norm(output_RD + attended_RD)


class MaskedDecoder(nn.Module):
    """n bidirectional layers over the embedded, masked text whose position 0 is h; the last at labelled rows only."""

    def __init__(self, config: PretrainedConfig, dropout: float, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config, dropout) for _ in range(num_layers))

    def forward(self, context_TD: torch.Tensor, text: Text, labels: Labels) -> torch.Tensor:
        """Hidden states [M, D] of the labelled rows."""
        hidden = context_TD
        for layer in self.layers:
            q_THC = layer.split_heads(layer.query(hidden) + layer.query_bias)
            k_THC, v_THC = layer.keys_and_values(hidden)
            attended = packed_attention(q_THC, k_THC, v_THC, text.cu_seqlens, text.max_length)
            if layer is self.layers[-1]:
                attended, hidden = (x.index_select(0, labels.positions) for x in (attended, hidden))
            hidden = layer(attended, hidden)
        return hidden


class EnhancedDecoder(nn.Module):
    """One layer with two streams (RetroMAE, Eq. 4 to 7): each row recovers its token from h and its own random context.

    The query stream, h + position, is also the residual; it has no LayerNorm and no dropout, so its projection is
    h W_q + p W_q: S + P rows pass the product instead of T. `decode_enhanced` runs the decoders of all tasks.
    """

    def __init__(self, config: PretrainedConfig, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(config, dropout)])

    def queries(self, h_SD: torch.Tensor, positions_PD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two parts of the queries, [S, H, C] and [P, H, C]: row i of sequence s asks with h[s] + position[i]."""
        layer = self.layers[0]
        h_SD, positions_PD = layer.query(torch.cat([h_SD, positions_PD])).split([len(h_SD), len(positions_PD)])
        return layer.split_heads(h_SD), layer.split_heads(positions_PD + layer.query_bias)

    def decode_embedded(self, query_TD: torch.Tensor, stream: "DecoderStream") -> torch.Tensor:
        """Hidden states [M, D] with a query stream given in full (RetroMAE's FlagEmbedding fork embeds h)."""
        layer, task = self.layers[0], stream.task
        q_THC = layer.split_heads(layer.query(query_TD) + layer.query_bias)
        k_THC, v_THC = layer.keys_and_values(stream.context_TD)
        attended_THC = visible_attention(
            q_THC, k_THC, v_THC, stream.text.cu_seqlens, task.keys, task.word_ids, task.keep_thresholds, task.visibility
        )
        rows_M = task.labels.positions
        return layer(attended_THC.index_select(0, rows_M), query_TD.index_select(0, rows_M))


@dataclass(frozen=True)
class DecoderStream:
    """What one task's decoder reads."""

    task: Task
    text: Text
    h_SD: torch.Tensor
    """Sentence vectors of the text's sequences."""
    context_TD: torch.Tensor
    """The embedded text with h at position 0."""


def decode_enhanced(
    decoders: Sequence[EnhancedDecoder],
    streams: Sequence[DecoderStream],
    positions_PD: torch.Tensor,
    kernels: Implementation,
) -> list[torch.Tensor]:
    """Hidden states [M, D] of each task's labelled rows, from one attention call over the sequences of all tasks.

    `positions_PD` is the raw position table, up to the longest sequence.
    """
    tasks, texts = [stream.task for stream in streams], [stream.text for stream in streams]
    parts = [decoder.queries(stream.h_SD, positions_PD) for decoder, stream in zip(decoders, streams, strict=True)]
    h_query_SHC, position_query_PHC = (torch.cat(part) for part in zip(*parts, strict=True))
    parts = [
        decoder.layers[0].keys_and_values(stream.context_TD) for decoder, stream in zip(decoders, streams, strict=True)
    ]
    k_THC, v_THC = (torch.cat(part) for part in zip(*parts, strict=True))
    num_tokens = [len(text.input_ids) for text in texts]
    offsets = [sum(num_tokens[:i]) for i in range(len(texts))]
    bounds = [text.cu_seqlens[1:] + offset for text, offset in zip(texts, offsets, strict=True)]
    cu_seqlens = torch.cat([texts[0].cu_seqlens[:1], *bounds])
    position_starts_S = torch.cat([torch.full_like(part, i * len(positions_PD)) for i, part in enumerate(bounds)])
    if tasks[0].visibility is None:
        rule = [torch.cat([getattr(task, name) for task in tasks]) for name in ("keys", "word_ids", "keep_thresholds")]
    else:
        assert len(tasks) == 1, "explicit masks replay cases of one task"
        rule = [None, None, None, tasks[0].visibility]
    attended_THC = enhanced_attention(
        h_query_SHC,
        position_query_PHC,
        k_THC,
        v_THC,
        cu_seqlens,
        *rule,
        position_starts_S=position_starts_S,
        max_length=max(text.max_length for text in texts),
        impl=kernels,
    )
    decoded = []
    for decoder, stream, attended in zip(decoders, streams, attended_THC.split(num_tokens), strict=True):
        text, rows_M = stream.text, stream.task.labels.positions
        # F.embedding: its gradient sums a sequence's or a position's many rows in float32 and in a fixed order.
        residual_MD = F.embedding(text.sequences.index_select(0, rows_M), stream.h_SD)
        residual_MD = residual_MD + F.embedding(text.positions.index_select(0, rows_M), positions_PD)
        decoded.append(decoder.layers[0](attended.index_select(0, rows_M), residual_MD))
    return decoded


# Our name of a parameter of a layer -> the names of a Hugging Face BertLayer (RoBERTa, ELECTRA, XLM-R alike).
BERT_LAYER_NAMES = {
    "query.weight": ("attention.self.query.weight",),
    "query_bias": ("attention.self.query.bias",),
    "key_value.weight": ("attention.self.key.weight", "attention.self.value.weight"),
    "key_value.bias": ("attention.self.key.bias", "attention.self.value.bias"),
    "attention_output.weight": ("attention.output.dense.weight",),
    "attention_output.bias": ("attention.output.dense.bias",),
    "attention_norm.weight": ("attention.output.LayerNorm.weight",),
    "attention_norm.bias": ("attention.output.LayerNorm.bias",),
    "intermediate.weight": ("intermediate.dense.weight",),
    "intermediate.bias": ("intermediate.dense.bias",),
    "output.weight": ("output.dense.weight",),
    "output.bias": ("output.dense.bias",),
    "output_norm.weight": ("output.LayerNorm.weight",),
    "output_norm.bias": ("output.LayerNorm.bias",),
}


def layer_weights(bert_layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a Hugging Face BertLayer as a DecoderLayer's state (K above V in one matrix)."""
    return {ours: torch.cat([bert_layer[name] for name in theirs]) for ours, theirs in BERT_LAYER_NAMES.items()}


def copy_last_layers(decoder: MaskedDecoder | EnhancedDecoder, encoder_layers: list[nn.Module]) -> None:
    """Starts a decoder's layers as copies of the encoder's last ones, in their order (as SimLM does).

    Raises SettingsError where the encoder's layers are not BERT's or are fewer.
    """
    if len(encoder_layers) < len(decoder.layers):
        raise SettingsError(
            f"decoder_init encoder needs {len(decoder.layers)} encoder layers, but the encoder has "
            f"{len(encoder_layers)}; lower decoder_layers or set decoder_init to random"
        )
    for ours, theirs in zip(decoder.layers, encoder_layers[-len(decoder.layers) :], strict=True):
        state = theirs.state_dict()
        if any(name not in state for names in BERT_LAYER_NAMES.values() for name in names):
            raise SettingsError(
                "decoder_init encoder needs BERT-like layers, which this encoder does not have; set it to random"
            )
        ours.load_state_dict(layer_weights(state))
