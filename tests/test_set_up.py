""".ci/venv, which `make demo` and `make test` run first; the rest of it is proven by every run on a new machine."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_disk_too_small_for_the_virtual_environment_is_said_before_anything_is_written(small_disk):
    tmp_path = small_disk("size=64m")
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "venv", tmp_path / ".ci")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    refused = subprocess.run([tmp_path / ".ci" / "venv"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stdout.startswith(f"error: 0 GB are free on the disk of {tmp_path} and the virtual environment")
    assert refused.stdout.count("\n") == 1 and not refused.stderr
    assert not (tmp_path / ".venv").exists()
