"""Work cut into parts, shared over ranks through files: what survives kill -9 and another number of ranks.

A folder holds plan.json (how many rows each part has, and a fingerprint of everything the rows depend on), then
part-00000.npy with its part-00000.json (rows, digest), written last. Rank r makes parts r, r + ranks, ... that are not
there yet; parts depend on the plan alone, so any number of ranks may go on with them. No process group is needed.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.engine.environment import Environment
from quincunx.engine.retrieval.files import check_manifest, file_digest, manifest_path, written_whole

PLAN = "plan.json"
OWN_PLAN = "plan-of-rank-"
POLL_SECONDS = 0.2
REPORT_SECONDS = 60.0


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of the whole."""

    number: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def cut_rows(num_rows: int, rows_a_part: int) -> list[Part]:
    """Parts of `rows_a_part` rows, the last one shorter: a function of the work, never of the ranks."""
    return [
        Part(number, start, min(start + rows_a_part, num_rows))
        for number, start in enumerate(range(0, num_rows, rows_a_part))
    ]


def run_parts(
    folder: Path,
    parts: Sequence[Part],
    make_part: Callable[[Part], np.ndarray],
    fingerprint: dict[str, Any],
    environment: Environment,
    *,
    patience_seconds: float = 3600.0,
    is_finished: Callable[[], bool] = lambda: False,
) -> list[Path] | None:
    """Makes what is missing of `parts` (every rank calls this); rank 0 waits for all and gets their files in order.

    folder: made where it is not there, kept until the caller removes it. Every rank must see it.
    make_part: the rows of a part, first axis `part.rows` long; whatever the rank, it must give the same rows.
    fingerprint: JSON of all that decides the rows: digests of model and data, settings.
    patience_seconds: how long rank 0 waits without any other rank's part appearing.
    is_finished: whether rank 0 has already made the whole of the parts; asked before every part, so that a rank that
        comes late does not begin anew what rank 0 has cleared away.

    Returns None on every other rank. Raises DataError where the folder holds other work's parts, make_part gives
    another number of rows, or the other ranks' parts do not come.
    """
    write_plan(folder, parts, fingerprint, environment)
    for part in parts[environment.rank :: environment.world_size]:
        if part_is_done(folder, part):
            continue
        if is_finished():
            shutil.rmtree(folder, ignore_errors=True)
            return None
        rows = make_part(part)
        if len(rows) != part.rows:
            raise DataError(f"part {part.number} of {folder} came out with {len(rows)} rows instead of {part.rows}")
        write_part(folder, part, rows)
    return wait_for_parts(folder, parts, environment, patience_seconds) if environment.is_main else None


