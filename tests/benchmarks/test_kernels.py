"""The contenders of benchmarks/kernels.py must compute the same thing, or the comparison says nothing."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
# Not by `import kernels`: transformers would take that for a distribution of the same name.
SPEC = importlib.util.spec_from_file_location("benchmark_of_kernels", ROOT / "benchmarks" / "kernels.py")
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)


@pytest.mark.parametrize("name", ["quincunx, torch twin", "torch linear_cross_entropy"])
def test_lm_heads_give_the_loss_and_gradients_of_full_logits(name):
    results = []
    for contender in (benchmark.weighted_nll, benchmark.lm_head_contenders()[name]):
        inputs = benchmark.lm_head_inputs(50, 16, 103, "cpu", torch.float32)
        try:
            loss = contender(*inputs)
        except benchmark.Absent as reason:
            pytest.skip(str(reason))
        results.append([loss, *torch.autograd.grad(loss, inputs[:3])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_contender_that_is_not_installed_says_so():
    inputs = benchmark.lm_head_inputs(5, 16, 103, "cpu", torch.float32)
    with pytest.raises(benchmark.Absent, match="is not installed"):
        benchmark.require("a_package_that_nobody_made")
    if benchmark.importlib.util.find_spec("quack") is None:
        with pytest.raises(benchmark.Absent, match="quack"):
            benchmark.quack(*inputs)


def test_padded_attention_with_a_dense_mask_gives_the_packed_outputs():
    lengths = np.array([3, 7, 5])
    inputs = benchmark.attention_inputs(lengths, heads=2, channels=32, device="cpu", dtype=torch.float32)
    packed = benchmark.quincunx_attention(inputs, impl="torch")
    padded = benchmark.sdpa_dense(inputs).transpose(1, 2)
    starts = inputs["cu_seqlens"].tolist()
    for s, length in enumerate(lengths):
        # Row 0 may see nothing, which padded rows may not: compare from row 1 on.
        ours, theirs = packed[starts[s] + 1 : starts[s + 1]], padded[s, 1:length]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
