"""Any bidirectional Hugging Face encoder on packed passages: one row of T tokens, no padding.

transformers models look their attention up by name; ours is registered under PACKED, reads `cu_seqlens` from the
model's keyword arguments, and asks for no mask. Checked against the padded models for BERT, RoBERTa, ELECTRA, XLM-R and
ModernBERT (tests/engine/test_encoder.py). Attention-probability dropout is not applied: the variable-length kernels
have none, and hidden dropout remains.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMaskedLM, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import logging as transformers_logging

from quincunx.data_shards.batches import Text, make_text
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.tokenizer import resolve_model
from quincunx.kernels.packed_attention import packed_attention

PACKED = "quincunx_packed"


def _attention_of_transformers(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, *, cu_seqlens, max_length, **_
):
    """The signature transformers calls; tensors [1, H, T, C]; a `sliding_window` of w + 1 reaches w positions far."""
    window = None if sliding_window is None else sliding_window - 1
    q_THC, k_THC, v_THC = (x[0].transpose(0, 1) for x in (query, key, value))
    attended = packed_attention(q_THC, k_THC, v_THC, cu_seqlens, max_length, window=window, scale=scaling)
    return attended[None], None


ALL_ATTENTION_FUNCTIONS.register(PACKED, _attention_of_transformers)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, lambda *_, **__: None)


class PackedEncoder(nn.Module):
    """A Hugging Face encoder without its pooler, on packed rows. Letters: T tokens, S sequences, D channels."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config: PretrainedConfig = model.config

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def position_embeddings(self) -> nn.Embedding | None:
        """The table of absolute positions, None where the encoder has none (ModernBERT)."""
        return getattr(self.model.embeddings, "position_embeddings", None)

    @property
    def position_offset(self) -> int:
        """What position 0 is called: pad_token_id + 1 in RoBERTa-like encoders, else 0."""
        table = self.position_embeddings
        return 0 if table is None or table.padding_idx is None else table.padding_idx + 1

    @property
    def max_length(self) -> int:
        """Longest passage in tokens, [CLS] and [SEP] counted."""
        return self.config.max_position_embeddings - self.position_offset

    def embed(self, word_vectors_TE: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """The embedding layer over word vectors: [T, D], projected where the embeddings are narrower."""
        arguments = {"input_ids": None, "inputs_embeds": word_vectors_TE[None]}
        if self.position_embeddings is not None:
            arguments["position_ids"] = positions_T[None] + self.position_offset
        embedded = self.model.embeddings(**arguments)[0]
        project = getattr(self.model, "embeddings_project", None)  # ELECTRA's; ALBERT's stands in its stack of layers
        project = project or getattr(getattr(self.model, "encoder", None), "embedding_hidden_mapping_in", None)
        return embedded if project is None else project(embedded)

    def forward(self, word_vectors_TE: torch.Tensor, text: Text) -> torch.Tensor:
        """Final hidden states [T, D] of packed word vectors (rows of `word_embeddings`)."""
        return self.model(
            inputs_embeds=word_vectors_TE[None],
            position_ids=text.positions[None] + self.position_offset,
            cu_seqlens=text.cu_seqlens,
            max_length=text.max_length,
        ).last_hidden_state[0]


def norm_eps(config: PretrainedConfig) -> float:
    """Epsilon of the encoder's LayerNorms."""
    return getattr(config, "layer_norm_eps", None) or getattr(config, "norm_eps", 1e-12)


def init_std(config: PretrainedConfig) -> float:
    """Standard deviation of fresh weights."""
    return getattr(config, "initializer_range", 0.02)


def encoder_layers(encoder: nn.Module) -> list[nn.Module]:
    """A Hugging Face encoder's layers in their order; none if it keeps them elsewhere than BERT and ModernBERT."""
    stack = getattr(encoder, "encoder", encoder)
    return list(getattr(stack, "layer", getattr(stack, "layers", [])))


def set_dropout(model: nn.Module, rate: float | None) -> None:
    """Gives every dropout of hidden states `rate`; None keeps the model's own."""
    for module in model.modules():
        if rate is not None and isinstance(module, nn.Dropout):
            module.p = rate


def load_encoder(
    name: str,
    *,
    from_scratch: Mapping[str, int] | None = None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    max_tokens: int | None = None,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
) -> tuple[PackedEncoder, dict[str, torch.Tensor] | None]:
    """Loads an encoder, or makes one with random weights in the architecture of `name`.

    `name` is a Hugging Face name or folder, or `package:NAME/FOLDER` for one that an installed package carries. With
    `from_scratch` only its architecture is taken (`name` may then also be a model type, such as "bert"), at those sizes
    (transformers' names: hidden_size, num_hidden_layers, num_attention_heads; intermediate_size, by default four times
    hidden_size; max_position_embeddings, the longest passage, to which RoBERTa-like encoders add two) and with
    `vocab_size` words of which `pad_token_id` is padding (both of the shards' tokenizer). `max_tokens` is the longest
    passage of the run. `dropout` replaces the checkpoint's hidden dropout.

    Returns the encoder and the weights of its masked-LM head as `model.LMHead` names them, None where the checkpoint
    has none. Raises SettingsError where the encoder has too few positions or too few words.
    """
    if from_scratch is not None:
        masked_lm, has_head = _random_masked_lm(name, from_scratch, vocab_size, pad_token_id), False
    else:
        masked_lm, has_head = _pretrained_masked_lm(name)
    encoder = PackedEncoder(masked_lm.base_model)
    _check_packing(name, encoder)
    if max_tokens is not None and max_tokens > encoder.max_length:
        raise SettingsError(
            f"max_tokens is {max_tokens}, but encoder {name} has {encoder.max_length} positions; "
            "set max_tokens to at most that, or use an encoder with more positions"
        )
    if vocab_size is not None and encoder.word_embeddings.num_embeddings < vocab_size:
        raise SettingsError(
            f"the shards' tokenizer has {vocab_size} words, encoder {name} embeds "
            f"{encoder.word_embeddings.num_embeddings}; build the shards with the encoder's own tokenizer"
        )
    set_dropout(encoder.model, dropout)
    if gradient_checkpointing and not encoder.model.supports_gradient_checkpointing:
        raise SettingsError(
            f"encoder {name!r} is of type {encoder.config.model_type}, which has no gradient checkpointing in "
            "transformers; set gradient_checkpointing to false"
        )
    if gradient_checkpointing:
        encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
    return encoder, head_weights(masked_lm, encoder) if has_head else None


def _random_masked_lm(name: str, sizes: Mapping[str, int], vocab_size: int | None, pad_token_id: int | None):
    known = name in CONFIG_MAPPING
    config = AutoConfig.for_model(name) if known else fetch_pretrained(AutoConfig.from_pretrained, name)
    _check_type(name, config)
    sizes = {"vocab_size": vocab_size, "pad_token_id": pad_token_id, **sizes}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    sizes.setdefault("intermediate_size", 4 * sizes["hidden_size"])
    fields = config.to_dict()
    if "embedding_size" in fields:
        sizes["embedding_size"] = sizes["hidden_size"]
    if "hidden_dim" in fields:  # DistilBERT's name of it
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
    # Built anew rather than changed in place: some configurations derive other fields from these (layer_types).
    fields |= sizes
    fields.pop("layer_types", None)
    # Special ids of the architecture's own tokenizer mean nothing where another one has fewer words.
    for key, value in fields.items():
        if key.endswith("_token_id") and isinstance(value, int) and value >= fields["vocab_size"]:
            fields[key] = 0 if key == "pad_token_id" else None
    try:
        config = type(config)(**fields)
        model = AutoModelForMaskedLM.from_config(config, attn_implementation=PACKED)
        offset = PackedEncoder(model.base_model).position_offset
        if "max_position_embeddings" in sizes and offset:
            config.max_position_embeddings += offset
            model = AutoModelForMaskedLM.from_config(config, attn_implementation=PACKED)
    except (AttributeError, StrictDataclassError, TypeError, ValueError) as error:
        raise SettingsError(
            f"encoder {name!r} cannot be made from scratch at these sizes ({_in_one_line(error)}); change them, or "
            "give the architecture of a BERT, RoBERTa, ELECTRA, XLM-R or ModernBERT"
        ) from error
    return model


def _pretrained_masked_lm(name: str) -> tuple[nn.Module, bool]:
    _check_type(name, fetch_pretrained(AutoConfig.from_pretrained, name))
    model, report = fetch_pretrained(
        AutoModelForMaskedLM.from_pretrained,
        name,
        output_loading_info=True,
        attn_implementation=PACKED,
        dtype=torch.float32,
    )
    base = model.base_model_prefix + "."
    lost = [key for key in report["missing_keys"] if key.startswith(base) and "position_ids" not in key]
    if lost:
        raise SettingsError(f"{name} lacks weights of its encoder ({', '.join(lost[:3])}); give a complete checkpoint")
    return model, all(key.startswith(base) for key in report["missing_keys"])


def fetch_pretrained(load: Callable, name: str, **arguments):
    """What `load` gives for `name`; what the hub or the disk cannot give becomes a SettingsError of one sentence."""
    source = resolve_model(name)
    try:
        with quiet_transformers():
            return load(source, **arguments)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise SettingsError(
            f"model {name!r} could not be loaded ({_in_one_line(error)}); give a folder, a package:NAME/FOLDER, or a "
            "model of the Hugging Face hub that this machine reaches or has cached"
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' table of loaded keys and its bars off the screen: its report says what is missing."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _check_type(name: str, config: PretrainedConfig) -> None:
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False):
        raise SettingsError(
            f"encoder {name!r} is of type {config.model_type}, for which transformers has no masked language model; "
            "give a bidirectional encoder (BERT, RoBERTa, ELECTRA, XLM-R, ModernBERT)"
        )
    if not MODEL_FOR_MASKED_LM_MAPPING[type(config)]._supports_attention_backend:
        raise SettingsError(
            f"encoder {name!r} is of type {config.model_type}, whose attention in transformers cannot be replaced, so "
            "that packed passages would see each other; give a BERT, RoBERTa, ELECTRA, XLM-R or ModernBERT"
        )


@torch.no_grad()
def _check_packing(name: str, encoder: PackedEncoder) -> None:
    """Reads two texts packed and one of them alone. Raises SettingsError where that fails or does not give the same."""
    training = encoder.model.training
    encoder.model.eval()
    both, second = make_text(np.arange(5), np.array([0, 3, 5])), make_text(np.arange(3, 5), np.array([0, 2]))
    try:
        words = encoder.word_embeddings(both.input_ids)
        packed, alone = encoder(words, both)[3:], encoder(words[3:], second)
        obstacle = None
        if not torch.allclose(packed, alone, rtol=1e-3, atol=1e-4, equal_nan=True):
            obstacle = "they see each other"
        elif encoder.embed(words, both.positions).shape[-1] != packed.shape[-1]:
            obstacle = "its embedding layer is not as wide as its vectors"
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        obstacle = _in_one_line(error)
    encoder.model.train(training)
    if obstacle is not None:
        raise SettingsError(
            f"encoder {name!r} is of type {encoder.config.model_type}, which cannot read packed passages here "
            f"({obstacle}); give a BERT, RoBERTa, ELECTRA, XLM-R or ModernBERT"
        )


def head_weights(masked_lm: nn.Module, encoder: PackedEncoder) -> dict[str, torch.Tensor] | None:
    """Weights of a masked language model's head: dense, LayerNorm, output bias; None where it is built otherwise.

    The families name them differently, but outside the encoder every head has one dense layer and one LayerNorm.
    """
    output = masked_lm.get_output_embeddings()
    inside = set(encoder.model.modules()) | {output}
    outside = [module for module in masked_lm.modules() if module not in inside]
    dense = [module for module in outside if isinstance(module, nn.Linear)]
    norms = [module for module in outside if isinstance(module, nn.LayerNorm)]
    if len(dense) != 1 or len(norms) != 1:
        return None
    weights = {
        "dense.weight": dense[0].weight,
        "dense.bias": dense[0].bias,
        "norm.weight": norms[0].weight,
        "norm.bias": norms[0].bias,
        "bias": output.bias,
    }
    return {name: weight.detach().clone() for name, weight in weights.items() if weight is not None}


def encoder_multiply_adds(model: nn.Module, lengths: np.ndarray) -> float:
    """Multiply-adds of one forward of a Hugging Face encoder over texts of these lengths, matrix products only."""
    config = model.config
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", getattr(config, "hidden_dim", 4 * width))
    is_plain = hasattr(config, "hidden_act") or hasattr(config, "hidden_dim")  # as BERT's and DistilBERT's
    inner *= 1 if is_plain else 1.5  # a gated feed-forward has three matrices
    lengths = lengths.astype(np.float64)
    of_a_layer = (4 * width**2 + 2 * width * inner) * lengths.sum() + 2 * width * (lengths**2).sum()
    return config.num_hidden_layers * of_a_layer