def write_plan(folder: Path, parts: Sequence[Part], fingerprint: dict[str, Any], environment: Environment) -> None:
    """Writes the plan, or checks that the folder's is this one: parts of other work are never mixed in."""
    plan = _plan(parts, fingerprint)
    path = folder / PLAN
    if not path.is_file():
        foreign = [entry.name for entry in folder.glob("*") if not entry.name.lstrip(".").startswith(OWN_PLAN)]
        if foreign and not path.is_file():  # another rank may have written it meanwhile
            raise DataError(f"{folder} holds other files (such as {foreign[0]}): give a new folder, or an empty one")
        own = folder / f".{OWN_PLAN}{environment.rank}"  # all ranks write the same, none waits for another
        with written_whole(own) as file:
            json.dump(plan, file)
        os.replace(own, path)
    try:
        found = json.loads(path.read_bytes())
        found["fingerprint"], found["parts"] = found["fingerprint"], found["parts"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is not a plan of parts: remove the folder {folder} to begin anew") from None
    if found != plan:
        keys = {**found["fingerprint"], **plan["fingerprint"]}
        other = [key for key in keys if found["fingerprint"].get(key) != plan["fingerprint"].get(key)]
        raise DataError(
            f"{folder} holds parts of other work (differs in {', '.join(other) or 'how its rows are cut'}): give that "
            "work's settings again to finish it, or remove the folder to begin anew"
        )


def _plan(parts: Sequence[Part], fingerprint: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({"fingerprint": fingerprint, "parts": [[part.start, part.stop] for part in parts]}))


def is_planned(folder: Path, parts: Sequence[Part], fingerprint: dict[str, Any]) -> bool:
    """Whether the folder holds parts of just this work, finished or not."""
    try:
        return json.loads((folder / PLAN).read_bytes()) == _plan(parts, fingerprint)
    except (FileNotFoundError, ValueError):
        return False


def input_digest(path: str | Path) -> str:
    """The digest of a file that a stage reads. Raises DataError where it cannot be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def is_made(output: Path, kind: str, made_by: dict[str, Any], *, begun: bool = False) -> bool:
    """Whether a stage's file is there already, whole, and made from the same inputs by the same settings.

    kind, made_by: as in its manifest (files.py), which may say more. begun: this very work was begun before, so that a
    file without manifest is its own, cut off before the manifest.

    Raises DataError where the file is there and was made otherwise: it is not overwritten.
    """
    if not output.exists():
        if manifest_path(output).exists():
            raise DataError(f"{output} is missing, its manifest is there: remove {manifest_path(output)} or restore it")
        return False
    manifest = check_manifest(output, kind)
    if manifest is None:
        if begun:
            return False
        raise DataError(f"{output} is there already, without a manifest: remove it, or give another --output")
    found, wanted = manifest["made_by"], json.loads(json.dumps(made_by))
    other = [key for key in wanted if found.get(key) != wanted[key]]
    if other:
        raise DataError(
            f"{output} is there already and was made otherwise (differs in {', '.join(other)}): remove it, or give "
            "another --output"
        )
    return True


@contextmanager
def making(output: Path, kind: str, made_by: dict[str, Any]) -> Iterator[bool]:
    """Whether the caller has to make a stage's file, with its manifest, in this block; False where it is there.

    A mark beside the file, .NAME.begun, stands while it is made: a file without manifest and with this mark is what a
    kill has cut off before the manifest. kind, made_by, errors: as is_made.
    """
    mark, text = output.with_name(f".{output.name}.begun"), json.dumps(made_by, sort_keys=True)
    try:
        begun = mark.read_text(encoding="utf-8") == text
    except (FileNotFoundError, NotADirectoryError):
        begun = False
    except OSError as error:
        raise SettingsError(f"{output} cannot be written: {error.strerror}") from None
    if is_made(output, kind, made_by, begun=begun):
        yield False
        return
    with written_whole(mark) as file:
        file.write(text)
    try:
        yield True
    finally:
        if manifest_path(output).exists() or not output.exists():
            mark.unlink(missing_ok=True)


def part_path(folder: Path, part: Part) -> Path:
    return folder / f"part-{part.number:05d}.npy"


def write_part(folder: Path, part: Part, rows: np.ndarray) -> None:
    """Writes a part whole or not at all, then its description."""
    path = part_path(folder, part)
    with written_whole(path, "wb") as file:
        np.save(file, rows, allow_pickle=False)
    with written_whole(path.with_suffix(".json")) as file:
        json.dump({"rows": len(rows), "digest": file_digest(path)}, file)


def part_is_done(folder: Path, part: Part) -> bool:
    """Whether a part is there, has its rows, and is what was written."""
    path = part_path(folder, part)
    try:
        described = json.loads(path.with_suffix(".json").read_bytes())
        return described == {"rows": part.rows, "digest": file_digest(path)}
    except (FileNotFoundError, ValueError):
        return False


def wait_for_parts(
    folder: Path, parts: Sequence[Part], environment: Environment, patience_seconds: float
) -> list[Path]:
    """All parts' files in order, once every one of them is there and verifies."""
    missing, since, reported = list(parts), time.monotonic(), time.monotonic()
    while missing:
        left = [part for part in missing if not part_is_done(folder, part)]
        now = time.monotonic()
        if len(left) < len(missing):
            since = now
        elif now - since > patience_seconds:
            ranks = sorted({part.number % environment.world_size for part in left})
            raise DataError(
                f"{len(left)} of {len(parts)} parts are missing from {folder} (of ranks {ranks}), and none came for "
                f"{patience_seconds:.0f} s: run the same command again, which makes the missing parts only"
            )
        missing = left
        if missing:
            if now - reported > REPORT_SECONDS:
                print(f"waiting for {len(missing)} of {len(parts)} parts of other ranks", file=sys.stderr, flush=True)
                reported = now
            time.sleep(POLL_SECONDS)
    return [part_path(folder, part) for part in parts]
