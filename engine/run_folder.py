"""The folder of one run: held by one run at a time, set aside rather than overwritten.

OUTPUT/settings.yaml        the resolved settings of the latest start
OUTPUT/metrics.jsonl        every metric and event (engine/metrics_file.py)
OUTPUT/skipped_steps.jsonl  steps whose loss or gradient was not finite, with their sample ids
OUTPUT/checkpoints/         step-00001000/ ... (engine/checkpoint.py)
OUTPUT/export/              the finished models
"""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from quincunx.data_shards.errors import SettingsError

LOCK_FILE = "run.lock"
LOCK_PATIENCE_SECONDS = 10.0
SETTINGS_FILE = "settings.yaml"
SKIPPED_FILE = "skipped_steps.jsonl"


class RunFolder:
    """A run's folder, held by this process (rank 0) until it ends. Other ranks only use the paths."""

    def __init__(self, path: str, is_main: bool):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.settings_file = self.path / SETTINGS_FILE
        self._lock: IO[str] | None = None
        if is_main:
            self._hold()

    def _hold(self) -> None:
        """Takes the lock; a run that is just ending is waited for a few seconds.

        The lock is the kernel's (flock), so a killed run leaves none behind. Raises SettingsError where another run
        holds it, or where the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK_FILE, "a+")  # noqa: SIM115 - held for the process's life
        except OSError as error:
            raise SettingsError(f"output {self.path} cannot be written: {error.strerror}") from None
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    raise SettingsError(
                        f"output {self.path} lies on a file system that cannot lock files ({error.strerror}), so that "
                        "two runs could write there; mount it with locks, or choose another output"
                    ) from None
                if time.monotonic() > deadline:
                    self._lock.seek(0)
                    holder = self._lock.read().strip() or "unknown"
                    raise SettingsError(
                        f"output {self.path} is in use by another run ({holder}); stop it or choose another output"
                    ) from None
                time.sleep(0.2)
        self._lock.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        self._lock.flush()

    def set_aside(self) -> Path | None:
        """Moves everything of an earlier run into `OUTPUT.old-1`, -2 ...; that folder, None where there is nothing.

        Slurm runs a requeued job's command again as it was: what lies here then is the job's own run, and stays.
        """
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            return None
        earlier = [entry for entry in self.path.iterdir() if entry.name != LOCK_FILE]
        if not earlier:
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        aside.mkdir()
        for entry in earlier:
            entry.rename(aside / entry.name)
        return aside

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Writes the resolved settings of this start."""
        import yaml

        self.settings_file.write_text(yaml.safe_dump(settings, sort_keys=False))

    def note_skipped_step(self, record: dict[str, Any]) -> None:
        """Appends one skipped step to skipped_steps.jsonl."""
        with open(self.path / SKIPPED_FILE, "a") as file:
            file.write(json.dumps(record) + "\n")
