"""Recall against exact search, seconds to build and milliseconds a query of some indexes, on real embeddings.

    python launchers/encode.py --model MODEL --corpus data/scifact --output passages
    python launchers/encode.py --model MODEL --corpus data/scifact --kind query --output queries
    python benchmarks/indexes.py --embeddings passages --queries queries [--output benchmarks/results/indexes.json]

`--copies N` searches N copies of the embeddings, each but the first with noise: a larger collection of the same kind.
"""

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from quincunx.engine.retrieval.embeddings import Embeddings, open_embeddings
from quincunx.engine.retrieval.index import Index, recall_against_exact

DEPTH = 100
NOISE = 0.03  # standard deviation a channel; vectors of length 1 in 384 channels have 0.05
KINDS = [
    ("exact", ""),
    *(("IVF911,PQ96", f"nprobe={probes}") for probes in (8, 32, 128)),
    *(("HNSW32", f"efConstruction=200,efSearch={candidates}") for candidates in (100, 256, 1000)),
]


def copied(embeddings: Embeddings, copies: int) -> Embeddings:
    """Embeddings in memory: `copies` times as many, the further ones shaken, all of length 1."""
    draw, parts = np.random.default_rng(0), [np.array(part, np.float32) for part in embeddings.parts]
    for _ in range(copies - 1):
        for part in embeddings.parts:
            shaken = part.astype(np.float32) + draw.normal(0, NOISE, part.shape).astype(np.float32)
            parts.append(shaken / np.linalg.norm(shaken, axis=1, keepdims=True))
    return Embeddings(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--embeddings", required=True)
    parser.add_argument("--queries", required=True)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    embeddings = copied(open_embeddings(arguments.embeddings), arguments.copies)
    queries = open_embeddings(arguments.queries, kind="query")
    queries_QD = queries.vectors(range(min(len(queries), 300)))
    exact_QK, rows = None, []
    for kind, options in KINDS:
        index = Index(embeddings, kind, options, device=arguments.device)
        begun = time.perf_counter()
        _, found_QK = index.search(queries_QD, DEPTH)
        first, seconds = time.perf_counter() - begun, []
        for _ in range(arguments.repeats):
            begun = time.perf_counter()
            index.search(queries_QD, DEPTH)
            seconds.append(time.perf_counter() - begun)
        exact_QK = found_QK if kind == "exact" else exact_QK
        row = {
            "kind": kind,
            "options": options,
            "recall@10": round(recall_against_exact(found_QK[:, :10], exact_QK[:, :10]), 4),
            "recall@100": round(recall_against_exact(found_QK, exact_QK), 4),
            "build_seconds": round(max(first - statistics.median(seconds), 0), 1) if index.approximate else 0.0,
            "ms_a_query": round(1000 * statistics.median(seconds) / len(queries_QD), 3),
        }
        rows.append(row)
        print(row, flush=True)
    result = {
        "vectors": len(embeddings),
        "width": embeddings.width,
        "queries": len(queries_QD),
        "depth": DEPTH,
        "indexes": rows,
        "device": arguments.device,
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        **{package: version(package) for package in ("torch", "faiss-cpu")},
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
