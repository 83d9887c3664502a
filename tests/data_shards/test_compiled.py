"""Cached machine code is never older than any of the files it was compiled from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = "from quincunx.data_shards.order import permute_point; print(permute_point(7, 100, 8192))"


def test_a_change_in_the_hash_reaches_cached_functions_of_other_files(tmp_path):
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
