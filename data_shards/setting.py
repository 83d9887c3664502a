"""The fields of a settings dataclass: a range and a role beside each, and one check of all of them.

    seed: int = setting(42, low=0, high=2**32 - 1, role="stream")

Roles say what a resumed run may change (engine/checkpoint.py):
learned   what is learned: a change is printed (the default)
stream    where a step lies in the data: under another value a resumed run would repeat and miss examples
model     the model's shape: under another value a checkpoint does not fit
data      files of the training data: compared by what they hold, not by path
machine   nothing that is learned
"""

import dataclasses
import math
import operator
from typing import Any

BOUNDS = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def setting(default: Any = dataclasses.MISSING, *, role: str = "learned", local: bool = False, **bounds: float) -> Any:
    """A dataclass field. bounds: low, high, above, below, of a number or of each of a list or dict; None passes.

    local: machines of one run may have values of their own, such as paths of equal files.
    """
    assert bounds.keys() <= BOUNDS.keys()
    metadata = {"role": role, "local": local, "bounds": bounds}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def names_of(settings: Any, *roles: str) -> list[str]:
    """The fields with one of `roles`, of a settings class or object."""
    return [field.name for field in dataclasses.fields(settings) if field.metadata.get("role", "learned") in roles]


def local_names(settings: Any) -> set[str]:
    """The fields that machines of one run may have values of their own for."""
    return {field.name for field in dataclasses.fields(settings) if field.metadata.get("local")}


def find_problems(settings: Any) -> list[str]:
    """Every value out of its range, then what the class's own `contradictions()` finds, each as one clause."""
    problems = []
    for field in dataclasses.fields(settings):
        value, bounds = getattr(settings, field.name), field.metadata.get("bounds", {})
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        numbers = [number for number in values if number is not None]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            problems.append(f"{field.name} is {value}; it must be finite")
        elif not all(BOUNDS[name][1](number, bound) for name, bound in bounds.items() for number in numbers):
            words = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items())
            problems.append(f"{field.name} is {value}; it must be {words}")
    return problems + (settings.contradictions() if hasattr(settings, "contradictions") else [])


def as_plain(settings: Any) -> dict[str, Any]:
    """The settings as YAML and JSON can hold them."""
    values = dataclasses.asdict(settings)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
