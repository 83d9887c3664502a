"""What the C library does with memory that a CPU training step has freed."""

import ctypes
import platform

SMALLEST_MAPPING = 2**18
M_MMAP_THRESHOLD = -3
LARGE_MODEL = 2**27
"""Parameters from which memory counts more than page faults: 2 GB of weights, gradients and moments."""


def return_freed_memory(num_parameters: int) -> bool:
    """For a large model, makes glibc give every freed block of 256 KiB or more back to the system at once.

    Returns whether it did: not for a model of fewer than 2**27 parameters, nor where the C library is not glibc.

    By default glibc raises that threshold to 32 MB as it goes, and a step's activations and gradients, freed in another
    order than they came, leave the heap full of holes: MASTER's recipe at 12 x 768 then peaks at 4.25 GB instead of
    3.52. The price is page faults, up to a fifth of a step, which a small model need not pay. The call holds for the
    process (docs/log.md has the figures).
    """
    if num_parameters < LARGE_MODEL or platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALLEST_MAPPING))
