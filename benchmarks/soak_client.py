"""One of the soak's clients: leases at random times, uses what it got, releases it, and may be killed in the middle.

`python -m benchmarks.soak_client HOST_DIR SEED CYCLES RATE KILLED`; writes a line for each container that it got: the
monotonic time, and the seconds that `get` took. Arrivals are a Poisson process of RATE a second: if it is late, it does
not wait. Each cycle is with probability KILLED the last one: SIGKILL comes at a random moment of it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time

from lxc_pool import PoolManager

_HOLD = 0.02
"""Seconds that a container is held on average. A guess: a short test."""

_USED = 10
"""In one of so many containers a command is run."""


def main() -> None:
    """Run the client."""
    host_dir, seed, cycles, rate, killed = sys.argv[1], *map(float, sys.argv[2:])
    rng = random.Random(seed)  # noqa: S311  # arrivals, no secrets
    pool = PoolManager.connect(host_dir, timeout=60)
    due = time.monotonic()
    for number in range(int(cycles)):
        due += rng.expovariate(rate)
        time.sleep(max(0.0, due - time.monotonic()))  # until the next arrival of the Poisson process
        if rng.random() < killed:
            moment = rng.uniform(0.0, 2 * _HOLD)
            threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
        begin = time.monotonic()
        with pool.lease(f"soak-{number}", timeout=60) as container:
            print(f"{time.monotonic()} {time.monotonic() - begin}", flush=True)
            if number % _USED == 0:
                container.run(["true"], check=True)
            time.sleep(min(1.0, rng.expovariate(1 / _HOLD)))  # the time that a test takes


if __name__ == "__main__":
    main()
