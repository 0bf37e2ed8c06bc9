"""The service is killed beside each write to its ledger; the next one finishes or undoes what was begun."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lxc_pool import Container, ContainerId, LeaseExpired, PoolServiceProxy, ServiceUnavailable, State, UnknownLease
from lxc_pool.model import LeaseId
from lxc_pool.service import audit
from tests.support.faults import CREATION_STEPS, LEDGER_STEPS, REMOVAL_STEPS, FaultyService
from tests.support.oracle import assert_healed
from tests.support.reuse import occupied
from tests.support.waiting import eventually

CONFIG = "[pool]\nsize = 2\nworkers = 2\n"

LEASE_AND_WAIT = "container = pool.get('x', 30); print(container.name, flush=True); sys.stdin.read()"


@dataclasses.dataclass
class World:
    """A service that is killed in each test, and a lease that outlives all of them, in the same object."""

    service: FaultyService
    pool: PoolServiceProxy
    survivor: Container

    def die(self, step: str, act: Callable[[], object]) -> object:
        """Let the service die at *step* of what *act* asks for; start the next one, and return what *act* returned.

        *act* goes on meanwhile: the client is to find the next service by itself.
        """
        self.service.faults.plan(step, "kill")
        with ThreadPoolExecutor(1) as threads:
            future = threads.submit(act)
            eventually(self.service.died, f"the service dies at {step}")
            self.service.wait()
            self.service.launch(config=CONFIG)
            self.service.await_ready()
            return future.result(30)


@pytest.fixture(scope="module")
def module_world(images: Path) -> Iterator[World]:
    service = FaultyService(images)
    try:
        pool = service.start(config=CONFIG)
        survivor = pool.get("survivor", 30)
        assert survivor is not None
        with survivor:
            survivor.run(["sh", "-c", "echo mine > /mine"], check=True)
            yield World(service, pool, survivor)
        assert_healed(service, pool)
    finally:
        service.close()


@pytest.fixture
def world(module_world: World) -> Iterator[World]:
    """The module's service, and after the test proof that everything is as it should be."""
    world = module_world
    if world.service.process is None:
        world.service.launch(config=CONFIG)
        world.service.await_ready()
    before = {info.name: info for info in world.pool.containers()}[world.survivor.name]
    yield world
    world.service.faults.forget()
    assert_healed(world.service, world.pool, leased=[world.survivor.name])
    assert world.survivor.run(["cat", "/mine"], capture_output=True, text=True, check=True).stdout == "mine\n"
    after = {info.name: info for info in world.pool.containers()}[world.survivor.name]
    assert (after.id, after.owner_pid, after.init_pid) == (before.id, before.owner_pid, before.init_pid)
    assert after.age >= before.age


def get(world: World) -> Container:
    container = world.pool.get("x", 30)
    assert container is not None
    return container


def leased(world: World) -> set[str]:
    return {info.name for info in world.pool.containers() if info.state is State.LEASED} - {world.survivor.name}


