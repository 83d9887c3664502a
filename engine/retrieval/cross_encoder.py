"""The reranker: a Hugging Face sequence-classification model that reads (query, passage) pairs, packed.

The encoder runs on one row of T tokens without padding (engine/encoder.py); the [CLS] rows go to the model's own head.
Checked against the padded models of BERT, RoBERTa, ELECTRA, XLM-R and ModernBERT, and against sentence-transformers'
CrossEncoder on the exported folder (tests/engine/retrieval/test_cross_encoder.py). Scores are raw logits.

Letters: T tokens of all pairs, S pairs, D channels, C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from quincunx.data_shards.batches import Text
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.tokenizer import load_tokenizer, tokenizer_digest
from quincunx.engine.encoder import PACKED, PackedEncoder, fetch_pretrained, set_dropout
from quincunx.engine.retrieval.dual_encoder import mean_pool, run_packed, save_model, save_tokenizer
from quincunx.engine.retrieval.sentence_folder import folder_written_whole

FAMILIES = ("bert", "roberta", "electra", "xlm-roberta", "modernbert")
ACTIVATION = "torch.nn.modules.linear.Identity"
TRUNCATION = "longest_first"  # as sentence-transformers cuts a pair: token by token from the longer of the two


class CrossEncoder(nn.Module):
    """A sequence-classification model of transformers (`model`, its weights under their own names) on packed pairs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = model.config
        encoder = PackedEncoder(model.base_model)
        self.position_offset = encoder.position_offset
        self.max_length = encoder.max_length
        """Longest pair in tokens, special tokens counted."""
        self.has_types = getattr(model.config, "type_vocab_size", 0) > 1

    @property
    def num_labels(self) -> int:
        return self.config.num_labels

    def forward(self, pairs: Text, token_types_T: torch.Tensor | None = None) -> torch.Tensor:
        """Logits: [S] of a model with one label, else [S, C].

        `token_types_T` int64 is 0 up to the query's [SEP] and 1 after it; None means all 0. A model without token types
        does not look at it.
        """
        arguments = {} if token_types_T is None or not self.has_types else {"token_type_ids": token_types_T[None]}
        takes_mean = self.config.model_type == "modernbert" and self.config.classifier_pooling == "mean"
        hidden_TD = self.model.base_model(
            input_ids=pairs.input_ids[None],
            position_ids=pairs.positions[None] + self.position_offset,
            cu_seqlens=pairs.cu_seqlens,
            max_length=pairs.max_length,
            **arguments,
        ).last_hidden_state[0]
        with torch.autocast(hidden_TD.device.type, enabled=False):  # 8 bits of a score would tie many pairs
            hidden_TD = hidden_TD.to(next(self.model.classifier.parameters()).dtype)
            read_SD = mean_pool(hidden_TD, pairs) if takes_mean else hidden_TD.index_select(0, pairs.starts)
            logits_SC = self._head(read_SD)
        return logits_SC[:, 0] if logits_SC.shape[1] == 1 else logits_SC

    def loss_counts(self, batch: Any) -> list[int]:
        """What each loss is a mean over, queries."""
        return [len(batch)]

    def compile_parts(self) -> None:
        """torch.compile for the encoder, in place."""
        self.model.base_model.compile(dynamic=True)

    def _head(self, pooled_SD: torch.Tensor) -> torch.Tensor:
        """[S, C]: what the model's own head makes of the one row of each pair that it reads."""
        model = self.model
        if self.config.model_type == "modernbert":
            return model.classifier(model.drop(model.head(pooled_SD)))
        first_S1D = pooled_SD[:, None]
        if self.config.model_type == "bert":
            return model.classifier(model.dropout(model.base_model.pooler(first_S1D)))
        return model.classifier(first_S1D)


@dataclass(frozen=True)
class Reranker:
    """What a reranker's folder holds, loaded for use."""

    model: CrossEncoder
    tokenizer: Any
    max_tokens: int
    """Pairs are cut there, special tokens counted."""
    digest: str
    """16 hex digits of the weights and the tokenizer, as loaded."""


def load_reranker(
    name: str,
    *,
    num_labels: int = 1,
    max_tokens: int | None = None,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    allow_fresh_head: bool = True,
) -> Reranker:
    """Loads a sequence-classification model, or puts a new head on any encoder of the five families.

    name: a Hugging Face name or folder, or `package:NAME/FOLDER`; a pre-training run's export/encoder is one. A new
        head (and BERT's pooler, where the folder has none) draws its weights from torch's global generator.
    max_tokens: the longest pair; None takes the tokenizer's own limit, at most the model's positions.
    dropout: replaces every dropout rate of the model, head included; None leaves them.

    Raises:
        SettingsError: not found, another family, another number of labels, an incomplete encoder, max_tokens beyond the
            model's positions or too small for a pair, or a fresh head where `allow_fresh_head` is False.
    """
    config = fetch_pretrained(AutoConfig.from_pretrained, name)
    if config.model_type not in FAMILIES or getattr(config, "is_decoder", False):
        raise SettingsError(
            f"reranker {name!r} is of type {config.model_type}: give a bidirectional model of {', '.join(FAMILIES)}"
        )
    has_head = has_fitting_head(name, config, num_labels)
    model, report = fetch_pretrained(
        AutoModelForSequenceClassification.from_pretrained,
        name,
        num_labels=num_labels,
        output_loading_info=True,
        attn_implementation=PACKED,
        dtype=torch.float32,
    )
    _check_weights(name, model, report["missing_keys"], has_head, allow_fresh_head)
    encoder = CrossEncoder(model)
    tokenizer = load_tokenizer(name)
    if max_tokens is None:
        own_limit = tokenizer.init_kwargs.get("model_max_length")  # load_tokenizer lifts the other
        max_tokens = min(own_limit or encoder.max_length, encoder.max_length)
    elif not 8 <= max_tokens <= encoder.max_length:
        raise SettingsError(
            f"max_tokens is {max_tokens}, reranker {name!r} takes pairs of 8 to {encoder.max_length} tokens; set "
            "max_tokens in that range"
        )
    tokenizer.backend_tokenizer.encode_special_tokens = False  # text that spells [SEP] is one, as for its other users
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise SettingsError(
            f"{name!r}: its tokenizer has {len(tokenizer)} words, its model embeds "
            f"{model.get_input_embeddings().num_embeddings}; give a folder whose tokenizer is the model's own"
        )
    set_dropout(model, dropout)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Reranker(encoder.eval(), tokenizer, max_tokens, _digest(encoder, tokenizer))


