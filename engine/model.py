"""One encoder, its shallow decoders, the LM head they share, and the loss of a micro-batch.

Letters: B passages, S sequences of a task, T tokens of a text, M labelled rows of a task, N labelled rows of all, D
channels, E embedding channels (E < D in small ELECTRAs), V words, P longest text of the decoders.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from quincunx.data_shards.batches import Batch, Context, Text
from quincunx.data_shards.errors import CheckpointError, SettingsError
from quincunx.data_shards.tasks import TaskSpec
from quincunx.engine.decoders import (
    DecoderLayer,
    DecoderStream,
    EnhancedDecoder,
    MaskedDecoder,
    copy_last_layers,
    decode_enhanced,
)
from quincunx.engine.encoder import (
    PackedEncoder,
    encoder_layers,
    encoder_multiply_adds,
    init_std,
    load_encoder,
    norm_eps,
)
from quincunx.kernels.launching import Implementation
from quincunx.kernels.linear_cross_entropy import linear_cross_entropy

SHARED = "shared"
"""Name of the decoder that all tasks share; no task is called so."""
SENTENCE_LOSSES: dict[str, Callable[[torch.Tensor, Batch, Callable[[Text], torch.Tensor]], torch.Tensor]] = {}
"""Losses of the sentence vectors beside the tasks' own, by the name that the setting sentence_losses takes: sentence
vectors [B, D], the batch and PretrainModel.encode (a second view, or another text of `batch.contexts`, to [S, D]) give
[B], a loss for each passage. An entry here is all that a new loss needs. Negatives within the batch are those of the
micro-batch; engine/retrieval/losses.py's gather_with_gradient has all ranks', where each has equally many passages (all
but the last held-out batch). Under ZeRO 3 every rank must run the same modules: a loss that may find nothing to encode
encodes `batch.encoder` and multiplies by 0."""
BUNDLE_FILE = "bundle.json"
DECODERS_FILE = "decoders.safetensors"
BUNDLE_VERSION = 1


class PretrainOutput(NamedTuple):
    """What a micro-batch gives; vectors hold the encoder's task first, the others in the recipe's order, then the
    sentence losses; losses below counts these too."""

    loss: torch.Tensor
    """Scalar: sum over losses of lambda_t * (sum of nll over this micro-batch's rows) / label_counts[t]."""
    nll_sums: torch.Tensor
    """[losses], sum of the negative log-likelihoods in nats (of a sentence loss: its values), detached."""
    correct: torch.Tensor
    """int64 [losses], labelled tokens whose word got the highest score; 0 of a sentence loss."""
    counts: torch.Tensor
    """int64 [losses], labelled tokens, or passages."""
    flops: float = 0.0
    """Of forward and backward (`PretrainModel.flops`); the job fills it in, from a batch on the host."""


class LMHead(nn.Module):
    """Transform (dense, activation, LayerNorm) and tied output projection with a bias, up to the loss."""

    def __init__(self, config: PretrainedConfig, words: nn.Embedding, weights: dict[str, torch.Tensor] | None):
        """`weights` are those of the encoder's checkpoint (`encoder.head_weights`); None: fresh ones.

        A checkpoint without a bias somewhere (ModernBERT's dense and norm) gets one of zeros.
        """
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, words.embedding_dim)
        activation = getattr(config, "classifier_activation", None) or getattr(config, "hidden_act", "gelu")
        self.activation = ACT2FN[activation]
        self.norm = nn.LayerNorm(words.embedding_dim, eps=norm_eps(config))
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        nn.init.normal_(self.dense.weight, std=init_std(config))
        nn.init.zeros_(self.dense.bias)
        self.load_state_dict(weights or {}, strict=False)

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

        `output_weight_VE` is the word embedding's weight.
        """
        transformed_NE = self.norm(self.activation(self.dense(hidden_ND)))
        return linear_cross_entropy(
            transformed_NE, output_weight_VE, self.bias, labels_N, row_weights_N, task_slices, impl=kernels
        )


class PretrainModel(nn.Module):
    """The model that trains. The LM head's output weight is the encoder's word embedding."""

    def __init__(
        self,
        encoder: PackedEncoder,
        tasks: Sequence[TaskSpec],
        *,
        max_tokens: int,
        head_weights: dict[str, torch.Tensor] | None = None,
        decoder_layers: int = 2,
        query_stream: Literal["raw", "embedded"] = "raw",
        dropout: float | None = None,
        shared_decoder: bool = False,
        sentence_losses: Mapping[str, float] | None = None,
        kernels: Implementation = "auto",
    ):
        """`max_tokens` sizes a position table of the decoders' own where the encoder has none of width D.

        `head_weights`: as load_encoder gives them. `dropout`: of the decoders; None: as the encoder's configuration has
        it. `shared_decoder`: all tasks, whose decoders must then be of one kind, decode through one module.
        `sentence_losses`: weights of some of SENTENCE_LOSSES.
        """
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.lm_head = LMHead(config, encoder.word_embeddings, head_weights)
        self.tasks = tuple(tasks)
        self.query_stream = query_stream
        self.shared_decoder = shared_decoder
        self.kernels = kernels
        self.loss_weights = {"mlm": 1.0} | {task.name: task.weight for task in tasks} | dict(sentence_losses or {})
        """Weight lambda of each loss, in the order of a PretrainOutput's vectors."""
        if dropout is None:
            dropout = getattr(config, "hidden_dropout_prob", getattr(config, "dropout", 0.0))
        self.decoders = nn.ModuleDict()
        assert not shared_decoder or len({task.decoder for task in tasks}) <= 1, "a shared decoder has one kind"
        for name, kind in {self.decoder_name(task.name): task.decoder for task in tasks}.items():
            if kind == "masked":
                self.decoders[name] = MaskedDecoder(config, dropout, decoder_layers)
            else:
                self.decoders[name] = EnhancedDecoder(config, dropout)
        any_enhanced = any(task.decoder == "enhanced" for task in tasks)
        table = encoder.position_embeddings
        if any_enhanced and query_stream == "embedded" and encoder.word_embeddings.embedding_dim != config.hidden_size:
            raise SettingsError(
                "query_stream embedded needs an embedding layer as wide as h, but this encoder's is "
                f"{encoder.word_embeddings.embedding_dim} wide and h {config.hidden_size}; set query_stream to raw"
            )
        self.position_table = None
        needs_table = any_enhanced and query_stream == "raw" and table is not None
        if (table is None and tasks) or (needs_table and table.embedding_dim != config.hidden_size):
            self.position_table = nn.Embedding(max_tokens, config.hidden_size)
            nn.init.normal_(self.position_table.weight, std=init_std(config))
        self.register_buffer("lambdas", torch.tensor([*self.loss_weights.values()]), persistent=False)

    def decoder_name(self, task: str) -> str:
        """Name in `decoders` of the decoder that a task uses: the task's own, or that of all."""
        return SHARED if self.shared_decoder else task

    def decoder_of(self, task: str) -> MaskedDecoder | EnhancedDecoder:
        return self.decoders[self.decoder_name(task)]

    def encode(self, text: Text) -> torch.Tensor:
        """Sentence vectors [S, D]: final hidden states of [CLS], no pooler."""
        return self.encoder(self.encoder.word_embeddings(text.input_ids), text).index_select(0, text.starts)

    def loss_counts(self, batch: Batch) -> list[int]:
        """What each loss is a mean over: labelled tokens, or passages."""
        num_sentence_losses = len(self.loss_weights) - 1 - len(self.tasks)
        return [*batch.num_labels(), *[batch.num_passages] * num_sentence_losses]

    def forward(self, batch: Batch, label_counts: torch.Tensor) -> PretrainOutput:
        """Loss of one micro-batch.

        `label_counts` [losses] holds the loss_counts of the whole global batch (all ranks, all micro-batches), so that
        the losses of the micro-batches sum to the global batch's. A task without rows here adds 0 and zero gradients
        (every parameter takes part in every forward, which ZeRO and all-reduce rely on).
        """
        assert label_counts.shape == self.lambdas.shape and list(batch.tasks) == [task.name for task in self.tasks]
        h_BD, rows, output_weight_VE = self._labelled_rows(batch)
        counts = batch.num_labels()
        bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]
        labels_N = torch.cat([batch.encoder_labels.ids, *(task.labels.ids for task in batch.tasks.values())])
        per_row = self.lambdas.float() / label_counts.to(self.lambdas.device, torch.float32).clamp(min=1)
        row_weights_N = torch.cat([per_row[t].expand(count) for t, count in enumerate(counts)])
        task_slices, rows_ND = list(itertools.pairwise(bounds)), torch.cat(rows)
        loss, sums, correct = self.lm_head(
            rows_ND, output_weight_VE, labels_N, row_weights_N, task_slices, self.kernels
        )
        for place, name in list(enumerate(self.loss_weights))[len(counts) :]:
            value = SENTENCE_LOSSES[name](h_BD, batch, self.encode).float().sum()
            loss = loss + value * per_row[place]
            sums, correct = torch.cat([sums, value.detach()[None]]), torch.cat([correct, correct.new_zeros(1)])
        return PretrainOutput(loss, sums, correct, torch.tensor(self.loss_counts(batch)))

    def _labelled_rows(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Sentence vectors [B, D]; final hidden states [M, D] of the labelled rows of the encoder and every task; the
        head's weight [V, E]."""
        contexts = batch.contexts
        ids = torch.cat([batch.encoder.input_ids, *(context.text.input_ids for context in contexts.values())])
        output_weight_VE = self.encoder.word_embeddings.weight
        words_TE = F.embedding(ids, output_weight_VE)
        encoder_words_TE, words_TE = words_TE.split([batch.num_tokens, len(ids) - batch.num_tokens])
        hidden_TD = self.encoder(encoder_words_TE, batch.encoder)
        h_BD = hidden_TD.index_select(0, batch.encoder.starts)
        embedded = self._embed(contexts, words_TE) if contexts else {}
        read = {}
        for name, context in contexts.items():
            h_SD = h_BD.index_select(0, context.passage_index)
            read[name] = context.text, h_SD, embedded[name].index_copy(0, context.text.starts, h_SD)
        streams = {name: DecoderStream(task, *read[task.context]) for name, task in batch.tasks.items()}
        decoded = self._decode(streams)
        rows = [hidden_TD.index_select(0, batch.encoder_labels.positions)]
        return h_BD, rows + [decoded[spec.name] for spec in self.tasks], output_weight_VE

    def _embed(self, contexts: dict[str, Context], words_TE: torch.Tensor) -> dict[str, torch.Tensor]:
        """The embedding layer over all decoders' texts at once: [T, D] by the context's name."""
        texts = [context.text for context in contexts.values()]
        positions = torch.cat([text.positions for text in texts])
        embedded = self.encoder.embed(words_TE, positions)
        if self.encoder.position_embeddings is None:
            embedded = embedded + self.position_table(positions)
        return dict(zip(contexts, embedded.split([len(text.input_ids) for text in texts]), strict=True))

    def _decode(self, streams: dict[str, DecoderStream]) -> dict[str, torch.Tensor]:
        """Hidden states [M, D] of the labelled rows by task."""
        decoded, enhanced = {}, []
        for spec in self.tasks:
            decoder, stream = self.decoder_of(spec.name), streams[spec.name]
            if spec.decoder == "masked":
                decoded[spec.name] = decoder(stream.context_TD, stream.text, stream.task.labels)
            elif self.query_stream == "embedded":
                h_TD = stream.h_SD.index_select(0, stream.text.sequences)
                decoded[spec.name] = decoder.decode_embedded(self.encoder.embed(h_TD, stream.text.positions), stream)
            else:
                enhanced.append(spec.name)
        if enhanced:
            members = [streams[name] for name in enhanced]
            positions_PD = self._positions(max(stream.text.max_length for stream in members))
            decoders = [self.decoder_of(name) for name in enhanced]
            decoded |= zip(enhanced, decode_enhanced(decoders, members, positions_PD, self.kernels), strict=True)
        return decoded

    def _positions(self, length: int) -> torch.Tensor:
        """Raw position vectors [P, D] of the enhanced decoders' query stream."""
        table, offset = self.position_table, 0
        if table is None:
            table, offset = self.encoder.position_embeddings, self.encoder.position_offset
        return table(torch.arange(offset, offset + length, device=self.lambdas.device))

    def flops(self, batch: Batch) -> float:
        """FLOPs of forward and backward (three times the forward) of one micro-batch, matrix products only.

        As usual for MFU, only what the losses need counts: neither recomputation (gradient checkpointing) nor queries
        at rows without a label. benchmarks/flops.py counts what is run.
        """
        width = self.encoder.config.hidden_size
        multiply_adds = encoder_multiply_adds(self.encoder.model, np.diff(batch.encoder.cu_seqlens))
        rows = float(sum(batch.num_labels()))
        words = self.encoder.word_embeddings
        multiply_adds += rows * (words.num_embeddings + width) * words.embedding_dim
        for spec in self.tasks:
            task = batch.tasks[spec.name]
            text = batch.contexts[task.context].text
            tokens, labels = float(len(text.input_ids)), float(len(task.labels.ids))
            lengths = np.diff(text.cu_seqlens).astype(np.float64)
            squares = (lengths**2).sum()
            layers = self.decoder_of(spec.name).layers
            inner = layers[0].intermediate.out_features
            if spec.decoder == "masked":
                whole_layers = len(layers) - 1
                multiply_adds += whole_layers * ((4 * width**2 + 2 * width * inner) * tokens + 2 * width * squares)
            # The last (or only) layer: keys and values of all tokens, the rest at labelled rows.
            multiply_adds += 2 * width**2 * tokens + (2 * width**2 + 2 * width * inner) * labels
            multiply_adds += 2 * width * squares * (labels / tokens if tokens else 0.0)
        return 3 * 2 * multiply_adds

    def compile_parts(self) -> None:
        """torch.compile for the encoder and every decoder layer, in place; names of parameters stay."""
        layers = (module for module in self.decoders.modules() if isinstance(module, DecoderLayer))
        for module in (self.encoder.model, *layers):
            module.compile(dynamic=True)


def build_model(
    encoder: str,
    tasks: Sequence[TaskSpec],
    *,
    max_tokens: int,
    dropout: float | None = None,
    decoder_init: Literal["random", "encoder"] = "random",
    from_scratch: Mapping[str, int] | None = None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    gradient_checkpointing: bool = False,
    **decoding: Any,
) -> PretrainModel:
    """The model of a run: `encoder` as `load_encoder` takes it, `decoding` as PretrainModel does.

    Random weights come from torch's global generator. Raises SettingsError where the encoder cannot serve the run.
    """
    packed, head_weights = load_encoder(
        encoder,
        from_scratch=from_scratch,
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        max_tokens=max_tokens,
        dropout=dropout,
        gradient_checkpointing=gradient_checkpointing,
    )
    model = PretrainModel(packed, tasks, max_tokens=max_tokens, head_weights=head_weights, dropout=dropout, **decoding)
    if decoder_init == "encoder":
        for decoder in model.decoders.values():
            copy_last_layers(decoder, encoder_layers(packed.model))
    return model


def is_bundle(name: str) -> bool:
    """Whether the `encoder` setting names a bundle."""
    return (Path(name) / BUNDLE_FILE).is_file()


def load_bundle(model: PretrainModel, folder: Path, report: Callable[[str], None] = print) -> None:
    """Fills a PretrainModel's LM head and decoders from a bundle; its encoder is loaded already.

    report: told which decoders of the run the bundle lacks; they keep their fresh weights.

    Raises:
        CheckpointError: a damaged bundle, one of a newer version, weights of another shape or decoder kind, or one
            decoder for all tasks on one side and one for each on the other.
    """
    try:
        content = json.loads((folder / BUNDLE_FILE).read_text())
        version, tasks = content["version"], content["tasks"]
        weights = load_file(folder / DECODERS_FILE)
    except Exception as error:  # safetensors has an error class of its own for a damaged file
        raise CheckpointError(f"the bundle {folder} cannot be read ({error}): export it again") from error
    if version > BUNDLE_VERSION:
        raise CheckpointError(
            f"the bundle {folder} has format {version}, this quincunx reads {BUNDLE_VERSION}: update it"
        )
    shared = content.get("shared_decoder", False)
    if tasks and model.tasks and shared != model.shared_decoder:
        raise CheckpointError(
            f"the bundle {folder} has one decoder for {'all tasks' if shared else 'each task'}, but the recipe does "
            f"not: give --{'' if shared else 'no_'}shared_decoder, or start from the plain encoder folder"
        )
    if shared and tasks:  # its decoder serves any task
        tasks = dict.fromkeys([task.name for task in model.tasks], next(iter(tasks.values())))
    for task in model.tasks:
        if tasks.get(task.name, task.decoder) != task.decoder:
            raise CheckpointError(
                f"the bundle {folder} has a decoder of kind {tasks[task.name]} for {task.name}, the recipe asks for "
                f"{task.decoder}: set --decoder {tasks[task.name]}, or start from the plain encoder folder"
            )
    fresh = [task.name for task in model.tasks if task.name not in tasks]
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")}
    fresh_decoders = tuple(f"decoders.{model.decoder_name(task)}." for task in fresh)
    wanted = {name for name in own if not name.startswith(fresh_decoders)}
    wrong = [name for name in sorted(wanted) if name not in weights or weights[name].shape != own[name].shape]
    if wrong:
        raise CheckpointError(
            f"the bundle {folder} does not fit the recipe's decoders ({wrong[0]} is missing or of another shape): use "
            f"the settings in its {BUNDLE_FILE}, or start from the plain encoder folder"
        )
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    if fresh:
        report(f"the bundle {folder} has no decoder for {', '.join(fresh)}: they start from fresh weights")
