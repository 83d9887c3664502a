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
from quincunx.data_shards.stream import Rows
from quincunx.data_shards.tokenizer import tokenise
from quincunx.engine.ranks import rank_and_world, sum_over_ranks

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
QRELS_NAMES = ("qrels/test.tsv", "qrels/dev.tsv", "qrels/train.tsv")


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
    batches = pack_spread(held_out, num_passages, micro_batch)
    if not batches:
        return None
    trained = labels_by_task(pack_spread(train, UNIGRAM_PASSAGES, PASSAGES_A_PACK, UNIGRAM_IN_A_ROW))
    unigram = {}
    for task, labels in labels_by_task(batches).items():
        if len(labels):
            counts = np.bincount(trained[task], minlength=held_out.vocabulary.size)
            unigram[task] = -float(log_probabilities(counts)[labels].mean())
    return HeldOut(batches, unigram)


def pack_spread(packer: "Packer", num_passages: int, micro_batch: int, in_a_row: int = 1) -> list[Batch]:
    """At most `num_passages` passages, `micro_batch` a batch, masked as in epoch 0; none of a split without passages.

    Shared equally by the shard sets (all of a smaller one), and spread over each, `in_a_row` at a place: corpora are
    sorted, so their first passages may be of one kind, and lack a field that a task reads.
    """
    counts = [shard_set.num_samples(packer.split) for shard_set in packer.shard_sets]
    filled = [index for index, count in enumerate(counts) if count]
    datasets, ids = [], []
    for index, share in zip(filled, np.array_split(np.arange(num_passages), max(len(filled), 1))):
        number = min(len(share), counts[index])
        places = np.arange(0, number, in_a_row) * counts[index] // number
        datasets += [index] * number
        ids += (places[:, None] + np.arange(in_a_row)).ravel()[:number].tolist()
    rows = Rows(np.array(datasets, np.int16), np.zeros(len(ids), np.int32), np.array(ids, np.int64))
    cuts = [slice(start, start + micro_batch) for start in range(0, len(ids), micro_batch)]
    return [packer.pack(Rows(*(part[cut] for part in rows))) for cut in cuts]


def labels_by_task(batches: list[Batch]) -> dict[str, np.ndarray]:
    """int64 labels of all batches, the encoder's ("mlm") first."""
    labels = {"mlm": torch.cat([batch.encoder_labels.ids for batch in batches]).numpy()}
    for task in batches[0].tasks:
        labels[task] = torch.cat([batch.tasks[task].labels.ids for batch in batches]).numpy()
    return labels


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
    qrels: dict[str, dict[str, int]]
    """query id -> passage id -> grade, of these passages and queries"""


def load_probe(folder: str | Path, tokenizer: Any, max_tokens: int) -> Probe:
    """Reads and tokenises a BEIR folder; of qrels/ it takes test.tsv, dev.tsv or train.tsv. Texts keep their titles.

    max_tokens: texts are cut there, [CLS] and [SEP] included.

    Raises:
        DataError: a file is missing or malformed (file and line named), or no query has a relevant passage here.
    """
    folder = Path(folder)
    passages, queries, qrels = {}, {}, {}

    def add_passage(line: str) -> None:
        row = json.loads(line)
        passages[str(row["_id"])] = f"{row.get('title') or ''} {row['text'].strip()}".strip()

    def add_query(line: str) -> None:
        row = json.loads(line)
        queries[str(row["_id"])] = row["text"].strip()

    def add_grade(line: str) -> None:
        query_id, doc_id, grade = line.split("\t")
        if query_id != "query-id":  # the header
            qrels.setdefault(query_id, {})[doc_id] = int(grade)

    judgements = next((name for name in QRELS_NAMES if (folder / name).is_file()), " or ".join(QRELS_NAMES))
    row, grade = "an object with _id and text", "query-id, corpus-id, score with tabs between"
    readers = [("corpus.jsonl", row, add_passage), ("queries.jsonl", row, add_query), (judgements, grade, add_grade)]
    for name, form, add in readers:
        path = folder / name
        if not path.is_file():
            raise DataError(f"the probe {folder} has no {name}: give a folder in BEIR's format")
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                if line.strip():
                    add(line.decode())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path} line {number} is not {form} ({type(error).__name__}: {error}): fix or remove the line"
                ) from error
    return make_probe(folder, passages, queries, qrels, lambda texts, _: tokenise(texts, tokenizer, max_tokens))


def make_probe(
    folder: str | Path,
    passages: dict[str, str],
    queries: dict[str, str],
    qrels: dict[str, dict[str, int]],
    tokenise_side: Callable[[list[str], str], list[np.ndarray]],
) -> Probe:
    """A probe of texts by id and grades by query and passage id; queries without a relevant passage are left out.

    tokenise_side: int32 [n] of each text, given the texts and "passage" or "query". folder: for the message.

    Raises:
        DataError: no query has a relevant passage here.
    """
    known = {query: {doc: grades[doc] for doc in grades if doc in passages} for query, grades in qrels.items()}
    qrels = {query: known[query] for query in queries if max(known.get(query, {}).values(), default=0) > 0}
    if not qrels:
        raise DataError(
            f"the probe {folder} judges no passage of its corpus as relevant to one of its queries: give a BEIR folder "
            "whose qrels name ids of its own corpus.jsonl and queries.jsonl"
        )
    docs = tokenise_side(list(passages.values()), "passage")
    asked = tokenise_side([queries[query] for query in qrels], "query")
    batches = [*batches_by_length(docs), *(len(docs) + batch for batch in batches_by_length(asked))]
    return Probe(list(passages), list(qrels), [*docs, *asked], batches, qrels)


def encode_texts(encode: Encode, probe: Probe, device: torch.device) -> torch.Tensor:
    """float32 [texts, D] on `device`, the vectors of all texts, the same on every rank."""
    vectors = None
    for batch, counts in shared_out(probe.batches):
        kind = "passage" if batch[0] < len(probe.doc_ids) else "query"
        encoded = encode(to_device(join_texts([probe.texts[index] for index in batch]), device), kind).float()
        if vectors is None:
            vectors = torch.zeros(len(probe.texts), encoded.shape[1], device=device)
        if counts:
            vectors[torch.from_numpy(batch).to(device)] = encoded
    return sum_over_ranks(vectors)


def measure(probe: Probe, queries_QD: torch.Tensor, docs_ND: torch.Tensor) -> dict[str, float]:
    """MRR@10 and nDCG@10, by ir-measures, of exact search by dot product; means over the judged queries."""
    import ir_measures

    run, query_ids = {}, iter(probe.query_ids)
    for part_QD in queries_QD.split(QUERIES_A_SEARCH):
        found = (part_QD @ docs_ND.T).topk(min(SEARCH_DEPTH, len(docs_ND)), dim=1)
        for scores, indices in zip(found.values.tolist(), found.indices.tolist(), strict=True):
            run[next(query_ids)] = {probe.doc_ids[i]: score for i, score in zip(indices, scores, strict=True)}
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
    return measure(probe, vectors[num_docs:], vectors[:num_docs])
