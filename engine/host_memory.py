"""What the C library does with memory that a CPU training step has freed."""

import ctypes
import platform

M_MMAP_THRESHOLD = -3
LARGE_MODEL = 2**27
"""Parameters from which memory counts more than page faults: 2 GB of weights, gradients and moments."""
SMALLEST_MAPPING = {"large": 2**18, "small": 2**23}
"""Bytes from which a block of memory is the system's own: given back the moment it is freed."""


def return_freed_memory(num_parameters: int) -> bool:
    """Makes glibc give every freed block from SMALLEST_MAPPING on back at once; False where the C library is another.

    By default glibc raises that threshold to 32 MB as it goes, and a step's activations and gradients, freed in another
    order than they came, leave the heap full of holes: MASTER's recipe at 12 x 768 then peaks at 4.25 GB instead of
    3.4. The price is page faults, up to a fifth of a step, which a small model need not pay: it only gives back what is
    as large as a chunk of logits. The call holds for the process (docs/log.md has the figures).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    smallest = SMALLEST_MAPPING["large" if num_parameters >= LARGE_MODEL else "small"]
    return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, smallest))
