"""What glibc gives back of freed memory, in processes of their own: the setting holds for a whole process."""

import platform
import subprocess
import sys

import pytest

HOLES = """
import sys, torch
from quincunx.engine.host_memory import LARGE_MODEL, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

megabytes, kind = int(sys.argv[1]), sys.argv[2]
if kind != "default":
    assert return_freed_memory(LARGE_MODEL if kind == "large" else 1)
torch.ones(20 * 2**18)  # freed at once: glibc then keeps blocks of up to 20 MiB in its heap
blocks = [torch.ones(megabytes * 2**18) for _ in range(200 // megabytes)]
before = resident()
blocks = blocks[::2]
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's heap")
@pytest.mark.parametrize(
    ("kind", "megabytes", "returned"),
    [("default", 10, False), ("small", 10, True), ("small", 1, False), ("large", 1, True)],
)
def test_every_second_block_freed_goes_back_to_the_system_or_stays_a_hole(kind, megabytes, returned):
    """100 MiB are freed with a block in use behind each."""
    result = subprocess.run(
        [sys.executable, "-c", HOLES, str(megabytes), kind], capture_output=True, text=True, check=True
    )
    given_back = float(result.stdout)
    assert given_back > 80 if returned else given_back < 20
