import errno
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from quincunx.data_shards import artefact as module
from quincunx.data_shards.artefact import artefact, manifest_path, open_artefact
from quincunx.data_shards.durable import written_whole
from quincunx.data_shards.errors import DataError, SettingsError


def make_file(path: Path, text: str = "rows", made_from: dict | None = None, **options) -> bool:
    """Whether the file had to be made."""
    with artefact(path, "candidates", made_from or {"depth": 3}, single=True, **options) as work:
        if work is None:
            return False
        with work.file() as file:
            file.write(text)
        work.details["queries"] = 7
    return True


def make_parts(path: Path, rank: int = 0, world_size: int = 1, die_at: int | None = None) -> list[int]:
    """The parts that this rank made."""
    made = []
    with artefact(path, "embeddings", {"model": "m"}, rank=rank, world_size=world_size) as work:
        if work is None:
            return made
        for number in work.missing(5):
            if number == die_at:
                raise KeyboardInterrupt
            with work.part(number, ".bin") as file:
                file.write(bytes([number]) * 3)
            made.append(number)
        if work.leads:
            work.details["bytes"] = sum(file.stat().st_size for file in work.wait(20))
    return made


def test_a_file_is_made_once_and_its_manifest_says_from_what(tmp_path):
    path = tmp_path / "some" / "negatives.jsonl"
    assert make_file(path) and not make_file(path)
    manifest = open_artefact(path, "candidates", single=True, verify=True)
    assert manifest["made_from"] == {"depth": 3} and manifest["details"] == {"queries": 7}
    assert manifest["files"] == {path.name: {"bytes": 4, "digest": module.file_digest(path)}}
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}.manifest.json"]


def test_other_work_is_refused_with_what_differs_and_remade_on_request(tmp_path):
    path = tmp_path / "run.trec"
    make_file(path, "old", {"depth": 3, "rules": {"seed": 1, "fill": 2}})
    with pytest.raises(
        SettingsError,
        match=r"from other inputs or settings \(depth was 3 and is 4; rules.seed was 1 and is 5\).*--remake",
    ):
        make_file(path, "new", {"depth": 4, "rules": {"seed": 5, "fill": 2}})
    assert path.read_text() == "old"
    assert make_file(path, "new", {"depth": 4}, remake=True) and path.read_text() == "new"
    assert Path(f"{path}.old-1").read_text() == "old" and manifest_path(f"{path}.old-1").exists()
    assert make_file(path, "newer", {"depth": 4}, remake=True) and Path(f"{path}.old-2").read_text() == "new"


def test_what_nobody_made_is_not_touched(tmp_path):
    (tmp_path / "mine.jsonl").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    for path, make in ((tmp_path / "mine.jsonl", make_file), (tmp_path / "folder", make_parts)):
        with pytest.raises(SettingsError, match="exists, and no stage made it"):
            make(path)
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    (tmp_path / "folder" / "mine").unlink()
    assert make_parts(tmp_path / "folder") == [0, 1, 2, 3, 4]


def test_an_error_publishes_nothing_and_parts_that_were_finished_are_kept(tmp_path):
    path = tmp_path / "vectors"
    with pytest.raises(KeyboardInterrupt):
        make_parts(path, die_at=3)
    assert not path.exists()
    with pytest.raises(DataError, match=r"has no finished embeddings \(no manifest.json in it\)"):
        open_artefact(path, "embeddings")
    damaged = tmp_path / ".vectors.work" / "made" / "part-00001.bin"
    damaged.write_bytes(b"x")
    assert make_parts(path) == [1, 3, 4]
    assert open_artefact(path, "embeddings", verify=True)["details"] == {"bytes": 15}
    assert make_parts(path) == [] and sorted(os.listdir(tmp_path)) == ["vectors"]


