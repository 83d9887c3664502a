"""The losses of the retrieval chain, one value per query: contrastive, listwise, KL, margin-MSE and R-Drop.

No loss takes a mean over queries. The caller sums its own and divides by the queries of the global batch, so that
neither gradient accumulation nor the number of ranks changes the gradient. Vectors and scores of 16 bits are computed
with in float32, also under autocast; float64 stays float64.

Letters: B queries that losses are for, Q queries and N passages at hand (with a gather those of the global batch),
G candidates of a query with the positive in column 0, D the width of a vector, P the most positives of a query.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from quincunx.engine.ranks import rank_and_world


def gather_rows(mine: Tensor) -> Tensor:
    """[world * N, ...]: the rows of rank 0, then rank 1's, and so on, on every rank; N is the same everywhere."""
    num_ranks = rank_and_world()[1]
    if num_ranks == 1:
        return mine
    gathered = mine.new_empty(num_ranks * len(mine), *mine.shape[1:])
    dist.all_gather_into_tensor(gathered, mine.contiguous())
    return gathered


def gather_with_gradient(mine_ND: Tensor) -> Tensor:
    """[world * N, D]: the rows of all ranks as gather_rows has them, with their gradient.

    The rows travel in their own type and arrive in float32 (float64 stays). The backward sums the ranks' gradients in
    that type and keeps this rank's rows: where the loss is the sum of the ranks' losses, this rank's vectors get the
    whole gradient. Without a process group the rows are only cast.
    """
    return _Gather.apply(mine_ND)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mine_ND: Tensor) -> Tensor:
        ctx.dtype, ctx.num_ranks = mine_ND.dtype, rank_and_world()[1]
        if ctx.num_ranks > 1:
            _assert_same_on_all_ranks(len(mine_ND), mine_ND.device)
        all_ND = _widened(gather_rows(mine_ND))
        return all_ND.view_as(all_ND)

    @staticmethod
    def backward(ctx, gradient_ND: Tensor) -> Tensor:
        if ctx.num_ranks == 1:
            return gradient_ND.to(ctx.dtype)
        mine_ND = gradient_ND.new_empty(len(gradient_ND) // ctx.num_ranks, *gradient_ND.shape[1:])
        dist.reduce_scatter_tensor(mine_ND, gradient_ND.contiguous())
        return mine_ND.to(ctx.dtype)


def _assert_same_on_all_ranks(number: int, device: torch.device) -> None:
    """Without waiting for the device; a gather of unequal parts would hang or mix up rows."""
    extremes = torch.tensor([number, -number], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    torch._assert_async(extremes.sum() == 0, "the ranks gather different numbers of rows")


def known_positives(positives_QP: Tensor, passage_rows_N: Tensor, targets_Q: Tensor) -> Tensor:
    """Which of the N passages are positives of each query, bool [Q, N], False at the query's own target.

    positives_QP: rows (in the collection) of all positives of each query, padded with -1. passage_rows_N: the row of
    each passage of the batch. The mask is what `contrastive_loss` takes as excluded_QN.
    """
    known_QN = torch.zeros(len(positives_QP), len(passage_rows_N), dtype=torch.bool, device=passage_rows_N.device)
    for positives_Q in positives_QP.unbind(1):
        known_QN |= (positives_Q[:, None] == passage_rows_N[None]) & (positives_Q[:, None] >= 0)
    return known_QN.scatter_(1, targets_Q[:, None], False)


def contrastive_loss(
    queries_QD: Tensor,
    passages_ND: Tensor,
    targets_Q: Tensor,
    *,
    temperature: float,
    rows: slice = slice(None),
    excluded_QN: Tensor | None = None,
    all_pairs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's positive among all passages: losses [B], and whether it ranks first, bool [B].

    queries_QD: the queries that losses are for; with all_pairs all those of the global batch, `rows` naming the B
    that losses are for. targets_Q: the row of each query's positive in passages_ND. excluded_QN: passages that are no
    negatives of the query (other positives of it, copies of its target), bool, False at the target; they get no
    probability.

    all_pairs: the denominator also holds positive x other queries, query x other queries and positive x other
    queries' positives (SimLM's recipe, appendix: k-q, q-q, k-k). Queries i and j are no pair where the positive of one
    is the target of the other or excluded for it; published code leaves out i = j alone.

    "First" compares with the passages that are not excluded, and a draw is lost.
    """
    queries_QD, passages_ND = _widened(queries_QD), _widened(passages_ND)
    targets_B, mine_BD = targets_Q[rows], queries_QD[rows]
    with torch.autocast(queries_QD.device.type, enabled=False):
        scores_BN = mine_BD @ passages_ND.T / temperature
        if excluded_QN is not None:
            scores_BN = scores_BN.masked_fill(excluded_QN[rows], -torch.inf)
        terms = [scores_BN]
        if all_pairs:
            positives_QD = passages_ND[targets_Q]
            no_pair_BQ = _no_pairs(targets_Q, excluded_QN)[rows]
            for left_BD, right_QD in (
                (positives_QD[rows], queries_QD),
                (mine_BD, queries_QD),
                (positives_QD[rows], positives_QD),
            ):
                terms.append((left_BD @ right_QD.T / temperature).masked_fill(no_pair_BQ, -torch.inf))
    losses_B = torch.cat(terms, 1).logsumexp(1) - scores_BN.gather(1, targets_B[:, None]).squeeze(1)
    return losses_B, ranks_first(scores_BN.detach(), targets_B)


def _no_pairs(targets_Q: Tensor, excluded_QN: Tensor | None) -> Tensor:
    """bool [Q, Q], symmetric: queries that are the same, or one of them is answered by the other's positive."""
    no_pair_QQ = targets_Q[:, None] == targets_Q[None]
    if excluded_QN is not None:
        answers_QQ = excluded_QN[:, targets_Q]
        no_pair_QQ = no_pair_QQ | answers_QQ | answers_QQ.T
    return no_pair_QQ


def ranks_first(scores_BN: Tensor, targets_B: Tensor) -> Tensor:
    """Whether the target scores higher than every other column, bool [B]; a draw is lost."""
    others_BN = scores_BN.scatter(1, targets_B[:, None], -torch.inf)
    return scores_BN.gather(1, targets_B[:, None]).squeeze(1) > others_BN.amax(1)


def listwise_loss(scores_BG: Tensor) -> Tensor:
    """Cross-entropy of the positive (column 0) among a query's candidates, [B]."""
    scores_BG = _widened(scores_BG)
    return scores_BG.logsumexp(1) - scores_BG[:, 0]


def kl_loss(student_BG: Tensor, teacher_BG: Tensor) -> Tensor:
    """KL(softmax of the teacher's scores || softmax of the student's), [B] in nats.

    The student's scores come divided by their temperature; the teacher's are taken as they are, and get no gradient.
    """
    teacher_BG = _widened(teacher_BG).detach().log_softmax(1)
    return _divergence(teacher_BG, _widened(student_BG).log_softmax(1))


def margin_mse_loss(student_BG: Tensor, teacher_BG: Tensor) -> Tensor:
    """Mean over the negatives of (student's margin - teacher's margin) squared, [B]; margin: positive - negative.

    Hofstaetter and others, Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation,
    2020. Margins are compared in the scores' own units: those of unit vectors, at most 2 apart, need a temperature.
    """
    student_BG, teacher_BG = _widened(student_BG), _widened(teacher_BG).detach()
    return ((student_BG[:, :1] - student_BG[:, 1:]) - (teacher_BG[:, :1] - teacher_BG[:, 1:])).square().mean(1)


def r_drop(scores1_BG: Tensor, scores2_BG: Tensor) -> Tensor:
    """(KL(p1 || p2) + KL(p2 || p1)) / 2 of two passes with different dropout, [B]; R-Drop, section 2.1 (NeurIPS 2021).

    Both passes get gradients.
    """
    log_p1_BG, log_p2_BG = _widened(scores1_BG).log_softmax(1), _widened(scores2_BG).log_softmax(1)
    return (_divergence(log_p1_BG, log_p2_BG) + _divergence(log_p2_BG, log_p1_BG)) / 2


def _divergence(log_p_BG: Tensor, log_q_BG: Tensor) -> Tensor:
    return (log_p_BG.exp() * (log_p_BG - log_q_BG)).sum(1)


def _widened(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
