"""Measurements that take turns: each contender in a process of its own, step by step, so that noise hits all alike."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence


class ContenderEnded(Exception):
    """A contender's process ended before its last turn; `name` says which."""

    def __init__(self, name: str, code: int):
        super().__init__(f"the {name} step ended with exit code {code}")
        self.name = name


def take_turns(
    commands: Mapping[str, Sequence], turns: int, environment: Mapping[str, str] | None = None
) -> dict[str, list[list]]:
    """What each command's process, which must call `serve`, answered in each turn. Raises ContenderEnded."""
    workers = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for name, command in commands.items()
    }
    answers: dict[str, list[list]] = {name: [] for name in commands}
    try:
        for _ in range(turns):
            for name, worker in workers.items():
                with contextlib.suppress(BrokenPipeError):  # it has ended: its answer is empty, too
                    worker.stdin.write("step\n")
                    worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    raise ContenderEnded(name, worker.wait())
                answers[name].append(json.loads(answer))
    finally:
        for worker in workers.values():
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
            worker.wait()
    return answers


def serve(step: Callable[[], None], figures: Callable[[], list]) -> None:
    """Runs `step` for every line on stdin and answers with its seconds, followed by `figures()`."""
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, *figures()]), flush=True)
