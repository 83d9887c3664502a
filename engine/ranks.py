"""The ranks of a run: who this process is, small collectives, requests to stop, and a watchdog.

Without a launcher's variables (LAUNCHERS) the process is the whole run. No other file reads them: what was found is
written back as those that torch.distributed and DeepSpeed read. A request to stop (docs/training.md) only sets a flag,
which the training loop folds into its per-step all-reduce, so that all ranks save at the same step.
"""

import contextlib
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quincunx.data_shards.errors import EXIT_HUNG, CheckpointError, DataError, SettingsError

if TYPE_CHECKING:
    import torch

DEFAULT_PORT = 29500
RANK_0_SPEAKS_FIRST_SECONDS = 5.0
LAUNCHERS = {
    "torch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
"""Launcher -> its variables for rank, number of ranks, rank on this machine; the first that are there count."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ON_HANG_SECONDS = 15.0
"""What a hung process takes for its last words at most: the disk they go to may be what hangs."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """This process's place in the run."""

    launcher: str
    """torch (deepspeed or torchrun), slurm, openmpi, or python if the process is alone."""
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
    have SLURM_STEP_NUM_TASKS. Raises SettingsError if the machine of rank 0 cannot be told.
    """
    for launcher, (rank, world_size, local_rank) in LAUNCHERS.items():
        if rank in variables and world_size in variables:
            port = 20000 + int(variables.get("SLURM_JOB_ID", 0)) % 20000 if launcher == "slurm" else DEFAULT_PORT
            return Environment(
                launcher=launcher,
                rank=int(variables[rank]),
                world_size=int(variables[world_size]),
                local_rank=int(variables.get(local_rank, 0)),
                master_addr=variables.get("MASTER_ADDR") or machine_of_rank_0(launcher, variables),
                master_port=int(variables.get("MASTER_PORT") or port),
            )
    return Environment(
        launcher="python", rank=0, world_size=1, local_rank=0, master_addr="127.0.0.1", master_port=free_port()
    )


def machine_of_rank_0(launcher: str, variables: Mapping[str, str]) -> str:
    """Its address if the launcher gives none: of SLURM's node list `gpu[03-05,9],login1` it is gpu03.

    Raises SettingsError if it cannot be told.
    """
    if launcher == "slurm":
        nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
        found = re.match(r"([^\[,\s]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
        if found is None:
            raise SettingsError(f"the machine of rank 0 cannot be read from node list {nodes!r}; set MASTER_ADDR")
        return "".join(filter(None, found.groups()))
    world_size = variables.get("OMPI_COMM_WORLD_SIZE")
    if launcher == "openmpi" and variables.get("OMPI_COMM_WORLD_LOCAL_SIZE", world_size) != world_size:
        raise SettingsError("mpirun over several machines needs -x MASTER_ADDR=<the machine of rank 0>")
    return "127.0.0.1"


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def choose_device(device: str, environment: Environment) -> bool:
    """Whether a `device` setting (auto, cpu, cuda) means a GPU. Raises SettingsError if this rank has none."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False
    if not torch.cuda.is_available():
        raise SettingsError(
            "device is cuda, but torch finds no GPU on this machine; give --device cpu or use another machine"
        )
    if environment.local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"rank {environment.rank} is number {environment.local_rank + 1} on its machine, which has "
            f"{torch.cuda.device_count()} GPUs; start at most one rank per GPU, or give --device cpu"
        )
    return True


def device_and_precision(device: str, precision: str, environment: Environment) -> tuple[str, str]:
    """(torch's device, float32 or bfloat16) of this rank for encoding and generating, which train nothing.

    precision auto: bfloat16 on a GPU, float32 elsewhere. Raises SettingsError as choose_device.
    """
    cuda = choose_device(device, environment)
    precision = precision if precision != "auto" else "bfloat16" if cuda else "float32"
    return f"cuda:{environment.local_rank}" if cuda else "cpu", precision


def rank_and_world() -> tuple[int, int]:
    """(rank, number of ranks) of the process group, (0, 1) if there is none."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def sum_over_ranks(values: "torch.Tensor") -> "torch.Tensor":
    """The elementwise sum of every rank's `values`, on every rank."""
    import torch.distributed as dist

    if rank_and_world()[1] > 1:
        dist.all_reduce(values)
    return values


@contextlib.contextmanager
def one_voice(environment: Environment) -> Iterator[None]:
    """Has rank 0 say a user's error at once, and others later and by name, should rank 0 not have it.

    All ranks find the same error in the same files, and the launcher ends them as soon as the first one leaves.
    """
    try:
        yield
    except (SettingsError, DataError, CheckpointError) as error:
        if environment.is_main:
            raise
        time.sleep(RANK_0_SPEAKS_FIRST_SECONDS)
        raise type(error)(f"rank {environment.rank}: {error}") from None


class StopRequest:
    """Whether this process has been asked to stop, and by what. Install once, in the main thread, before training."""

    def __init__(self, launched: bool):
        """launched: the process was started by deepspeed, torchrun, srun or mpirun, whose death is a request too."""
        self.reason: str | None = None
        self._interrupted = False
        self._above = processes_above() if launched else None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:  # the second one stops at once; schedulers and launchers may repeat the others
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

    def pending(self) -> bool:
        """True from the first request on; costs up to three reads of /proc a step."""
        if self.reason is None and self._above is not None and processes_above() != self._above:
            self.reason = "the death of the launcher"
        return self.reason is not None


def processes_above() -> list[int]:
    """The ids of this process's parent and, if that was started by a `deepspeed` command, of the command.

    The command starts `deepspeed.launcher.launch`, which starts the ranks. Killing the command leaves the other two
    running without a word.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError):  # it has just died, or this system has no /proc
        if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
            command = int(Path(f"/proc/{parent}/stat").read_bytes().rpartition(b")")[2].split()[1])
            if b"deepspeed" in Path(f"/proc/{command}/cmdline").read_bytes():
                return [parent, command]
    return [parent]


class Watchdog:
    """Ends the process with exit code 76 when `beat` has not been called for `seconds`.

    A thread, because a hung collective never returns to the main one. Before it ends the process it prints every
    thread's stack on stderr, which shows the call that hangs, and calls `on_hang`, for ON_HANG_SECONDS at most.
    """

    def __init__(self, seconds: float, on_hang: Callable[[], None] = lambda: None):
        self._seconds, self._on_hang = seconds, on_hang
        self._last = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Says that the run has got somewhere: a step, a checkpoint, a probe is done."""
        self._last = time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self._seconds / 10)):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                print(
                    f"hung: no step has finished for {silent / 60:.1f} minutes (hang_minutes); the stacks of all"
                    " threads follow; the same command resumes from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                closing = threading.Thread(target=self._on_hang, daemon=True)
                closing.start()
                closing.join(ON_HANG_SECONDS)
                os._exit(EXIT_HUNG)
