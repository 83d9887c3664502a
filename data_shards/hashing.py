"""The one source of randomness: a 32-bit integer hash of (seed, epoch, sample id, task, position, word).

No generator has state, so a mask or an order does not depend on packing, rank, worker count or restart. All
arithmetic is uint32 and wraps; draws are compared as integers, never as floats. `kernels/enhanced_attention.py` has the
same in torch, equal bit for bit. The functions are meant to be called from compiled loops; called from Python they take
and return integers.

The mixer is Wellons' two-multiply `lowbias32` (hash-prospector); 2**30 is the scale of every threshold, so that
draws and thresholds fit a non-negative int32 and "always" (2**30) has a value of its own.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import xxhash

FOLDER = Path(__file__).parent
ALWAYS = 1 << 30
"""Threshold that every draw is below; draws are in [0, ALWAYS)."""


def compiled(function: Callable) -> Callable:
    """numba's njit without the GIL, so that threads scale, cached for the next process.

    numba's own cache looks only at the file a function is in. Ours call each other across files, and a mask drawn by an
    old hash would be silently wrong; so the cache lies in a folder named by the digest of every file that is compiled.
    """
    previous, numba.config.CACHE_DIR = numba.config.CACHE_DIR, CACHE_FOLDER
    try:
        return numba.njit(cache=True, nogil=True)(function)
    finally:
        numba.config.CACHE_DIR = previous


def _cache_folder() -> str:
    """In NUMBA_CACHE_DIR, else beside the code, else (if that cannot be written) in the user's cache."""
    contents = [path.read_bytes() for path in sorted(FOLDER.glob("*.py"))]
    digest = xxhash.xxh3_64_hexdigest(b"".join(content for content in contents if b"\n@compiled\n" in content))
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "quincunx")
    beside = FOLDER / "__pycache__" if os.access(FOLDER, os.W_OK) else user
    return str(Path(numba.config.CACHE_DIR or beside, f"numba-{digest}"))


CACHE_FOLDER = _cache_folder()


@compiled
def mix(x):
    """Scrambles 32 bits: a bijection on uint32 in which every input bit flips every output bit half the time."""
    x = np.uint32(x)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def fold(key, value):
    """Folds the low 32 bits of `value` into `key`; returns uint32."""
    return mix(np.uint32(key) ^ np.uint32(np.uint32(value) * np.uint32(0x9E3779B1)))


@compiled
def text_key(seed, epoch, sample_id, task_code):
    """Key (uint32) of one text in one epoch: everything drawn for that text is hashed from it.

    `sample_id` is int64, folded in as two halves; `task_code` is a `code` of `tasks.TASKS` or one of those beside it.
    """
    key = fold(mix(seed), epoch)
    key = fold(key, np.int64(sample_id) & np.int64(0xFFFFFFFF))
    key = fold(key, np.int64(sample_id) >> np.int64(32))
    return fold(key, task_code)


@compiled
def draw30(key, row, word):
    """Uniform draw in [0, 2**30) as int32, for a row (position in the sequence, [CLS] = 0) and a word of a text."""
    return np.int32(fold(fold(key, row), word) >> np.uint32(2))


@compiled
def word_slot(token_ids, start, end, vocab_size, num_buckets):
    """Slot of the word token_ids[start:end] in a shard set's statistics; num_buckets is a power of two.

    A word of one token has the slot of its id; one of several tokens shares slot vocab_size + hash mod num_buckets, so
    that the table does not grow with the corpus. The hash is the fold chain of its ids, begun at 0.
    """
    if end - start == 1:
        return np.int64(token_ids[start])
    key = np.uint32(0)
    for i in range(start, end):
        key = fold(key, token_ids[i])
    return vocab_size + np.int64(key & np.uint32(num_buckets - 1))


def dataset_seed(seed: int, dataset: int) -> int:
    """Seed of one dataset of a mixture: sample ids start at 0 in each, so each needs draws of its own."""
    return (seed + 0x632BE5AB * dataset) & 0xFFFFFFFF
