"""The published computations, replayed through the model that trains (cases of our own making; see fixtures/)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent


def replay(case: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, HERE / "replay_case.py", case, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


@pytest.mark.parametrize("impl", ["retromae", "master"])
def test_a_reference_case_replays_within_tolerance(impl):
    result = replay(HERE / "fixtures" / f"{impl}_small.safetensors")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "within tolerance" in result.stdout


@pytest.mark.parametrize("impl", ["retromae", "master"])
def test_the_cases_replay_through_the_interpreted_triton_kernels(impl):
    """Through the LM head's kernel; torch computes attention with RetroMAE's explicit mask, and MASTER's is its own."""
    case = HERE / "fixtures" / f"{impl}_small.safetensors"
    result = replay(case, "--kernels", "triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "within tolerance" in result.stdout


def test_a_wrong_gradient_or_loss_is_noticed(tmp_path):
    with safe_open(HERE / "fixtures" / "retromae_small.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    gradient = tensors["grad.lm.bert.embeddings.position_embeddings.weight"]
    tensors["grad.lm.bert.embeddings.position_embeddings.weight"] = gradient * 1.001
    save_file(tensors, tmp_path / "gradient.safetensors", metadata=metadata)
    result = replay(tmp_path / "gradient.safetensors")
    assert result.returncode == 1 and "OFF" in result.stdout and "position_embeddings" in result.stdout
