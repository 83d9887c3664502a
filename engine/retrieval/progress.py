"""Progress on stderr: a bar with rate and time left on a terminal, a line every half minute elsewhere."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 30
FEW_QUERIES = 500
"""A search for fewer is over before a bar would help."""


def progress_bar(total: int | None, label: str, unit: str, *, initial: int = 0, show: bool = True) -> Any:
    """A tqdm bar; `initial` of `total` were done before and do not count for the rate."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=True,
        initial=initial,
        disable=not show,
        dynamic_ncols=on_terminal,
        mininterval=0.1 if on_terminal else SECONDS_BETWEEN_LINES,
        maxinterval=10 if on_terminal else 2 * SECONDS_BETWEEN_LINES,
    )


def counted(items: Iterable[Item], label: str, unit: str, *, show: bool = True) -> Iterator[Item]:
    """The items, with a bar that counts them; a sequence tells the total."""
    total = len(items) if isinstance(items, Sized) else None
    with progress_bar(total, label, unit, show=show) as bar:
        for item in items:
            yield item
            bar.update()
