"""The best results of many queries: chosen, put in order, merged over shards, compared.

The order is by score, then by row, everywhere; so what shards give together is what one search gives.
Letters: Q queries, N rows, K results.
"""

import numpy as np
import torch


class Best:
    """The best K results so far of every query; shards are added in the order of their rows."""

    def __init__(self, num_queries: int, depth: int, device: torch.device | str = "cpu"):
        self.depth = depth
        self.scores_QK = torch.full((num_queries, depth), -torch.inf, device=device)
        self.rows_QK = torch.full((num_queries, depth), -1, dtype=torch.int64, device=device)

    def add(self, scores_QK: torch.Tensor, rows_QK: torch.Tensor) -> None:
        """Merges the results of a shard, in order and with rows above all before; -inf and -1 where there are none.

        The sort is stable: earlier rows stay before later ones of the same score.
        """
        scores = torch.cat([self.scores_QK, scores_QK], dim=1)
        rows = torch.cat([self.rows_QK, rows_QK], dim=1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.scores_QK = scores[:, : self.depth]
        self.rows_QK = rows.gather(1, order[:, : self.depth])


def in_order(scores_QK: torch.Tensor, rows_QK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same results by score, equal scores by row."""
    rows_QK, order = rows_QK.sort(dim=1)
    scores_QK, by_score = scores_QK.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores_QK, rows_QK.gather(1, by_score)


def top_rows(scores_QN: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [Q, K], rows [Q, K]) of the K = min(depth, N) best, in order.

    Of equal scores at the end the first rows are taken; torch's topk takes any.
    """
    depth = min(depth, scores_QN.shape[1])
    scores_QK, rows_QK = scores_QN.topk(depth, dim=1)
    last_Q1 = scores_QK[:, -1:]
    tied = ((scores_QN >= last_Q1).sum(dim=1) > depth).nonzero()[:, 0].tolist()
    for query in tied:
        rows = (scores_QN[query] >= last_Q1[query]).nonzero()[:, 0]
        order = scores_QN[query, rows].sort(descending=True, stable=True).indices[:depth]
        rows_QK[query] = rows[order]
        scores_QK[query] = scores_QN[query, rows_QK[query]]
    return in_order(scores_QK, rows_QK)


def recall_against_exact(rows_QK: np.ndarray, exact_QK: np.ndarray) -> float:
    """Share of the exact results that are among the approximate ones; both int64 [Q, K], -1 where there is none."""
    found = wanted = 0
    for rows, exact in zip(rows_QK, exact_QK, strict=True):
        real = exact[exact >= 0]
        found, wanted = found + int(np.isin(real, rows).sum()), wanted + len(real)
    return found / wanted if wanted else 1.0
