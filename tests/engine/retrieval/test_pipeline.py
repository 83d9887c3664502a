"""A chain of three commands (shell, so that each costs milliseconds): write, copy, join."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.pipeline import Pipeline, Stage, minutes

SCRIPT = """
mkdir -p "$1" && echo "$(basename "$1")" >> "$2"
shift 2
out="$1"; shift
{ for word in "$@"; do if [ -f "$word" ]; then cat "$word"; else echo "$word"; fi; done; } > "$out.tmp"
mv "$out.tmp" "$out"
"""


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("passages\n")
    return path


def stage(folder: Path, name: str, word: str, **inputs: Path) -> Stage:
    """Writes `word` and the content of its inputs, and its name into folder/../ran.txt each time it runs."""
    work = folder / name
    output, ran = work / "out.txt", folder.parent / "ran.txt"
    command = ["sh", "-c", SCRIPT, "sh", str(work), str(ran), str(output), word, *map(str, inputs.values())]
    return Stage(name=name, command=command, settings={"word": word}, inputs=inputs, work=work, outputs=[output])


def chain(folder: Path, corpus: Path, words: str = "abc") -> Pipeline:
    first = stage(folder, "first", words[0], corpus=corpus)
    second = stage(folder, "second", words[1], first=first.outputs[0])
    third = stage(folder, "third", words[2], second=second.outputs[0])
    return Pipeline(folder, [first, second, third])


def ran(folder: Path) -> list[str]:
    """Names of the stages that have run since the last call."""
    path = folder.parent / "ran.txt"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


@pytest.fixture
def folder(tmp_path, corpus) -> Path:
    """A finished chain."""
    folder = tmp_path / "chain"
    assert chain(folder, corpus).run() == 0
    assert ran(folder) == ["first", "second", "third"]
    return folder


def stamp(folder: Path, name: str) -> dict:
    return json.loads((folder / "stages" / f"{name}.json").read_text())


def test_what_is_done_is_not_done_again(folder, corpus):
    assert chain(folder, corpus).run() == 0
    assert ran(folder) == []
    assert stamp(folder, "third")["attempts"] == 1


def test_a_changed_setting_runs_the_stage_and_those_after_it_and_says_what_changed(folder, corpus, capsys):
    assert chain(folder, corpus, "aXc").run() == 0
    assert ran(folder) == ["second", "third"]
    assert (folder / "third" / "out.txt").read_text() == "c\nX\na\npassages\n"
    assert "second: word was b and is X" in capsys.readouterr().out
    assert stamp(folder, "second")["reason"] == "word was b and is X"
    assert stamp(folder, "third")["reason"] == "its second changed"
    kept = folder / "replaced" / "second-1" / "out.txt"
    assert kept.read_text() == "b\na\npassages\n"  # nothing is overwritten


def test_a_changed_input_file_runs_what_reads_it(folder, corpus):
    corpus.write_text("other passages\n")
    assert chain(folder, corpus).run() == 0
    assert ran(folder) == ["first", "second", "third"]
    assert stamp(folder, "first")["reason"] == "its corpus changed"


def test_the_same_bytes_made_again_leave_the_stages_after_them_alone(folder, corpus):
    (folder / "first" / "out.txt").unlink()
    assert chain(folder, corpus).run() == 0
    assert ran(folder) == ["first"]


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_missing_or_damaged_output_is_made_again(folder, corpus, harm):
    output = folder / "second" / "out.txt"
    if harm == "missing":
        output.unlink()
    else:
        content = output.read_bytes()
        times = output.stat()
        output.write_bytes(content[:-1] + b"?")
        os.utime(output, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a failing disk would leave it
    assert chain(folder, corpus).run() == 0
    assert ran(folder) == ["second"]
    assert stamp(folder, "second")["reason"] == f"output second/out.txt is {harm}"
    assert output.read_text() == "b\na\npassages\n"


def test_a_failing_stage_ends_the_chain_with_its_code_and_the_next_run_goes_on_there(folder, corpus, tmp_path):
    pipeline = chain(folder, corpus, "aXc")
    good = pipeline.stages[1]
    pipeline.stages[1] = dataclasses.replace(good, command=["sh", "-c", "exit 77"])
    assert pipeline.run() == 77
    assert ran(folder) == []
    pipeline.stages[1] = good
    assert pipeline.run() == 0
    assert ran(folder) == ["second", "third"]
    assert stamp(folder, "second")["attempts"] == 2


def test_a_stage_that_writes_nothing_is_not_done(tmp_path, corpus):
    pipeline = chain(tmp_path / "chain", corpus)
    pipeline.stages[0] = dataclasses.replace(pipeline.stages[0], command=["true"])
    with pytest.raises(SettingsError, match="first ended well but did not write"):
        pipeline.run()
    assert not pipeline.stamp_path(pipeline.stages[0]).exists()


def test_an_input_that_no_stage_has_made_is_named_with_the_stage_to_run(tmp_path, corpus):
    pipeline = chain(tmp_path / "chain", corpus)
    with pytest.raises(
        SettingsError, match=r"stage third reads .*second/out.txt, which is not there: run stage second"
    ):
        pipeline.run(pipeline.stages[2:])
    corpus.unlink()
    with pytest.raises(SettingsError, match="name another corpus in the recipe"):
        pipeline.run()


def test_what_a_kill_left_of_a_command_that_cannot_resume_is_cleared_away(folder, corpus):
    pipeline = chain(folder, corpus)
    pipeline.stamp_path(pipeline.stages[1]).unlink()
    torn = folder / "second" / "torn.txt"
    torn.write_text("half")
    assert pipeline.run() == 0
    assert ran(folder) == ["second"]
    assert not torn.exists()


def test_a_stage_that_resumes_finds_its_unfinished_work_unless_its_settings_changed(folder, corpus):
    def resuming(words: str) -> Pipeline:
        pipeline = chain(folder, corpus, words)
        pipeline.stages[1] = dataclasses.replace(pipeline.stages[1], resumes=True)
        return pipeline

    pipeline = resuming("abc")
    second = pipeline.stages[1]
    finished = json.loads(pipeline.stamp_path(second).read_text())
    begun = {key: finished[key] for key in ("digest", "settings", "inputs", "attempts", "reason")}
    pipeline.begun_path(second).write_text(json.dumps(begun))  # as a kill before the stamp leaves it
    pipeline.stamp_path(second).unlink()
    checkpoint = folder / "second" / "checkpoint"
    checkpoint.write_text("step 5")
    assert pipeline.run() == 0
    assert checkpoint.exists()
    assert resuming("aXc").run() == 0
    assert not checkpoint.exists()
    assert (folder / "replaced" / "second-1" / "checkpoint").read_text() == "step 5"


def test_a_kill_before_a_stage_begins_anew_does_not_lose_what_it_can_go_on_with(tmp_path, corpus, monkeypatch):
    first = dataclasses.replace(stage(tmp_path / "chain", "first", "a", corpus=corpus), resumes=True)
    pipeline = Pipeline(tmp_path / "chain", [first])
    assert pipeline.run() == 0
    (first.work / "checkpoint").write_text("hours")
    first.outputs[0].write_text("damaged")
    with monkeypatch.context() as patch:
        patch.setattr("quincunx.engine.retrieval.pipeline.write_json", lambda *_: 1 / 0)  # as if killed there
        with pytest.raises(ZeroDivisionError):
            pipeline.run()
    assert Pipeline(tmp_path / "chain", [first]).run() == 0
    assert (first.work / "checkpoint").read_text() == "hours"


def test_removing_a_stamp_makes_a_stage_run_again_from_nothing(folder, corpus):
    pipeline = chain(folder, corpus, "abc")
    pipeline.stages[1] = dataclasses.replace(pipeline.stages[1], resumes=True)
    left_over = folder / "second" / "checkpoint"
    left_over.write_text("step 5")
    pipeline.stamp_path(pipeline.stages[1]).unlink()
    assert pipeline.run() == 0 and not left_over.exists()
    assert "second" in " ".join(ran(folder))


def test_an_index_kept_in_a_folder_of_embeddings_is_no_damage(folder, corpus):
    """search.py keeps its indexes there: index-hnsw-00000.faiss and .json, and staging names while it writes."""
    pipeline = chain(folder, corpus, "abc")
    work = pipeline.stages[0].work
    before = pipeline.digest_of(work)
    for name in ("index-hnsw-00000.faiss", "index-hnsw-00000.json", ".index-ivfpq-00000.faiss.tmp7"):
        (work / name).write_text("x")
    assert chain(folder, corpus, "abc").digest_of(work) == before


def test_a_dry_run_says_what_would_run_and_runs_nothing(folder, corpus, capsys):
    chain(folder, corpus, "aXc").preview()
    out = capsys.readouterr().out
    assert "[1] first: done before" in out
    assert "[2] second: word was b and is X" in out
    assert "[3] third: after second" in out
    assert ran(folder) == []
    assert stamp(folder, "second")["settings"] == {"word": "b"}


RUNNER = """
import sys
from pathlib import Path
from quincunx.engine.retrieval.pipeline import Pipeline, Stage

