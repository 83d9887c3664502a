"""Rank discovery; signals and the watchdog, each case in a process of its own: handlers and exits belong to one."""

import signal
import subprocess
import sys
import time

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.ranks import discover_environment

WAIT = """
import sys, time
from quincunx.engine.ranks import StopRequest
request = StopRequest(launched={launched})
print("ready", flush=True)
while not request.pending():
    time.sleep(0.01)
print(request.reason, flush=True)
"""


def start(code: str, **arguments) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **arguments)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_sets_the_flag_and_does_not_end_the_process(number):
    process = start(WAIT.format(launched=False))
    process.send_signal(number)
    assert process.communicate(timeout=20)[0].strip() == number.name and process.returncode == 0


def test_a_second_interrupt_ends_the_process_at_once():
    process = start(WAIT.format(launched=False).replace("while not request.pending():", "while True:"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode not in (0, None)


PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"


@pytest.mark.parametrize(("launched", "said"), [(True, "the death of the launcher"), (False, "")])
def test_the_launcher_s_death_is_a_request_and_a_shell_s_is_none(launched, said):
    """The child keeps our end of the pipe open, so its last line comes when it ends."""
    code = (
        WAIT.format(launched=launched)
        .replace(
            "while not request.pending():", "end = time.time() + 3\nwhile not request.pending() and time.time() < end:"
        )
        .replace("print(request.reason", "print(request.reason or ''")
    )
    parent = subprocess.Popen([sys.executable, "-c", PARENT, code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    assert parent.stdout.read().strip() == said
    parent.wait()


def test_the_watchdog_ends_a_process_whose_last_words_hang_or_fail():
    code = """
import time
from quincunx.engine import ranks
ranks.ON_HANG_SECONDS = 0.5
ranks.Watchdog(0.3, on_hang=lambda: {last_words})
time.sleep(60)
"""
    for last_words in ("time.sleep(60)", "1 / 0"):
        done = subprocess.run([sys.executable, "-c", code.format(last_words=last_words)], timeout=30)
        assert done.returncode == 76


def test_a_process_without_a_launcher_is_the_whole_run():
    found = discover_environment({})
    assert (found.rank, found.world_size, found.local_rank, found.is_main) == (0, 1, 0, True)
    assert found.launcher == "python" and found.master_addr == "127.0.0.1" and found.master_port > 0
    assert discover_environment({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).world_size == 1, "sbatch without srun"


TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {
    "SLURM_PROCID": "11", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3",
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip
MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (TORCH | {"MASTER_ADDR": "node0", "MASTER_PORT": "29501"}, ("torch", 5, 8, 1, "node0", 29501)),
        (SLURM, ("slurm", 11, 16, 3, "gpu07", 20000 + 1234567 % 20000)),
        (SLURM | {"MASTER_ADDR": "10.0.0.1"}, ("slurm", 11, 16, 3, "10.0.0.1", 20000 + 1234567 % 20000)),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, ("openmpi", 5, 8, 1, "127.0.0.1", 29500)),
        # mpirun in a SLURM step: its processes may have the variables of the step that started its daemons.
        (SLURM | MPI | {"MASTER_ADDR": "a1"}, ("openmpi", 5, 8, 1, "a1", 29500)),
    ],
)
def test_each_launcher_s_variables_say_who_is_who(variables, place):
    found = discover_environment(variables)
    assert place == (
        found.launcher, found.rank, found.world_size, found.local_rank, found.master_addr, found.master_port
    )  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[03-05,9],login1", "gpu03"), ("node7", "node7"), ("a1,a2", "a1"), ("r[1,3]n", "r1n"), ("x-[9-11]", "x-9")],
)
def test_the_first_machine_of_a_slurm_node_list_is_the_master(nodes, host):
    assert discover_environment(SLURM | {"SLURM_STEP_NODELIST": nodes}).master_addr == host


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "set MASTER_ADDR"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "-x MASTER_ADDR"),
    ],
)
def test_ranks_that_cannot_know_their_master_are_refused(variables, remedy):
    with pytest.raises(SettingsError, match=remedy):
        discover_environment(variables)
