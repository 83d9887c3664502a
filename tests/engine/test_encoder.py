"""Packed Hugging Face encoders against the same models on padded batches, tiny and random, in five families."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config

from quincunx.data_shards.batches import join_texts, make_text
from quincunx.data_shards.errors import SettingsError
from quincunx.engine.encoder import load_encoder
from quincunx.engine.model import LMHead

LENGTHS = [5, 40, 17, 2, 38, 30]
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
}
MODERNBERT = {
    "local_attention": 8,
    "global_attn_every_n_layers": 3,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 16},
    "xlm-roberta": {"pad_token_id": 1},
    "modernbert": MODERNBERT,
    "albert": {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64},
}


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a random masked language model of a family, every weight shaken (biases and norms too)."""

    def save(family, model_class=AutoModelForMaskedLM):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
        model = model_class.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / family)
        return str(tmp_path / family), model

    return save


def random_text(seed=0):
    return make_text(np.random.default_rng(seed).integers(3, 99, sum(LENGTHS)), np.cumsum([0, *LENGTHS]))


def run_packed(encoder, text):
    return encoder(encoder.word_embeddings(text.input_ids), text)


def run_padded(model, text):
    """Final hidden states [T, D] of the padded Hugging Face model."""
    sequences = text.input_ids.split(LENGTHS)
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=model.config.pad_token_id)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_in_values_and_gradients(family, checkpoint):
    """Tolerance: float32 with hidden values of order 1; a wrong position, window or mask is off by 0.1 and more."""
    folder, masked_lm = checkpoint(family)
    encoder, _ = load_encoder(folder, max_tokens=40)
    encoder.eval()
    text = random_text()
    packed, padded = run_packed(encoder, text), run_padded(masked_lm.base_model, text)
    torch.testing.assert_close(packed, padded, rtol=0, atol=5e-6)
    probe = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    packed.backward(probe)
    padded.backward(probe)
    ours = dict(encoder.model.named_parameters())
    for name, parameter in masked_lm.base_model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                ours[name].grad, parameter.grad, rtol=0, atol=1e-5 * parameter.grad.norm().item() + 1e-5
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_checkpoint_is_carried_over(family, checkpoint):
    """Loss and hits of our tied, chunked head = cross-entropy of the logits that Hugging Face's own head gives."""
    folder, masked_lm = checkpoint(family)
    encoder, weights = load_encoder(folder)
    head = LMHead(encoder.config, encoder.word_embeddings, weights)
    ids, labels = torch.randint(3, 99, (1, 40)), torch.randint(0, 99, (40,))
    hidden, logits = masked_lm.base_model(input_ids=ids).last_hidden_state[0], masked_lm(input_ids=ids).logits[0]
    arguments = encoder.word_embeddings.weight, labels, torch.full((40,), 1 / 40), [(0, 40)], "torch"
    loss, _, correct = head(hidden, *arguments)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels), rtol=1e-5, atol=1e-6)
    assert correct.item() == (logits.argmax(-1) == labels).sum().item()


def test_modernberts_local_layers_matter_in_the_comparison(checkpoint):
    """At 40 tokens and a window of 4 to each side the local layers must change the result."""
    folder, _ = checkpoint("modernbert")
    encoder, _ = load_encoder(folder)
    text = random_text()
    local = run_packed(encoder.eval(), text)
    for layer in encoder.model.layers:
        layer.attn.sliding_window = None
    assert (run_packed(encoder, text) - local).abs().max() > 0.01


def test_gradient_checkpointing_changes_nothing(checkpoint):
    folder, _ = checkpoint("bert")
    text = random_text()
    results = []
    for checkpointing in (False, True):
        encoder, _ = load_encoder(folder, dropout=0.0, gradient_checkpointing=checkpointing)
        encoder.train()
        hidden = run_packed(encoder, text)
        hidden.square().sum().backward()
        results.append([hidden, *(parameter.grad for parameter in encoder.parameters())])
        assert encoder.model.is_gradient_checkpointing == checkpointing
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_dropout_is_set_everywhere_or_left_as_the_checkpoint_has_it(checkpoint):
    folder, _ = checkpoint("bert")
    rates = [module.p for module in load_encoder(folder, dropout=0.3)[0].modules() if hasattr(module, "p")]
    assert rates and set(rates) == {0.3}
    rates = [module.p for module in load_encoder(folder)[0].modules() if hasattr(module, "p")]
    assert set(rates) == {0.1}


@pytest.mark.parametrize("family", FAMILIES)
def test_from_scratch_takes_the_architecture_at_other_sizes(family):
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 33}
    encoder, head = load_encoder(family, from_scratch=shape, vocab_size=57, pad_token_id=3, max_tokens=33)
    assert head is None and encoder.max_length == 33 and encoder.word_embeddings.num_embeddings == 57
    assert encoder.config.pad_token_id == 3
    assert encoder.config.hidden_size == 16 and encoder.config.num_hidden_layers == 3
    widths = {module.out_features for module in encoder.model.modules() if isinstance(module, torch.nn.Linear)}
    assert max(widths) == (128 if family == "modernbert" else 64), "4 x hidden; twice that at once where it is gated"
    text = join_texts([np.arange(33)])
    assert torch.isfinite(run_packed(encoder, text)).all()


def test_an_encoder_that_cannot_serve_the_run_is_refused_in_one_sentence(checkpoint, tmp_path):
    folder, _ = checkpoint("roberta")
    with pytest.raises(SettingsError, match=r"max_tokens is 47, but encoder .* has 46 positions"):
        load_encoder(folder, max_tokens=47)
    with pytest.raises(SettingsError, match=r"tokenizer has 100 words, encoder .* embeds 99"):
        load_encoder(folder, vocab_size=100)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SettingsError, match=r"type mpnet, whose attention .* cannot be replaced"):
        load_encoder(
            "mpnet",
            from_scratch={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
            vocab_size=9,
            pad_token_id=0,
        )
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 8}
    with pytest.raises(SettingsError, match=r"type mobilebert, which cannot read packed passages .* see each other"):
        load_encoder("mobilebert", from_scratch=shape, vocab_size=9, pad_token_id=0)  # its embeddings read neighbours
    with pytest.raises(SettingsError, match=r"'eurobert' cannot be made from scratch at these sizes \("):
        load_encoder("eurobert", from_scratch=shape, vocab_size=9, pad_token_id=0)
    weights = tmp_path / "roberta" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SettingsError, match="could not be loaded"):
        load_encoder(folder)
    with pytest.raises(SettingsError, match="type gpt2"):
        load_encoder(str(tmp_path / "gpt2"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="could not be loaded"):
        load_encoder(str(tmp_path / "empty"))


def test_a_checkpoint_without_a_head_gives_the_encoder_alone(checkpoint):
    folder, base = checkpoint("bert", AutoModel)
    encoder, head = load_encoder(folder)
    assert head is None
    torch.testing.assert_close(encoder.word_embeddings.weight, base.get_input_embeddings().weight)