folder = Path(sys.argv[1])
shell = "trap 'sleep 0.3; echo saved > {0}/saved; exit 75' TERM; mkdir -p {0}; echo begun > {0}/begun; " \\
    "[ -f {0}/saved ] && echo x > {0}/out || while true; do sleep 0.05; done"
work = folder / "long"
stage = Stage(name="long", command=["sh", "-c", shell.format(work)], settings={}, inputs={}, work=work,
    outputs=[work / "out"], resumes=True)
sys.exit(Pipeline(folder, [stage]).run())
"""


@contextlib.contextmanager
def running(folder: Path):
    """The runner above as a process, its stage begun."""
    process = subprocess.Popen([sys.executable, "-c", RUNNER, str(folder)])
    try:
        deadline = time.monotonic() + 60
        while not (folder / "long" / "begun").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def test_sigterm_reaches_the_running_stage_and_the_pipeline_ends_with_75_once_it_has_saved(tmp_path):
    folder = tmp_path / "chain"
    with running(folder) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
        assert (folder / "long" / "saved").exists()
    assert subprocess.run([sys.executable, "-c", RUNNER, str(folder)]).returncode == 0
    assert stamp(folder, "long")["attempts"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="a command follows its parent into death on Linux only")
def test_a_killed_pipeline_takes_its_stage_along_and_the_next_one_waits_until_it_has_saved(tmp_path):
    folder = tmp_path / "chain"
    with running(folder) as process:
        process.kill()
        process.wait()
    # Started at once, while the orphan is still saving: it must find what that saves, or it would run for ever.
    assert subprocess.run([sys.executable, "-c", RUNNER, str(folder)], timeout=60).returncode == 0


def test_minutes_and_hours_are_written_as_clocks_do():
    assert [minutes(75.2), minutes(3.0), minutes(3725)] == ["1:15", "0:03", "1:02:05"]
