"""launchers/build_shards.py and verify_shards.py: real processes, killed, run again, and what they say."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import psutil
import pytest

from quincunx.data_shards import build as build_module
from quincunx.data_shards.artefact import work_folder
from quincunx.data_shards.build import build_shards
from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.build_task import run_task
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.shards import open_shards
from quincunx.launchers.command_line import as_flags, parse_settings

LAUNCHERS = Path(__file__).parent.parent.parent / "launchers"


def arguments(settings: BuildSettings) -> list[str]:
    """The command line that gives these settings."""
    changed = {
        field.name: getattr(settings, field.name)
        for field in fields(BuildSettings)
        if getattr(settings, field.name) not in (field.default, [])
    }
    return [sys.executable, str(LAUNCHERS / "build_shards.py"), *as_flags(changed)]


def launch(settings: BuildSettings, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(arguments(settings), capture_output=True, text=True, timeout=300, **kwargs)


def test_the_launcher_with_two_workers_writes_the_same_bytes_and_says_what(build_case, tmp_path):
    result = launch(build_case.settings(tmp_path / "out", workers=2, progress=True))
    assert result.returncode == 0, result.stderr
    build_case.check(tmp_path / "out")
    for line in (
        "documents               120",
        "generations joined      40",
        open_shards(build_case.reference).manifest.dataset_id,
    ):
        assert line in result.stdout
    assert "6/6" in result.stderr
    command = json.loads((tmp_path / "out" / "build.json").read_text())["command"]
    assert command[1:] == arguments(build_case.settings(tmp_path / "out", workers=2, progress=True))[1:]
    said: list[str] = []
    build_shards(build_case.settings(tmp_path / "out"), [], say=said.append)
    assert "already holds this shard set, complete" in said[-1]
    build_case.check(tmp_path / "out")


def kill_after(process: subprocess.Popen, is_due) -> None:
    deadline = time.monotonic() + 120
    while not is_due() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=120)  # workers finish their task
    assert not alive, f"orphans of the killed builder: {alive}"


def test_a_build_killed_after_its_first_task_continues_to_the_same_bytes(build_case, tmp_path, monkeypatch):
    output, work = tmp_path / "out", work_folder(tmp_path / "out")
    settings = build_case.settings(output, workers=2)
    process = subprocess.Popen(arguments(settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_after(process, lambda: any((work / "scratch").glob("part-?????.json")))
    finished = list((work / "scratch").glob("part-?????.json"))
    assert 0 < len(finished) < 6
    with pytest.raises(DataError, match="an interrupted build continues with the same command"):
        open_shards(output)
    with pytest.raises(SettingsError, match=r"was begun with other inputs or settings \(max_tokens was 64 and is 32\)"):
        build_case.build(replace(settings, max_tokens=32))
    (work / "made" / ".train-00005-000.tar.tmp1").write_bytes(b"torn")
    started: list[int] = []
    monkeypatch.setattr(build_module, "run_task", lambda plan, task: started.append(task) or run_task(plan, task))
    build_case.build(replace(settings, workers=1))
    assert len(started) == 6 - len(finished)
    build_case.check(output)
    assert not work.exists()


@pytest.mark.slow
def test_builds_killed_at_random_moments_give_the_same_bytes(build_case, tmp_path):
    draw = random.Random(0)
    settings = build_case.settings(tmp_path / "out", workers=2)
    for _ in range(10):
        process = subprocess.Popen(arguments(settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        due = time.monotonic() + draw.uniform(0.5, 12)
        kill_after(process, lambda due=due: time.monotonic() > due)
    assert launch(settings).returncode == 0
    build_case.check(tmp_path / "out")


@pytest.mark.parametrize("target", ["tokenizer/tokenizer.json", "made/manifest.json", "out"])
def test_a_kill_while_the_set_is_finished_leaves_no_trace_after_a_rerun(build_case, tmp_path, target):
    """os._exit stands for a kill at the renaming of a file, and of the whole set."""
    settings = build_case.settings(tmp_path / "out")
    script = (
        "import os, sys\n"
        "from quincunx.launchers.build_shards import main\n"
        "def mortal(real):\n"
        f"    return lambda a, b: os._exit(9) if str(b).endswith('/{target}') and '.work' in str(a) else real(a, b)\n"
        "os.replace, os.rename = mortal(os.replace), mortal(os.rename)\n"
        "main()\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, *arguments(settings)[2:]], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert not (tmp_path / "out").exists()
    build_case.build(settings)
    build_case.check(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_bad_record_ends_the_launcher_with_one_sentence_and_code_3(build_case, tmp_path):
    (tmp_path / "docs.jsonl").write_text("[]\n")
    result = launch(build_case.settings(tmp_path / "out", path=str(tmp_path / "docs.jsonl"), generations=[]))
    assert result.returncode == 3 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: docs.jsonl:1: a JSON list")


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        ({"max_tokens": 2, "num_buckets": 3}, "max_tokens is 2; .*num_buckets is 3; give a power of two"),
        ({"tokenizer_megabytes": 0}, "tokenizer_megabytes is 0; it must be at least 1"),
        ({"format": "document"}, r"invalid choice 'document' for argument '--format'.*'documents'"),
        *(
            ({"tokenizer": name}, f"tokenizer is {name}; give train:N with N from 300 to 1000000")
            for name in ("train:0", "train:abc", "train:", "train:2000000")
        ),
    ],
)
def test_settings_out_of_range_are_refused_in_one_sentence(flags, refusal):
    given = {"format": "beir", "path": "x", "output": "x", "tokenizer": "x"}
    with pytest.raises(SettingsError, match=refusal) as refused:
        parse_settings(BuildSettings, "", as_flags(given | flags))
    assert "\n" not in str(refused.value)


def test_verify_names_all_damage_and_the_command_that_fixes_it(build_case, tmp_path):
    def verify() -> subprocess.CompletedProcess:
        command = [sys.executable, str(LAUNCHERS / "verify_shards.py"), str(folder)]
        return subprocess.run(command, capture_output=True, text=True)

    folder = Path(shutil.copytree(build_case.reference, tmp_path / "set"))
    sound = verify()
    assert sound.returncode == 0 and "0 damaged" in sound.stdout
    shards = sorted(folder.glob("train-*.tar"))
    shards[0].unlink()
    shards[3].write_bytes(shards[3].read_bytes() + bytes(512))
    damaged = verify()
    assert damaged.returncode == 3 and damaged.stderr.count("\n") == 1
    assert f"is damaged in {shards[0].name}, {shards[3].name}: " in damaged.stderr
    assert "delete the damaged shards and run `the command` again, which makes only these" in damaged.stderr
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "build.json").write_bytes(b"[")
    damaged = verify()
    for name in (shards[0].name, "tokenizer/tokenizer.json", "build.json"):
        assert name in damaged.stderr
    assert "build.json is damaged, so how the set was built is not known: copy it again" in damaged.stdout
