"""Generation with real models: a T5 and a GPT-2 of random weights, made here."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.passages import split_documents
from quincunx.data_shards.readers import read_documents
from quincunx.data_shards.setting import find_problems
from quincunx.data_shards.tokenizer import load_tokenizer, special_ids
from quincunx.data_shards.tokenizer_training import train_wordpiece
from quincunx.engine.generate import GenerateSettings, generate_corpus
from quincunx.engine.generator import Sampling, draw, load_generator, uniform
from quincunx.engine.ranks import Environment

SAMPLING = Sampling(seed=1, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=8)


def place(rank: int, world_size: int) -> Environment:
    return Environment(
        launcher="torch", rank=rank, world_size=world_size, local_rank=0, master_addr="127.0.0.1", master_port=1
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A WordPiece tokenizer of 300 tokens: generating costs little with few."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["the fox number one passage of text, a longer passage that is padded less: many words last"] * 20
    texts += [f"Continue with {letters}" for letters in ("abcdefghijklm", "nopqrstuvwxyz", "0123456789")]
    train_wordpiece(texts, 300).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> Iterator[Path]:
    """A folder with t5/, gpt2/ and bert/, small, random, each with a real tokenizer."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small operations on a busy machine: threads would only wait for each other
    folder = tmp_path_factory.mktemp("models")
    loaded = load_tokenizer(tokenizer)
    ids = special_ids(loaded)
    small = {"vocab_size": len(loaded)}
    torch.manual_seed(0)
    t5 = T5Config(
        **small,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=ids["pad"],
        eos_token_id=ids["sep"],
    )
    gpt2 = GPT2Config(
        **small, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=ids["cls"], eos_token_id=ids["sep"]
    )
    bert = BertConfig(**small, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    for name, model in (
        ("t5", T5ForConditionalGeneration(t5)),
        ("gpt2", GPT2LMHeadModel(gpt2)),
        ("bert", BertModel(bert)),
    ):
        model.save_pretrained(folder / name)
        loaded.save_pretrained(folder / name)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """14 passages of 1 to 40 words."""
    path = tmp_path_factory.mktemp("corpus") / "collection.tsv"
    path.write_text("".join(f"{k}\t{'the fox number ' * (1 + 3 * k % 13)}{k}\n" for k in range(14)))
    return path


def make_settings(models: Path, corpus: Path, output: Path, **changes) -> GenerateSettings:
    given = {
        "task": "queries", "model": str(models / "t5"), "format": "msmarco", "path": str(corpus),
        "tokenizer": str(models / "t5"), "output": str(output), "num_queries": 3, "max_new_tokens": 6, "batch_size": 12,
        "device": "cpu", "part_megabytes": corpus.stat().st_size / 3 / 1e6,
    }  # fmt: skip
    return GenerateSettings(**(given | changes))


def records(output: Path) -> list[dict]:
    return [json.loads(line) for part in sorted(output.glob("part-*.jsonl")) for line in open(part, encoding="utf-8")]


def test_a_draw_follows_the_models_distribution_within_top_k_and_top_p():
    logits = torch.tensor([0.50, 0.25, 0.15, 0.10]).log()

    def frequencies(**changes) -> list[float]:
        sampling = replace(SAMPLING, seed=3, **changes)
        num = 20_000
        uniforms = torch.tensor([uniform(3, f"p{i}", 0, 0) for i in range(num)], dtype=torch.float64)
        tokens = draw(logits.flip(0).expand(num, 4), uniforms, sampling)
        return (torch.bincount(3 - tokens, minlength=4) / num).tolist()

    # Four standard deviations of a frequency among 20,000 draws: 4 * sqrt(p * (1 - p) / 20000) <= 0.0142.
    assert frequencies() == pytest.approx([0.50, 0.25, 0.15, 0.10], abs=0.0142)
    assert frequencies(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.0142)
    assert frequencies(top_p=0.8) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=0.0142)
    assert frequencies(top_p=1e-9) == frequencies(top_k=1) == [1, 0, 0, 0]
    squares = [0.5**2, 0.25**2, 0.15**2, 0.1**2]
    assert frequencies(temperature=0.5) == pytest.approx([x / math.fsum(squares) for x in squares], abs=0.0142)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_texts_depend_on_seed_passage_and_number_but_not_on_the_batch(models, kind):
    generator = load_generator(str(models / kind), "cpu", "float32")
    prompts = generator.tokenize([f"{'word ' * k}and passage {k}" for k in range(1, 10)], 8)
    ids = [f"p{k}" for k in range(1, 10)]
    together = generator.generate(ids, prompts, 3, SAMPLING)
    alone = [generator.generate([i], [prompt], 3, SAMPLING)[0] for i, prompt in zip(ids, prompts)]
    fewer = generator.generate(ids[::-1], prompts[::-1], 2, SAMPLING)[::-1]
    assert together == alone
    assert [texts[:2] for texts in together] == fewer
    assert all(len(set(texts)) == 3 for texts in together)
    assert len({texts[0] for texts in generator.generate(ids, [prompts[0]] * 9, 1, SAMPLING)}) == 9
    assert generator.generate(ids, prompts, 3, replace(SAMPLING, seed=2)) != together


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_without_chance_the_text_is_that_of_hugging_faces_own_greedy_search(models, kind):
    generator = load_generator(str(models / kind), "cpu", "float32")
    prompts = generator.tokenize(["one passage of text", "a longer passage of text that is padded less"], 8)
    texts = generator.generate(["a", "b"], prompts, 1, replace(SAMPLING, top_k=1))
    for (ours,), prompt in zip(texts, prompts):
        output = generator.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0]
        new = output[1:] if generator.is_seq2seq else output[len(prompt) :]
        assert ours == generator.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_every_passage_gets_its_texts_with_the_ids_that_shards_use(models, tokenizer, corpus, tmp_path):
    settings = make_settings(models, corpus, tmp_path / "queries", max_tokens=20)
    counts = generate_corpus(settings, place(0, 1))
    split = split_documents(read_documents("msmarco", str(corpus)), load_tokenizer(tokenizer), 20)
    expected = [passage.passage_id for _, passages in split for passage in passages]
    found = records(tmp_path / "queries")
    assert [record["passage_id"] for record in found] == expected and len(expected) > 14
    assert all(1 <= len(record["queries"]) <= 3 and all(record["queries"]) for record in found)
    assert counts["parts"] == 3 and counts["passages"] == len(expected)
    assert counts["texts"] == 3 * len(expected) == sum(len(r["queries"]) for r in found) + counts["empty_texts"]

    settings = make_settings(models, corpus, tmp_path / "more", task="continuation", model=str(models / "gpt2"))
    counts = generate_corpus(settings, place(0, 1))
    found = records(tmp_path / "more")
    assert [record["passage_id"] for record in found] == [str(k) for k in range(14)]
    assert all(record["continuation"] and set(record) == {"passage_id", "continuation"} for record in found)
    assert counts["cut_prompts"] == 0
    manifest = json.loads((tmp_path / "more" / "manifest.json").read_text())
    made_from = manifest["made_from"]
    assert made_from["num_parts"] == 3 and len(made_from["model_digest"]) == 32
    assert made_from["settings"]["seed"] == 0 and made_from["settings"]["max_new_tokens"] == 6
    assert made_from["settings"]["precision"] == "float32" and made_from["sources"][0]["name"] == "collection.tsv"


