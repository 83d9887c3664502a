"""launchers/demo.py and demo_results.py: what is skipped, what fails, and what the end prints."""

import fcntl
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quincunx.engine.retrieval.measures import Comparison
from quincunx.engine.settings import PretrainSettings, find_problems
from quincunx.launchers import demo, demo_results, pretrain
from quincunx.launchers.command_line import parse_settings
from quincunx.launchers.demo_results import LABELS

RIGHT_AT = {"bm25": 4, "random": 8, "mlm": 5, "ours": 1, "untuned": 2}
"""System -> rank of the right passage, for every query of `output`."""


def write_run(path: Path, rank: int, num_queries: int) -> None:
    """A TREC run whose right passage (p7 for q7) is at `rank` for every query."""
    lines = []
    for query in range(num_queries):
        found = [f"wrong{k}" for k in range(1, 10)]
        found.insert(rank - 1, f"p{query}")
        lines += [f"q{query} Q0 {id} {place} {1 / place} tag\n" for place, id in enumerate(found, 1)]
    path.write_text("".join(lines))


@pytest.fixture
def output(tmp_path) -> Path:
    """What a demo leaves behind for its end, made up: 40 queries."""
    qrels = tmp_path / "shards" / "probe" / "qrels" / "test.tsv"
    qrels.parent.mkdir(parents=True)
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{k}\tp{k}\t1\n" for k in range(40)))
    for name, rank in RIGHT_AT.items():
        write_run(tmp_path / f"{name}.trec", rank, 40)
    return tmp_path


def test_the_table_has_a_line_for_every_system_with_its_interval_and_what_ours_has_more(output, capsys):
    assert demo_results.print_worth(output) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("40 held-out queries")
    for name, line in zip(LABELS, lines[2:7], strict=True):
        mean = 1 / RIGHT_AT[name]
        cells = line.removeprefix(LABELS[name]).split()
        assert cells[:4] == [f"{mean:.3f}", f"{mean:.3f}", "to", f"{mean:.3f}"]
        assert cells[4:8] == (
            [] if name == "ours" else [f"{1 - mean:+.3f}", f"{1 - mean:+.3f}", "to", f"{1 - mean:+.3f}"]
        )
    assert "was worth +0.875 MRR@10 over random weights and +0.800 MRR@10 over MLM alone" in " ".join(lines)


@pytest.mark.parametrize("rank", [1, 5, 8])
def test_a_rival_that_is_as_good_or_better_fails_the_demo(output, rank):
    write_run(output / "ours.trec", 5, 40)
    write_run(output / "mlm.trec", rank, 40)
    failures = demo_results.print_worth(output)
    assert [LABELS["mlm"] in failure for failure in failures] == ([True] if rank <= 5 else [])


def gain(difference: float, t_test_p: float, randomisation_p: float) -> Comparison:
    return Comparison(
        mean=0.5,
        other_mean=0.5 - difference,
        difference=difference,
        low=difference - 0.1,
        high=difference + 0.1,
        t_test_p=t_test_p,
        randomisation_p=randomisation_p,
        wins=1,
        losses=1,
        ties=1,
    )


def test_a_difference_counts_only_if_both_tests_say_so():
    assert demo_results.is_better(gain(0.1, 0.009, 0.002))
    assert not demo_results.is_better(gain(0.1, 0.011, 0.002))
    assert not demo_results.is_better(gain(0.1, 0.002, 0.011))
    assert not demo_results.is_better(gain(-0.1, 0.002, 0.002))


def test_the_sentence_says_which_difference_is_not_significant():
    text = demo_results.sentence({"random": gain(0.2, 0.001, 0.001), "mlm": gain(-0.02, 0.4, 0.3)})
    assert "+0.200 MRR@10 over random weights and -0.020 MRR@10 over MLM alone (not significant, p = 0.4)" in text


@pytest.mark.parametrize(
    ("loss", "probe", "failed"),
    [
        (5.0, 0.2, []),
        (6.0, 0.2, ["the held-out loss of mkp"]),
        (5.0, 0.19, ["the probe"]),
        (float("nan"), 0.2, ["mkp"]),
    ],
)
def test_a_loss_above_its_unigram_or_a_probe_that_does_not_double_fails_the_demo(tmp_path, capsys, loss, probe, failed):
    rows = []
    for step, (value, found) in enumerate([(8.0, 0.1), (loss, probe)]):
        values = {"held_out/loss/mkp": value, "held_out/unigram/mkp": 5.5, "held_out/accuracy/mkp": 0.25}
        at = {"step": step, "time": 0.0}
        rows += [{**at, "kind": "held_out", **values}, {**at, "kind": "probe", "probe/mrr@10": found}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row).replace("NaN", '"nan"') + "\n" for row in rows))
    failures = demo_results.print_learned(tmp_path)
    assert len(failures) == len(failed) and all(what in failure for what, failure in zip(failed, failures))
    printed = capsys.readouterr().out
    assert f"8.00{loss:>8.2f}     5.50" in printed and f"0.100 {probe:.3f}" in printed


