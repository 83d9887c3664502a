"""Trains two small generators, a doc2query model and a causal one, for machines without a model hub.

    python benchmarks/small_generators.py --pairs BEIR_FOLDER [--documents DOCS.jsonl] --output generators --minutes 4

Writes two Hugging Face folders that launchers/generate.py runs like any other model:
  generators/doc2query   a T5 (4 + 4 layers x 256) trained on (passage, query) pairs: BEIR's qrels of the train split
  generators/gpt2        a GPT-2 (4 layers x 256) trained on the documents in reading order, or on the folder's passages
Each trains for `--minutes` of wall time. They are small on purpose: the experiment shows that the chain works
and that each task's loss falls, not that these generations are good. With a hub at hand, use published models instead
(docs/generations.md). Both tokenizers are trained on the documents.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

VOCABULARY = 8192
WIDTH, LAYERS, HEADS = 256, 4, 4


def byte_level_tokenizer(texts: list[str], add_eos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`; with `add_eos`, every text ends in </s>, as T5's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    if add_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>")


def read_jsonl(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """(passage, query) of every relevant judgement of a BEIR folder's train split (test where it has no other)."""
    passages = {record["_id"]: record["text"] for record in read_jsonl(folder / "corpus.jsonl")}
    queries = {record["_id"]: record["text"] for record in read_jsonl(folder / "queries.jsonl")}
    qrels = folder / "qrels" / "train.tsv"
    qrels = qrels if qrels.exists() else folder / "qrels" / "test.tsv"
    rows = [line.rstrip("\n").split("\t") for line in qrels.read_text().splitlines()[1:]]
    return [(passages[pid], queries[qid]) for qid, pid, score in rows if int(score) > 0]


def train(model: torch.nn.Module, batches: Iterator[dict], minutes: float, name: str) -> None:
    """Trains for `minutes` with AdamW at 1e-3 after 100 steps of warm-up; prints the loss every 50 steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    deadline, losses = time.monotonic() + 60 * minutes, []
    for step, batch in enumerate(batches):
        loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"{name}: step {step + 1}, loss {sum(losses[-50:]) / 50:.3f}", flush=True)
        if time.monotonic() > deadline:
            break
    model.to("cpu").eval()


def pair_batches(pairs: list[tuple[str, str]], tokenizer, size: int) -> Iterator[dict]:
    draw = random.Random(0)
    while True:
        chosen = draw.sample(pairs, size)
        batch = tokenizer([p for p, _ in chosen], truncation=True, max_length=144, padding=True, return_tensors="pt")
        labels = tokenizer([q for _, q in chosen], truncation=True, max_length=24, padding=True, return_tensors="pt")
        yield {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100),
        }


def text_batches(documents: list[str], tokenizer, size: int, length: int) -> Iterator[dict]:
    ids = torch.tensor([token for text in documents for token in [*tokenizer(text)["input_ids"], 1]])
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(ids) - length, (size,), generator=generator)
        rows = torch.stack([ids[start : start + length] for start in starts.tolist()])
        yield {"input_ids": rows, "labels": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--documents", type=Path, help="JSONL with `paragraphs` in reading order (default: the passages of --pairs)"
    )
    parser.add_argument("--pairs", type=Path, required=True, help="BEIR folder with judged queries")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0, help="training time of each model")
    settings = parser.parse_args()
    torch.manual_seed(0)
    if settings.documents:
        documents = ["\n".join(record["paragraphs"]) for record in read_jsonl(settings.documents)]
    else:
        documents = ["\n".join(record["text"] for record in read_jsonl(settings.pairs / "corpus.jsonl"))]
    pairs = read_pairs(settings.pairs)

    tokenizer = byte_level_tokenizer(documents + [query for _, query in pairs], add_eos=True)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=4 * WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    train(t5, pair_batches(pairs, tokenizer, 16), settings.minutes, "doc2query")
    t5.save_pretrained(settings.output / "doc2query")
    tokenizer.save_pretrained(settings.output / "doc2query")

    tokenizer = byte_level_tokenizer(documents, add_eos=False)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=512,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    train(gpt2, text_batches(documents, tokenizer, 8, 128), settings.minutes, "gpt2")
    gpt2.save_pretrained(settings.output / "gpt2")
    tokenizer.save_pretrained(settings.output / "gpt2")
    print(f"wrote {settings.output}/doc2query and {settings.output}/gpt2")


if __name__ == "__main__":
    main()
