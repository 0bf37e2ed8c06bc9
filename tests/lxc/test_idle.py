"""A service that nobody asks anything does nothing."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from lxc_pool import PoolServiceProxy
from tests.support.real_service import Service
from tests.support.waiting import eventually


def switches(pid: int) -> int:
    """Return how often the threads of a process have gone to sleep. Source: proc_pid_status(5)."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            for line in Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                total += int(value) if name == "voluntary_ctxt_switches" else 0
    return total


def test_an_idle_service_and_its_workers_sleep(pool: PoolServiceProxy, shared_service: Service) -> None:
    with pool.lease("x") as container:
        container.run(["true"], check=True)
    eventually(lambda: len(pool.containers()) == 3, "what was leased is gone")
    pool.wait_ready()
    # Whatever the last call has set off comes to rest.
    processes: list[int] = []
    while processes != (processes := shared_service.marked()):
        time.sleep(0.3)
    assert shared_service.pid in processes
    assert len(processes) > 3
    before = {pid: switches(pid) for pid in processes}
    time.sleep(1)
    woken = {pid: count for pid in processes if (count := switches(pid) - before[pid])}
    assert sum(woken.values()) < 5, woken