def test_what_is_there_is_not_made_again_and_a_failure_ends_the_demo_with_its_code(tmp_path, capsys):
    made = tmp_path / "made"
    write = f"""python -c 'open("{made}", "a").write("x")'"""
    demo.make(tmp_path, {"made": write})
    demo.make(tmp_path, {"made": write})
    assert made.read_text() == "x"
    with pytest.raises(SystemExit) as stopped:
        demo.make(tmp_path, {"other": "python -c 'raise SystemExit(3)'"})
    assert stopped.value.code == 3
    assert "exit code 3 of the command python -c" in capsys.readouterr().err


def test_side_by_side_commands_run_at_once_and_a_failure_shows_its_log(tmp_path, capsys):
    """Each of two commands waits for what the other writes."""
    meet = """python -c 'import pathlib, time
pathlib.Path("{0}/{1}").write_text("")
while not pathlib.Path("{0}/{2}").exists(): time.sleep(0.05)'"""
    demo.make(tmp_path, {"a": meet.format(tmp_path, "a", "b"), "b": meet.format(tmp_path, "b", "a")})
    with pytest.raises(SystemExit) as stopped:
        demo.make(tmp_path, {"c": "python -c 'exit(\"lost a wheel\")'", "d": "python -c pass"})
    assert stopped.value.code == 1 and "lost a wheel" in capsys.readouterr().err


@pytest.fixture(scope="module")
def commands() -> dict[str, str]:
    """What is made -> the command."""
    stages = demo.stages("demo_run", 7, "deepspeed")
    return {made: command for jobs in stages.values() for made, command in jobs.items()}


def test_held_out_queries_are_for_measuring_only_and_training_ones_for_training_only(commands):
    for made, command in commands.items():
        if made.startswith(("random/", "bm25.train", "negatives")) or ".tuned/" in made:
            assert "shards/probe" not in command, made
        if made.endswith((".vectors/manifest.json", ".trec")) and made != "bm25.train.trec":
            assert "shards/probe" in command and "pairs" not in command, made


def test_every_training_has_the_seed_and_mlm_alone_differs_from_ours_in_its_tasks_only(commands):
    trainings = [command for made, command in commands.items() if "/export/" in made]
    assert len(trainings) == 6 and all("--seed 7" in command for command in trainings)
    ours, mlm = (set(commands[f"{name}/export/encoder"].split()) for name in ("ours", "mlm"))
    alone = {"--tasks", "[]", "--task_weights", "null", "--tracking", "none"}
    assert ours ^ mlm == {"demo_run/ours", "demo_run/mlm"} | alone


def test_a_run_that_was_past_the_interruption_is_not_interrupted_again(tmp_path):
    """The command outlives the half second after which the demo looks; a signal would end it with -15."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 60, "time": 0.0, "kind": "train"}\n')
    process = demo.start("python -c 'import time; time.sleep(1.2); raise SystemExit(5)'")
    assert demo.interrupt(process, tmp_path, 60) == 5


def test_the_settings_of_every_training_of_the_demo_are_sound(tmp_path):
    (tmp_path / "shards" / "probe").mkdir(parents=True)
    (tmp_path / "shards" / "probe" / "corpus.jsonl").touch()
    checked = 0
    for jobs in demo.stages(str(tmp_path), 42, "deepspeed --num_gpus 2").values():
        for command in jobs.values():
            words = shlex.split(command)
            script = next((word for word in words if word.endswith("pretrain.py")), None)
            if script is not None:
                flags = words[words.index(script) + 1 :]
                settings = parse_settings(
                    PretrainSettings, "", flags, config_flag="--recipe", config_folder=pretrain.RECIPES
                )
                assert find_problems(settings) == [], command
                checked += 1
    assert checked == 3


def refused(output: Path, *flags: str) -> str:
    """What the demo says as it leaves with exit code 2."""
    command = [sys.executable, "launchers/demo.py", "--output", str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2, done
    return done.stderr


def test_an_output_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds something other than a demo" in refused(tmp_path)
    assert "holds something other than a demo" in refused(tmp_path, "--keep")
    (tmp_path / "shards").mkdir()  # as the README's first commands make in a folder of other things
    assert "holds something other than a demo" in refused(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_demo_that_runs_is_left_alone_and_another_folder_is_no_place_to_start_it(tmp_path):
    mark = open(tmp_path / demo.MARK, "a")  # noqa: SIM115 - locked until the test ends
    fcntl.flock(mark, fcntl.LOCK_EX)
    (tmp_path / "shards").mkdir()
    assert "another demo is making" in refused(tmp_path) and (tmp_path / "shards").exists()
    command = [sys.executable, str(Path(demo.__file__).resolve()), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "start it there" in done.stderr and (tmp_path / "shards").exists()


def test_what_one_seed_made_is_not_continued_with_another(tmp_path):
    (tmp_path / demo.MARK).write_text("")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "settings.yaml").write_text("seed: 42\n")
    assert "made with --seed 42" in refused(tmp_path, "--keep", "--seed", "43")


@pytest.mark.slow
def test_the_demo_shows_what_pre_training_is_worth(tmp_path):
    command = [sys.executable, "launchers/demo.py", "--output", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "The ranks saved step" in done.stdout and "it goes on where it stopped" in done.stdout