def test_parts_of_other_work_are_not_mixed_in(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_parts(tmp_path / "x", die_at=2)
    with pytest.raises(
        SettingsError,
        match=r"with other inputs or settings \(model was m and is left out; depth was left out and is 3\)",
    ):
        with artefact(tmp_path / "x", "embeddings", {"depth": 3}):
            pass
    with artefact(tmp_path / "x", "embeddings", {"depth": 3}, remake=True) as work:
        assert list(work.missing(2)) == [0, 1]


def fail(path: Path, depth: int) -> None:
    with artefact(path, "split", {"depth": depth}) as work:
        work.made("half").write_text("half")
        raise DataError("no")


def test_an_error_before_the_first_part_leaves_nothing_in_the_way(tmp_path):
    for depth in (3, 4):
        with pytest.raises(DataError, match="no"):
            fail(tmp_path / "x", depth)
        assert not list(tmp_path.iterdir())
    left = tmp_path / ".x.work"  # as a kill leaves it
    (left / "made").mkdir(parents=True)
    (left / "made" / "half").touch()
    (left / "scratch").mkdir()
    (left / "begun.json").write_text(json.dumps({"kind": "split", "made_from": {"depth": 9}}))
    with artefact(tmp_path / "x", "split", {"depth": 4}) as work:
        work.made("whole").touch()
    assert list(open_artefact(tmp_path / "x", "split")["files"]) == ["whole"]


@pytest.mark.parametrize("first", [0, 2])
def test_ranks_share_the_parts_in_any_order_and_the_first_one_publishes(first, tmp_path):
    path, made = tmp_path / "vectors", {}
    ranks = [
        threading.Thread(target=lambda r=r: made.update({r: make_parts(path, r, 3)})) for r in (first, 1, 2 - first)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert made == {0: [0, 3], 1: [1, 4], 2: [2]}
    assert len(open_artefact(path, "embeddings", verify=True)["files"]) == 5
    assert make_parts(path, 1, 3) == [], "a rank that comes late finds it done"
    assert sorted(os.listdir(tmp_path)) == ["vectors"]


def test_a_rank_that_never_comes_is_named(tmp_path):
    with artefact(tmp_path / "x", "embeddings", {}, world_size=2) as work:
        for number in work.missing(5):
            with work.part(number, ".bin") as file:
                file.write(b"x")
        with pytest.raises(DataError, match=r"2 of 5 parts of .* \(ranks \[1\]\), and none arrived in 0 s"):
            work.wait(0.3)


def test_two_processes_do_not_make_the_same_thing_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOCK_PATIENCE_SECONDS", 0.3)
    with artefact(tmp_path / "x", "run", {}, single=True) as work:
        with pytest.raises(SettingsError, match="is being made by another process: wait for it"):
            make_file(tmp_path / "x", made_from={})
        with work.file() as file:
            file.write("x")


def test_a_file_system_without_locks_serves(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", cannot)
    assert make_file(tmp_path / "x") and not make_file(tmp_path / "x")


KILLED = """
import os, signal, sys
from pathlib import Path
from quincunx.data_shards import artefact as module

steps = [0]
def count(function):
    def counted(*arguments, **options):
        steps[0] += 1
        if steps[0] == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return counted

for name in ("replace", "rename", "fsync", "unlink"):
    setattr(os, name, count(getattr(os, name)))
module.shutil.rmtree = count(module.shutil.rmtree)
with module.artefact(Path(sys.argv[1]), "x", {"a": 1}, single=sys.argv[3] == "single") as work:
    if work is not None:
        for number in work.missing(2):
            with work.part(number, ".txt", published=sys.argv[3] != "single") as file:
                file.write(b"part")
        work.wait()
        with work.file("" if sys.argv[3] == "single" else "ids.txt") as file:
            file.write("whole")
print("done")
"""


@pytest.mark.parametrize("kind", ["single", "folder"])
def test_a_kill_at_every_step_leaves_what_the_same_command_finishes(kind, tmp_path):
    def run(path: Path, step: int) -> int:
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(step), kind], capture_output=True
        ).returncode

    for step in range(1, 60):
        path = tmp_path / f"{step}" / "out"
        if run(path, step) == 0:
            break
        found = path.exists() and manifest_path(path).exists() if kind == "single" else path.exists()
        if found:
            open_artefact(path, "x", single=kind == "single", verify=True)
        assert run(path, 0) == 0
        open_artefact(path, "x", single=kind == "single", verify=True)
        expected = ["out", "out.manifest.json"] if kind == "single" else ["out"]
        assert sorted(os.listdir(path.parent)) == expected, step
    assert 10 < step < 59


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "part-00002.bin").unlink(), "part-00002.bin is missing"),
        (lambda path: (path / "part-00002.bin").write_bytes(b"longer than it was"), "part-00002.bin is damaged"),
        (lambda path: (path / "part-00002.bin").write_bytes(b"abc"), "part-00002.bin is damaged"),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot be read as JSON"),
        (lambda path: rewrite(path, schema=99), "a manifest of a newer schema"),
        (lambda path: rewrite(path, schema=1), "a manifest of another schema"),
        (lambda path: rewrite(path, kind="scores"), "holds scores, embeddings are needed"),
    ],
)
def test_what_is_not_whole_or_of_another_kind_is_refused(change, message, tmp_path):
    make_parts(tmp_path / "x")
    change(tmp_path / "x")
    with pytest.raises(DataError, match=message):
        open_artefact(tmp_path / "x", "embeddings", verify=True)


def rewrite(path: Path, **changes) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot be written \(Not a directory\)"):
        make_file(tmp_path / "file" / "x")
    with pytest.raises(SettingsError, match="it is a folder"), written_whole(tmp_path):
        pass


def test_a_full_disk_is_one_sentence_and_what_was_there_stays(small_disk):
    folder = small_disk("size=64k")
    with written_whole(folder / "a") as file:
        file.write("old")
    with pytest.raises(DataError, match=r"the disk of .* is full .*what is finished is kept"):
        make_file(folder / "b", "x" * 10**6)
    assert (folder / "a").read_text() == "old" and not (folder / "b").exists()


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    host, dead = socket.gethostname(), subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".x.tmp-{host}-{dead.pid}").touch()
    (tmp_path / f".x.tmp-{host}-{os.getppid()}").touch()
    with written_whole(tmp_path / "x") as file:
        file.write("text")
    assert sorted(os.listdir(tmp_path)) == [f".x.tmp-{host}-{os.getppid()}", "x"]
