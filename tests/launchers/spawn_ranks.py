"""The smallest launcher: `spawn_ranks.py N COMMAND ...` starts N ranks on this machine and imports nothing heavy.

When one rank fails the others are killed at once, as harsh as a launcher can be. Exits with the first failing code
(256 - signal's number for a killed rank, as Python counts).
"""

import os
import socket
import subprocess
import sys
import time


def main() -> int:
    num_ranks, command = int(sys.argv[1]), sys.argv[2:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        variables = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
        ranks.append(subprocess.Popen(command, env=variables))
    failed = None
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = failed or next((code for code in codes if code), None)  # a rank that is then killed does not count
        if failed is not None and failed not in (75, 76, 77):
            for rank in ranks:
                rank.kill()
        if None not in codes:
            return failed % 256 if failed else 0
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
