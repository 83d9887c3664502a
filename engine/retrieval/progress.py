"""Progress on stderr: a bar with rate and time left on a terminal, a line every half minute elsewhere."""

import sys
from collections.abc import Iterable
from typing import Any

FEW_QUERIES = 500
"""A search for fewer is over before a bar would help."""


def progress_bar(
    label: str,
    unit: str,
    items: Iterable | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    show: bool = True,
) -> Any:
    """A tqdm bar, over `items` or updated by hand; `initial` of `total` were done before and are not in the rate."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    seconds = {"mininterval": 0.1, "maxinterval": 10} if on_terminal else {"mininterval": 30, "maxinterval": 60}
    shown = {"desc": label, "unit": unit, "unit_scale": True, "disable": not show, "dynamic_ncols": on_terminal}
    return tqdm(items, total=total, initial=initial, **shown, **seconds)
