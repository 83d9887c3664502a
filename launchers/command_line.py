"""The command line of every launcher: a YAML file of some of the settings, then flags over it.

A settings dataclass is the only place that names a setting: its field is the flag and the YAML key, its default is the
default, the string below it is the help, its metadata the range (data_shards/setting.py).
"""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.setting import as_plain, find_problems, names_of, require

Settings = TypeVar("Settings")


def parse_settings(
    settings_class: type[Settings],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    config_flag: str = "--config",
    config_folder: Path | None = None,
    default_config: str | None = None,
    find_more: Callable[[Settings], list[str]] = lambda settings: [],
) -> Settings:
    """Reads and checks a launcher's settings from `argv` (default: the process's own).

    `config_flag FILE.yaml` gives values for any of the fields; with `config_folder`, a bare NAME means
    `config_folder/NAME.yaml`; `default_config` is read if the flag is absent. A flag wins over the file wherever it
    stands. `--print_config` prints the settings as YAML. With QUINCUNX_CHECK=1 (a chain's CHECK) the process ends here.

    find_more: the launcher's own problems, as clauses.

    Raises SettingsError for what tyro refuses (unknown flags, with the nearest known one, and values of the wrong
    type), for a file with unknown keys, and for values out of range or in conflict.
    """
    import tyro

    words = list(sys.argv[1:] if argv is None else argv)
    config, words = take_config(words, config_flag)
    help_line = f"{config_flag} FILE.yaml gives values for any of the options"
    if config_folder is not None:
        help_line += f"; shipped: {', '.join(config_names(config_folder))}"
    if config or default_config:
        path = find_config(config or default_config, config_flag, config_folder)
        words = as_flags(read_config(path, settings_class)) + words
    prints = "--print_config" in words
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            settings = tyro.cli(
                settings_class,
                description=f"{description}\n\n{help_line}. --print_config prints the settings.",
                args=[word for word in words if word != "--print_config"],
                use_underscores=True,
            )
    except SystemExit as left:
        if not left.code:
            raise
        raise SettingsError(in_one_sentence(said.getvalue())) from None
    if prints:
        import yaml

        print(yaml.safe_dump(as_plain(settings), sort_keys=False), end="")
        sys.exit(0)
    require(find_problems(settings) + find_more(settings))
    if os.environ.get("QUINCUNX_CHECK"):
        print("settings are sound" + missing_inputs(settings))
        sys.exit(0)
    return settings


def in_one_sentence(box: str) -> str:
    """tyro's refusal without its frame: the message, and the nearest flag if it names one."""
    message, *others = re.split(r"\n\W*─{9,}\W*\n", box.partition("\n")[2])
    plain = " ".join(message.replace("│", " ").split()).rstrip(".")
    nearest = [flag for block in others if "Perhaps you meant" in block for flag in re.findall(r"--\w+", block)]
    return plain + (f"; did you mean {nearest[0]}?" if nearest else "; --help lists the settings")


def missing_inputs(settings: Any) -> str:
    """What a chain's CHECK=1 says of inputs that earlier stages have yet to make, or that nobody will."""
    named = [getattr(settings, name) for name in names_of(settings, "data")]
    paths = [path for value in named if value for path in (value if isinstance(value, list) else [value])]
    missing = [path for path in paths if not Path(path).exists()]
    return f"; not there yet: {', '.join(missing)}" if missing else ""


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """{"steps": 3, "tasks": ["mkp"], "fresh": True} as --steps=3 --tasks mkp --fresh."""
    words = []
    for name, value in values.items():
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words.append(f"--{name}={value}")
    return words


def config_names(folder: Path) -> list[str]:
    """The names that `--recipe NAME` accepts: the YAML files of `folder` without their ending."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def take_config(words: list[str], config_flag: str) -> tuple[str | None, list[str]]:
    """(the configuration file that `words` name, the other words). Raises SettingsError where it is given twice."""
    given, others, rest = [], [], iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag != config_flag:
            others.append(word)
        else:
            given.append(value if equals else next(rest, ""))
    if len(given) > 1:
        raise SettingsError(f"{config_flag} is given {len(given)} times: {', '.join(given)}; give it once")
    if given == [""]:
        raise SettingsError(f"{config_flag} is given without a file: name one")
    return (given[0] if given else None), others


def find_config(name: str, config_flag: str, folder: Path | None) -> Path:
    """The file that `name` means: a path that exists, or the name of a file in `folder`."""
    for path in (Path(name), *([folder / f"{name}.yaml"] if folder else [])):
        if path.is_file():
            return path
    known = f" and none of the names {', '.join(config_names(folder))}" if folder else ""
    raise SettingsError(f"{config_flag} {name}: no such file{known}")


def read_config(path: Path, settings_class: type) -> dict[str, Any]:
    """A YAML file's settings. Raises SettingsError naming every key that is no field, each with the nearest field."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold `setting: value` lines")
    known = {field.name for field in dataclasses.fields(settings_class)}
    unknown = [f"{key}{suggestion(str(key), known)}" for key in content if key not in known]
    if unknown:
        raise SettingsError(f"{path} sets what does not exist: {'; '.join(unknown)}")
    return content


def suggestion(name: str, known: set[str]) -> str:
    """`, did you mean x?` for the nearest known name, or where to look."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {nearest[0]}?" if nearest else "; --help lists the settings"
