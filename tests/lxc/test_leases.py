"""Who holds a real container, for how long, and what ends it."""

from __future__ import annotations

import contextlib
import grp
import multiprocessing
import os
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import pytest

from lxc_pool import AccessDenied, Container, LeaseExpired, PoolServiceProxy, State, UnknownLease
from lxc_pool.backend.lxc.engine import LxcBackend
from tests.support import remote
from tests.support.processes import NOBODY, as_nobody, in_child, sleeper
from tests.support.real_service import Service
from tests.support.waiting import ends, eventually, pidfd

LEASE_AND_WAIT = """
    containers = [pool.get(number, 30) for number in range({number})]
    print(*(container.name for container in containers), flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def kept(pool: PoolServiceProxy, container: Container | None) -> Iterator[tuple[Container, int]]:
    """Yield a container with its init's pidfd, and release it."""
    assert container is not None
    with container, pidfd(container.init_pid) as init:
        yield container, init
    assert pool.echo("x") == "x"


def leased(pool: PoolServiceProxy) -> set[str]:
    return {info.name for info in pool.containers() if info.state is State.LEASED}


def init_of(pool: PoolServiceProxy, name: str) -> int:
    pid = pool.container(name).init_pid
    assert pid
    return pid


def test_the_containers_of_an_owner_that_is_killed_are_reaped(pool: PoolServiceProxy, shared_service: Service) -> None:
    with shared_service.client(LEASE_AND_WAIT.format(number=2)) as client, contextlib.ExitStack() as stack:
        assert client.stdout is not None
        names = client.stdout.readline().split()
        assert leased(pool) == set(names)
        inits = [stack.enter_context(pidfd(init_of(pool, name))) for name in names]
        client.kill()
        client.wait()
        assert all(map(ends, inits))
    eventually(lambda: not any(map(shared_service.has_traces, names)), "they are removed")
    with pytest.raises(LeaseExpired, match="owner died"):
        pool.container(names[0])


def test_a_lease_lives_as_long_as_the_process_it_was_asked_for(pool: PoolServiceProxy) -> None:
    with sleeper() as owner, kept(pool, pool.get("x", 10, owner=owner.pid)) as (container, init):
        (info,) = [info for info in pool.containers() if info.name == container.name]
        assert info.owner_pid == owner.pid
        owner.kill()
        owner.wait()
        assert ends(init)
        with pytest.raises(LeaseExpired, match="owner died"):
            container.run(["true"])


def test_an_owner_that_is_dead_is_refused(pool: PoolServiceProxy) -> None:
    with sleeper() as owner:
        pass
    with pytest.raises(ValueError, match=str(owner.pid)):
        pool.get("x", 10, owner=owner.pid)


def test_a_lease_ends_by_itself_after_its_ttl(pool: PoolServiceProxy) -> None:
    with kept(pool, pool.get("x", 10, ttl=0.1)) as (container, init):
        assert ends(init)
        with pytest.raises(LeaseExpired, match="expired"):
            container.run(["true"])
        with pytest.raises(LeaseExpired, match="expired"):
            container.renew(10)


def test_a_renewed_lease_outlives_its_first_ttl(pool: PoolServiceProxy) -> None:
    with kept(pool, pool.get("x", 10, ttl=0.3)) as (container, init):
        container.renew(30)
        assert not ends(init, timeout=0.5)
        container.renew(0)
        assert ends(init)


def test_a_kept_lease_outlives_its_process(pool: PoolServiceProxy, shared_service: Service) -> None:
    script = "container = pool.get('x', 30); container.keep(60); print(container.name)"
    with shared_service.client(script) as client:
        name = client.communicate()[0].strip()
    assert client.returncode == 0
    (info,) = [info for info in pool.containers() if info.name == name]
    assert (info.state, info.owner_pid, info.owner_uid) == (State.LEASED, None, 0)
    with pool.container(name) as container:
        container.run(["true"], check=True)


def test_a_kept_lease_ends_by_its_ttl(pool: PoolServiceProxy) -> None:
    with kept(pool, pool.get("x", 10)) as (container, init):
        container.keep(0.1)
        assert ends(init)


def test_a_container_that_is_forgotten_warns_and_is_released(pool: PoolServiceProxy) -> None:
    container = pool.get("x", 10)
    assert container is not None
    with pidfd(container.init_pid) as init:
        with pytest.warns(ResourceWarning, match=container.name):
            del container
        assert ends(init)


def test_a_forked_child_uses_its_parents_pool_and_container(pool: PoolServiceProxy) -> None:
    def use() -> tuple[str, str]:
        return pool.echo("child"), container.run(["hostname"], capture_output=True, text=True).stdout.strip()

    with pool.lease("x") as container:
        assert in_child(use) == ("child", container.name)
        assert pool.echo("parent") == "parent"
        assert container.state is State.LEASED  # the child's copy is no lease of its own


