"""The files of launchers/cluster: shells that parse, a job that names our exit codes, and a script that runs ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from quincunx.data_shards.errors import EXIT_HUNG, EXIT_PREEMPTED

CLUSTER = Path(__file__).parents[2] / "launchers" / "cluster"
RANKS = str(CLUSTER / "ranks.sh")
# A rank: writes down who it is, then does what its rank's entry of PLAN says.
CHILD = """
import json, os, signal, sys, time
plan = json.loads(os.environ["PLAN"])[os.environ["LOCAL_RANK"]]
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
def stop(number, frame):
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop if plan != "deaf" else signal.SIG_IGN)
signal.signal(signal.SIGUSR1, stop)
with open(os.environ["OUT"] + os.environ["RANK"], "w") as file:
    json.dump([os.environ[name] for name in names] + [os.getpid()], file)
time.sleep(600 if plan in ("wait", "deaf") else 0)
sys.exit(plan if isinstance(plan, int) else 0)
"""


def start(folder: Path, plan: dict[int, object], **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PLAN": json.dumps(plan), "OUT": f"{folder}/rank-", "RANKS_PER_NODE": str(len(plan))}
    return subprocess.Popen([RANKS, sys.executable, "-c", CHILD], env=environment | variables)


def wait_for(folder: Path, ranks: list[int]) -> list[list]:
    for _ in range(300):
        if all((folder / f"rank-{rank}").exists() and (folder / f"rank-{rank}").stat().st_size for rank in ranks):
            return [json.loads((folder / f"rank-{rank}").read_text()) for rank in ranks]
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


def test_every_shell_script_parses():
    for script in [*CLUSTER.glob("*.sh"), *CLUSTER.glob("*.sbatch"), *Path(__file__).parent.glob("*.sh")]:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_each_rank_learns_its_place_and_a_finished_run_returns_0(tmp_path):
    process = start(tmp_path, {0: 0, 1: 0}, NODE_RANK="1", NUM_NODES="3", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    found = wait_for(tmp_path, [2, 3])
    assert [rank[:5] for rank in found] == [
        ["2", "6", "0", "10.0.0.1", "1234"],
        ["3", "6", "1", "10.0.0.1", "1234"],
    ]
    assert process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_and_their_75_is_returned(tmp_path, number):
    process = start(tmp_path, {0: "wait", 1: "wait"})
    wait_for(tmp_path, [0, 1])
    process.send_signal(number)
    assert process.wait(30) == EXIT_PREEMPTED


def test_a_failing_rank_takes_the_others_along_and_its_code_is_returned(tmp_path):
    started = time.monotonic()
    process = start(tmp_path, {0: "deaf", 1: 3}, GRACE_SECONDS="1")
    ((*_, pid),) = wait_for(tmp_path, [0])
    assert process.wait(60) == 3 and time.monotonic() - started < 60
    assert not Path(f"/proc/{pid}").exists()


def test_the_kubernetes_job_agrees_with_itself_and_with_our_exit_codes():
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(variables["NUM_NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["RANKS_PER_NODE"])
    name = job["metadata"]["name"]
    assert (
        pod["subdomain"] == service["metadata"]["name"] and variables["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    )
    assert service["spec"]["selector"] == {"job-name": name}
    actions = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert actions["Ignore"] == [EXIT_PREEMPTED] and EXIT_HUNG not in actions["FailJob"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_job_scripts_pass_arguments_that_pretrain_knows():
    from quincunx.engine.settings import PretrainSettings

    container = list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))[1]["spec"]["template"]["spec"]
    flags = {argument.split("=")[0].removeprefix("--") for argument in container["containers"][0]["args"]}
    assert flags - {"recipe"} <= set(PretrainSettings.__dataclass_fields__)
