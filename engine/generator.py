"""A Hugging Face model that writes queries or continuations, sampled as a pure function of seed and passage.

Every draw is a hash of (seed, passage id, sequence number, position), compared with the model's distribution; no random
generator has state. So a passage's text depends neither on the order of the work nor on the process that does it; it
depends on the batch only through the rounding of the model's own arithmetic.

Shapes: P passages of a batch, R = P * num_sequences rows, V the model's vocabulary, K kept tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.modeling_outputs import BaseModelOutput

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.encoder import fetch_pretrained

CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: temperature first, then the top_k likeliest (0: all), then the top_p nucleus of those."""

    seed: int
    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int


def uniform(seed: int, passage_id: str, number: int, position: int) -> float:
    """A number in [0, 1) for token `position` of sequence `number` of a passage."""
    digest = xxhash.xxh3_64_intdigest(f"{seed}/{number}/{position}/{passage_id}".encode())
    return (digest >> 11) / 2**53


def draw(logits_RV: torch.Tensor, uniforms_R: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Token ids int64 [R]: the inverse of each row's cumulative distribution over the K kept tokens, in order of id.

    In that order a rounding error of the logits moves a boundary by as little; in the order of probability it would
    exchange tokens.
    """
    if 0 < sampling.top_k < logits_RV.shape[1]:
        logits_RK, tokens_RK = logits_RV.topk(sampling.top_k, dim=1)
    else:
        logits_RK, tokens_RK = logits_RV.sort(dim=1, descending=True)
    probabilities_RK = torch.softmax(logits_RK.double() / sampling.temperature, dim=1)
    before_RK = probabilities_RK.cumsum(1) - probabilities_RK
    probabilities_RK = probabilities_RK.masked_fill(before_RK >= sampling.top_p, 0.0)
    tokens_RK, order_RK = tokens_RK.sort(dim=1)
    cumulative_RK = probabilities_RK.gather(1, order_RK).cumsum(1)
    thresholds_R1 = uniforms_R.to(cumulative_RK)[:, None] * cumulative_RK[:, -1:]
    index_R1 = torch.searchsorted(cumulative_RK, thresholds_R1, right=True).clamp(max=tokens_RK.shape[1] - 1)
    return tokens_RK.gather(1, index_R1)[:, 0]


class PureSampler(LogitsProcessor):
    """Leaves each row one token, drawn by `uniform`; greedy decoding then takes it.

    rows: (passage id, sequence number) of each row. prompt_length: columns of input_ids before the first new token.
    """

    def __init__(self, rows: list[tuple[str, int]], prompt_length: int, sampling: Sampling):
        self.rows = rows
        self.prompt_length = prompt_length
        self.sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1] - self.prompt_length
        uniforms = [uniform(self.sampling.seed, passage_id, number, position) for passage_id, number in self.rows]
        tokens_R = draw(scores, torch.tensor(uniforms, dtype=torch.float64, device=scores.device), self.sampling)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_R[:, None], 0.0)


class Generator:
    """A loaded model with its tokenizer; see `load_generator`. `digest` is that of its weights."""

    def __init__(self, model: Any, tokenizer: Any, is_seq2seq: bool):
        self.model = model
        self.tokenizer = tokenizer
        self.is_seq2seq = is_seq2seq
        self.num_cut_prompts = 0

    @property
    def digest(self) -> str:
        """xxh3_128 (32 hex digits) of the weights by name."""
        digest = xxhash.xxh3_128()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def prompt_limit(self, max_new_tokens: int) -> int:
        """Most tokens of a prompt."""
        config = self.model.config
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        limits = [self.tokenizer.model_max_length]
        if positions:
            limits.append(positions if self.is_seq2seq else positions - max_new_tokens)
        if min(limits) < 1:
            raise SettingsError(
                f"max_new_tokens is {max_new_tokens}, but the model has {positions} positions for prompt and text: "
                "give less"
            )
        return min(limits)

    def tokenize(self, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        """Token ids of each prompt. One that is too long loses its end for seq2seq, its beginning for causal models."""
        limit = self.prompt_limit(max_new_tokens)
        tokenized = self.tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]
        self.num_cut_prompts += sum(len(ids) > limit for ids in tokenized)
        if self.is_seq2seq:
            num_end = len(self.tokenizer("")["input_ids"])  # the closing token stays
            return [
                ids if len(ids) <= limit else ids[: limit - num_end] + ids[len(ids) - num_end :] for ids in tokenized
            ]
        # A causal model cannot start from nothing.
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        return [ids[-limit:] or [start] for ids in tokenized]

    @torch.inference_mode()
    def generate(
        self, passage_ids: Sequence[str], prompts: Sequence[list[int]], num_sequences: int, sampling: Sampling
    ) -> list[list[str]]:
        """`num_sequences` texts for each of P passages, stripped; a text may be empty.

        prompts: token ids of each, by `tokenize`.
        """
        device = self.model.device
        longest = max(map(len, prompts))
        input_ids = torch.full((len(prompts), longest), self.model.generation_config.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            columns = slice(0, len(ids)) if self.is_seq2seq else slice(longest - len(ids), longest)
            input_ids[row, columns] = torch.tensor(ids)
            mask[row, columns] = 1
        input_ids, mask = input_ids.to(device), mask.to(device)
        inputs: dict[str, Any] = {"attention_mask": mask.repeat_interleave(num_sequences, 0)}
        if self.is_seq2seq:
            hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=mask).last_hidden_state
            inputs["encoder_outputs"] = BaseModelOutput(hidden.repeat_interleave(num_sequences, 0))
            prompt_length = 1
        else:
            inputs["input_ids"] = input_ids.repeat_interleave(num_sequences, 0)
            prompt_length = longest
        rows = [(passage_id, number) for passage_id in passage_ids for number in range(num_sequences)]
        output_ids = self.model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=LogitsProcessorList([PureSampler(rows, prompt_length, sampling)]),
        )
        texts = self.tokenizer.batch_decode(output_ids[:, prompt_length:], skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        return [texts[start : start + num_sequences] for start in range(0, len(texts), num_sequences)]


def load_generator(name: str, device: str, precision: str) -> Generator:
    """A sequence-to-sequence (doc2query's T5) or causal (GPT-2) model by Hugging Face id, folder or `package:...`.

    Args:
        precision: "float32" or "bfloat16".

    Raises:
        SettingsError: not found, the hub cannot be reached, or neither kind of model.
    """
    config = fetch_pretrained(AutoConfig.from_pretrained, name)
    is_causal = any(architecture.endswith(CAUSAL_ENDINGS) for architecture in config.architectures or [])
    if not config.is_encoder_decoder and not is_causal:
        raise SettingsError(
            f"the model {name!r} ({', '.join(config.architectures or [config.model_type])}) does not generate text: "
            "give a sequence-to-sequence model (a doc2query T5) or a causal one (GPT-2)"
        )
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    tokenizer = fetch_pretrained(AutoTokenizer.from_pretrained, name)
    model = fetch_pretrained(kind.from_pretrained, name, dtype=getattr(torch, precision))
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        raise SettingsError(
            f"the tokenizer of {name!r} has neither a padding nor an end token: give a model that has one"
        )
    # Only what stands in our manifest may decide the output: of the model's own generation settings the token ids stay.
    own = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )
    return Generator(model.eval().to(device), tokenizer, config.is_encoder_decoder)
