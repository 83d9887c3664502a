"""The retrieval probe: does [CLS] find the right passage yet? A small BEIR set is searched while pre-training runs.

A BEIR folder holds corpus.jsonl ({"_id", "title", "text"}), queries.jsonl ({"_id", "text"}) and qrels/*.tsv (query-id,
corpus-id, score). Its texts are tokenised once; each probe encodes them, searches exactly by cosine, and reports
MRR@10 and nDCG@10 as ir-measures computes them. Nothing is fine-tuned: read the curve, not the level.

Every rank must call run_probe: the ranks share the encoding, and under ZeRO-3 each forward gathers weights from all of
them, so all run the same number of forwards.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quincunx.data_shards.batches import PackedText
from quincunx.data_shards.errors import DataError
from quincunx.engine.environment import gather_rows, rank_and_world

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 8192
SEARCH_DEPTH = 100  # deeper than the measures' 10, so that ir-measures settles ties at rank 10 itself
QUERIES_A_SEARCH = 256
QRELS_NAMES = ("test.tsv", "dev.tsv", "train.tsv")


@dataclass(frozen=True)
class Probe:
    """A tokenised BEIR set: the corpus' texts first, then the judged queries', each [CLS] ... [SEP]."""

    doc_ids: list[str]
    query_ids: list[str]
    texts: list[np.ndarray]
    """int32 [n] each; len(doc_ids) + len(query_ids) of them"""
    batches: list[np.ndarray]
    """int64 indices into `texts`, longest texts first, at most BATCH_TOKENS tokens each"""
    qrels: list[Any]
    """ir_measures.Qrel"""


def load_probe(folder: Path, tokenizer: Any, max_tokens: int) -> Probe:
    """Reads and tokenises a BEIR folder; of qrels/ it takes test.tsv, else dev.tsv, else train.tsv.

    max_tokens: texts are cut there, [CLS] and [SEP] included. A title stands before its text.

    Raises:
        DataError: a file is missing or malformed (file and line named), or no judged query has a judged passage here.
    """
    folder = Path(folder)
    corpus = {
        str(row["_id"]): f"{row.get('title') or ''} {row['text']}".strip() for row in _rows(folder, "corpus.jsonl")
    }
    qrels = [qrel for qrel in _read_qrels(folder) if qrel.doc_id in corpus]
    judged = {qrel.query_id for qrel in qrels if qrel.relevance > 0}
    queries = {str(row["_id"]): row["text"] for row in _rows(folder, "queries.jsonl") if str(row["_id"]) in judged}
    qrels = [qrel for qrel in qrels if qrel.query_id in queries]
    if not qrels:
        raise DataError(
            f"the probe {folder} judges no passage of its corpus as relevant to one of its queries: give a BEIR folder "
            "whose qrels name ids of its own corpus.jsonl and queries.jsonl"
        )
    texts = tokenise([*corpus.values(), *queries.values()], tokenizer, max_tokens)
    return Probe(list(corpus), list(queries), texts, batches_by_length(texts), qrels)


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    path = folder / name
    if not path.is_file():
        raise DataError(f"the probe {folder} has no {name}: give a folder in BEIR's format")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["_id"], row["text"] = row["_id"], row["text"].strip()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path} line {number} is not an object with _id and text ({error}): mend or remove the line"
                ) from error
            yield row


def _read_qrels(folder: Path) -> list[Any]:
    from ir_measures import Qrel

    path = next((path for name in QRELS_NAMES if (path := folder / "qrels" / name).is_file()), None)
    if path is None:
        raise DataError(f"the probe {folder} has none of qrels/{', qrels/'.join(QRELS_NAMES)}: give one of them")
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
                f"{path} line {number} is not query-id, corpus-id, score: mend or remove the line"
            ) from error
    return qrels


def tokenise(texts: list[str], tokenizer: Any, max_tokens: int) -> list[np.ndarray]:
    """int32 [n] per text: [CLS], the text's tokens cut to max_tokens - 2, [SEP]."""
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [np.array([cls, *row[: max_tokens - 2], sep], np.int32) for row in rows]


def batches_by_length(texts: list[np.ndarray], batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
    """Cuts the texts, longest first, into batches of at most `batch_tokens` tokens (one text at least)."""
    order = sorted(range(len(texts)), key=lambda index: (-len(texts[index]), index))
    batches, batch, tokens = [], [], 0
    for index in order:
        if batch and tokens + len(texts[index]) > batch_tokens:
            batches.append(np.array(batch))
            batch, tokens = [], 0
        batch.append(index)
        tokens += len(texts[index])
    return [*batches, np.array(batch)]


def pack(texts: list[np.ndarray]) -> PackedText:
    """The texts laid end to end."""
    cu_seqlens = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    return PackedText(input_ids=np.concatenate(texts), cu_seqlens=cu_seqlens)


def encode_texts(model: Any, probe: Probe, device: "torch.device") -> "torch.Tensor":
    """float32 [texts, D] on `device`, the [CLS] vectors of all texts, the same on every rank.

    Rank r encodes batches r, r + ranks, ...; one that has a batch fewer encodes the last (shortest) batch once more.
    """
    import torch

    from quincunx.engine.tensors import text_to_tensors

    rank, world = rank_and_world()
    own = probe.batches[rank::world]
    rounds = -(-len(probe.batches) // world)
    vectors = []
    with torch.no_grad():  # not inference_mode, whose tensors ZeRO-3 cannot gather into
        for turn in range(rounds):
            batch = own[turn] if turn < len(own) else probe.batches[-1]
            encoded = model.encode(text_to_tensors(pack([probe.texts[index] for index in batch]), device))
            if turn < len(own):
                vectors.append(encoded.float())
    width = encoded.shape[1]
    mine = torch.cat(vectors) if vectors else torch.empty(0, width, device=device)
    shares = [sum(map(len, probe.batches[other::world])) for other in range(world)]
    order = np.concatenate([batch for other in range(world) for batch in probe.batches[other::world]])
    everything = torch.empty(len(probe.texts), width, device=device)
    everything[torch.from_numpy(order).to(device)] = gather_rows(mine, shares)
    return everything


def search(queries_QD: "torch.Tensor", docs_ND: "torch.Tensor", depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search by cosine: (scores float32 [Q, depth], doc indices int64 [Q, depth]), best first."""
    from torch.nn.functional import normalize

    docs_ND = normalize(docs_ND, dim=1)
    found = [
        (normalize(part, dim=1) @ docs_ND.T).topk(min(depth, len(docs_ND)), dim=1)
        for part in queries_QD.split(QUERIES_A_SEARCH)
    ]
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


def run_probe(model: Any, probe: Probe, device: "torch.device") -> dict[str, float]:
    """{"probe/mrr@10", "probe/ndcg@10"} of the model as it stands, on every rank. Every rank must call it.

    model: the PretrainModel, left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    try:
        vectors = encode_texts(model, probe, device)
    finally:
        model.train(was_training)
    num_docs = len(probe.doc_ids)
    return measure(probe, *search(vectors[num_docs:], vectors[:num_docs], SEARCH_DEPTH))
