"""The packed reranker against padded Hugging Face models and sentence-transformers: five families, tiny and random."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as SentenceCrossEncoder
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from quincunx.data_shards.batches import join_texts
from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.cross_encoder import load_reranker, save_reranker, score_pairs, tokenise_pairs

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 48, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "electra": {"embedding_size": 16},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "modernbert": {
        "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3,
        "bos_token_id": 2, "eos_token_id": 3, "classifier_pooling": "cls",
    },
}  # fmt: skip
TYPED = ("bert", "electra")
SPECIAL = ["[PAD]", "<pad>", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
WORDS = [f"w{n}" for n in range(99 - len(SPECIAL))]


def make_tokenizer(family):
    """Word-level, with the family's own pair form: [CLS] q [SEP] p [SEP], or <s> q </s></s> p </s> in RoBERTa's kin."""
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate([*SPECIAL, *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    double = "[SEP] [SEP]" if "roberta" in family else "[SEP]"
    second = 1 if family in TYPED else 0
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A {double} $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if family in TYPED else ["input_ids", "attention_mask"]
    pad = "<pad>" if "roberta" in family else "[PAD]"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        pad_token=pad,
        model_input_names=names,
        model_max_length=40,
    )


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a random model of a family with its tokenizer, every weight shaken (biases and norms too)."""

    def save(family, model_class=AutoModelForSequenceClassification, **fields):
        torch.manual_seed(0)
        labels = {"num_labels": 1} if model_class is AutoModelForSequenceClassification else {}
        config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **labels, **fields})
        model = model_class.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path / f"{family}-{model_class.__name__}"
        model.save_pretrained(folder)
        make_tokenizer(family).save_pretrained(folder)
        return str(folder), model

    return save


def make_pairs(seed=0, num=9):
    """Pairs of 0 to 59 words a side: the longest are cut on both sides."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 12, num), draw.integers(1, 60, num)
    lengths[0][1], lengths[1][1], lengths[1][2] = 50, 55, 0
    return [tuple(" ".join(draw.choice(WORDS, size)) for size in sizes) for sizes in zip(*lengths, strict=True)]


def packed_tensors(reranker, pairs):
    queries, passages = zip(*pairs, strict=True)
    ids, types, num_cut = tokenise_pairs(reranker.tokenizer, queries, passages, reranker.max_tokens)
    return join_texts(ids), None if types is None else torch.from_numpy(np.concatenate(types)), num_cut


def scores_of(reranker, pairs, **options):
    return score_pairs(reranker, *zip(*pairs, strict=True), **options)[0]


def padded_logits(model, folder, pairs):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        *map(list, zip(*pairs, strict=True)),
        truncation="longest_first",
        max_length=40,
        padding=True,
        return_tensors="pt",
    )
    return model(**batch).logits


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *((family, {"num_labels": n}) for family in FAMILIES for n in (1, 3)),
        ("modernbert", {"classifier_pooling": "mean"}),
    ],
)
def test_packed_pairs_equal_the_padded_model_in_logits_and_gradients(family, fields, checkpoint):
    """Tolerance: float32 with logits of order 1; a wrong position, type, window or head row is off by 0.01 and more."""
    folder, padded = checkpoint(family, **fields)
    num_labels = padded.config.num_labels
    reranker = load_reranker(folder, num_labels=num_labels)
    reranker.model.eval()
    pairs = make_pairs()
    tensors, types, num_cut = packed_tensors(reranker, pairs)
    assert (types is not None) == (family in TYPED)
    assert 0 < num_cut < len(pairs) and tensors.max_length == 40
    ours = reranker.model(tensors, types)
    theirs = padded_logits(padded, folder, pairs)
    assert ours.shape == ((9,) if num_labels == 1 else (9, 3))
    torch.testing.assert_close(ours.reshape(9, -1), theirs, rtol=0, atol=5e-6)
    assert theirs.std() > 0.01

    probe = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    ours.backward(probe.view_as(ours))
    theirs.backward(probe)
    gradients = {name: parameter.grad for name, parameter in reranker.model.model.named_parameters()}
    for name, parameter in padded.named_parameters():
        if parameter.grad is not None:
            tolerance = 1e-5 * parameter.grad.norm().item() + 1e-5
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_sentence_transformers_gives_the_exported_rerankers_scores(family, checkpoint, tmp_path):
    """Tolerance: the issue's 1e-5."""
    folder, _ = checkpoint(family)
    reranker = load_reranker(folder, max_tokens=30)
    state = {name: weight * 1.25 for name, weight in reranker.model.state_dict().items()}
    save_reranker(tmp_path / "out", reranker, state, card="# A reranker")
    exported = load_reranker(str(tmp_path / "out"), allow_fresh_head=False)
    assert exported.max_tokens == 30 and exported.digest != reranker.digest
    pairs = make_pairs(num=20)
    pairs.append(("w1 [SEP] w2", "w3 [MASK]"))
    progress = []
    ours = scores_of(exported, pairs, batch_tokens=64, progress=progress.append)
    theirs = SentenceCrossEncoder(str(tmp_path / "out"), device="cpu").predict(pairs)
    assert sum(progress) == len(pairs) and len(progress) > 5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert np.abs(ours - scores_of(reranker, pairs)).max() > 0.01
    assert (tmp_path / "out" / "README.md").read_text() == "# A reranker"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sentence_transformers"]["activation_fn"] == "torch.nn.modules.linear.Identity"
    assert config["architectures"][0].endswith("ForSequenceClassification")


