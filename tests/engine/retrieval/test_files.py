"""Files and folders that are written whole or not at all."""

import os
import socket
import subprocess

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.files import folder_written_whole, refuse_input, written_whole


def write_half(folder):
    with folder_written_whole(folder) as staging:
        (staging / "weights").write_text("half")
        raise ZeroDivisionError


def test_a_folder_takes_its_place_whole_or_the_old_one_stays(tmp_path):
    for content in ("old", "new"):
        with folder_written_whole(tmp_path / "model") as folder:
            (folder / "weights").write_text(content)
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be written"), folder_written_whole(tmp_path / "file" / "model"):
        raise AssertionError


def test_what_a_dead_process_left_of_a_file_is_swept_and_a_living_ones_stays(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = socket.gethostname()
    left, living = (tmp_path / f".out.tmp-{here}-{pid}" for pid in (dead.pid, os.getppid()))
    other, elsewhere = tmp_path / f".other.tmp-{here}-{dead.pid}", tmp_path / f".out.tmp-elsewhere-{dead.pid}"
    for path in (left, living, other, elsewhere):
        path.touch()
    with written_whole(tmp_path / "out") as file:
        file.write("whole")
    assert (tmp_path / "out").read_text() == "whole"
    assert not left.exists() and living.exists() and other.exists() and elsewhere.exists()


def test_an_output_that_is_an_input_is_refused_by_its_flag(tmp_path):
    refuse_input(tmp_path / "run", {"qrels": tmp_path / "qrels", "corpus": None})
    with pytest.raises(SettingsError, match="is the qrels itself"):
        refuse_input(tmp_path / "a" / ".." / "qrels", {"qrels": tmp_path / "qrels"})