def test_ranks_and_reruns_write_the_same_bytes_and_finished_parts_are_left_alone(models, corpus, tmp_path):
    for rank in (1, 0):  # rank 0 waits for the others
        generate_corpus(make_settings(models, corpus, tmp_path / "two"), place(rank, 2))
    one = make_settings(models, corpus, tmp_path / "one")
    generate_corpus(one, place(0, 1))
    parts = sorted(part.name for part in (tmp_path / "one").glob("part-*"))
    assert parts == ["part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl"]
    for name in [*parts, "manifest.json"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    kept = [os.stat(tmp_path / "one" / name).st_mtime_ns for name in parts]
    assert generate_corpus(one, place(0, 1))["parts"] == 0
    assert kept == [os.stat(tmp_path / "one" / name).st_mtime_ns for name in parts]

    moved = tmp_path / "moved.model"
    moved.symlink_to(models / "t5")
    generate_corpus(make_settings(models, corpus, tmp_path / "one", model=str(moved)), place(0, 1))
    with pytest.raises(SettingsError, match="was made from other inputs or settings") as refused:
        generate_corpus(make_settings(models, corpus, tmp_path / "one", seed=7, top_p=0.5), place(0, 1))
    assert "settings.top_p was 0.95 and is 0.5; settings.seed was 0 and is 7" in str(refused.value)
    with pytest.raises(SettingsError, match="model_digest"):
        generate_corpus(make_settings(models, corpus, tmp_path / "one", model=str(models / "gpt2")), place(0, 1))


def test_a_prompt_too_long_is_cut_and_counted(models, tmp_path):
    (tmp_path / "long.tsv").write_text("a\t" + "many words " * 60 + "last\n")
    generator = load_generator(str(models / "gpt2"), "cpu", "float32")
    (ids,) = generator.tokenize(["many words " * 60 + "last"], 6)
    assert len(ids) == 64 - 6 and generator.num_cut_prompts == 1
    assert generator.tokenizer.decode(ids, skip_special_tokens=True).endswith("many words last")
    settings = make_settings(
        models, tmp_path / "long.tsv", tmp_path / "out", model=str(models / "gpt2"), prompt="Continue: {passage}"
    )
    counts = generate_corpus(settings, place(0, 1))
    assert counts["cut_prompts"] == 1 and len(records(tmp_path / "out")[0]["queries"]) == 3
    with pytest.raises(SettingsError, match="max_new_tokens is 64, but the model has 64 positions"):
        generator.prompt_limit(64)


def test_what_cannot_be_generated_is_refused_in_one_sentence(models, corpus, tmp_path):
    with pytest.raises(SettingsError, match=r"\(BertModel\) does not generate text"):
        load_generator(str(models / "bert"), "cpu", "float32")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"model .* could not be loaded"):
        load_generator(str(tmp_path / "empty"), "cpu", "float32")
    problems = find_problems(make_settings(models, corpus, tmp_path / "out", temperature=0, top_p=2, prompt="x"))
    assert [problem.partition(";")[0] for problem in problems] == ["temperature is 0", "top_p is 2", "prompt is x"]
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="torch finds no GPU"):
            generate_corpus(make_settings(models, corpus, tmp_path / "out", device="cuda"), place(0, 1))
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "notes.txt").touch()
    with pytest.raises(SettingsError, match=r"exists, and no stage made it"):
        generate_corpus(make_settings(models, corpus, tmp_path / "busy"), place(0, 1))
    (tmp_path / "blank.tsv").write_text("1\t \n")
    with pytest.raises(DataError, match="holds no passage"):
        generate_corpus(make_settings(models, tmp_path / "blank.tsv", tmp_path / "out"), place(0, 1))


@pytest.mark.gpu
def test_a_gpu_generates_in_bfloat16(models, corpus, tmp_path):
    counts = generate_corpus(make_settings(models, corpus, tmp_path / "out", device="cuda"), place(0, 1))
    assert counts["passages"] == 14 and counts["peak_memory_bytes"] > 0
    assert (
        json.loads((tmp_path / "out" / "manifest.json").read_text())["made_from"]["settings"]["precision"] == "bfloat16"
    )
