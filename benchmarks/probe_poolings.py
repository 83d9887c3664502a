"""Which probe predicts fine-tuned quality best: [CLS] or the mean over tokens, plain or whitened?

    python benchmarks/probe_poolings.py --recipe master_figure2 --collections DATA/squad --output STUDY [--work WORK] \\
        --results benchmarks/results/probe_poolings.json

Reads a finished study (launchers/study.py) with its work folder. Each cell's encoder, before fine-tuning, searches the
judged queries by cosine; whitening makes the passages' vectors uncorrelated with variance 1 first. Printed and written:
for each pooling the MRR@10 of every cell, and Spearman's correlation with the fine-tuned MRR@10 over a seed's cells.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from quincunx.engine.retrieval.collection import read_passages, read_queries
from quincunx.engine.retrieval.dual_encoder import encode_texts, load_retriever
from quincunx.engine.retrieval.study_report import spearman
from quincunx.engine.retrieval.trec import read_qrels
from quincunx.launchers.study_cells import Cell, make_cells
from quincunx.launchers.study_recipe import read_recipe

DEPTH = 10


def whitened(passages_ND: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Passages (and others by the same map) with mean 0 and covariance 1 over the passages."""
    mean = passages_ND.mean(0)
    values, directions = np.linalg.eigh(np.cov(passages_ND - mean, rowvar=False))
    scale = directions / np.sqrt(np.maximum(values, values[-1] * 1e-6))
    return [(part - mean) @ scale for part in (passages_ND, *others)]


def mrr(queries_QD: np.ndarray, passages_ND: np.ndarray, relevant: list[set[int]]) -> float:
    """MRR@10 by cosine."""
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (queries_QD, passages_ND)]
    found = np.argsort(-(unit[0] @ unit[1].T), axis=1, kind="stable")[:, :DEPTH]
    ranks = ([rank for rank, row in enumerate(rows, 1) if row in wanted] for rows, wanted in zip(found, relevant))
    return float(np.mean([1 / rows[0] if rows else 0.0 for rows in ranks]))


def measure(cell: Cell) -> dict[str, float]:
    """{"cls", "mean", "cls whitened", "mean whitened"} -> MRR@10 of the cell's encoder before fine-tuning."""
    encoder = cell.tuned / "pretrained" / "encoder"
    encoder = encoder if encoder.exists() else cell.pretrained / "export" / "encoder"
    qrels = read_qrels(cell.collection / "qrels" / f"{cell.made_from['split']}.tsv")
    passages, queries = read_passages(str(cell.collection)), read_queries(str(cell.collection))
    asked = queries.texts(queries.rows(qrels))
    relevant = [
        set(passages.rows([id for id, grade in grades.items() if grade > 0]).tolist()) for grades in qrels.values()
    ]
    tokens, found = cell.made_from["finetune"]["max_passage_tokens"], {}
    for pooling in ("cls", "mean"):
        retriever = load_retriever(
            str(encoder), pooling=pooling, normalise=False, max_tokens={"query": 32, "passage": tokens}
        )
        vectors = [
            encode_texts(retriever, texts, kind).astype(np.float64)
            for texts, kind in ((passages.texts(), "passage"), (asked, "query"))
        ]
        found[pooling] = mrr(vectors[1], vectors[0], relevant)
        white = whitened(*vectors)
        found[f"{pooling} whitened"] = mrr(white[1], white[0], relevant)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--collections", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="the study's")
    parser.add_argument("--work", type=Path, help="the study's (default: OUTPUT/work)")
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    recipe = read_recipe(options.recipe)
    cells = make_cells(recipe, options.collections, options.output, options.work or options.output / "work")
    rows, by_seed = [], defaultdict(list)
    for cell in cells:
        record = cell.record.read()
        if record is None or "diverged" in record:
            continue
        tuned = next(iter(record["measures"].values()))["mean"]
        row = {"collection": cell.collection.name, "variant": cell.variant, "seed": cell.seed, "tuned": tuned}
        rows.append(row | measure(cell))
        by_seed[row["collection"], row["seed"]].append(rows[-1])
        print(json.dumps(rows[-1]), flush=True)
    names = ("cls", "mean", "cls whitened", "mean whitened")
    correlations = [
        {"collection": collection, "seed": seed, "cells": len(found)}
        | {name: spearman([row[name] for row in found], [row["tuned"] for row in found]) for name in names}
        for (collection, seed), found in by_seed.items()
    ]
    options.results.write_text(json.dumps({"correlations": correlations, "cells": rows}, indent=1) + "\n")
    print(json.dumps(correlations, indent=1))


if __name__ == "__main__":
    main()
