"""The hash is the one that docs/stream.md writes down, and it is random enough."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quincunx.data_shards import hashing
from quincunx.kernels import enhanced_attention as torch_hashing

UINT32 = st.integers(0, 2**32 - 1)
ROOT = Path(__file__).parents[2]
PROGRAM = "from quincunx.data_shards.stream import permute_point; print(permute_point(7, 100, 8192))"


def mix(x: int) -> int:
    """The formula in Python's unbounded integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def fold(key: int, value: int) -> int:
    return mix(key ^ value * 0x9E3779B1 % 2**32)


@given(UINT32, UINT32, UINT32)
@settings(deadline=None)
def test_the_compiled_hash_equals_the_formula(key, row, word):
    assert hashing.mix(key) == mix(key)
    assert hashing.fold(key, row) == fold(key, row)
    assert hashing.draw30(key, row, word) == fold(fold(key, row), word) >> 2


@given(UINT32, st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1), st.integers(0, 63))
@settings(deadline=None)
def test_text_key_folds_every_part_of_its_name(seed, epoch, sample_id, task):
    expected = mix(seed)
    for part in (epoch, sample_id & 0xFFFFFFFF, sample_id >> 32, task):
        expected = fold(expected, part)
    assert hashing.text_key(seed, epoch, sample_id, task) == expected


def test_draws_keep_the_values_that_old_runs_used():
    assert hashing.text_key(42, 1, 5_000_000_000, 2) == 1455455338
    assert hashing.draw30(12345, 7, 9) == 789878899


def test_draws_of_neighbouring_keys_rows_and_words_are_uniform_and_uncorrelated():
    words = torch.arange(100, dtype=torch.int32)
    rows = torch.arange(100, dtype=torch.int32)[:, None]
    keys = torch.arange(50, dtype=torch.int32)[:, None, None]
    share = torch_hashing.draw30(keys, rows, words).double() / 2**30
    counts = torch.histc(share, 64, 0, 1)
    expected = share.numel() / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 63 + 5 * (2 * 63) ** 0.5  # five standard deviations of chi squared with 63 degrees
    for axis in range(3):
        pair = torch.stack([share.narrow(axis, 0, share.shape[axis] - 1), share.narrow(axis, 1, share.shape[axis] - 1)])
        correlation = torch.corrcoef(pair.flatten(1))[0, 1].item()
        assert abs(correlation) < 5 / pair[0].numel() ** 0.5


def test_a_change_in_the_hash_reaches_cached_functions_of_other_files(tmp_path):
    """Cached machine code is never older than any of the files it was compiled from."""
    copy = tmp_path / "quincunx" / "data_shards"
    copy.mkdir(parents=True)
    for path in (ROOT / "data_shards").glob("*.py"):
        shutil.copy(path, copy)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def run() -> str:
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    caches = list((tmp_path / "cache").iterdir())
    assert len(caches) == 1 and list(caches[0].rglob("*.nbi"))
    assert run() == first
    source = copy / "hashing.py"
    source.write_text(source.read_text().replace("0x7FEB352D", "0x7FEB352F"))
    assert run() != first
