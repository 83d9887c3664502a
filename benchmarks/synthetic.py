"""Synthetic packed batches and shard sets, and the recipes that benchmarks run; no corpus needed."""

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from quincunx.data_shards.batches import Batch, Context, Task, make_labels, make_text
from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.tasks import TASKS, TaskSpec

if TYPE_CHECKING:
    from quincunx.data_shards.shard_writer import Sample
    from quincunx.data_shards.shards import Manifest

RECIPES = {
    "retromae": (("retromae",), "enhanced"),
    "master": (("mkp", "cmp", "npr", "dor", "gor"), "masked"),
    "quincunx": (("mkp", "cmp", "npr", "dor", "gor"), "enhanced"),
}
CLS, SEP, MASK, FIRST_WORD = 101, 102, 103, 999
ENCODER_RATE, DECODER_RATE = 0.30, 0.50
ALWAYS = 2**30
"""Keep threshold of a column that every row sees; data_shards.hashing.ALWAYS without its numba, 55 MB of a peak."""


def recipe_tasks(recipe: str) -> list[TaskSpec]:
    """Tasks of a recipe; two layers in a masked decoder, one in an enhanced one."""
    names, decoder = RECIPES[recipe]
    return [TaskSpec(name=name, decoder=decoder) for name in names]


def passage_lengths(kind: str, batch: int, max_tokens: int) -> np.ndarray:
    """Tokens of each passage, [CLS] and [SEP] included.

    `msmarco`: quantiles of a log-normal (sigma 0.4) cut at `max_tokens`, scaled so that they mean 75 at 144 (MS MARCO's
    passages in BERT's tokens; in proportion elsewhere). `full`: all `max_tokens`.
    """
    if kind == "full":
        return np.full(batch, max_tokens)
    from statistics import NormalDist

    normal = np.array([NormalDist().inv_cdf((i + 0.5) / batch) for i in range(batch)])
    wanted, scale = 75 * max_tokens / 144, 68.0 * max_tokens / 144
    for _ in range(60):
        lengths = np.clip(np.rint(scale * np.exp(0.4 * normal)), 8, max_tokens)
        scale *= wanted / lengths.mean()
    return np.random.default_rng(0).permutation(lengths.astype(int))


def make_batch(recipe: str, lengths: np.ndarray, vocab_size: int, seed: int = 0) -> Batch:
    """A batch of the recipe in which every task has a text for every passage, as long as the passage."""
    rng = np.random.default_rng(seed)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    inner = np.ones(cu_seqlens[-1], bool)
    inner[cu_seqlens[:-1]] = inner[cu_seqlens[1:] - 1] = False

    def random_ids() -> np.ndarray:
        ids = rng.integers(FIRST_WORD, vocab_size, cu_seqlens[-1]).astype(np.int32)
        ids[cu_seqlens[:-1]], ids[cu_seqlens[1:] - 1] = CLS, SEP
        return ids

    def choose(rate: float) -> np.ndarray:
        """Bool, `rate` of each text's inner tokens."""
        chosen = np.zeros_like(inner)
        for start, end in itertools.pairwise(cu_seqlens):
            places = np.arange(start + 1, end - 1)
            chosen[rng.choice(places, max(1, round(rate * len(places))), replace=False)] = True
        return chosen

    passage, hidden = random_ids(), choose(ENCODER_RATE)
    names, decoder = RECIPES[recipe]
    contexts, tasks = {}, {}
    for name in names:
        ids = passage if TASKS[name].field == "passage" else random_ids()
        if decoder == "enhanced":
            keep = ~hidden if TASKS[name].draw == "complement" else np.ones_like(inner)
            keep_thresholds = np.where(inner, np.where(keep, ALWAYS * DECODER_RATE, 0), ALWAYS).astype(np.int32)
            labelled, context, read = inner, TASKS[name].field, ids
            rule = {
                "keys": torch.from_numpy(rng.integers(-(2**31), 2**31, len(lengths)).astype(np.int32)),
                "word_ids": torch.arange(len(ids), dtype=torch.int32),
                "keep_thresholds": torch.from_numpy(keep_thresholds),
            }
        else:
            labelled = inner & ~hidden if TASKS[name].draw == "complement" else choose(DECODER_RATE)
            context, read, rule = name, np.where(labelled, MASK, ids), {}
        if context not in contexts:
            contexts[context] = Context(make_text(read, cu_seqlens), torch.arange(len(lengths)))
        tasks[name] = Task(context, make_labels(np.flatnonzero(labelled), ids[labelled]), **rule)
    return Batch(
        encoder=make_text(np.where(hidden, MASK, passage), cu_seqlens),
        encoder_labels=make_labels(np.flatnonzero(hidden), passage[hidden]),
        contexts=contexts,
        tasks=tasks,
    )


def versions() -> dict[str, str]:
    """What a result depends on besides the code: interpreter, libraries, processor."""
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": names[0] if names else "unknown",
    }


def write_shard_set(
    folder: str | Path,
    tokenizer: str | Path,
    train: Iterable[list["Sample"]],
    heldout: Iterable[list["Sample"]] = (),
    *,
    max_tokens: int = BuildSettings.max_tokens,
    block_samples: int = BuildSettings.block_samples,
    shard_bytes: int = BuildSettings.shard_bytes,
    num_buckets: int = BuildSettings.num_buckets,
) -> "Manifest":
    """Writes a whole shard set from documents in memory, each the list of its samples in reading order.

    tokenizer: any name that `load_tokenizer` takes; it is copied into the set.
    """
    from quincunx.data_shards.shard_writer import ShardWriter, StatisticsCounter, finish_shard_set
    from quincunx.data_shards.shards import SPLITS
    from quincunx.data_shards.tokenizer import load_tokenizer

    folder = Path(folder)
    loaded = load_tokenizer(str(tokenizer))
    counter = StatisticsCounter(len(loaded), num_buckets)
    writers = {split: ShardWriter(folder, split, 0, counter, block_samples, shard_bytes) for split in SPLITS}
    for writer, documents in zip(writers.values(), (train, heldout), strict=True):
        for samples in documents:
            writer.add_document(samples)
        writer.close()
    return finish_shard_set(
        folder,
        loaded,
        counter,
        shards=[shard for writer in writers.values() for shard in writer.shards],
        fields={split: dict(writer.field_counts) for split, writer in writers.items()},
        max_tokens=max_tokens,
        settings={"block_samples": block_samples, "shard_bytes": shard_bytes, "num_buckets": num_buckets},
        counts={"lost_neighbours": sum(writer.num_lost_neighbours for writer in writers.values())},
    )