def test_what_a_forked_child_leases_ends_with_the_child(pool: PoolServiceProxy) -> None:
    def lease() -> tuple[str, int]:
        container = pool.get("x", 10)
        assert container is not None
        name, pid = container.name, container.init_pid
        container.__dict__.clear()  # nothing of it is left to be released by the interpreter
        return name, pid

    name, _pid = in_child(lease)
    eventually(lambda: name not in {info.name for info in pool.containers()}, "it is reaped")


def test_a_container_is_used_by_a_spawned_child_of_its_owner(pool: PoolServiceProxy) -> None:
    context = multiprocessing.get_context("spawn")
    with pool.lease("x") as container:
        answers, theirs = context.Pipe(duplex=False)
        child = context.Process(target=remote.use, args=(container, theirs))
        try:
            child.start()
            theirs.close()
            assert answers.poll(30)
            assert answers.recv() == (child.pid, container.name, State.LEASED)
            child.join()
            assert child.exitcode == 0
        finally:
            child.close()
            answers.close()
            resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # or it lives as long as we do
        assert container.state is State.LEASED


def test_an_expired_lease_says_why_it_ended(pool: PoolServiceProxy) -> None:
    with pool.lease("x") as container:
        pass
    for use in (lambda: container.run(["true"]), lambda: container.ips, lambda: container.state):
        with pytest.raises(LeaseExpired, match="released"):
            use()
    with pytest.raises(UnknownLease):
        pool.container("lxp-000000-0000-1")


def test_a_container_whose_init_is_killed_is_lost_to_its_owner(pool: PoolServiceProxy, shared_service: Service) -> None:
    with kept(pool, pool.get("x", 10)) as (container, init):
        os.kill(container.init_pid, 9)
        assert ends(init)
        eventually(lambda: container.name not in leased(pool), "the service has noticed")
        with pytest.raises(LeaseExpired, match="init"):
            container.run(["true"])
    eventually(lambda: not shared_service.has_traces(container.name), "it is removed")


def test_another_users_process_sees_that_a_container_is_there_and_no_more(service: Service) -> None:
    group = grp.getgrgid(NOBODY).gr_name
    pool = service.start(size=2, config=f'[pool]\nworkers = 1\n[access]\ngroup = "{group}"\n')
    pool.wait_ready()

    def use() -> str:
        with pool.lease("mine") as container:
            return str(container.run(["id", "-u"], capture_output=True, text=True, check=True).stdout.strip())

    def look() -> list[tuple[object, object, object]]:
        return [(info.id, info.owner_pid, info.owner_uid) for info in pool.containers() if info.name == theirs.name]

    with pool.lease("secret") as theirs:
        assert as_nobody(use) == "0"  # root of the container, in the container only
        assert as_nobody(look) == [(None, None, None)]
        for touch in (
            lambda: theirs.run(["true"]),
            lambda: pool.container(theirs.name),
            lambda: theirs.keep(1),
            theirs.release,
        ):
            kind, words = as_nobody(touch) or (None, "")
            assert kind in (UnknownLease, None), words
        assert as_nobody(lambda: pool.get("x", 10, owner=os.getppid()))[0] is AccessDenied
        for administer in (lambda: pool.resize(1), pool.drain, pool.resume, pool.shutdown):
            assert as_nobody(administer)[0] is AccessDenied
        theirs.run(["true"], check=True)


def test_a_user_outside_the_group_does_not_get_in(pool: PoolServiceProxy) -> None:
    kind, words = as_nobody(lambda: pool.echo("x"))
    assert kind is AccessDenied
    assert "administrator" in words


def test_threads_share_a_pool(pool: PoolServiceProxy) -> None:
    heard: list[str] = []
    threads = [threading.Thread(target=lambda word=word: heard.append(pool.echo(word))) for word in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(heard) == list("abcdef")


def test_what_runs_on_in_a_released_container_ends_though_others_are_asked_for(service: Service) -> None:
    """Else it would have the CPUs; one in which nothing runs may wait for a lull."""
    pool = service.start(size=8)
    pool.wait_ready()
    backend = LxcBackend(service.state_dir)
    container = pool.get("busy", 30)
    assert container is not None
    assert backend.is_idle(container.name)
    container.run(["sh", "-c", "sleep 1000 > /dev/null 2>&1 &"], check=True)
    assert not backend.is_idle(container.name)
    with pidfd(container.init_pid) as init:
        container.release()
        while not ends(init, timeout=0):
            with pool.lease("another", 30) as another:
                another.run(["true"])
    assert not backend.is_idle("no-such-container")
