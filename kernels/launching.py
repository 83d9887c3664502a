"""Which implementation of a kernel runs, chosen once at start-up."""

import importlib.util
import os
from typing import Literal

import torch

Implementation = Literal["auto", "triton", "torch"]

# Triton reads this when a kernel is decorated. Interpreted kernels run on CPU tensors, for tests: slowly, and with a
# matrix product that is wrong in bf16, which kernels therefore widen to float32 where this is set.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST_CAPABILITY = (8, 0)
"""Ampere: bf16 tensor cores and asynchronous copies."""


def is_recent(index: int | None) -> bool:
    """Whether a CUDA device is Ampere or newer, as Triton kernels and flash attention need; AMD's count as such."""
    card = torch.cuda.get_device_properties(index)  # no cache, nor another call: torch.compile folds this one
    return torch.version.hip is not None or (card.major, card.minor) >= OLDEST_CAPABILITY


def choose(implementation: Implementation, device: torch.device | str) -> Literal["triton", "torch"]:
    """The implementation that runs on `device`: `auto` is Triton on CUDA devices from Ampere on, torch elsewhere.

    Raises ValueError if Triton is demanded and cannot run.
    """
    device, obstacle = torch.device(device), None
    if implementation == "torch":
        return "torch"
    if importlib.util.find_spec("triton") is None:
        obstacle = "the triton package is not installed (pip install triton)"
    elif INTERPRETED:
        return "triton" if implementation == "triton" else "torch"
    elif device.type != "cuda":
        obstacle = f"tensors are on {device.type} and Triton kernels need a CUDA device"
    elif not is_recent(device.index):
        card = torch.cuda.get_device_properties(device.index)
        obstacle = f"the device has compute capability {card.major}.{card.minor}, kernels need 8.0 (Ampere) or newer"
    if obstacle is None:
        return "triton"
    if implementation == "triton":
        raise ValueError(f"kernels: triton cannot run: {obstacle}; set kernels to torch or auto")
    return "torch"