def test_saving_without_a_state_writes_the_models_own_weights_and_replaces_the_folder(checkpoint, tmp_path):
    reranker = load_reranker(checkpoint("bert")[0])
    for card in ("first", "second"):
        save_reranker(tmp_path / "out", reranker, card=card)
    assert load_reranker(str(tmp_path / "out")).digest == reranker.digest
    assert (tmp_path / "out" / "README.md").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("mine")
    with pytest.raises(SettingsError, match="holds other files than a model's"):
        save_reranker(tmp_path / "other", reranker, card="")
    assert (tmp_path / "other" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_class", [AutoModel, AutoModelForMaskedLM])
def test_an_encoder_gets_a_fresh_head_from_torchs_generator(family, model_class, checkpoint):
    folder, base = checkpoint(family, model_class)
    rerankers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rerankers.append(load_reranker(folder))
    weights = [dict(reranker.model.model.named_parameters()) for reranker in rerankers]
    names = [name for name in weights[0] if "classifier" in name and name.endswith("weight")]
    assert names and all(torch.equal(weights[0][name], weights[1][name]) for name in names)
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in names)
    embedding = base.get_input_embeddings().weight
    assert torch.equal(rerankers[0].model.model.get_input_embeddings().weight, embedding)
    with pytest.raises(SettingsError, match="without a classification head"):
        load_reranker(folder, allow_fresh_head=False)


def test_no_pairs_give_no_scores(checkpoint):
    assert score_pairs(load_reranker(checkpoint("bert")[0]), [], [])[0].shape == (0,)


def test_a_model_that_cannot_rerank_is_refused_in_one_sentence(checkpoint, tmp_path):
    folder, _ = checkpoint("roberta", num_labels=3)
    with pytest.raises(SettingsError, match="gives 3 labels, 1 wanted"):
        load_reranker(folder)
    folder, _ = checkpoint("roberta")
    with pytest.raises(SettingsError, match=r"max_tokens is 47, reranker .* takes pairs of 8 to 46 tokens"):
        load_reranker(folder, max_tokens=47)
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SettingsError, match="is of type gpt2: give a bidirectional model of bert"):
        load_reranker(str(tmp_path / "gpt2"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="could not be loaded"):
        load_reranker(str(tmp_path / "empty"))


def test_a_head_with_weights_missing_is_refused(checkpoint):
    from safetensors.torch import load_file, save_file

    folder, _ = checkpoint("bert")
    weights = load_file(f"{folder}/model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match=r"lacks weights of its head \(classifier.weight\)"):
        load_reranker(folder)
