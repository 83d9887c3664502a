from dataclasses import dataclass, field
from typing import Literal

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Settings of a test."""

    paths: list[str] = field(default_factory=lambda: ["here"])
    """Where to look."""
    kind: Literal["masked", "enhanced"] = "masked"
    """Which kind."""
    rate: float = 0.5
    """Peak rate."""
    steps: int | None = None
    """Length in steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates."""
    weights: list[float] | None = None
    """One weight each."""
    fresh: bool = False
    """Start anew."""


def parse(*arguments: str, **options) -> Tiny:
    return parse_settings(Tiny, "A test.", list(arguments), **options)


def test_lists_booleans_and_numbers_are_written_as_people_write_them():
    assert parse() == Tiny()
    assert parse("--paths", "a:3", "b,c", "--fresh", "--rate", "1e-4").paths == ["a:3", "b", "c"]
    assert parse("--paths=[x, y]", "--fresh=false") == Tiny(paths=["x", "y"])
    assert parse("--weights", "1,2.5", "--betas", "0.9", "0.98") == Tiny(weights=[1.0, 2.5], betas=(0.9, 0.98))
    assert parse("--steps", "-3").steps == -3


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
        (["--rat", "1"], "unknown setting --rat, did you mean rate?"),
        (["--zzz"], "unknown setting --zzz; --help lists the settings"),
        (["--kind", "other"], "kind must be masked or enhanced, given other"),
        (["--steps", "many"], "steps must be a whole number, or null, given many"),
        (["--steps", ""], "steps must be a whole number, or null, given nothing"),
        (["--rate"], "--rate takes one value, 0 given: none"),
        (["--rate", "1", "2"], "--rate takes one value, 2 given: 1 2"),
        (["rate=1"], "unexpected argument 'rate=1'; every setting is given as --name value"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--config", "a", "--config", "b"], "--config is given 2 times: a, b; give it once"),
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


def test_help_shows_every_field_with_its_docstring(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help", config_folder=None)
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert all(text in shown for text in ("--paths", "Where to look.", "--fresh", "Start anew.", "default: 0.5"))
