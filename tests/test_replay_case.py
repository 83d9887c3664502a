"""The published computations, rebuilt in benchmarks/published_model.py, replayed through the model that trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "benchmarks"), str(HERE)]

from published_model import PublishedModel, make_padded_passes  # noqa: E402
from replay_case import HEADS, PASSES, read_case  # noqa: E402

# Heads of 32 channels, the fewest that the Triton kernel takes.
SIZES = {
    "vocab_size": 1200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def make_case(impl: str, path: Path) -> Path:
    """Writes a case of plain padded Hugging Face modules, in the format that replay_case.py reads.

    Weights are larger than BERT's first ones, so that a mistake shows in the losses.
    """
    torch.manual_seed(20)
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = PublishedModel(config, list(HEADS[impl].values()), enhanced=impl == "retromae")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if "LayerNorm" in name else 0.15 * noise)
    passes = make_padded_passes(impl, np.array([18, 7, 3, 12]), SIZES["vocab_size"], 20)
    batch, out = {}, {}
    with sdpa_kernel(SDPBackend.MATH):
        losses = model(passes)
        sum(losses.values()).backward()
        for number, (step, (text, decoded)) in enumerate(zip(PASSES[impl], passes, strict=True)):
            batch |= {step.ids: text.ids, step.labels: text.labels, step.mask: text.attention_mask}
            out[step.loss] = losses[f"encoder {number}"]
            hidden_BLD = model.lm.bert(input_ids=text.ids, attention_mask=text.attention_mask).last_hidden_state
            out[step.vectors] = hidden_BLD[:, 0]
            for task, names in step.decoders.items():
                read = decoded[task]
                batch |= zip(names, (read.ids, read.labels, read.attention_mask), strict=True)
                out["decoder_loss" if impl == "retromae" else f"{task}_loss"] = losses[f"{task} {number}"]
                if read.visible is not None:
                    batch["decoder_attention_mask"] = read.visible
    out["total_loss"] = sum(losses.values())
    tensors = {f"batch.{name}": value.to(torch.int32) for name, value in batch.items()}
    tensors |= {f"out.{name}": value.detach().clone() for name, value in out.items()}
    heads = {task: head for head, task in HEADS[impl].items()}
    for name, parameter in model.named_parameters():
        if name.startswith("decoders."):
            _, task, layer, rest = name.split(".", 3)
            name = f"{heads[task]}.{rest}" if impl == "retromae" else f"{heads[task]}.{layer}.{rest}"
        tensors |= {f"weight.{name}": parameter.detach().clone(), f"grad.{name}": parameter.grad}
    save_file(tensors, path, metadata={"impl": impl, "config": json.dumps(SIZES)})
    return path


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cases")
    return {impl: make_case(impl, folder / f"{impl}.safetensors") for impl in PASSES}


def replay(case: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, HERE / "replay_case.py", case, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


@pytest.mark.parametrize("impl", ["retromae", "master"])
def test_a_reference_case_replays_within_tolerance(cases, impl):
    result = replay(cases[impl])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "within tolerance" in result.stdout


@pytest.mark.parametrize("impl", ["retromae", "master"])
def test_the_cases_replay_through_the_interpreted_triton_kernels(cases, impl):
    """Through the LM head's kernel; torch computes attention with RetroMAE's explicit mask, and MASTER's is its own."""
    result = replay(cases[impl], "--kernels", "triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "within tolerance" in result.stdout


def test_a_wrong_gradient_or_loss_is_noticed(cases, tmp_path):
    metadata, tensors = read_case(cases["retromae"])
    gradient = tensors["grad.lm.bert.embeddings.position_embeddings.weight"]
    tensors["grad.lm.bert.embeddings.position_embeddings.weight"] = gradient * 1.001
    save_file(tensors, tmp_path / "gradient.safetensors", metadata=metadata)
    result = replay(tmp_path / "gradient.safetensors")
    assert result.returncode == 1 and "OFF" in result.stdout and "position_embeddings" in result.stdout
