"""The LM head's output projection and its cross-entropy in one call, chunked: the [N, V] logits never exist at once.

Letters: N labelled rows of the encoder and all decoders, concatenated by task; D channels; V vocabulary; K rows of one
chunk.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch

from quincunx.kernels.launching import Implementation, choose

Form = Literal["auto", "A", "B"]

# Logits of one chunk take at most this many elements: 256 rows of BERT's vocabulary, 31 MB in float32, on a CPU, where
# they are twice as many as the weight's at most; 17,536 rows, 1 GB in bf16, on a GPU, where small chunks would be bound
# by the traffic of dW (half as many rows in float32).
LARGEST_CHUNK = {"cpu": 2**23, "cuda": 2**29}


class Gradients(NamedTuple):
    """What the forward pass collects for the backward pass, in place, chunk by chunk."""

    hidden_ND: torch.Tensor
    """d nll / d hidden, still to be multiplied by `row_factors`; dtype of hidden."""
    row_factors_N1: torch.Tensor
    """A row's weight relative to the heaviest one; form B divides it by the row's sum of exponentials."""
    weight_VD: torch.Tensor
    """float32, of the relative weights."""
    bias_V: torch.Tensor
    """float32, of the relative weights."""


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor,
    labels_N: torch.Tensor,
    row_weights_N: torch.Tensor,
    task_slices: Sequence[tuple[int, int]],
    chunk_rows: int | None = None,
    impl: Implementation = "auto",
    form: Form = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy of `hidden @ weight.T + bias` against `labels`, and each task's plain sum.

    Rows are concatenated by task; `task_slices` holds each task's (start, end). A row weighs `row_weights` (float32,
    lambda_t / N_t in training); labels are int64 in [0, V). Gradients for hidden, weight and bias are computed in the
    forward pass, chunk by chunk (`chunk_rows` rows; None: as many as LARGEST_CHUNK allows), three matrix products each
    and a workspace of one chunk of logits; where no gradient is wanted, none is computed.

    `impl` "auto" takes the Triton kernels on CUDA from Ampere on and torch elsewhere, for float64 everywhere. `form`
    says how the kernels work (linear_cross_entropy_triton.py) and means nothing to torch: "A" for every dtype, "B" for
    bf16. Nothing waits for the device. The caller's tensors have one dtype: torch.autocast does not reach the kernels.

    Returns the loss sum_i weight_i * nll_i (scalar; float64 for float64 inputs, else float32), and, detached, each
    task's sum of nll [num_tasks] and its number of rows whose label has the highest logit, int64 [num_tasks]. No rows
    give zeros, and zero gradients.

    The gradient of a row's weight is not computed. Gradients exist once: a second backward raises.

    Shapes, dtypes and layouts are asserted. Labels outside the vocabulary make the kernels' loss NaN and stop torch's.
    """
    num_rows, num_words = len(hidden_ND), len(weight_VD)
    assert hidden_ND.shape[1:] == weight_VD.shape[1:] and bias_V.shape == (num_words,)
    assert labels_N.shape == row_weights_N.shape == (num_rows,) and labels_N.dtype == torch.int64
    assert hidden_ND.dtype == weight_VD.dtype == bias_V.dtype and row_weights_N.is_floating_point()
    assert hidden_ND.stride(-1) == weight_VD.stride(-1) == bias_V.stride(-1) == 1
    starts, ends = zip(*task_slices)
    assert (*starts, num_rows) == (0, *ends), f"{task_slices} of {num_rows} rows"
    assert form != "B" or hidden_ND.dtype == torch.bfloat16, "form B stores exponentials, only bf16 has their range"
    assert impl != "triton" or hidden_ND.dtype != torch.float64, "the kernels compute in float32"
    if chunk_rows is None:
        chunk_rows = largest_chunk(hidden_ND, num_words)
    run_chunks = _run_chunks
    if hidden_ND.dtype != torch.float64 and choose(impl, hidden_ND.device) == "triton":
        from quincunx.kernels.linear_cross_entropy_triton import run_chunks as run_kernels

        run_chunks = partial(run_kernels, form=form)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_ND, weight_VD, bias_V))
    with torch.cuda.device_of(hidden_ND):  # Triton launches on the current device
        return _LinearCrossEntropy.apply(
            hidden_ND,
            weight_VD,
            bias_V,
            labels_N,
            row_weights_N,
            tuple(task_slices),
            chunk_rows,
            wants_gradient,
            run_chunks,
        )


