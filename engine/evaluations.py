"""What a pre-training is measured by: held-out losses beside their unigrams, and a retrieval probe.

Held-out loss: every task on passages that are never trained on, with masks that never change. The passages are packed
once, with the masks of epoch 0. A task's loss is a mean over its labelled tokens, in nats. Its unigram is the
cross-entropy of the very same tokens under their frequency as labels in training, the plateau that small models from
scratch sit on. Tasks label different words (keyword tasks the rare ones), so only the distance to a task's own unigram
can be compared.

Probe: a small BEIR folder (corpus.jsonl: {"_id", "title", "text"}; queries.jsonl: {"_id", "text"}; qrels/*.tsv:
query-id, corpus-id, score) is searched exactly while pre-training runs, and MRR@10 and nDCG@10 are reported as
ir-measures computes them. Pre-training fine-tunes nothing: read the curve, not the level.

Every rank must call run_held_out and run_probe: the ranks share the batches, and under ZeRO-3 each forward gathers
weights from all of them, so all run the same number of forwards.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from quincunx.data_shards.batches import Batch, Text, batches_by_length, join_texts, to_device
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.order import Rows
from quincunx.data_shards.tokenizer import tokenise
from quincunx.engine.ranks import gather_rows, rank_and_world, sum_over_ranks

if TYPE_CHECKING:
    from quincunx.data_shards.packer import Packer

Item = TypeVar("Item")
Encode = Callable[[Text, str], torch.Tensor]

UNIGRAM_PASSAGES = 4096  # training passages that label frequencies are counted on
UNIGRAM_IN_A_ROW = 16  # of them side by side: each place is a block to be read, far away if shards are remote
PASSAGES_A_PACK = 256
PSEUDO_COUNTS = 10.0 ** np.arange(-4, 1)
"""Candidates of the count that every id of the vocabulary is given before the first label is seen."""
SEARCH_DEPTH = 100  # deeper than the measures' 10, so that ir-measures settles ties at rank 10 itself
QUERIES_A_SEARCH = 256
QRELS_NAMES = ("test.tsv", "dev.tsv", "train.tsv")


def shared_out(batches: Sequence[Item]) -> Iterator[tuple[Item, bool]]:
    """This rank's batches, and whether each counts.

    Rank r takes batches r, r + ranks, ...; one that has a batch fewer takes the last once more, which does not count.
    """
    rank, world = rank_and_world()
    for turn in range(-(-len(batches) // world)):
        number = rank + turn * world
        yield batches[min(number, len(batches) - 1)], number < len(batches)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and gradients; not inference_mode, whose tensors ZeRO-3 cannot gather into."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class HeldOut:
    """Packed held-out passages, the same on every rank."""

    batches: list[Batch]
    unigram: dict[str, float]
    """nats per labelled token of each task ("mlm" first) under its label frequencies in training; tasks with labels"""


def load_held_out(held_out: "Packer", train: "Packer", num_passages: int, micro_batch: int) -> HeldOut | None:
    """Packs `num_passages` held-out passages, shared equally by the shard sets that have any.

    held_out, train: packers of the two splits, alike otherwise. micro_batch: passages of one forward pass.
    Returns None where no shard set holds any passage out. A pure function: ranks need not talk.
    """
    datasets, samples = spread_samples(held_out, num_passages)
    if not len(samples):
        return None
    batches = pack_all(held_out, datasets, samples, micro_batch)
    trained = pack_all(train, *spread_samples(train, UNIGRAM_PASSAGES, UNIGRAM_IN_A_ROW), PASSAGES_A_PACK)
    return HeldOut(batches, unigram_cross_entropy(batches, trained, held_out.vocab_size))


def spread_samples(packer: "Packer", num_passages: int, in_a_row: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(datasets int16 [n], sample_ids int64 [n]), `in_a_row` at places evenly spread over each shard set.

    n <= num_passages, all of a smaller shard set.

    Spread, because corpora are sorted: the first passages may be of one kind, and lack a field that a task reads.
    """
    counts = [shard_set.num_samples(packer.split) for shard_set in packer.shard_sets]
    filled = [index for index, count in enumerate(counts) if count]
    shares = np.array_split(np.arange(num_passages), len(filled)) if filled else []
    taken = [min(len(share), counts[index]) for index, share in zip(filled, shares, strict=True)]
    ids = []
    for index, number in zip(filled, taken, strict=True):
        places = np.arange(0, number, in_a_row) * counts[index] // number
        ids.append((places[:, None] + np.arange(in_a_row)).ravel()[:number])
    datasets = np.repeat(np.array(filled, np.int16), taken)
    return datasets, np.concatenate(ids) if ids else np.empty(0, np.int64)


def pack_all(packer: "Packer", datasets: np.ndarray, samples: np.ndarray, micro_batch: int) -> list[Batch]:
    """The samples in their order, `micro_batch` a batch, as epoch 0 masks them."""
    epochs = np.zeros(len(samples), np.int32)
    cuts = [slice(start, start + micro_batch) for start in range(0, len(samples), micro_batch)]
    return [packer.pack(Rows(datasets[cut], epochs[cut], samples[cut])) for cut in cuts]


