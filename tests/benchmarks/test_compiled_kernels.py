"""Every Triton kernel, compiled for Ampere and Hopper without a GPU: no spills, tensor cores, enough shared memory."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("compiled_kernels", ROOT / "benchmarks" / "compiled_kernels.py")
compiled_kernels = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compiled_kernels)


@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_ampere_and_hopper_without_faults(tmp_path):
    """In a process of its own: here kernels are decorated for the interpreter."""
    command = [sys.executable, ROOT / "benchmarks" / "compiled_kernels.py", "--json", tmp_path / "table.json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1150)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = json.loads((tmp_path / "table.json").read_text())["kernels"]
    assert {row["architecture"] for row in kernels} == {"sm_80", "sm_90"}
    names = {row["kernel"].split()[0] for row in kernels}
    assert any(name.startswith("linear_cross_entropy") for name in names)
    assert any(name.startswith("enhanced_attention") for name in names)
    assert any(row["hgmma"] for row in kernels), "no kernel uses Hopper's warp-group products"


def test_spills_shared_memory_and_missing_tensor_cores_are_faults():
    good = {"architecture": "sm_80", "spilled_bytes": 0, "shared_bytes": 163 * 1024, "hmma": 8, "hgmma": 0}
    assert compiled_kernels.faults(good, needs_tensor_cores=True) == []
    assert "spills 8 bytes" in compiled_kernels.faults(good | {"spilled_bytes": 8}, True)[0]
    assert "shared memory" in compiled_kernels.faults(good | {"shared_bytes": 163 * 1024 + 1}, True)[0]
    assert "no tensor cores" in compiled_kernels.faults(good | {"hmma": 0}, True)[0]
    assert compiled_kernels.faults(good | {"hmma": 0}, needs_tensor_cores=False) == []
