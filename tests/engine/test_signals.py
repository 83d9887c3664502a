"""Each case runs in a process of its own, since handlers and exits belong to a process."""

import signal
import subprocess
import sys
import time

import pytest

WAIT = """
import sys, time
from quincunx.engine.signals import StopRequest
request = StopRequest(launched={launched})
print("ready", flush=True)
while not request.pending():
    time.sleep(0.01)
print(request.reason, flush=True)
"""


def start(code: str, **arguments) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **arguments)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_sets_the_flag_and_does_not_end_the_process(number):
    process = start(WAIT.format(launched=False))
    process.send_signal(number)
    assert process.communicate(timeout=20)[0].strip() == number.name and process.returncode == 0


def test_a_second_interrupt_ends_the_process_at_once():
    process = start(WAIT.format(launched=False).replace("while not request.pending():", "while True:"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode not in (0, None)


PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"


@pytest.mark.parametrize(("launched", "said"), [(True, "the death of the launcher"), (False, "")])
def test_the_launcher_s_death_is_a_request_and_a_shell_s_is_none(launched, said):
    """The child keeps our end of the pipe open, so its last line comes when it ends."""
    code = (
        WAIT.format(launched=launched)
        .replace(
            "while not request.pending():", "end = time.time() + 3\nwhile not request.pending() and time.time() < end:"
        )
        .replace("print(request.reason", "print(request.reason or ''")
    )
    parent = subprocess.Popen([sys.executable, "-c", PARENT, code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    assert parent.stdout.read().strip() == said
    parent.wait()


def test_the_watchdog_ends_a_silent_process_with_76_and_shows_where_it_hangs():
    code = """
import time
from quincunx.engine.signals import Watchdog
def somewhere(): time.sleep(60)
watchdog = Watchdog(0.5, on_hang=lambda: print("told", flush=True))
for _ in range(8):
    time.sleep(0.2)
    watchdog.beat()
print("alive after 1.6 s", flush=True)
somewhere()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 76 and done.stdout == "alive after 1.6 s\ntold\n"
    assert "hung: no step has finished" in done.stderr and "in somewhere" in done.stderr


def test_the_watchdog_ends_a_process_whose_last_words_hang_or_fail():
    code = """
import time
from quincunx.engine import signals
signals.ON_HANG_SECONDS = 0.5
signals.Watchdog(0.3, on_hang=lambda: {last_words})
time.sleep(60)
"""
    for last_words in ("time.sleep(60)", "1 / 0"):
        done = subprocess.run([sys.executable, "-c", code.format(last_words=last_words)], timeout=30)
        assert done.returncode == 76