def unigram_cross_entropy(batches: list[Batch], trained: list[Batch], vocab_size: int) -> dict[str, float]:
    """Nats per labelled token of `batches` under the label frequencies of `trained`, task by task."""
    counts = count_labels(trained, vocab_size)
    unigram = {}
    for task, labels in labels_by_task(batches).items():
        if len(labels):
            unigram[task] = -float(log_probabilities(counts[task])[labels].mean())
    return unigram


def labels_by_task(batches: list[Batch]) -> dict[str, np.ndarray]:
    """int64 labels of all batches, the encoder's ("mlm") first."""
    labels = {"mlm": torch.cat([batch.encoder_labels.ids for batch in batches]).numpy()}
    for task in batches[0].tasks:
        labels[task] = torch.cat([batch.tasks[task].labels.ids for batch in batches]).numpy()
    return labels


def count_labels(batches: list[Batch], vocab_size: int) -> dict[str, np.ndarray]:
    """How often each id is a label of the encoder ("mlm") and of each task, int64 [vocab_size]."""
    return {name: np.bincount(ids, minlength=vocab_size) for name, ids in labels_by_task(batches).items()}


def log_probabilities(counts: np.ndarray) -> np.ndarray:
    """Natural logarithms of the smoothed label distribution, float64 [vocab_size]; uniform where nothing was counted.

    The mean of -log_probabilities(counts)[labels] over held-out labels is their unigram cross-entropy in nats.

    Every id is given a pseudo-count, the one of PSEUDO_COUNTS under which the counted labels are likeliest, each with
    itself left out: a pseudo-count of 1 would raise the plateau on small corpora and make it easier to pass.
    """
    total = counts.sum()

    def left_out_likelihood(pseudo_count: float) -> float:
        seen = counts[counts > 0]
        return float(seen @ np.log((seen - 1 + pseudo_count) / (total - 1 + pseudo_count * len(counts))))

    pseudo_count = max(PSEUDO_COUNTS, key=left_out_likelihood) if total > 1 else 1.0
    return np.log((counts + pseudo_count) / (total + pseudo_count * len(counts)))


def run_held_out(model: Any, held_out: HeldOut, device: torch.device) -> dict[str, float]:
    """held_out/loss/TASK and held_out/unigram/TASK in nats, held_out/accuracy/TASK (share right) on every rank.

    model: the PretrainModel, left in the mode it was in. A task without labels is left out.
    """
    names = list(model.loss_weights)
    totals = torch.zeros(3, len(names), dtype=torch.float64, device=device)
    unweighted = torch.ones(len(names), device=device)
    with evaluating(model):
        for batch, counts in shared_out(held_out.batches):
            output = model(to_device(batch, device), unweighted)
            if counts:
                totals += torch.stack([x.to(totals) for x in (output.nll_sums, output.correct, output.counts)])
    nll_sums, correct, counts = sum_over_ranks(totals).tolist()
    metrics = {}
    for task, nll, right, count in zip(names, nll_sums, correct, counts, strict=True):
        if count:
            metrics[f"held_out/loss/{task}"] = nll / count
            if task in held_out.unigram:
                metrics[f"held_out/accuracy/{task}"] = right / count
                metrics[f"held_out/unigram/{task}"] = held_out.unigram[task]
    return metrics


@dataclass(frozen=True)
class Probe:
    """A tokenised BEIR set: the corpus' texts first, then the judged queries', each [CLS] ... [SEP]."""

    doc_ids: list[str]
    query_ids: list[str]
    texts: list[np.ndarray]
    """int32 [n] each; len(doc_ids) + len(query_ids) of them"""
    batches: list[np.ndarray]
    """int64 indices into `texts`, passages' or queries', longest texts first, at most packing.BATCH_TOKENS tokens"""
    qrels: list[Any]
    """ir_measures.Qrel"""


