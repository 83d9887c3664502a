"""What the numbers of every retrieval command's settings are checked with."""

from collections.abc import Mapping

from quincunx.data_shards.errors import SettingsError


def check_lowest(settings: object, lowest: Mapping[str, int]) -> None:
    """Raises SettingsError for the first named setting that is below its lowest value; None is not set."""
    for name, least in lowest.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise SettingsError(f"{name} is {value}: give {least} or more")
