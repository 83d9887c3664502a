"""metrics.jsonl: the record of a run, one JSON object a line, from which MLflow, plots and the model card are drawn.

A line is {"step": optimizer steps done, "time": seconds since 1970, "kind": "train" | "held_out" | "probe" | "event",
...values}. JSON has no word for nan and inf, so they are written as the strings "nan", "inf" and "-inf".
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """The record, open for appending, cut back to the steps that the resumed checkpoint holds.

    path: the file. resume_step: optimizer steps the loaded checkpoint has done, 0 for a run that starts from nothing.
    The steps after it will be trained and written again, so that each stands once; a line that a crash tore goes too.
    """

    def __init__(self, path: Path, resume_step: int):
        if path.exists():
            os.truncate(path, _bytes_until(path, resume_step))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._unwritten = b""

    def append(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Hands one line to the operating system, so that a killed process loses none.

        Where the disk is full, that is said once, and the lines wait in memory until there is room.
        """
        record = {"step": step, "time": round(time.time(), 3), "kind": kind}
        record.update((name, plain(value)) for name, value in values.items())
        complaining = not self._unwritten
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if complaining:
                print(f"warning: {self._file.name} cannot be written: {error.strerror}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            print(f"warning: {lost} lines of {self._file.name} are lost", file=sys.stderr, flush=True)
        self._file.close()


def _bytes_until(path: Path, resume_step: int) -> int:
    """The length of the leading lines that are whole and belong to steps up to `resume_step` (none where it is 0)."""
    kept = 0
    if resume_step <= 0:
        return kept
    with open(path, "rb") as file:
        for line in file:
            record = parse_line(line)
            if record is None or record["step"] > resume_step:
                break
            kept += len(line)
    return kept


def plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors and numpy scalars become numbers, nan and inf become strings."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of one line, None where a crash or a full disk tore it."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"step", "time", "kind"} <= record.keys() else None


def read_metrics(run_folder: Path) -> Iterator[dict[str, Any]]:
    """The run's records, oldest first; torn lines are left out. Nothing where the run has written none yet."""
    path = Path(run_folder) / METRICS_FILE
    if path.exists():
        with open(path, "rb") as file:
            yield from filter(None, map(parse_line, file))


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The record's metrics as floats, nan and inf included; step, time and everything that is no number left out."""
    values = {}
    for name, value in record.items():
        if name in ("step", "time", "kind") or isinstance(value, bool):
            continue
        if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
            values[name] = float(value)
    return values