def load_probe(
    folder: Path,
    tokenizer: Any,
    max_tokens: int,
    max_query_tokens: int | None = None,
    *,
    split: str | None = None,
    titles: bool = True,
    query_prompt: str = "",
    passage_prompt: str = "",
) -> Probe:
    """Reads and tokenises a BEIR folder; of qrels/ it takes SPLIT.tsv, without a split test.tsv, dev.tsv or train.tsv.

    max_tokens: texts are cut there, [CLS] and [SEP] included, queries at max_query_tokens. titles: a title stands
    before its text. The prompts stand before every text.

    Raises:
        DataError: a file is missing or malformed (file and line named), or no judged query has a judged passage here.
    """
    folder = Path(folder)
    corpus = {
        str(row["_id"]): f"{(titles and row.get('title')) or ''} {row['text']}".strip()
        for row in _rows(folder, "corpus.jsonl")
    }
    qrels = [qrel for qrel in _read_qrels(folder, split) if qrel.doc_id in corpus]
    judged = {qrel.query_id for qrel in qrels if qrel.relevance > 0}
    queries = {str(row["_id"]): row["text"] for row in _rows(folder, "queries.jsonl") if str(row["_id"]) in judged}
    qrels = [qrel for qrel in qrels if qrel.query_id in queries]
    if not qrels:
        raise DataError(
            f"the probe {folder} judges no passage of its corpus as relevant to one of its queries: give a BEIR folder "
            "whose qrels name ids of its own corpus.jsonl and queries.jsonl"
        )
    docs = tokenise([passage_prompt + text for text in corpus.values()], tokenizer, max_tokens)
    asked = tokenise([query_prompt + text for text in queries.values()], tokenizer, max_query_tokens or max_tokens)
    batches = [*batches_by_length(docs), *(len(docs) + batch for batch in batches_by_length(asked))]
    return Probe(list(corpus), list(queries), [*docs, *asked], batches, qrels)


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    path = folder / name
    if not path.is_file():
        raise DataError(f"the probe {folder} has no {name}: give a folder in BEIR's format")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["_id"], row["text"] = row["_id"], row["text"].strip()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path} line {number} is not an object with _id and text ({error}): fix or remove the line"
                ) from error
            yield row


def _read_qrels(folder: Path, split: str | None) -> list[Any]:
    from ir_measures import Qrel

    names = QRELS_NAMES if split is None else (f"{split}.tsv",)
    path = next((path for name in names if (path := folder / "qrels" / name).is_file()), None)
    if path is None:
        raise DataError(f"the probe {folder} has no qrels/{', qrels/'.join(names)}: give such a file")
    qrels = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        columns = line.split("\t")
        if number == 1 and columns[0] == "query-id":
            continue
        try:
            query_id, doc_id, relevance = columns
            qrels.append(Qrel(query_id, doc_id, int(relevance)))
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is not query-id, corpus-id, score: fix or remove the line"
            ) from error
    return qrels


def encode_texts(encode: Encode, probe: Probe, device: torch.device) -> torch.Tensor:
    """float32 [texts, D] on `device`, the vectors of all texts, the same on every rank."""
    vectors = []
    for batch, counts in shared_out(probe.batches):
        kind = "passage" if batch[0] < len(probe.doc_ids) else "query"
        encoded = encode(to_device(join_texts([probe.texts[index] for index in batch]), device), kind).float()
        vectors.append(encoded if counts else encoded[:0])
    world = rank_and_world()[1]
    shares = [sum(map(len, probe.batches[other::world])) for other in range(world)]
    order = np.concatenate([batch for other in range(world) for batch in probe.batches[other::world]])
    everything = torch.empty(len(probe.texts), encoded.shape[1], device=device)
    everything[torch.from_numpy(order).to(device)] = gather_rows(torch.cat(vectors), shares)
    return everything


def search(queries_QD: torch.Tensor, docs_ND: torch.Tensor, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search by dot product: (scores float32 [Q, depth], doc indices int64 [Q, depth]), best first."""
    found = [(part @ docs_ND.T).topk(min(depth, len(docs_ND)), dim=1) for part in queries_QD.split(QUERIES_A_SEARCH)]
    return (
        np.concatenate([part.values.cpu().numpy() for part in found]),
        np.concatenate([part.indices.cpu().numpy() for part in found]),
    )


def measure(probe: Probe, scores: np.ndarray, indices: np.ndarray) -> dict[str, float]:
    """MRR@10 and nDCG@10 by ir-measures, means over the judged queries, 1 is perfect."""
    import ir_measures

    run = {
        query: {probe.doc_ids[index]: float(score) for index, score in zip(row_indices, row_scores, strict=True)}
        for query, row_indices, row_scores in zip(probe.query_ids, indices, scores, strict=True)
    }
    values = ir_measures.calc_aggregate([ir_measures.RR @ 10, ir_measures.nDCG @ 10], probe.qrels, run)
    return {"probe/mrr@10": values[ir_measures.RR @ 10], "probe/ndcg@10": values[ir_measures.nDCG @ 10]}


def run_probe(
    model: Any, probe: Probe, device: torch.device, *, encode: Encode | None = None, cosine: bool = True
) -> dict[str, float]:
    """{"probe/mrr@10", "probe/ndcg@10"} of the model as it stands, on every rank.

    model: left in the mode it was in. encode: gives the vectors [S, D] of packed queries or passages (default:
    the [CLS] vectors of a PretrainModel). cosine: search by cosine, else by dot product.
    """
    with evaluating(model):
        vectors = encode_texts(encode or (lambda text, kind: model.encode(text)), probe, device)
    if cosine:
        vectors = torch.nn.functional.normalize(vectors, dim=1)
    num_docs = len(probe.doc_ids)
    return measure(probe, *search(vectors[num_docs:], vectors[:num_docs], SEARCH_DEPTH))
