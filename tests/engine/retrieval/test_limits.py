"""Numbers out of their range are named, with what is allowed."""

from types import SimpleNamespace

import pytest

from quincunx.data_shards.errors import SettingsError
from quincunx.engine.retrieval.limits import check_lowest


def test_a_number_below_its_lowest_is_named_and_what_is_not_set_passes():
    settings = SimpleNamespace(depth=100, patience=None, seed=-1, sample=0)
    check_lowest(settings, {"depth": 1, "patience": 1})
    check_lowest(settings, {"sample": 0})
    with pytest.raises(SettingsError, match=r"^seed is -1: give 0 or more$"):
        check_lowest(settings, {"depth": 1, "seed": 0})
    with pytest.raises(SettingsError, match=r"^sample is 0: give 1 or more$"):
        check_lowest(settings, {"sample": 1})
