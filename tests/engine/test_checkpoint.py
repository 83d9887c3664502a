"""The commit protocol without DeepSpeed's files; with them it is proven in tests/launchers/test_resume.py."""

import json

import pytest

from quincunx.data_shards.errors import CheckpointError
from quincunx.engine.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointWriter,
    commit,
    committed,
    file_digest,
    find_newest,
    needs_conversion,
    remove_leftovers,
    step_name,
)


def write_checkpoint(folder, step: int):
    """A committed checkpoint with one real file, through the writer and commit."""
    import torch

    staging = folder / f".staging-{step_name(step)}"
    staging.mkdir(parents=True)
    writer = CheckpointWriter()
    writer.save({"weights": torch.arange(step + 3)}, str(staging / "weights.pt"))
    manifest = {
        "schema_version": 1, "step": step, "world_size": 1, "zero_stage": 2, "precision": "float32",
        "state": {"step": step}, "files": writer.files,
    }  # fmt: skip
    commit(staging, folder / step_name(step), manifest)
    return folder / step_name(step)


def test_the_newest_of_several_is_found_and_the_writer_s_digest_is_the_file_s(tmp_path):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    newest = find_newest(tmp_path)
    assert newest.step == 100 and newest.state == {"step": 100}
    files = json.loads((newest.folder / MANIFEST).read_text())["files"]
    assert files["weights.pt"]["xxh3_128"] == file_digest(newest.folder / "weights.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "weights.pt").unlink(), "weights.pt is missing"),
        (lambda folder: (folder / "weights.pt").write_bytes(b"x"), "has 1 bytes, its manifest says"),
        (lambda folder: flip(folder / "weights.pt"), "differs from the digest in its manifest"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "has no readable manifest.json"),
        (lambda folder: (folder / MANIFEST).unlink(), "has no readable manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text('{"schema_version": 1, "files": {}}'), "KeyError: 'step'"),
        (lambda folder: (folder / MANIFEST).write_text('{"schema_version": 9, "files": {}}'), "has format 9"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_its_reason_and_alone_it_is_an_error(damage, message, tmp_path, capsys):
    damage(write_checkpoint(tmp_path, 2))
    with pytest.raises(CheckpointError, match=message):
        find_newest(tmp_path)
    capsys.readouterr()
    write_checkpoint(tmp_path, 1)
    assert find_newest(tmp_path).step == 1
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("skipping checkpoint step-00000002: ") and message in said


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def test_what_a_kill_leaves_behind_is_never_taken_for_a_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 1)
    (tmp_path / ".staging-step-00000002").mkdir()
    (tmp_path / ".staging-step-00000002" / "weights.pt").write_bytes(b"half")
    (tmp_path / ".deleting-step-00000000").mkdir()
    assert [path.name for path in committed(tmp_path)] == ["step-00000001"]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_saving_a_step_again_replaces_it(tmp_path):
    for step in (2, 3, 3):
        write_checkpoint(tmp_path, step)
    assert [path.name for path in committed(tmp_path)] == ["step-00000003", "step-00000002"]
    assert not list(tmp_path.glob(".*"))


def test_no_checkpoint_at_all_is_no_error(tmp_path):
    assert find_newest(tmp_path / "checkpoints") is None


def test_a_file_that_cannot_be_written_is_reported_and_not_raised(tmp_path):
    writer = CheckpointWriter()
    writer.save({"a": 1}, str(tmp_path / "missing" / "weights.pt"))
    assert writer.failure.startswith("weights.pt: FileNotFoundError") and writer.files == {}


def test_only_a_changed_world_stage_or_precision_needs_a_conversion(tmp_path):
    checkpoint = Checkpoint(tmp_path, 5, 2, 2, "float32", {})
    assert not needs_conversion(checkpoint, 2, 2, "float32")
    assert needs_conversion(checkpoint, 1, 2, "float32") and needs_conversion(checkpoint, 2, 1, "float32")
    assert needs_conversion(checkpoint, 2, 2, "bfloat16")
    with pytest.raises(CheckpointError, match="cannot continue under ZeRO 3"):
        needs_conversion(checkpoint, 2, 3, "float32")
