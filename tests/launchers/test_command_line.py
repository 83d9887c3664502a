import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.setting import setting
from quincunx.launchers.command_line import as_flags, parse_settings

LAUNCHERS = Path(__file__).parents[2] / "launchers"
COMMANDS = sorted(path.name for path in LAUNCHERS.glob("*.py") if "__main__" in path.read_text())


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Settings of a test."""

    paths: list[str] = setting(["here"], role="data")
    """Where to look."""
    kind: Literal["masked", "enhanced"] = "masked"
    """Which kind."""
    rate: float = setting(0.5, above=0, high=1)
    """Peak rate."""
    steps: int | None = setting(None, low=0)
    """Length in steps."""
    betas: tuple[float, float] = setting((0.9, 0.999), below=1)
    """Decay rates."""
    weights: list[float] | None = None
    """One weight each."""
    shares: dict[str, float] = setting({}, low=0)
    """A share each."""
    fresh: bool = False
    """Start anew."""

    def contradictions(self) -> list[str]:
        return ["fresh needs steps"] if self.fresh and self.steps is None and self.rate == 0.5 else []


def parse(*arguments: str, **options) -> Tiny:
    return parse_settings(Tiny, "A test.", list(arguments), **options)


def test_lists_booleans_and_numbers_are_written_as_people_write_them():
    assert parse() == parse("--local_rank=1") == Tiny(), "DeepSpeed's launcher adds the rank"
    assert parse("--paths", "a:3", "b", "--fresh", "--rate", "1e-4") == Tiny(paths=["a:3", "b"], fresh=True, rate=1e-4)
    assert parse("--paths", "--no_fresh", "--steps", "None") == Tiny(paths=[])
    assert parse("--weights", "1", "2.5", "--betas", "0.9", "0.98") == Tiny(weights=[1.0, 2.5], betas=(0.9, 0.98))


def test_flags_win_over_the_file_wherever_they_stand(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("rate: 1e-4\nsteps: 7\npaths: [p, q]\n")
    assert parse("--config", str(file)) == Tiny(rate=1e-4, steps=7, paths=["p", "q"])
    assert parse("--steps", "8", "--config", str(file), "--paths", "r") == Tiny(rate=1e-4, steps=8, paths=["r"])
    assert parse(config_folder=tmp_path, default_config="a").steps == 7
    assert parse("--config", "a", config_folder=tmp_path).steps == 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rat", "1"], "Unrecognized options: --rat, 1; did you mean --rate?"),
        (["--zzz"], "Unrecognized options: --zzz; --help lists the settings"),
        (
            ["--kind", "other"],
            "invalid choice 'other' for argument '--kind'. Expected one of ('masked', 'enhanced'); --help lists the "
            "settings",
        ),
        (["--steps", "many"], "--steps is many; it takes None or INT; --help lists the settings"),
        (["--rate"], "Missing value for argument '--rate'. Expected 1 values; --help lists the settings"),
        (["--rate", "1", "2"], "Unrecognized options: 2; --help lists the settings"),
        (["rate=1"], "Unrecognized options: rate=1; --help lists the settings"),
        (["--rate", "nan"], "rate is nan; it must be finite"),
        (
            ["--rate", "2", "--steps", "-3"],
            "rate is 2.0; it must be above 0 and at most 1; steps is -3; it must be at least 0",
        ),
        (
            ["--shares", "a:1"],
            "--shares takes pairs: NAME NUMBER NAME NUMBER ... (in YAML a mapping); --help lists the settings",
        ),
        (["--shares", "a", "-1"], "shares is {'a': -1.0}; it must be at least 0"),
        (["--betas", "0.9", "1"], "betas is (0.9, 1.0); it must be below 1"),
        (["--fresh"], "fresh needs steps"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--config", "a", "--config", "b"], "--config is given 2 times: a, b; give it once"),
        (["--config"], "--config is given without a file: name one"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments, sentence):
    with pytest.raises(SettingsError) as caught:
        parse(*arguments)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rat: 1\nstep: 2\n", "sets what does not exist: rat, did you mean rate?; step, did you mean steps?"),
        ("- a\n", "must hold `setting: value` lines"),
        ("a: [\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(text, sentence, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        parse("--config", str(tmp_path / "a.yaml"))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("launcher", COMMANDS)
def test_the_help_of_every_launcher_comes_at_once(launcher):
    """In less time than it takes to import torch; of the processor's, which others may be using too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, LAUNCHERS / launcher, "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "show this help message" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_shows_every_field_with_its_docstring(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help", config_folder=None)
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert all(text in shown for text in ("--paths", "Where to look.", "--fresh", "Start anew.", "default: 0.5"))


def test_the_settings_are_printed_as_a_file_that_gives_them_again(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        parse("--rate", "1e-4", "--print_config", "--paths", "a", "b")
    assert left.value.code == 0
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "a.yaml")) == Tiny(rate=1e-4, paths=["a", "b"])


def test_flags_of_settings_are_those_that_give_them():
    values = {
        "paths": [],
        "kind": "enhanced",
        "rate": 1e-5,
        "steps": 7,
        "betas": (0.5, 0.6),
        "weights": [1, 2.0],
        "shares": {"a": 0.1, "b": 2.0},
        "fresh": True,
    }
    assert parse(*as_flags(values)) == Tiny(**{**values, "weights": [1.0, 2.0]})
    assert parse(*as_flags({"steps": None, "fresh": False})) == Tiny()


def test_a_check_ends_before_anything_runs_and_names_inputs_that_are_not_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("QUINCUNX_CHECK", "1")
    with pytest.raises(SystemExit) as left:
        parse("--paths", str(tmp_path), "nowhere")
    assert left.value.code == 0 and capsys.readouterr().out == "settings are sound; not there yet: nowhere\n"
    with pytest.raises(SettingsError):
        parse("--rate", "7")
    with pytest.raises(SettingsError, match="rate is odd"):
        parse("--rate", "0.7", find_more=lambda settings: ["rate is odd"])
    with pytest.raises(SettingsError, match="'no_such_package', which is not installed"):
        parse("--paths", "package:no_such_package/model")
