"""Compiles the hot loops with numba, and caches the machine code so that a change of any of them is noticed.

numba's own cache looks only at the file a function stands in. Ours call each other across files, and a mask drawn by an
old hash would be silently wrong; so the cache lies in a folder named by the digest of every file that is compiled.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numba
import xxhash

FOLDER = Path(__file__).parent


def compiled(function: Callable) -> Callable:
    """numba's njit without the GIL, so that threads scale, cached for the next process."""
    previous, numba.config.CACHE_DIR = numba.config.CACHE_DIR, CACHE_FOLDER
    try:
        return numba.njit(cache=True, nogil=True)(function)
    finally:
        numba.config.CACHE_DIR = previous


def _cache_folder() -> str:
    """In NUMBA_CACHE_DIR, else beside the code, else (where that cannot be written) in the user's cache."""
    contents = [path.read_bytes() for path in sorted(FOLDER.glob("*.py"))]
    digest = xxhash.xxh3_64_hexdigest(b"".join(content for content in contents if b"\n@compiled\n" in content))
    if numba.config.CACHE_DIR:
        parent = Path(numba.config.CACHE_DIR)
    elif os.access(FOLDER, os.W_OK):
        parent = FOLDER / "__pycache__"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "quincunx")
    return str(parent / f"numba-{digest}")


CACHE_FOLDER = _cache_folder()
