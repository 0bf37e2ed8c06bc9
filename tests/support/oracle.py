"""After a fault: is the pool whole again, and does the host have nothing that nobody owns?"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from lxc_pool import PoolServiceProxy, State
from lxc_pool.errors import LxcPoolError
from lxc_pool.host import idranges
from lxc_pool.service import audit
from tests.support.real_service import Service
from tests.support.waiting import PATIENCE, eventually

HEALED = 10.0
"""Seconds from the end of a fault until the pool is full again. The promise is "within seconds"; it takes one."""


def assert_healed(
    service: Service, pool: PoolServiceProxy, *, leased: Collection[str] = (), within: float = HEALED
) -> None:
    """Assert that the pool is full in time, has just these leases, and that an audit finds nothing.

    The audit is the service's own, and beside it a count with other eyes: what is on the host is exactly what the pool
    says that it has.
    """
    state: list[object] = []

    def whole() -> bool:
        state[:] = [(info.name, str(info.state), info.reason) for info in pool.containers()], pool.status()
        names = {info.name for info in pool.containers() if info.state is State.LEASED}
        status = pool.status()
        busy = status.building or status.reserved or status.reaping or status.stuck
        return status.size == status.capacity and not busy and names == set(leased)

    try:
        eventually(whole, "the pool is whole again", within)
    except AssertionError as error:
        raise AssertionError(f"{error}: {state}\n{service.log}") from error
    found = audit.audit(service.state_dir, service.host_dir).findings
    assert not found, f"{found}\n{service.log}"
    assert_host_has_just(service, {info.name for info in pool.containers()})


def assert_host_has_just(service: Service, names: Collection[str]) -> None:
    """Assert that there is nothing of the service's on the host but what belongs to these containers."""
    assert {path.name for path in service.containers.iterdir()} == set(names)
    strange = [path for path in service.cgroups() if not any(f".{name}" in path for name in names)]
    assert not strange
    locks = {path.name.removeprefix(".") for path in service._lock_files()}
    assert locks <= set(names)
    assert set(service.semaphores().values()) <= semaphores_in_use(service.pid)
    ranges = [Path(holder) for _path, holder in idranges.held()]
    assert sorted(path.name for path in ranges if path.parent == service.containers) == sorted(names)


def semaphores_in_use(pid: int) -> set[str]:
    """Return the inodes of the semaphores that a process uses; whoever makes one knows it by another name at first."""
    words = (line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return {fields[4] for fields in words if len(fields) > 5 and fields[5].startswith("/dev/shm/sem.")}


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a service's process takes, and has to give back."""

    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        return cls(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))


def assert_no_larger(pid: int, before: Footprint, within: float = PATIENCE) -> None:
    """Assert that a process's footprint is what it was, or comes to be."""
    seen: list[Footprint] = []

    def small() -> bool:
        seen[:] = [Footprint.of(pid)]
        return seen[0].descriptors <= before.descriptors and seen[0].threads <= before.threads

    try:
        eventually(small, "descriptors and threads are given back", within)
    except AssertionError as error:
        links = sorted(os.readlink(path) for path in _links(pid))
        raise AssertionError(f"{error}: {before} has become {seen}: {links}") from error


def _links(pid: int) -> Iterator[Path]:
    for path in Path(f"/proc/{pid}/fd").iterdir():
        if os.path.lexists(path):
            yield path


def becomes_ready(pool: PoolServiceProxy, timeout: float = 30.0) -> None:
    """Wait until the pool is full, whatever goes wrong meanwhile."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            pool.wait_ready(timeout=max(0.0, deadline - time.monotonic()))
        except LxcPoolError:
            if time.monotonic() > deadline:
                raise
        else:
            return
