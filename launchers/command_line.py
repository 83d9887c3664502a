"""The command line of every launcher: a YAML file of some of the settings, then flags over it.

A settings dataclass is the only place that names a setting: its field is the flag and the YAML key, its default is the
default, the string below it is the help, its metadata the range (data_shards/setting.py).
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.setting import as_plain, find_problems, names_of

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

    outer = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    outer.add_argument(config_flag, dest="configs", action="append", nargs="?")
    # DeepSpeed's launcher adds the local rank; the environment says it too.
    outer.add_argument("--local_rank", "--local-rank", nargs="?")
    given, words = outer.parse_known_args(argv)
    configs = given.configs or [default_config]
    shipped = {path.stem: path for path in sorted(config_folder.glob("*.yaml"))} if config_folder else {}
    if len(configs) > 1:
        named = ", ".join(map(str, configs))
        raise SettingsError(f"{config_flag} is given {len(configs)} times: {named}; give it once")
    if given.configs and not given.configs[0]:
        raise SettingsError(f"{config_flag} is given without a file: name one")
    if (name := configs[0]) is not None:
        path = Path(name) if Path(name).is_file() else shipped.get(name)
        if path is None:
            others = f" and none of the names {', '.join(shipped)}" if shipped else ""
            raise SettingsError(f"{config_flag} {name}: no such file{others}")
        words = as_flags(read_config(path, settings_class)) + words
    help_line = f"{config_flag} FILE.yaml gives values for any of the options"
    help_line += f"; shipped: {', '.join(shipped)}" if shipped else ""
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
    if "--print_config" in words:
        print(yaml.safe_dump(as_plain(settings), sort_keys=False), end="")
        sys.exit(0)
    if problems := find_problems(settings) + find_more(settings):
        raise SettingsError("; ".join(problems))
    if os.environ.get("QUINCUNX_CHECK"):  # of a chain: inputs may be made by its earlier stages
        from quincunx.data_shards.tokenizer import PACKAGE_PREFIX, resolve_model

        named = [getattr(settings, name) for name in names_of(settings, "data")]
        paths = [path for value in named if value for path in (value if isinstance(value, list) else [value])]
        paths = [resolve_model(path) if path.startswith(PACKAGE_PREFIX) else path for path in paths]
        missing = [path for path in paths if not Path(path).exists()]
        print("settings are sound" + (f"; not there yet: {', '.join(missing)}" if missing else ""))
        sys.exit(0)
    return settings


def in_one_sentence(box: str) -> str:
    """tyro's refusal without its frame: the message, and the nearest flag if it names one."""
    message, *others = re.split(r"\n\W*─{9,}\W*\n", box.partition("\n")[2])
    plain = " ".join(message.replace("│", " ").split()).rstrip(".")
    if wrong := re.match(
        r"Error parsing (--\w+): no type matching (\S+) could be instantiated from \['(.*?)'\]", plain
    ):
        kinds = " or ".join(wrong[2].replace("{None}", "None").split("|"))
        plain = f"{wrong[1]} is {wrong[3]}; it takes {kinds}"
    if wrong := re.match(r"Error parsing (--\w+): Failed to parse key-value pairs", plain):
        plain = f"{wrong[1]} takes pairs: NAME NUMBER NAME NUMBER ... (in YAML a mapping)"
    nearest = [flag for block in others if "Perhaps you meant" in block for flag in re.findall(r"--\w+", block)]
    return plain + (f"; did you mean {nearest[0]}?" if nearest else "; --help lists the settings")


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """{"steps": 3, "tasks": ["mkp"], "fresh": True} as --steps=3 --tasks mkp --fresh."""
    words = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = [word for pair in value.items() for word in pair]
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words.append(f"--{name}={value}")
    return words


def read_config(path: Path, settings_class: type) -> dict[str, Any]:
    """A YAML file's settings. Raises SettingsError naming every key that is no field, each with the nearest field."""
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


def suggestion(name: str, known: Iterable[str], otherwise: str = "; --help lists the settings") -> str:
    """`, did you mean x?` for the nearest known name, or where to look."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {nearest[0]}?" if nearest else otherwise
