import errno
import subprocess
import sys

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.engine import run_folder
from quincunx.engine.run_folder import RunFolder

HOLD = """
import sys
from quincunx.engine.run_folder import RunFolder
folder = RunFolder(sys.argv[1], is_main=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_by_another_process_is_refused_until_that_process_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_SECONDS", 0.3)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SettingsError, match=f"is in use by another run .process {other.pid} on"):
            RunFolder(str(tmp_path / "run"), is_main=True)
        RunFolder(str(tmp_path / "run"), is_main=False)  # the holder's own other ranks
    finally:
        other.kill()
        other.communicate()
    RunFolder(str(tmp_path / "run"), is_main=True)


def test_fresh_moves_an_earlier_run_aside_and_deletes_nothing(tmp_path):
    folder = RunFolder(str(tmp_path / "run"), is_main=True)
    assert folder.set_aside() is None
    for number in (1, 2):
        (folder.path / "metrics.jsonl").write_text(f"run {number}")
        folder.checkpoints.mkdir()
        assert folder.set_aside() == tmp_path / f"run.old-{number}"
        assert (tmp_path / f"run.old-{number}" / "metrics.jsonl").read_text() == f"run {number}"
        assert (tmp_path / f"run.old-{number}" / "checkpoints").is_dir()
    assert [entry.name for entry in folder.path.iterdir()] == ["run.lock"]


def test_fresh_leaves_a_requeued_jobs_own_run_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder = RunFolder(str(tmp_path / "run"), is_main=True)
    (folder.path / "metrics.jsonl").write_text("an hour's work")
    assert folder.set_aside() is None
    assert (folder.path / "metrics.jsonl").read_text() == "an hour's work"


def test_an_output_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be written"):
        RunFolder(str(tmp_path / "file" / "run"), is_main=True)


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with pytest.raises(SettingsError, match=r"cannot lock files \(No locks available\)"):
        RunFolder(str(tmp_path / "run"), is_main=True)
