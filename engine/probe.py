"""The retrieval probe: does [CLS] find the right passage yet? A small BEIR set is searched while pre-training runs.

A BEIR folder holds corpus.jsonl ({"_id", "title", "text"}), queries.jsonl ({"_id", "text"}) and qrels/*.tsv (query-id,
corpus-id, score). Its texts are tokenised once; each probe encodes them, searches exactly, and reports MRR@10 and
nDCG@10 as ir-measures computes them. Pre-training fine-tunes nothing: read the curve there, not the level.

Every rank must call run_probe: the ranks share the encoding, and under ZeRO-3 each forward gathers weights from all of
them, so all run the same number of forwards.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quincunx.data_shards.errors import DataError
from quincunx.engine.packing import batches_by_length, pack, tokenise
from quincunx.engine.ranks import gather_rows, rank_and_world

if TYPE_CHECKING:
    import torch

    from quincunx.engine.tensors import TensorText

    Encode = Callable[[TensorText, str], torch.Tensor]

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
                    f"{path} line {number} is not an object with _id and text ({error}): mend or remove the line"
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
                f"{path} line {number} is not query-id, corpus-id, score: mend or remove the line"
            ) from error
    return qrels


def encode_texts(encode: "Encode", probe: Probe, device: "torch.device") -> "torch.Tensor":
    """float32 [texts, D] on `device`, the vectors of all texts, the same on every rank.

    Rank r encodes batches r, r + ranks, ...; one that has a batch fewer encodes the last batch once more.
    """
    import torch

    from quincunx.engine.tensors import text_to_tensors

    rank, world = rank_and_world()
    rounds = -(-len(probe.batches) // world)
    vectors = []
    with torch.no_grad():  # not inference_mode, whose tensors ZeRO-3 cannot gather into
        for turn in range(rounds):
            number = rank + turn * world
            batch = probe.batches[min(number, len(probe.batches) - 1)]
            kind = "passage" if batch[0] < len(probe.doc_ids) else "query"
            encoded = encode(text_to_tensors(pack([probe.texts[index] for index in batch]), device), kind)
            if number < len(probe.batches):
                vectors.append(encoded.float())
    width = encoded.shape[1]
    mine = torch.cat(vectors) if vectors else torch.empty(0, width, device=device)
    shares = [sum(map(len, probe.batches[other::world])) for other in range(world)]
    order = np.concatenate([batch for other in range(world) for batch in probe.batches[other::world]])
    everything = torch.empty(len(probe.texts), width, device=device)
    everything[torch.from_numpy(order).to(device)] = gather_rows(mine, shares)
    return everything


def search(queries_QD: "torch.Tensor", docs_ND: "torch.Tensor", depth: int) -> tuple[np.ndarray, np.ndarray]:
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
    model: Any, probe: Probe, device: "torch.device", *, encode: "Encode | None" = None, cosine: bool = True
) -> dict[str, float]:
    """{"probe/mrr@10", "probe/ndcg@10"} of the model as it stands, on every rank. Every rank must call it.

    model: left in the mode it was in. encode: gives the vectors [S, D] of packed queries or passages (default:
    the [CLS] vectors of a PretrainModel). cosine: search by cosine, else by dot product.
    """
    from torch.nn.functional import normalize

    was_training = model.training
    model.eval()
    try:
        vectors = encode_texts(encode or (lambda text, kind: model.encode(text)), probe, device)
    finally:
        model.train(was_training)
    if cosine:
        vectors = normalize(vectors, dim=1)
    num_docs = len(probe.doc_ids)
    return measure(probe, *search(vectors[num_docs:], vectors[:num_docs], SEARCH_DEPTH))
