"""Query and passage encoder: packed texts in, one vector each out; as a module to train and as a folder to use.

A folder is what sentence-transformers reads and writes: one encoder for both sides (Transformer, Pooling, Normalize) or
two (its Router, with the routes query and document). `retriever.json` beside it keeps what sentence-transformers has no
place for: that queries are cut shorter than passages.

Letters: T tokens, S sequences, B queries, N passages, D channels.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from huggingface_hub import snapshot_download
from tokenizers import normalizers
from torch import nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from quincunx.data_shards.batches import Text, batches_by_length, join_texts, to_device
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.tokenizer import load_tokenizer, resolve_model, tokenise, tokenizer_digest
from quincunx.engine.encoder import PackedEncoder, fetch_pretrained, load_encoder, quiet_transformers
from quincunx.engine.retrieval.sentence_folder import (
    KINDS,
    Tower,
    folder_written_whole,
    read_sentence_folder,
    write_sentence_folder,
)

BATCH_TOKENS, CPU_BATCH_TOKENS = 8192, 4096
MODEL_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
Kind = Literal["query", "passage"]
Pooling = Literal["cls", "mean"]
Precision = Literal["float32", "bfloat16"]


class DualEncoder(nn.Module):
    """Query and passage encoder (one object where shared) to vectors.

    Parameters are called `passage.model...` and, where the towers are separate, `query.model...`.
    """

    def __init__(self, passage: PackedEncoder, query: PackedEncoder | None, pooling: Pooling, normalise: bool):
        super().__init__()
        self.passage = passage
        self.query = query
        self.pooling = pooling
        self.normalise = normalise

    @property
    def shared(self) -> bool:
        """Whether one encoder reads queries and passages."""
        return self.query is None

    @property
    def width(self) -> int:
        """D."""
        return self.passage.config.hidden_size

    def tower(self, kind: Kind) -> PackedEncoder:
        return self.passage if kind == "passage" or self.query is None else self.query

    def encode_packed(self, text: Text, kind: Kind) -> torch.Tensor:
        """[S, D] in the model's dtype: [CLS] or mean of all tokens, of length 1 where `normalise`."""
        encoder = self.tower(kind)
        hidden_TD = encoder(encoder.word_embeddings(text.input_ids), text)
        pooled_SD = hidden_TD.index_select(0, text.starts) if self.pooling == "cls" else mean_pool(hidden_TD, text)
        return normalize(pooled_SD.float(), dim=1).to(pooled_SD.dtype) if self.normalise else pooled_SD

    def forward(self, queries: Text, passages: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """([B, D], [N, D]); a shared encoder reads both in one pass, queries first."""
        if not self.shared:
            return self.encode_packed(queries, "query"), self.encode_packed(passages, "passage")
        num_queries, num_passages = len(queries.starts), len(passages.starts)
        return self.encode_packed(join(queries, passages), "passage").split([num_queries, num_passages])

    def loss_counts(self, batch: Any) -> list[int]:
        """What each loss is a mean over, queries."""
        return [len(batch)]

    def compile_parts(self) -> None:
        """torch.compile for the encoder, or both, in place."""
        for encoder in (self.passage, self.query):
            if encoder is not None:
                encoder.model.compile(dynamic=True)


def mean_pool(hidden_TD: torch.Tensor, text: Text) -> torch.Tensor:
    """[S, D], the mean over each sequence's tokens, [CLS] and [SEP] among them; summed in float32."""
    sums_SD = hidden_TD.new_zeros(len(text.starts), hidden_TD.shape[1], dtype=torch.float32)
    sums_SD = sums_SD.index_add(0, text.sequences, hidden_TD.float())
    return (sums_SD / text.cu_seqlens.diff()[:, None]).to(hidden_TD.dtype)


def join(first: Text, second: Text) -> Text:
    """One packed text of both, the sequences of `first` before those of `second`."""
    num_tokens, num_sequences = len(first.input_ids), len(first.starts)
    return Text(
        input_ids=torch.cat([first.input_ids, second.input_ids]),
        positions=torch.cat([first.positions, second.positions]),
        sequences=torch.cat([first.sequences, second.sequences + num_sequences]),
        starts=torch.cat([first.starts, second.starts + num_tokens]),
        cu_seqlens=torch.cat([first.cu_seqlens, second.cu_seqlens[1:] + num_tokens]),
        max_length=max(first.max_length, second.max_length),
    )


@dataclass(frozen=True)
class Retriever:
    """A dual encoder with everything that turns texts into its vectors."""

    model: DualEncoder
    tokenizer: Any
    """A fast tokenizer of Hugging Face, the same for both sides."""
    max_tokens: dict[Kind, int]
    """[CLS] and [SEP] counted; longer texts are cut."""
    prompts: dict[Kind, str]
    """Text put before every query, and before every passage."""
    digest: str
    """16 hex digits, see model_digest."""

    def tokenise(self, texts: Sequence[str], kind: Kind) -> list[np.ndarray]:
        """int32 [n] of each text, with the prompt of its kind and cut at its limit."""
        return tokenise([self.prompts[kind] + text for text in texts], self.tokenizer, self.max_tokens[kind])


def model_digest(model: DualEncoder, tokenizer: Any, prompts: dict[Kind, str]) -> str:
    """xxh3_64 (16 hex digits) of weights, pooling, normalisation, tokenizer and prompts.

    Models with equal digests give equal vectors (for texts within the length limits).
    """
    said = f"{model.pooling} {model.normalise} {tokenizer_digest(tokenizer)}"
    if any(prompts.values()):
        said += f" {(prompts['query'], prompts['passage'])!r}"
    digest = xxhash.xxh3_64(said.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def encode_texts(retriever: Retriever, texts: Sequence[str], kind: Kind, **options: Any) -> np.ndarray:
    """float32 [texts, D], in the order of `texts`; options: device, batch_tokens, precision, progress of run_packed."""
    model, rows = retriever.model, retriever.tokenise(texts, kind)
    return run_packed(model, lambda text, _: model.encode_packed(text, kind), rows, (model.width,), **options)


def run_packed(
    model: nn.Module,
    forward: Callable[[Text, np.ndarray], torch.Tensor],
    rows: Sequence[np.ndarray],
    shape: tuple[int, ...],
    *,
    device: torch.device | str = "cpu",
    batch_tokens: int | None = None,
    precision: Precision = "float32",
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """float32 [rows, *shape]: what `forward` makes of token rows, packed longest first, in the order of `rows`.

    forward: takes a packed text and the numbers of its rows. model: moved to `device` and left in the mode it was in.
    batch_tokens: maximum number of tokens of one forward; None: 8192, on a CPU 4096, which stay nearer its caches.
    precision: bfloat16 runs under autocast. progress: told how many rows each forward has read.
    """
    device = torch.device(device)
    batches = batches_by_length(rows, batch_tokens or (CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS))
    results = np.empty((len(rows), *shape), np.float32)
    if not batches:
        return results
    was_training = model.to(device).training
    model.eval()
    try:
        with (
            torch.no_grad(),  # not inference_mode, whose tensors ZeRO-3 cannot gather into
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            found = []
            for batch in batches:
                found.append(forward(to_device(join_texts([rows[n] for n in batch]), device), batch).float())
                if progress is not None:
                    progress(len(batch))
    finally:
        model.train(was_training)
    results[np.concatenate(batches)] = torch.cat(found).cpu().numpy()  # one copy, so that a GPU never waits before
    return results


def load_retriever(
    name: str,
    *,
    pooling: Pooling | None = None,
    normalise: bool | None = None,
    max_tokens: Mapping[Kind, int | None] | None = None,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
) -> Retriever:
    """Loads a sentence-transformers folder, or a plain Hugging Face encoder, for use or as a start for training.

    name: a folder, a hub id, or `package:NAME/FOLDER`. What is None stays as the folder says; a plain encoder has
    pooling "cls", is normalised, and reads texts as long as its positions reach. dropout and gradient_checkpointing
    matter in training only. The model comes in evaluation mode, in float32.

    Raises:
        SettingsError: not found, modules that are not supported, or more tokens than the encoder has positions.
    """
    folder = resolve_model(name)
    if not Path(folder).is_dir():
        folder = fetch_pretrained(snapshot_download, folder, allow_patterns=MODEL_FILES)
    layout = read_sentence_folder(Path(folder))
    tokenizers = {kind: _tokenizer_for_search(tower) for kind, tower in layout.towers.items()}
    if len({tokenizer_digest(tokenizer) for tokenizer in tokenizers.values()}) > 1:
        raise SettingsError(f"the two towers of {name} have different tokenizers; give one where they agree")
    tokenizer, encoders, limits = tokenizers["passage"], {}, {}
    for kind, tower in layout.towers.items():
        options = {"dropout": dropout, "gradient_checkpointing": gradient_checkpointing, "vocab_size": len(tokenizer)}
        encoders[kind] = load_encoder(str(tower.folder), **options)[0]
    for kind in KINDS:
        longest, limit = encoders.get(kind, encoders["passage"]).max_length, (max_tokens or {}).get(kind)
        if limit is not None and not 3 <= limit <= longest:
            raise SettingsError(
                f"max_{kind}_tokens is {limit}; {name} reads 3 to {longest} tokens: give a number among them"
            )
        limits[kind] = limit or min(layout.max_tokens[kind] or longest, longest)
    said = layout.towers["passage"]
    normalise = said.normalise if normalise is None else normalise
    model = DualEncoder(encoders["passage"], encoders.get("query"), pooling or said.pooling, normalise).eval()
    digest = model_digest(model, tokenizer, layout.prompts)
    return Retriever(model, tokenizer, limits, layout.prompts, digest)


def _tokenizer_for_search(tower: Tower) -> Any:
    """The tokenizer as its users know it: a text that spells a special token gets that token."""
    tokenizer = load_tokenizer(str(tower.folder))
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = False
    if tower.lower_case:
        own = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return tokenizer


def save_retriever(
    folder: Path, retriever: Retriever, state: dict[str, torch.Tensor] | None = None, *, card: str
) -> None:
    """Writes a folder that SentenceTransformer and load_retriever load; replaces `folder` at once, when all is written.

    state: weights by their names in the model (a checkpoint's), None for those it has. card: README.md. One encoder for
    both sides has one max_seq_length in sentence-transformers, the larger of the two: only load_retriever cuts queries
    at max_query_tokens.
    """
    model = retriever.model
    with folder_written_whole(folder) as staging:
        for kind, (place, max_tokens) in write_sentence_folder(staging, retriever).items():
            save_model(place, model.tower(kind).model, state or model.state_dict(), f"{kind}.model.")
            save_tokenizer(place, retriever.tokenizer, max_tokens)
        (staging / "README.md").write_text(card, encoding="utf-8")


def save_model(folder: Path, model: PreTrainedModel, state: dict[str, torch.Tensor], prefix: str) -> None:
    """Writes a model's configuration and, in float32, its weights: those of `state` with this prefix."""
    own = {name.removeprefix(prefix): w.float() for name, w in state.items() if name.startswith(prefix)}
    assert own.keys() == model.state_dict().keys(), "the state is not of this model"
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=own)


def save_tokenizer(folder: Path, tokenizer: Any, max_tokens: int) -> None:
    """Writes a tokenizer as its users know it, whatever a run does with its own."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.encode_special_tokens = False
    tokenizer.model_max_length = max_tokens
    tokenizer.save_pretrained(folder)