def largest_chunk(hidden_ND: torch.Tensor, num_words: int) -> int:
    """Rows of a chunk by default, for tensors like `hidden`."""
    if hidden_ND.is_cuda:
        rows, multiple = LARGEST_CHUNK["cuda"] * 2 // hidden_ND.element_size() // num_words, 128
    else:
        # More would leave the cache between the passes over them; fewer would read and write dW too often.
        rows, multiple = min(LARGEST_CHUNK["cpu"] // num_words, 2 * hidden_ND.shape[1]), 64
    return max(1, rows // multiple * multiple or rows)


def _run_chunks(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor,
    labels_N: torch.Tensor,
    chunk_rows: int,
    nll_N: torch.Tensor,
    correct_N: torch.Tensor,
    gradients: Gradients | None,
) -> None:
    """Fills `nll`, `correct` (bool) and, where wanted, `gradients`: the twin in torch of the Triton kernels."""
    wide = nll_N.dtype
    for start in range(0, len(hidden_ND), chunk_rows):
        rows = slice(start, min(start + chunk_rows, len(hidden_ND)))
        hidden_KD, labels_K1 = hidden_ND[rows], labels_N[rows, None]
        scores_KV = torch.addmm(bias_V, hidden_KD, weight_VD.T).to(wide)
        highest_K1, target_K1 = scores_KV.amax(-1, keepdim=True), scores_KV.gather(1, labels_K1)
        correct_N[rows] = (target_K1 >= highest_K1)[:, 0]
        torch.softmax(scores_KV, dim=-1, out=scores_KV)
        # The highest probability is at least 1 / V, so this log never sees an underflow.
        nll_N[rows] = (highest_K1 - target_K1 - scores_KV.amax(-1, keepdim=True).log())[:, 0]
        if gradients is None:
            continue
        relative_K1 = gradients.row_factors_N1[rows]
        scores_KV.scatter_add_(1, labels_K1, torch.full_like(target_K1, -1))  # d nll / d logits = p - onehot
        gradients.bias_V.add_(relative_K1[:, 0] @ scores_KV)
        if wide == hidden_ND.dtype:
            gradients.weight_VD.addmm_(scores_KV.T, hidden_KD * relative_K1)
        else:
            scores_KV = scores_KV.to(hidden_ND.dtype)
            gradients.weight_VD.add_(scores_KV.T @ (hidden_KD * relative_K1).to(hidden_ND.dtype))
        torch.mm(scores_KV, weight_VD, out=gradients.hidden_ND[rows])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, bias_V, labels_N, row_weights_N, task_slices, chunk_rows, wants_gradient, run_chunks
    ):
        num_rows = hidden_ND.shape[0]
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        row_weights_N = row_weights_N.to(wide)
        nll_N = torch.empty(num_rows, dtype=wide, device=hidden_ND.device)
        correct_N = torch.empty(num_rows, dtype=torch.bool, device=hidden_ND.device)
        gradients = None
        if wants_gradient:
            # Rows enter dW relative to the heaviest one, so that fp16 neither over- nor underflows at 1 / N_t;
            # the common factor is put back in backward, in float32, together with any loss scale.
            heaviest = row_weights_N.max().clamp(min=1e-30) if num_rows else row_weights_N.new_ones(())
            gradients = Gradients(
                hidden_ND=torch.empty_like(hidden_ND),
                row_factors_N1=(row_weights_N / heaviest)[:, None],
                weight_VD=torch.zeros_like(weight_VD, dtype=wide),
                bias_V=torch.zeros_like(bias_V, dtype=wide),
            )
            ctx.gradients, ctx.heaviest = gradients, heaviest
            ctx.dtypes = (weight_VD.dtype, bias_V.dtype)
        run_chunks(hidden_ND, weight_VD, bias_V, labels_N, chunk_rows, nll_N, correct_N, gradients)
        loss = (nll_N * row_weights_N).sum()
        nll_sums = torch.stack([nll_N[start:end].sum() for start, end in task_slices])
        correct = torch.stack([correct_N[start:end].sum() for start, end in task_slices])
        ctx.mark_non_differentiable(nll_sums, correct)
        return loss, nll_sums, correct

    @staticmethod
    def backward(ctx, loss_gradient, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward ran already; its gradients exist once, run forward again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = loss_gradient * ctx.heaviest
        hidden_gradient_ND = gradients.hidden_ND.mul_(gradients.row_factors_N1 * factor)
        weight_gradient_VD = gradients.weight_VD.mul_(factor).to(ctx.dtypes[0])
        bias_gradient_V = gradients.bias_V.mul_(factor).to(ctx.dtypes[1])
        return hidden_gradient_ND, weight_gradient_VD, bias_gradient_V, *[None] * 6
