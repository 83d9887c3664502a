"""The command line of every launcher: one frozen dataclass, a YAML file of some of its fields, then flags over it.

The dataclass is the only place a setting is named: its field is the flag and the YAML key, its default is the default,
the string below it is the help line.
"""

import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from quincunx.data_shards.errors import SettingsError

Settings = TypeVar("Settings")


def parse_settings(
    settings_class: type[Settings],
    description: str,
    argv: Sequence[str] | None = None,
    config_flag: str = "--config",
    config_folder: Path | None = None,
    default_config: str | None = None,
    base_config: str | None = None,
) -> Settings:
    """Reads a launcher's settings from `argv` (default: the process's own).

    `config_flag FILE.yaml` gives values for any of the fields; with `config_folder`, a bare NAME means
    `config_folder/NAME.yaml`. `default_config` is the file or name taken when the flag is absent; `base_config` one
    that is always read first, so that the flag's file only changes some of it. A flag wins over the files wherever it
    stands. Lists are written `--tasks mkp cmp` or `--tasks mkp,cmp`, booleans `--fresh` or
    `--fresh=false`. `--help` and `--print_config` print and leave the process with exit code 0.

    Raises SettingsError for an unknown key or flag (naming the nearest known one) and for a value of the wrong type.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False)
    config_help = "A YAML file with any of the fields below"
    if config_folder is not None:
        config_help += f", or one of {', '.join(config_names(config_folder))}"
    config_help += f" (default: {default_config})." if default_config else "."
    parser.add_argument(config_flag, action=ActionConfigFile, help=config_help)
    parser.add_class_arguments(settings_class)

    arguments = normalise(list(sys.argv[1:] if argv is None else argv), settings_class, config_flag)
    config, flags = take_config(arguments, config_flag, default_config)
    for name in (config, base_config):
        if name is not None:
            path = find_config(name, config_flag, config_folder)
            check_keys(path, settings_class)
            flags = [f"{config_flag}={path}", *flags]
    try:
        parsed = parser.parse_args(flags)
    except Exception as error:
        if type(error).__name__ not in ("ArgumentError", "ArgumentTypeError"):
            raise
        raise SettingsError(readable(str(error), settings_class)) from None
    return settings_class(**{field.name: parsed[field.name] for field in dataclasses.fields(settings_class)})


def config_names(folder: Path) -> list[str]:
    """The names that `--recipe NAME` accepts: the YAML files of `folder` without their ending."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_config(name: str, config_flag: str, folder: Path | None) -> Path:
    """The file that `name` means: a path that exists, or the name of a file in `folder`."""
    candidates = [Path(name)]
    if folder is not None:
        candidates.append(folder / f"{name}.yaml")
    for path in candidates:
        if path.is_file():
            return path
    known = config_names(folder) if folder is not None else []
    raise SettingsError(
        f"{config_flag} {name}: no such file" + (f" and none of the names {', '.join(known)}" if known else "")
    )


def normalise(arguments: list[str], settings_class: type, config_flag: str) -> list[str]:
    """Rewrites flags to `--name=value`, lists as JSON; raises SettingsError for a name that is no field."""
    fields = field_types(settings_class)
    known = {config_flag.removeprefix("--"), "help", "print_config", *fields}
    out: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            if argument == "-h":
                out.append(argument)
                continue
            raise SettingsError(f"unexpected argument {argument!r}; every setting is given as --name value")
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise SettingsError(f"unknown setting --{name}{suggestion(name, known)}")
        if name in ("help", "print_config"):
            out.append(f"--{name}{equals}{value}")
            continue
        values = [value] if equals else []
        while not equals and position < len(arguments) and not arguments[position].startswith("--"):
            values.append(arguments[position])
            position += 1
        out.append(f"--{name}={joined(name, values, fields.get(name, str))}")
    return out


def joined(name: str, values: list[str], kind: Any) -> str:
    """One command-line value for the words that followed `--name`."""
    if is_sequence(kind):
        if len(values) == 1 and (values[0][:1] == "[" or (values[0] == "null" and type(None) in typing.get_args(kind))):
            return values[0]
        words = [word for value in values for word in value.split(",") if word]
        return "[" + ", ".join(json.dumps(word) if is_sequence(kind, str) else word for word in words) + "]"
    if kind is bool and not values:
        return "true"
    if len(values) != 1:
        raise SettingsError(f"--{name} takes one value, {len(values)} given: {' '.join(values) or 'none'}")
    return values[0]


def field_types(settings_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(settings_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings_class)}


def is_sequence(kind: Any, element: type | None = None) -> bool:
    """Whether a field's type is a list or tuple, also `list[...] | None` (of `element`, where one is given)."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if typing.get_origin(option) in (list, tuple):
            return element is None or typing.get_args(option)[0] is element
    return False


def take_config(arguments: list[str], config_flag: str, default_config: str | None) -> tuple[str | None, list[str]]:
    """Separates the configuration file from the other flags; given twice, it is an error."""
    prefix = f"{config_flag}="
    given = [argument.removeprefix(prefix) for argument in arguments if argument.startswith(prefix)]
    others = [argument for argument in arguments if not argument.startswith(prefix)]
    if len(given) > 1:
        raise SettingsError(f"{config_flag} is given {len(given)} times: {', '.join(given)}; give it once")
    return (given[0] if given else default_config), others


def check_keys(path: Path, settings_class: type) -> None:
    """Raises SettingsError naming every key of a YAML file that is no field, each with the nearest field."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold `setting: value` lines")
    known = set(field_types(settings_class))
    unknown = [f"{key}{suggestion(str(key), known)}" for key in content if key not in known]
    if unknown:
        raise SettingsError(f"{path} sets what does not exist: {'; '.join(unknown)}")


def readable(message: str, settings_class: type) -> str:
    """jsonargparse's refusal of a value as one sentence: the setting, what is allowed, what was given."""
    message = " ".join(message.split())
    found = re.search(r'Parser key "(\w+)".*?(?:Got value|Given value):\s*(.*)', message)
    if found is None or found[1] not in field_types(settings_class):
        return message
    allowed, given = in_words(field_types(settings_class)[found[1]]), found[2].partition(" - Expected")[0] or "nothing"
    return f"{found[1]} must be {allowed}, given {given}"


def in_words(kind: Any) -> str:
    """A field's type as a user would say it: `list[float] | None` is "finite numbers, or null"."""
    plain = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "null"}
    many = {int: "whole numbers", float: "finite numbers", str: "texts"}
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return ", or ".join(in_words(option) for option in inner)
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    if origin is tuple and ... not in inner:
        return f"{len(inner)} {many[inner[0]]}"
    return many[inner[0]] if origin in (list, tuple) else plain.get(kind, str(kind))


def suggestion(name: str, known: set[str]) -> str:
    """`, did you mean x?` for the nearest known name, or where to look."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {nearest[0]}?" if nearest else "; --help lists the settings"
