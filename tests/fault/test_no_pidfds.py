"""Where the kernel refuses pidfds, the ends of owners and containers are seen all the same, and nothing is left."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool import ExecFailed, LeaseExpired, PoolServiceProxy, State
from tests.support.no_pidfds import ServiceWithoutPidfds
from tests.support.oracle import assert_healed
from tests.support.processes import sleeper
from tests.support.waiting import ends, eventually, pidfd

SIZE = 2


@pytest.fixture(scope="module")
def service(images: Path) -> Iterator[ServiceWithoutPidfds]:
    """They are denied, as by a policy. Ended in order, it leaves nothing."""
    service = ServiceWithoutPidfds(images, errno.EPERM)
    try:
        service.start(size=SIZE)
        yield service
    finally:
        service.close()


@pytest.fixture
def pool(service: ServiceWithoutPidfds) -> Iterator[PoolServiceProxy]:
    with service.connect() as pool:
        pool.wait_ready()
        yield pool
        assert_healed(service, pool)


def test_the_containers_of_an_owner_that_is_killed_are_reaped(
    pool: PoolServiceProxy, service: ServiceWithoutPidfds
) -> None:
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(sleeper())
        taken = [pool.get("x", 10, owner=owner.pid) for _ in range(SIZE)]
        containers = [container for container in taken if container is not None]
        inits = [stack.enter_context(pidfd(container.init_pid)) for container in containers]
        assert len(inits) == SIZE
        owner.kill()  # and stays a zombie, whose pid is not free
        assert all(map(ends, inits))
        with pytest.raises(LeaseExpired, match="owner died"):
            pool.container(containers[0].name)
    eventually(lambda: not any(service.has_traces(container.name) for container in containers), "they are removed")


def test_an_owner_that_is_stopped_keeps_its_container(pool: PoolServiceProxy) -> None:
    with sleeper() as owner:
        owner.send_signal(signal.SIGSTOP)
        container = pool.get("x", 10, owner=owner.pid)
        assert container is not None
        with sleeper() as other:  # whose end is noticed meanwhile
            gone = pool.get("y", 10, owner=other.pid)
            assert gone is not None
        eventually(lambda: gone.name not in {info.name for info in pool.containers()}, "the other's is reaped")
        assert container.state is State.LEASED
        container.release()


def test_a_container_that_goes_down_is_noticed(pool: PoolServiceProxy) -> None:
    with pool.lease("x", timeout=10) as container:
        os.kill(container.init_pid, signal.SIGKILL)
        eventually(lambda: container.name not in {info.name for info in pool.containers()}, "it is removed")
        with pytest.raises(LeaseExpired, match="init died"):
            container.renew(1)
    warm = next(info for info in pool.containers() if info.state is State.WARM)
    assert warm.init_pid is not None
    os.kill(warm.init_pid, signal.SIGKILL)
    eventually(lambda: warm.name not in {info.name for info in pool.containers()}, "it is replaced")


def test_a_dead_owner_is_refused(pool: PoolServiceProxy) -> None:
    with sleeper() as owner:
        pass
    with pytest.raises(ValueError, match=str(owner.pid)):
        pool.get("x", 0, owner=owner.pid)


def test_commands_say_what_they_lack_and_so_does_check(pool: PoolServiceProxy, service: ServiceWithoutPidfds) -> None:
    with pool.lease("x", timeout=10) as container, pytest.raises(ExecFailed, match=r"refuses pidfd_open.*check"):
        container.run(["true"], timeout=10)
    check = service.cli("check")
    assert check.returncode == 1
    assert "LACKS   pidfds: pidfd_open: " in check.stdout


def test_leases_survive_the_service_and_their_owners_ends_are_seen_by_the_next(service: ServiceWithoutPidfds) -> None:
    with sleeper() as owner, service.connect() as pool:
        pool.wait_ready()
        container = pool.get("x", 10, owner=owner.pid)
        assert container is not None
        service.kill()
        service.start(size=SIZE)
        assert container.state is State.LEASED
        owner.kill()
        owner.wait()
        eventually(lambda: not service.has_traces(container.name), "it is removed")
        assert_healed(service, pool)
