"""One encoder, its shallow decoders, the LM head they share, and the loss of a micro-batch.

Letters: B passages, S sequences of a task, T tokens of a text, M labelled rows of a task, N labelled rows of all, D
channels, P longest text of the decoders.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.tasks import TaskSpec
from quincunx.engine.decoders import (
    DecoderLayer,
    DecoderStream,
    EnhancedDecoder,
    LayerShape,
    MaskedDecoder,
    copy_last_layers,
    decode_enhanced,
)
from quincunx.engine.encoder import PackedEncoder, ScratchShape, load_encoder
from quincunx.engine.lean_modules import encoder_layers
from quincunx.engine.lm_head import LMHead, TiedRows, make_lm_head, norm_eps
from quincunx.engine.tensors import TensorBatch, TensorTask, TensorText, cls_and_labels, cls_rows, empty_task
from quincunx.kernels.launching import Implementation

SHARED = "shared"
"""Name of the decoder that all tasks share; no task is called so."""


class StepOutput(NamedTuple):
    """What a micro-batch gives; vectors hold the encoder's task first, then the others in the recipe's order."""

    loss: torch.Tensor
    """Scalar: sum over tasks of lambda_t * (sum of nll over this micro-batch's rows) / label_counts[t]."""
    nll_sums: torch.Tensor
    """[1 + tasks], sum of the negative log-likelihoods in nats, detached."""
    correct: torch.Tensor
    """int64 [1 + tasks], labelled tokens whose word got the highest score."""
    counts: torch.Tensor
    """int64 [1 + tasks], labelled tokens."""


class PretrainModel(nn.Module):
    """The model that trains. The LM head's output weight is the encoder's word embedding."""

    def __init__(
        self,
        encoder: PackedEncoder,
        lm_head: LMHead,
        tasks: Sequence[TaskSpec],
        *,
        decoder_layers: int,
        query_stream: Literal["raw", "embedded"],
        dropout: float,
        max_tokens: int,
        shared_decoder: bool = False,
        kernels: Implementation = "auto",
    ):
        """`max_tokens` sizes a position table of the decoders' own where the encoder has none of width D.

        `shared_decoder`: all tasks, whose decoders must then be of one kind, decode through one module.
        """
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.lm_head = lm_head
        self.tasks = tuple(tasks)
        self.query_stream = query_stream
        self.shared_decoder = shared_decoder
        self.kernels = kernels
        self.task_names = ("mlm", *(task.name for task in tasks))
        shape = LayerShape(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            # Gated feed-forwards (no hidden_act in the configuration) count their width differently: take BERT's.
            intermediate=config.intermediate_size if hasattr(config, "hidden_act") else 4 * config.hidden_size,
            activation=getattr(config, "hidden_act", "gelu"),
            eps=norm_eps(config),
            dropout=dropout,
            init_std=getattr(config, "initializer_range", 0.02),
        )
        self.decoders = nn.ModuleDict()
        assert not shared_decoder or len({task.decoder for task in tasks}) <= 1, "a shared decoder has one kind"
        for name, kind in {self.decoder_name(task.name): task.decoder for task in tasks}.items():
            masked = kind == "masked"
            self.decoders[name] = MaskedDecoder(shape, decoder_layers) if masked else EnhancedDecoder(shape)
        any_enhanced = any(task.decoder == "enhanced" for task in tasks)
        table = encoder.position_embeddings
        if any_enhanced and query_stream == "embedded" and encoder.word_embeddings.embedding_dim != shape.hidden:
            raise SettingsError(
                "query_stream embedded passes h through the embedding layer, which in this encoder is "
                f"{encoder.word_embeddings.embedding_dim} wide and h {shape.hidden}; set query_stream to raw"
            )
        self.position_table = None
        needs_table = any_enhanced and query_stream == "raw" and table is not None
        if (table is None and tasks) or (needs_table and table.embedding_dim != shape.hidden):
            self.position_table = nn.Embedding(max_tokens, shape.hidden)
            nn.init.normal_(self.position_table.weight, std=shape.init_std)
        lambdas = torch.tensor([1.0, *(task.weight for task in tasks)])
        self.register_buffer("lambdas", lambdas, persistent=False)

    def decoder_name(self, task: str) -> str:
        """Name in `decoders` of the decoder that a task uses: the task's own, or that of all."""
        return SHARED if self.shared_decoder else task

    def decoder_of(self, task: str) -> MaskedDecoder | EnhancedDecoder:
        return self.decoders[self.decoder_name(task)]

    def encode(self, text: TensorText) -> torch.Tensor:
        """Sentence vectors [S, D]: final hidden states of [CLS], no pooler."""
        word_vectors = self.encoder.word_embeddings(text.input_ids)
        return self.encoder(word_vectors, text.positions, text.cu_seqlens, text.max_length, cls_rows(text))

    def forward(self, batch: TensorBatch, label_counts: torch.Tensor) -> StepOutput:
        """Loss of one micro-batch.

        `label_counts` [1 + tasks] holds each task's labelled tokens in the whole global batch (all ranks, all
        micro-batches), so that the losses of the micro-batches sum to the global batch's. A task without rows here adds
        0 and zero gradients (every parameter takes part in every forward, which ZeRO and all-reduce rely on).
        """
        assert label_counts.shape == self.lambdas.shape and batch.tasks.keys() <= set(self.task_names)
        tasks = [batch.tasks.get(task.name) or empty_task(batch.encoder.input_ids.device) for task in self.tasks]
        rows, output_weight_VE = self._labelled_rows(batch, tasks)
        counts = [len(part) for part in rows]
        bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]
        labels_N = torch.cat([batch.encoder_labels.labels, *(task.labels.labels for task in tasks)])
        per_row = self.lambdas.float() / label_counts.to(self.lambdas.device, torch.float32).clamp(min=1)
        row_weights_N = torch.cat([per_row[t].expand(count) for t, count in enumerate(counts)])
        task_slices, rows_ND = list(itertools.pairwise(bounds)), torch.cat(rows)
        found = self.lm_head(rows_ND, output_weight_VE, labels_N, row_weights_N, task_slices, self.kernels)
        return StepOutput(*found, torch.tensor(counts))

    def _labelled_rows(self, batch: TensorBatch, tasks: list[TensorTask]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Final hidden states [M, D] of the labelled rows, the encoder's and every task's; the head's weight [V, E]."""
        texts = list({id(task.text): task.text for task in tasks}.values())
        ids = torch.cat([batch.encoder.input_ids, *(text.input_ids for text in texts)])
        words_TE, output_weight_VE = TiedRows.apply(self.encoder.word_embeddings.weight, ids)
        text, num_encoder = batch.encoder, len(batch.encoder.input_ids)
        encoder_words_TE, words_TE = words_TE.split([num_encoder, len(ids) - num_encoder])
        read, cls_B, labels_M = cls_and_labels(text, batch.encoder_labels)
        hidden_RD = self.encoder(encoder_words_TE, text.positions, text.cu_seqlens, text.max_length, read)
        h_BD = hidden_RD.index_select(0, cls_B)
        embedded = self._embed(texts, words_TE) if tasks else {}
        shared: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        streams = {}
        for spec, task in zip(self.tasks, tasks, strict=True):
            key = (id(task.text), id(task.passage_index))
            if key not in shared:
                h_SD = h_BD.index_select(0, task.passage_index)
                shared[key] = (h_SD, embedded[id(task.text)].index_copy(0, task.text.starts, h_SD))
            streams[spec.name] = DecoderStream(task, *shared[key])
        decoded = self._decode(streams)
        rows = [hidden_RD.index_select(0, labels_M)]
        return rows + [decoded[spec.name] for spec in self.tasks], output_weight_VE

    def _embed(self, texts: list[TensorText], words_TE: torch.Tensor) -> dict[int, torch.Tensor]:
        """The embedding layer over all decoder texts at once, by the text's identity: [T, D] each."""
        positions = torch.cat([text.positions for text in texts])
        embedded = self.encoder.embed(words_TE, positions)
        if self.encoder.position_embeddings is None:
            embedded = embedded + self.position_table(positions)
        parts = embedded.split([len(text.input_ids) for text in texts])
        return {id(text): part for text, part in zip(texts, parts, strict=True)}

    def _decode(self, streams: dict[str, DecoderStream]) -> dict[str, torch.Tensor]:
        """Hidden states [M, D] of the labelled rows by task."""
        decoded, enhanced = {}, []
        for spec in self.tasks:
            decoder, stream = self.decoder_of(spec.name), streams[spec.name]
            if spec.decoder == "masked":
                decoded[spec.name] = decoder(stream.context_TD, stream.task)
            elif self.query_stream == "embedded":
                text = stream.task.text
                query_TD = self.encoder.embed(stream.h_SD.index_select(0, text.sequences), text.positions)
                decoded[spec.name] = decoder.decode_embedded(query_TD, stream)
            else:
                enhanced.append(spec.name)
        if enhanced:
            members = [streams[name] for name in enhanced]
            positions_PD = self._positions(max(stream.task.text.max_length for stream in members))
            decoders = [self.decoder_of(name) for name in enhanced]
            decoded |= zip(enhanced, decode_enhanced(decoders, members, positions_PD, self.kernels), strict=True)
        return decoded

    def _positions(self, length: int) -> torch.Tensor:
        """Raw position vectors [P, D] of the enhanced decoders' query stream."""
        table, offset = self.position_table, 0
        if table is None:
            table, offset = self.encoder.position_embeddings, self.encoder.position_offset
        return table(torch.arange(offset, offset + length, device=self.lambdas.device))

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
    decoder_layers: int = 2,
    decoder_init: Literal["random", "encoder"] = "random",
    query_stream: Literal["raw", "embedded"] = "raw",
    shared_decoder: bool = False,
    dropout: float | None = None,
    from_scratch: ScratchShape | None = None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    gradient_checkpointing: bool = False,
    kernels: Implementation = "auto",
) -> PretrainModel:
    """The model of a run: `encoder` as `encoder.load_encoder` takes it, the rest as in engine/settings.py.

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
    words = packed.word_embeddings
    if dropout is None:
        dropout = getattr(packed.config, "hidden_dropout_prob", getattr(packed.config, "dropout", 0.0))
    model = PretrainModel(
        packed,
        make_lm_head(packed.config, words.num_embeddings, words.embedding_dim, head_weights),
        tasks,
        decoder_layers=decoder_layers,
        query_stream=query_stream,
        dropout=dropout,
        max_tokens=max_tokens,
        shared_decoder=shared_decoder,
        kernels=kernels,
    )
    if decoder_init == "encoder":
        for decoder in model.decoders.values():
            copy_last_layers(decoder, encoder_layers(packed.model))
    return model