def steps(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("step", [step for step in LEDGER_STEPS if step.rpartition("-")[0] in names])


@steps("building", "warm", "leased", "settling")
def test_a_get_during_which_the_service_dies_ends_in_one_lease(world: World, step: str) -> None:
    assert_healed(world.service, world.pool, leased=[world.survivor.name])
    container = world.die(step, lambda: get(world))
    assert isinstance(container, Container)
    assert leased(world) == {container.name}
    container.run(["true"], check=True)
    container.release()


def test_a_get_that_is_given_up_as_the_service_dies_ends_in_no_lease(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lxc_pool.client.pool.GRACE", 0.1)
    world.service.faults.plan("leased-after", "kill")
    with world.service.connect() as pool:
        with pytest.raises(ServiceUnavailable):
            pool.get("x", 0)
        world.service.wait()
        world.service.launch(config=CONFIG)
        world.service.await_ready()
        assert len(leased(world)) == 1  # for all that the service knows, this process has it
        pool.echo("x")
        eventually(lambda: not leased(world), "it was given back")


@steps("rewriting")
def test_a_lease_that_is_renewed_as_the_service_dies_is_renewed(world: World, step: str) -> None:
    container = world.pool.get("x", 30, ttl=3600)
    assert container is not None

    def renew() -> None:
        with contextlib.suppress(LeaseExpired):  # it may have, while there was no service
            container.renew(0.5)

    world.die(step, renew)
    eventually(lambda: not leased(world), "it has ended by its new ttl")
    with pytest.raises(LeaseExpired, match="expired"):
        container.run(["true"])
    container.release()


@steps("reaping", "erasing")
def test_a_release_during_which_the_service_dies_is_one(world: World, step: str) -> None:
    container = get(world)
    world.die(step, container.release)
    assert leased(world) == set()
    with pytest.raises((LeaseExpired, UnknownLease)):
        world.pool.container(container.name)


@pytest.mark.parametrize("step", [*CREATION_STEPS[1:], *REMOVAL_STEPS])
def test_what_a_lane_is_at_as_the_service_dies_is_finished_or_undone(world: World, step: str) -> None:
    service = world.service
    service.faults.plan(step, "hang")
    container = get(world)
    container.release()
    eventually(lambda: service.faults.has_happened(step, "hang"), f"a worker is at {step}")
    known = {info.name: info.state for info in world.pool.containers()}
    halves = {name for name, state in known.items() if state in (State.BUILDING, State.REAPING)}
    service.kill()
    # What is half made or half removed is residue; the lease is not.
    named = {trace.name for trace in audit.audit(service.state_dir, service.host_dir).findings}
    assert halves & named
    assert world.survivor.name not in named
    service.launch(config=CONFIG)
    service.await_ready()
    assert_healed(service, world.pool, leased=[world.survivor.name])
    assert not halves & {info.name for info in world.pool.containers()}


def test_what_of_a_lease_is_written_down_is_there_after_a_restart(world: World) -> None:
    wished: list[LeaseId] = [0, "a string", ContainerId.create("job")]
    first = [world.pool.get(wish, 30, ttl=3600) for wish in wished]
    with world.service.client("pool.get('kept', 30).keep(3600)") as keeper:
        keeper.wait()
    before = {info.name: info for info in world.pool.containers()}
    world.service.kill()
    world.service.launch(config=CONFIG)
    world.service.await_ready()
    after = {info.name: info for info in world.pool.containers()}
    for container, wish in zip(first, wished, strict=True):
        assert container is not None
        assert after[container.name].id == wish
        assert type(after[container.name].id) is type(wish)
    (kept,) = [info for info in after.values() if info.id == "kept"]
    assert kept.owner_pid is None
    for info in [kept, *(after[container.name] for container in first if container is not None)]:
        old = before[info.name]
        same = (old.profile, old.state, old.owner_pid, old.owner_uid, old.init_pid)
        assert (info.profile, info.state, info.owner_pid, info.owner_uid, info.init_pid) == same
        assert info.age >= old.age
    world.pool.container(kept.name).release()
    for container in first:
        assert container is not None
        container.run(["true"], check=True)
        container.release()


def test_a_killed_service_leaves_no_socket_that_an_audit_or_the_next_one_does_not_find(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    service = FaultyService(images)
    try:
        state_dir = ("--state-dir", service.state_dir)
        service.start(size=1).wait_ready()
        for clean_up in (
            lambda: service.cli("cleanup", "--execute", *state_dir),
            lambda: service.start(size=1).wait_ready(),
        ):
            (ours,) = service.host_dir.glob("listener-*")
            service.kill()
            assert f"{ours}: no service runs here" in service.cli("audit", *state_dir).stdout
            clean_up()
            assert not ours.exists()
            if service.process is None:
                service.start(size=1).wait_ready()
        service.stop()
        assert sorted(path.name for path in service.host_dir.iterdir()) == ["service.lock"]
        assert list(tmp_path.iterdir()) == []
    finally:
        service.close()


def test_a_service_that_is_killed_with_all_its_helpers_leaves_no_semaphore_that_is_not_found(images: Path) -> None:
    service = FaultyService(images)
    state_dir = ("--state-dir", service.state_dir)
    try:
        for clean_up in (lambda: service.cli("cleanup", "--execute", *state_dir), lambda: service.start(size=1)):
            service.start(size=1).wait_ready()
            left = service.semaphores()
            assert len(left) >= 2  # a lane has some, and there are two lanes
            helpers = service.marked()
            for number in (signal.SIGSTOP, signal.SIGKILL):  # nobody may notice that another one is dead
                for pid in helpers:
                    os.kill(pid, number)
            service.wait()
            assert service.semaphores() == left
            said = service.cli("audit", *state_dir).stdout
            assert all(f"{path}: a semaphore" in said for path in left)
            clean_up()
            assert not service.semaphores().keys() & left.keys()
        service.stop()
    finally:
        service.close()


def test_who_waits_as_the_service_dies_goes_on_waiting_with_the_next_one(world: World) -> None:
    first = [get(world) for _ in range(2)]
    containers = [world.die("warm-before", lambda: [get(world) for _ in range(3)])]
    assert isinstance(containers[0], list)
    assert len({container.name for container in [*containers[0], *first]}) == 5
    for container in [*containers[0], *first]:
        container.release()


def test_warm_containers_are_adopted_and_not_built_again(world: World) -> None:
    assert_healed(world.service, world.pool, leased=[world.survivor.name])
    before = {info.name: info.init_pid for info in world.pool.containers()}
    world.service.kill()
    world.service.launch(config=CONFIG)
    world.service.await_ready()
    assert {info.name: info.init_pid for info in world.pool.containers()} == before


def test_an_owner_whose_pid_is_anothers_after_a_restart_is_dead(world: World) -> None:
    with world.service.client(LEASE_AND_WAIT) as client:
        assert client.stdout is not None
        name = client.stdout.readline().strip()
        assert leased(world) == {name}
        world.service.kill()
        client.kill()
        client.wait()
        with occupied(client.pid):
            world.service.launch(config=CONFIG)
            world.service.await_ready()
            eventually(lambda: not leased(world), "the lease has ended")
            assert_healed(world.service, world.pool, leased=[world.survivor.name])


def test_a_command_goes_on_while_the_service_dies_and_comes_back(world: World) -> None:
    with ThreadPoolExecutor(1) as threads:
        script = ["sh", "-c", "echo begun; read line; echo $line"]
        process = world.survivor.popen(script, stdin=-1, stdout=-1, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        world.service.kill()
        said = threads.submit(process.communicate, "still here\n")
        assert said.result(10)[0] == "still here\n"
        assert process.returncode == 0
    world.service.launch(config=CONFIG)
    world.service.await_ready()


def test_a_stopped_owner_keeps_its_lease_over_a_restart(world: World) -> None:
    with world.service.client(LEASE_AND_WAIT) as client:
        assert client.stdout is not None
        name = client.stdout.readline().strip()
        client.send_signal(19)
        world.service.kill()
        world.service.launch(config=CONFIG)
        world.service.await_ready()
        assert leased(world) == {name}
        client.kill()
        client.wait()
        eventually(lambda: not leased(world), "the lease has ended")
