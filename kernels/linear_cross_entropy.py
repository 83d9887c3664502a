"""The LM head's output projection and its cross-entropy in one call, chunked: the [N, V] logits never exist at once.

Letters: N labelled rows of the encoder and all decoders, concatenated by task; D channels; V vocabulary; K rows of one
chunk.
"""

from collections.abc import Sequence

import torch

# Logits of one chunk take at most this many elements: 256 rows of BERT's vocabulary, 31 MB in float32, on a CPU; 17,589
# rows, 1 GB in bf16, on a GPU, where small chunks would be bound by the traffic of dW.
LARGEST_CHUNK = {"cpu": 2**23, "cuda": 2**29}
HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile calls; not in every build of torch


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor,
    labels_N: torch.Tensor,
    row_weights_N: torch.Tensor,
    task_slices: Sequence[tuple[int, int]],
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy of `hidden @ weight.T + bias` against `labels`, and each task's plain sum.

    Rows are concatenated by task; `task_slices` holds each task's (start, end). A row weighs `row_weights` (float32,
    lambda_t / N_t in training); labels are int64 in [0, V). Gradients for hidden, weight and bias are computed in the
    forward pass, chunk by chunk (`chunk_rows` rows; None: as many as LARGEST_CHUNK allows), three matrix products each
    and a workspace of one chunk of logits; where no gradient is wanted, none is computed.

    Returns the loss sum_i weight_i * nll_i (scalar; float64 for float64 inputs, else float32), and, detached, each
    task's sum of nll [num_tasks] and its number of rows whose label has the highest logit, int64 [num_tasks]. No rows
    give zeros, and zero gradients.

    The gradient of a row's weight is not computed. Gradients exist once: a second backward raises.
    """
    if hidden_ND.shape[0] != labels_N.shape[0] or row_weights_N.shape != labels_N.shape:
        raise ValueError(
            f"linear_cross_entropy: {hidden_ND.shape[0]} rows, {labels_N.shape[0]} labels and "
            f"{row_weights_N.shape[0]} row weights; give one of each a row"
        )
    if chunk_rows is None:
        chunk_rows = LARGEST_CHUNK.get(hidden_ND.device.type, 2**23) // weight_VD.shape[0]
        chunk_rows = max(1, chunk_rows // 64 * 64 or chunk_rows)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_ND, weight_VD, bias_V))
    return _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, labels_N, row_weights_N, tuple(task_slices), chunk_rows, wants_gradient
    )


def logits(hidden_KD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor, chunk_rows: int) -> torch.Tensor:
    """hidden @ weight.T + bias, [K, V].

    In float32 on a CPU torch takes MKL, which on AMD's processors needs twice oneDNN's time (docs/log.md). oneDNN
    builds and keeps code for every number of rows it meets, so only whole chunks, all of one shape, go to it.
    """
    is_plain = hidden_KD.device.type == "cpu" and hidden_KD.dtype == torch.float32
    if HAS_ONEDNN and is_plain and len(hidden_KD) == chunk_rows and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(hidden_KD, weight_VD, bias_V.contiguous(), "none", [], "")
    return torch.addmm(bias_V, hidden_KD, weight_VD.T)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, row_weights_N, task_slices, chunk_rows, wants_gradient):
        num_rows = hidden_ND.shape[0]
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        row_weights_N = row_weights_N.to(wide)
        nll_N = torch.empty(num_rows, dtype=wide, device=hidden_ND.device)
        correct_N = torch.empty(num_rows, dtype=torch.bool, device=hidden_ND.device)
        if wants_gradient:
            # Rows enter dW relative to the heaviest one, so that fp16 neither over- nor underflows at 1 / N_t;
            # the common factor is put back in backward, in float32, together with any loss scale.
            heaviest = row_weights_N.max().clamp(min=1e-30) if num_rows else row_weights_N.new_ones(())
            relative_N1 = (row_weights_N / heaviest)[:, None]
            hidden_gradient_ND = torch.empty_like(hidden_ND)
            weight_gradient_VD = torch.zeros_like(weight_VD, dtype=wide)
            bias_gradient_V = torch.zeros_like(bias_V, dtype=wide)
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_rows))
            hidden_KD, labels_K1 = hidden_ND[rows], labels_N[rows, None]
            scores_KV = logits(hidden_KD, weight_VD, bias_V, chunk_rows).to(wide)
            highest_K1, target_K1 = scores_KV.amax(-1, keepdim=True), scores_KV.gather(1, labels_K1)
            correct_N[rows] = (target_K1 >= highest_K1)[:, 0]
            torch.softmax(scores_KV, dim=-1, out=scores_KV)
            # The highest probability is at least 1 / V, so this log never sees an underflow.
            nll_N[rows] = (highest_K1 - target_K1 - scores_KV.amax(-1, keepdim=True).log())[:, 0]
            if not wants_gradient:
                continue
            scores_KV.scatter_add_(1, labels_K1, torch.full_like(target_K1, -1))  # d nll / d logits = p - onehot
            bias_gradient_V += relative_N1[rows, 0] @ scores_KV
            if wide == hidden_ND.dtype:
                weight_gradient_VD.addmm_(scores_KV.T, hidden_KD * relative_N1[rows])
            else:
                scores_KV = scores_KV.to(hidden_ND.dtype)
                weight_gradient_VD += scores_KV.T @ (hidden_KD * relative_N1[rows]).to(hidden_ND.dtype)
            torch.mm(scores_KV, weight_VD, out=hidden_gradient_ND[rows])
        if wants_gradient:
            ctx.gradients = (hidden_gradient_ND, relative_N1, weight_gradient_VD, bias_gradient_V, heaviest)
            ctx.dtypes = (weight_VD.dtype, bias_V.dtype)
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
        hidden_gradient_ND, relative_N1, weight_gradient_VD, bias_gradient_V, heaviest = ctx.gradients
        ctx.gradients = None
        factor = loss_gradient * heaviest
        hidden_gradient_ND = (hidden_gradient_ND * (relative_N1 * factor)).to(hidden_gradient_ND.dtype)
        weight_gradient = weight_gradient_VD.mul_(factor).to(ctx.dtypes[0])
        bias_gradient = bias_gradient_V.mul_(factor).to(ctx.dtypes[1])
        return hidden_gradient_ND, weight_gradient, bias_gradient, None, None, None, None, None
