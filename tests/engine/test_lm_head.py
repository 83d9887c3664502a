"""The shared LM head against the masked-LM heads of Hugging Face checkpoints."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from quincunx.engine.encoder import load_encoder
from quincunx.engine.model import TiedRows, make_lm_head

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "bert": {},
    "roberta": {},
    "electra": {"embedding_size": 16},
    "xlm-roberta": {},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
}


def head_of(encoder, weights):
    words = encoder.word_embeddings
    return make_lm_head(encoder.config, words.num_embeddings, words.embedding_dim, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_checkpoint_is_carried_over(family, tmp_path):
    """Loss and hits of our tied, chunked head = cross-entropy of the logits that Hugging Face's own head gives."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    encoder, weights = load_encoder(str(tmp_path))
    head = head_of(encoder, weights)
    ids = torch.randint(3, 99, (1, 40))
    labels = torch.randint(0, 99, (40,))
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    logits = model(input_ids=ids).logits[0]
    weight, row_weights = encoder.word_embeddings.weight, torch.full((40,), 1 / 40)
    loss, _, correct = head(hidden, weight, labels, row_weights, [(0, 40)], "torch")
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels), rtol=1e-5, atol=1e-6)
    assert correct.item() == (logits.argmax(-1) == labels).sum().item()


def test_the_output_weight_is_the_word_embedding(tmp_path):
    config = AutoConfig.for_model("bert", **SIZES)
    AutoModelForMaskedLM.from_config(config).base_model.save_pretrained(tmp_path)
    encoder, weights = load_encoder(str(tmp_path))
    assert weights is None
    head = head_of(encoder, weights)
    assert not any(parameter.shape == (99, 32) for parameter in head.parameters())
    weight, labels = encoder.word_embeddings.weight, torch.tensor([4, 5, 6])
    head(torch.randn(3, 32), weight, labels, torch.ones(3), [(0, 3)], "torch")[0].backward()
    assert encoder.word_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_the_two_gradients_of_the_tied_weight_add_up():
    """Ids repeat, as words do; the reference is torch's embedding beside the weight itself."""
    torch.manual_seed(0)
    weight, ids, coefficients = torch.randn(7, 4), torch.tensor([3, 3, 0, 6, 3]), torch.randn(5, 4)
    gradients = []
    for tied in (True, False):
        leaf = weight.clone().requires_grad_()
        rows, output = TiedRows.apply(leaf, ids) if tied else (torch.nn.functional.embedding(ids, leaf), leaf)
        assert torch.equal(rows, weight[ids]) and torch.equal(output, weight)
        ((rows * coefficients).sum() + output.square().sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