def has_fitting_head(name: str, config: PretrainedConfig, num_labels: int) -> bool:
    """Whether a model has a classification head. Raises SettingsError if it has one with other labels."""
    has_head = any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])
    if has_head and config.num_labels != num_labels:
        raise SettingsError(
            f"{name!r} gives {config.num_labels} labels, {num_labels} wanted: give a model with {num_labels}, or an "
            "encoder without a classification head"
        )
    return has_head


def _check_weights(name: str, model: nn.Module, missing: list[str], has_head: bool, allow_fresh_head: bool) -> None:
    """Raises SettingsError if weights are missing that a new head does not explain."""
    base = model.base_model_prefix + "."
    fresh = [key for key in missing if not key.startswith(base) or key.startswith(f"{base}pooler.")]
    lost = [key for key in missing if key not in fresh and "position_ids" not in key]
    for what, keys in (("encoder", lost), ("head", fresh if has_head else [])):
        if keys:
            raise SettingsError(
                f"{name!r} lacks weights of its {what} ({', '.join(keys[:3])}); give a complete checkpoint"
            )
    if fresh and not allow_fresh_head:
        raise SettingsError(
            f"{name!r} is an encoder without a classification head, so its scores would be random: give a reranker, "
            "such as the output of finetune.py --recipe reranker"
        )


def _digest(model: CrossEncoder, tokenizer: Any) -> str:
    digest = xxhash.xxh3_64()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(weight.shape)} ".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(f"{model.config.model_type} {getattr(model.config, 'classifier_pooling', None)} ".encode())
    digest.update(tokenizer_digest(tokenizer).encode())
    return digest.hexdigest()


def save_reranker(folder: Path, reranker: Reranker, state: dict[str, torch.Tensor] | None = None, *, card: str) -> None:
    """Writes a folder that load_reranker, transformers and sentence-transformers' CrossEncoder load; replaces one.

    state: weights by their names in the model (a consolidated checkpoint's); None takes the model's own. card:
    README.md.

    CrossEncoder(folder).predict gives the raw logits: the folder names the identity as its activation. Raises
    SettingsError if `folder` exists and is no model folder.
    """
    model = reranker.model
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise SettingsError(f"{folder} holds other files than a model's: give a new folder, or move that one away")
    with folder_written_whole(folder) as staging:
        model.config.sentence_transformers = {"activation_fn": ACTIVATION}
        save_model(staging, model.model, state or model.state_dict(), "model.")
        save_tokenizer(staging, reranker.tokenizer, reranker.max_tokens)
        (staging / "README.md").write_text(card, encoding="utf-8")


def tokenise_pairs(
    tokenizer: Any, queries: Sequence[str], passages: Sequence[str], max_tokens: int
) -> tuple[list[np.ndarray], list[np.ndarray] | None, int]:
    """Every pair's ids int32 [n] and token types int64 [n] (None: the tokenizer gives none), and how many were cut.

    The tokenizer's own pair form: [CLS] query [SEP] passage [SEP], RoBERTa's <s> query </s></s> passage </s>. Pairs
    beyond max_tokens lose tokens from the longer side.
    """
    if not len(queries):
        return [], None, 0
    options = {"truncation": TRUNCATION, "max_length": max_tokens, "padding": False, "return_attention_mask": False}
    rows = tokenizer(list(queries), list(passages), **options)
    ids = [np.array(row, np.int32) for row in rows["input_ids"]]
    types = [np.array(row, np.int64) for row in rows["token_type_ids"]] if "token_type_ids" in rows else None
    num_cut = sum(len(row) == max_tokens and bool(rows.encodings[n].overflowing) for n, row in enumerate(ids))
    return ids, types, num_cut


def score_pairs(
    reranker: Reranker, queries: Sequence[str], passages: Sequence[str], **options: Any
) -> tuple[np.ndarray, int]:
    """(float32 [N] or [N, C], the logits of the pairs (queries[n], passages[n]); how many of them were cut).

    options: device, batch_tokens, precision and progress of run_packed.
    """
    model = reranker.model
    ids, types, num_cut = tokenise_pairs(reranker.tokenizer, queries, passages, reranker.max_tokens)

    def score(pairs: Text, batch: np.ndarray) -> torch.Tensor:
        types_T = None if types is None else torch.from_numpy(np.concatenate([types[n] for n in batch]))
        return model(pairs, None if types_T is None else types_T.to(pairs.input_ids.device))

    shape = () if model.num_labels == 1 else (model.num_labels,)
    return run_packed(model, score, ids, shape, **options), num_cut
