"""Who this process is among the run's processes, whichever launcher started it, and what the ranks do together.

deepspeed and torchrun set RANK and WORLD_SIZE, srun sets SLURM_*, mpirun sets OMPI_*; without any of them the process
is the whole run. What was found is written back as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which is
what torch.distributed and DeepSpeed read. No other file reads a launcher's variables.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quincunx.data_shards.errors import SettingsError

if TYPE_CHECKING:
    import torch

DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class Environment:
    """This process's place in the run."""

    launcher: str
    """torch (deepspeed or torchrun), slurm, openmpi, or python where the process is alone."""
    rank: int
    """0 to world_size - 1."""
    world_size: int
    local_rank: int
    """Rank on this machine; the index of the GPU this process takes."""
    master_addr: str
    """Machine of rank 0, as the others reach it."""
    master_port: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def export(self) -> None:
        """Sets the variables that torch.distributed and DeepSpeed read."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def discover_environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """This process's place, from the first launcher whose variables are there: torch's, Open MPI's, SLURM's, none.

    In a SLURM job, mpirun's processes may have SLURM's variables too, of the step that started mpirun's own daemons.
    A SLURM job's own shell (sbatch without srun) carries SLURM_NTASKS too but is one process: only a step's processes
    have SLURM_STEP_NUM_TASKS. Raises SettingsError where the machine of rank 0 cannot be told.
    """
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return Environment(
            launcher="torch",
            rank=int(variables["RANK"]),
            world_size=int(variables["WORLD_SIZE"]),
            local_rank=int(variables.get("LOCAL_RANK", 0)),
            master_addr=variables.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(variables.get("MASTER_PORT", DEFAULT_PORT)),
        )
    if "OMPI_COMM_WORLD_RANK" in variables:
        world_size = int(variables["OMPI_COMM_WORLD_SIZE"])
        local_size = int(variables.get("OMPI_COMM_WORLD_LOCAL_SIZE", world_size))
        master = variables.get("MASTER_ADDR", "127.0.0.1" if local_size == world_size else "")
        if not master:
            raise SettingsError("mpirun over several machines needs -x MASTER_ADDR=<the machine of rank 0>")
        return Environment(
            launcher="openmpi",
            rank=int(variables["OMPI_COMM_WORLD_RANK"]),
            world_size=world_size,
            local_rank=int(variables.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)),
            master_addr=master,
            master_port=int(variables.get("MASTER_PORT", DEFAULT_PORT)),
        )
    if "SLURM_STEP_NUM_TASKS" in variables and "SLURM_PROCID" in variables:
        nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
        master = variables.get("MASTER_ADDR") or first_host(nodes)
        port = variables.get("MASTER_PORT") or 20000 + int(variables.get("SLURM_JOB_ID", 0)) % 20000
        return Environment(
            launcher="slurm",
            rank=int(variables["SLURM_PROCID"]),
            world_size=int(variables["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(variables.get("SLURM_LOCALID", 0)),
            master_addr=master,
            master_port=int(port),
        )
    return Environment(
        launcher="python", rank=0, world_size=1, local_rank=0, master_addr="127.0.0.1", master_port=free_port()
    )


def first_host(node_list: str) -> str:
    """The first machine of a SLURM node list: `gpu[03-05,9],login1` gives gpu03. Raises SettingsError on none."""
    found = re.match(r"([^\[,\s]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", node_list)
    if found is None:
        raise SettingsError(f"the machine of rank 0 cannot be read from node list {node_list!r}; set MASTER_ADDR")
    return found[1] + (found[2] or "") + found[3]


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def choose_device(device: str, environment: Environment) -> bool:
    """Whether a `device` setting (auto, cpu, cuda) means a GPU. Raises SettingsError where this rank has none."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False
    if not torch.cuda.is_available():
        raise SettingsError(
            "device is cuda and this machine has no GPU that torch can use; take --device cpu or another machine"
        )
    if environment.local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"rank {environment.rank} is number {environment.local_rank + 1} on its machine, which has "
            f"{torch.cuda.device_count()} GPUs; start at most one rank per GPU, or take --device cpu"
        )
    return True


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
