"""Interrupted runs against runs that were not: same samples, same losses, on the same ranks and on others."""

import dataclasses
import random
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest

from quincunx.data_shards.errors import CheckpointError
from quincunx.engine.checkpoint import check_fits, find_newest, verify
from quincunx.engine.pretraining import prepare
from quincunx.engine.ranks import discover_environment
from quincunx.engine.settings import PretrainSettings
from quincunx.engine.training import digest_of

NO_DROPOUT = {"dropout": 0.0, "checkpoint_every": 2, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def through(tiny_shards, tmp_path_factory, harness):
    """Two ranks, ZeRO 2, dropout on, six steps without a break, a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("through") / "run"
    finished = harness.run(tiny_shards, folder, ranks=2, checkpoint_every=2, keep_checkpoints=9)
    assert finished.code == 0, finished.output
    return finished


def cut_back(source: Path, target: Path, step: int) -> Path:
    """A copy of a run folder as it stood when its checkpoint of `step` was the newest."""
    shutil.copytree(source, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return target


def test_a_run_records_settings_metrics_and_checkpoints(through):
    lines = through.lines()
    assert list(lines) == [1, 2, 3, 4, 5, 6]
    names = {f"{kind}/{task}" for kind in ("loss", "accuracy") for task in ("mlm", "mkp", "cmp", "npr", "dor")}
    names |= {"loss/total", "passages_per_second", "tokens_per_second", "data_wait_share", "grad_norm"}
    assert names | {"learning_rate", "memory_gb", "skipped_steps"} <= set(lines[1])
    assert "mfu" not in lines[1], "there is no peak rate of a CPU to compare with"
    weights = {"mlm": 1, "mkp": 1, "cmp": 1, "npr": 2 / 3, "dor": 1}  # a document's last passage has no next one
    total = sum(weight * lines[3][f"loss/{task}"] for task, weight in weights.items())
    assert lines[3]["loss/total"] == pytest.approx(total, rel=1e-12)
    assert lines[6]["loss/total"] < lines[1]["loss/total"]
    checkpoint = find_newest(through.folder / "checkpoints")
    assert checkpoint.step == 6 and checkpoint.world_size == 2 and checkpoint.zero_stage == 2
    assert checkpoint.precision == "float32" and checkpoint.state["settings"]["global_batch"] == 8
    assert (through.folder / "settings.yaml").read_text().startswith("output:")


def test_resume_on_the_same_ranks_is_bit_identical(through, tiny_shards, tmp_path, harness):
    folder = cut_back(through.folder, tmp_path / "run", 2)
    resumed = harness.run(tiny_shards, folder, ranks=2, checkpoint_every=2, keep_checkpoints=9)
    assert resumed.code == 0, resumed.output
    assert resumed.lines("event")[2]["event"] in ("resumed", "artifact")
    assert resumed.losses() == through.losses()
    assert [resumed.lines()[s]["grad_norm"] for s in range(1, 7)] == [
        through.lines()[s]["grad_norm"] for s in range(1, 7)
    ]


@pytest.mark.parametrize(
    "stage",
    ["zero2", pytest.param("zero1", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)],
)
def test_two_ranks_then_one_then_two_learn_the_same(stage, tiny_shards, tmp_path, harness):
    """Also that accumulation (1 x 2 x 4) and ranks (2 x 4 x 1) give the same gradient: the norms are compared.

    1e-5 relative: float32 sums in another order (measured: 2e-8 for losses, 1e-7 for norms).
    """
    whole = harness.run(tiny_shards, tmp_path / "whole", ranks=2, stage=stage, **NO_DROPOUT)
    assert whole.code == 0, whole.output
    one = harness.run(
        tiny_shards, cut_back(whole.folder, tmp_path / "one", 2), ranks=1, stage=stage, micro_batch=2, **NO_DROPOUT
    )
    assert one.code == 0 and "converting step-00000002 from 2 to 1 ranks" in one.output, one.output
    two = harness.run(tiny_shards, cut_back(one.folder, tmp_path / "two", 4), ranks=2, stage=stage, **NO_DROPOUT)
    assert two.code == 0 and "converting step-00000004 from 1 to 2 ranks" in two.output, two.output
    for other in (one, two):
        assert list(other.lines()) == list(whole.lines())
        for step, line in whole.lines().items():
            for name in ("loss/total", "loss/mlm", "loss/npr", "grad_norm"):
                assert other.lines()[step][name] == pytest.approx(line[name], rel=1e-5), (step, name)


def test_a_checkpoint_of_another_run_is_refused(through, tiny_shards, tmp_path, harness):
    """The command says so in one sentence with exit code 4; what else is foreign is asked of check_fits itself."""
    folder = cut_back(through.folder, tmp_path / "run", 4)
    refused = harness.run(tiny_shards, folder, launcher="python", stage="zero3")
    assert refused.code == 4 and "Traceback" not in refused.output, refused.output
    assert "was written under ZeRO 2 and cannot continue under ZeRO 3" in refused.output

    checkpoint = find_newest(folder / "checkpoints")
    settings = PretrainSettings(**{**harness.tiny, "shards": [str(tiny_shards)], "output": str(folder)})
    job = prepare(settings, discover_environment({}))
    identity = {**job.data, "model_digest": digest_of(job.model)}

    def changes(**values) -> list[str]:
        return check_fits(
            checkpoint, dataclasses.replace(job, settings=dataclasses.replace(settings, **values)), identity
        )

    del checkpoint.state["settings"]["shared_decoder"]  # a setting younger than the checkpoint had its default then
    checkpoint.state["settings"]["sentence_losses"] = []  # as checkpoints have it from before they had weights
    assert changes() == []
    assert changes(learning_rate=0.5, log_every=9) == ["learning_rate was 0.001 and is 0.5"]
    for values, clause in (
        ({"seed": 7}, "belongs to another run: seed was 42 and is 7"),
        ({"tasks": ["mkp"]}, "tasks was \\['mkp', 'cmp', 'npr', 'dor'\\] and is \\['mkp'\\]"),
        ({"global_batch": 16}, "global_batch was 8 and is 16"),
    ):
        with pytest.raises(CheckpointError, match=clause):
            changes(**values)
    for other, clause in (
        ({"dataset_ids": ["x"]}, "was trained on dataset .*, this one is x"),
        ({"dataset_weights": [2]}, "was trained on dataset .* .weights .1.., this one is .* .\\[2\\]"),
        ({"model_digest": "x"}, "other shapes"),
    ):
        with pytest.raises(CheckpointError, match=clause):
            check_fits(checkpoint, job, identity | other)


def test_a_damaged_newest_checkpoint_is_skipped_with_its_reason(through, tiny_shards, tmp_path, harness):
    folder = cut_back(through.folder, tmp_path / "run", 4)
    newest = folder / "checkpoints" / "step-00000004"
    part = next(newest.glob("*optim_states.pt"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    resumed = harness.run(tiny_shards, folder, ranks=2, checkpoint_every=2, keep_checkpoints=2)
    assert resumed.code == 0 and "resuming at step 2 of 6" in resumed.output, resumed.output
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["damaged-step-00000004", "step-00000004", "step-00000006"], "retention counts only good ones"
    assert f"skipping checkpoint step-00000004: {part} differs from the digest in its manifest" in resumed.output
    assert verify(newest).step == 4, "the step was trained and saved again"
    assert resumed.losses() == through.losses()


def test_a_full_disk_costs_a_save_and_not_the_run_but_the_last_save_is_an_error(
    through, tiny_shards, tmp_path, harness
):
    """The disk is full for large files only (RLIMIT_FSIZE), so that what the test reads can be written."""
    folder = cut_back(through.folder, tmp_path / "run", 2)
    command = shlex.join(harness.command(tiny_shards, folder, ranks=2, checkpoint_every=2, keep_checkpoints=9))
    ended = harness.run_command(["bash", "-c", f"ulimit -f 100; trap '' XFSZ; exec {command}"], folder)
    assert ended.code in (4, 1), ended.output  # the launcher may answer a failed rank with 1
    assert ended.output.count("COULD NOT BE SAVED") == 1 and "File too large" in ended.output, ended.output
    assert "the checkpoint of the last step, 6, could not be saved" in ended.output, ended.output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert ended.losses() == through.losses()


def kill_again_and_again(num_kills, one_rank, seed, shards, folder, harness, **settings) -> tuple[int, int]:
    """Starts a run, kills it (-9) at a random moment of its training, and so on; (kills, kills inside a save).

    one_rank: one of the ranks is killed, and the launcher kills the rest; else all ranks at once.
    """
    draw, kills, inside = random.Random(seed), 0, 0
    for _ in range(num_kills):
        log, before = folder.parent / "killed.log", harness.lines(folder)
        with harness.started(harness.command(shards, folder, ranks=2, **settings), log) as process:

            def training(process=process, before=before) -> bool:  # no sign: what a killed save has left behind
                return process.poll() is not None or harness.lines(folder) != before

            harness.wait_until(training, 240, f"a step of {folder}; {log} says why")
            time.sleep(draw.random() * (0.2 if settings["steps"] <= 6 else 1.0))
            inside += any((folder / "checkpoints").glob(".staging-*"))
            ranks = harness.ranks_of(process)
            for pid in [draw.choice(ranks)] if one_rank and ranks else ranks:
                harness.send(pid, signal.SIGKILL)
            if one_rank:
                process.wait(60)
            kills += bool(ranks)
        for newest in harness.committed(folder)[-1:]:
            verify(newest)
    return kills, inside


@pytest.mark.parametrize(
    ("num_kills", "one_rank", "steps"),
    [
        (2, True, 6),
        pytest.param(25, True, 600, marks=[pytest.mark.slow, pytest.mark.timeout(14400)]),
        pytest.param(25, False, 600, marks=[pytest.mark.slow, pytest.mark.timeout(14400)]),
    ],
)
def test_killed_at_random_moments_a_run_goes_on_bit_for_bit(
    num_kills, one_rank, steps, through, tiny_shards, tmp_path, harness
):
    whole = through
    if steps > 6:
        whole = harness.run(tiny_shards, tmp_path / "whole", ranks=2, timeout=1200, steps=steps, checkpoint_every=steps)
    settings, folder = {"steps": steps, "checkpoint_every": 1}, tmp_path / "killed"
    kills, inside = kill_again_and_again(num_kills, one_rank, steps, tiny_shards, folder, harness, **settings)
    finished = harness.run(tiny_shards, folder, ranks=2, timeout=1200, **settings)
    assert finished.code == 0, finished.output
    assert finished.losses() == whole.losses()
    assert kills >= 1 and (num_kills < 25 or (kills == num_kills and inside > 0)), (kills, inside)
    assert not list((folder / "checkpoints").glob(".*")), "leftovers of killed saves remain"
