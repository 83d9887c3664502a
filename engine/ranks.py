"""What the ranks of a run do together outside the training step; one process alone is a world of one."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank_and_world() -> tuple[int, int]:
    """(rank, number of ranks) of the process group, (0, 1) where there is none."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather_rows(mine_ND: "torch.Tensor", shares: list[int]) -> "torch.Tensor":
    """[sum of shares, D]: rank 0's rows, then rank 1's, and so on, on every rank; rank r brings shares[r] rows."""
    import torch
    import torch.distributed as dist

    if len(shares) == 1:
        return mine_ND
    padded = mine_ND.new_zeros(max(shares), mine_ND.shape[1])
    padded[: len(mine_ND)] = mine_ND
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    return torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)])


def sum_over_ranks(values: "torch.Tensor") -> "torch.Tensor":
    """The elementwise sum of every rank's `values`, on every rank."""
    import torch.distributed as dist

    if rank_and_world()[1] > 1:
        dist.all_reduce(values)
    return values
