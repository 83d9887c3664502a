"""Sends to MLflow what a run has recorded and not sent, because its server did not answer while it ran.

    python launchers/send_metrics.py --run runs/pretrain [--tracking http://127.0.0.1:5000]

Sending twice is harmless: the run's tracking.json knows how far it came.
"""

from dataclasses import dataclass
from pathlib import Path

from quincunx.data_shards.errors import SettingsError, exit_with_one_sentence
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class SendSettings:
    """Settings of sending a run's record."""

    run: str
    """Run folder, the --output of pretrain.py."""
    tracking: str | None = None
    """MLflow store to send to: a tracking URI, or "sqlite" for mlflow.db in the run folder (default: the run's own)."""


def main() -> None:
    settings = parse_settings(SendSettings, __doc__.split("\n")[0])
    from quincunx.engine.run_folder import TrackingState, view_command
    from quincunx.engine.tracking import send_all

    run_folder = Path(settings.run)
    state = TrackingState.load(run_folder)
    if state is None:
        raise SettingsError(f"{run_folder} is not a run folder (tracking.json is missing); give pretrain.py's --output")
    uri = settings.tracking or state.uri
    if uri == "none":
        raise SettingsError("the run was not tracked by MLflow; give --tracking URI, or --tracking sqlite")
    sent_before = state.sent_bytes if state.uri == uri else 0
    try:
        state = send_all(run_folder, uri)
    except SettingsError:
        raise
    except Exception as error:  # MLflow raises whatever its transport or store raises
        raise SettingsError(f"MLflow at {uri} did not take the record: {error}") from error
    print(f"Sent {state.sent_bytes - sent_before:,} bytes of metrics.jsonl to {state.uri}")
    print(f"To see them: {view_command(state.uri, run_folder)}")


if __name__ == "__main__":
    exit_with_one_sentence(main)
