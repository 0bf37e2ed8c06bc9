"""What a service does with what an earlier one left: on the memory backend, with a clock of the test's own."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import pytest

from lxc_pool.backend.memory import HANG, Fault
from lxc_pool.config import ProfileConfig
from lxc_pool.errors import BackendError, LeaseExpired
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.model import State
from lxc_pool.service.pool import Pool
from lxc_pool.service.recovery import judge
from lxc_pool.service.watchdog import Watched
from tests.support.world import MemoryLane, World


def restart(world: World, **profile: object) -> World:
    """Kill the service and start it again: the host and the ledger are all that is left."""
    if profile:
        changed = dataclasses.replace(world.config.profiles[0], **profile)  # type: ignore[arg-type]
        world.config = dataclasses.replace(world.config, profiles=(changed,))
    entries = list(world.journal.entries.values())
    alive = set(world.backend.running.values())
    world.watch.dead |= {entry.init for entry in entries if entry.init is not None and entry.init not in alive}
    world.watch.timers.clear()
    world.watch.watched.clear()
    world.lanes = [MemoryLane(world.backend, world.watch) for _ in world.lanes]
    numbers = itertools.count(1)
    world.pool = Pool(
        world.config,
        world.lanes,
        world.watch,
        world.journal,
        new_name=lambda: f"later{next(numbers)}",
        wake=lambda: None,
        rng=random.Random(1),  # noqa: S311  # jitter
    )
    verdicts = judge(
        entries,
        world.backend.names(),
        world.config,
        world.backend.newest,
        world.watch.now(),
    )
    world.pool.restore(verdicts)
    world.settle()
    return world


def warm_world(size: int = 2) -> World:
    world = World(size)
    world.settle()
    return world


def steps(world: World, step: str) -> int:
    return sum(done == step for done, _name in world.backend.history)


def test_warm_containers_are_adopted_not_rebuilt() -> None:
    world = warm_world()
    names = world.names(State.WARM)
    restart(world)
    assert world.names(State.WARM) == names
    assert steps(world, "clone") == 2


def test_ids_ages_and_owners_of_leases_survive() -> None:
    world = warm_world()
    before = world.lease("my-job", pid=7)
    world.advance(100)
    restart(world)
    after = world.pool.leased(before.name, 1000)
    assert (after.id, after.owner_pid, after.state, after.init_pid) == ("my-job", 7, State.LEASED, before.init_pid)
    assert after.age == pytest.approx(before.age + 100)
    world.pool.release(before.name, 1000)
    world.settle()
    assert before.name not in world.backend.present


def test_an_owner_that_died_while_no_service_ran_loses_its_containers() -> None:
    world = warm_world()
    name = world.lease(pid=7).name
    world.watch.dead.add(world.process(7))
    restart(world)
    assert name not in world.backend.present
    assert world.count(State.WARM) == 2


def test_an_owner_that_dies_after_the_restart_loses_its_containers() -> None:
    world = warm_world()
    name = world.lease(pid=7).name
    restart(world)
    world.watch.kill(world.process(7))
    world.settle()
    assert name not in world.backend.present


@pytest.mark.parametrize("leased", [False, True])
def test_a_container_that_died_while_no_service_ran_is_removed(leased: bool) -> None:
    world = warm_world()
    name = world.lease().name if leased else world.names(State.WARM)[0]
    world.watch.dead.add(world.backend.running[name])
    restart(world)
    assert name not in world.backend.present
    assert world.count(State.WARM) == 2


def test_a_ttl_goes_on_while_no_service_runs() -> None:
    world = warm_world()
    early, late = world.lease(ttl=5.0).name, world.lease(ttl=50.0).name
    world.watch.time += 10
    restart(world)
    assert early not in world.backend.present
    with pytest.raises(LeaseExpired, match="expired"):
        world.pool.leased(early, 1000)
    world.advance(35)
    assert world.pool.leased(late, 1000).state is State.LEASED
    world.advance(10)
    with pytest.raises(LeaseExpired):
        world.pool.leased(late, 1000)


def test_a_kept_lease_needs_no_owner_after_the_restart_either() -> None:
    world = warm_world()
    name = world.lease(pid=7).name
    world.pool.set_ttl(name, 1000, 60.0, drop_owner=True)
    world.watch.dead.add(world.process(7))
    restart(world)
    assert world.pool.leased(name, 1000).owner_pid is None


def test_a_reservation_is_warm_again_and_its_request_gets_a_container_once() -> None:
    world = warm_world(1)
    ticket = world.ask()
    restart(world)
    assert world.pool.confirm(1000, ticket.request) is None
    assert world.count(State.WARM) == 1


def test_a_confirmation_whose_answer_was_lost_finds_its_lease() -> None:
    world = warm_world(2)
    ticket = world.ask()
    info = world.pool.confirm(1000, ticket.request)
    assert info is not None
    restart(world)
    again = world.ask(request=ticket.request)
    assert again.offer is not None
    assert again.offer.name == info.name
    assert world.pool.confirm(1000, ticket.request) is not None
    assert world.count(State.LEASED) == 1


@pytest.mark.parametrize("step", ["clone", "start", "probe"])
def test_what_was_half_made_is_undone(step: str) -> None:
    world = World(1)
    world.backend.script(step, HANG)  # type: ignore[arg-type]
    world.settle()
    (name,) = world.names(State.BUILDING)
    restart(world)
    assert name not in world.backend.present
    assert world.count(State.WARM) == 1


@pytest.mark.parametrize("step", ["stop", "destroy"])
def test_what_was_half_removed_is_finished(step: str) -> None:
    world = warm_world(1)
    world.backend.script(step, HANG)  # type: ignore[arg-type]
    name = world.lease().name
    world.pool.release(name, 1000)
    world.settle()
    restart(world)
    assert name not in world.backend.present
    assert name not in world.journal.entries


def test_a_container_that_the_ledger_does_not_know_is_removed() -> None:
    world = warm_world(1)
    world.backend.present.add("unknown")
    restart(world)
    assert "unknown" not in world.backend.present


def test_what_is_in_a_state_that_nobody_knows_is_removed_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is asked about a container whose monitor hangs, hangs itself."""
    world = warm_world(1)
    world.backend.present.add("unknown")
    forced = {}
    destroy = world.backend.destroy

    def note(name: str, *, force: bool) -> None:
        forced[name] = force
        destroy(name, force=force)

    monkeypatch.setattr(world.backend, "destroy", note)
    restart(world)
    assert forced == {"unknown": True}


def test_an_entry_without_a_container_is_erased() -> None:
    world = warm_world(1)
    name = world.names(State.WARM)[0]
    world.watch.dead.add(world.backend.running.pop(name))
    world.backend.present.remove(name)
    restart(world)
    assert name not in world.journal.entries


def test_warm_ones_that_the_configuration_does_not_want_any_more_are_replaced() -> None:
    world = warm_world(2)
    old = set(world.names(State.WARM))
    restart(world, probe=("true",))
    assert world.count(State.WARM) == 2
    assert not old & world.backend.present


def test_a_smaller_pool_keeps_the_oldest() -> None:
    world = warm_world(3)
    oldest = world.names(State.WARM)[0]
    restart(world, size=1)
    assert world.names(State.WARM) == [oldest]
    assert world.backend.present == {oldest}


def test_leases_of_a_profile_that_is_gone_live_on_and_its_warm_ones_go() -> None:
    world = World(small=1, large=1)
    world.settle()
    leased = world.lease(profile="large").name
    world.settle()
    world.config = dataclasses.replace(world.config, profiles=(ProfileConfig("small", 1),))
    restart(world)
    assert world.pool.leased(leased, 1000).profile == "large"
    assert len(world.backend.present) == 2
    world.pool.release(leased, 1000)
    world.settle()
    assert len(world.backend.present) == 1


def test_a_ledger_that_can_not_be_written_gives_nothing_out_and_loses_nothing() -> None:
    world = warm_world(2)
    world.journal.broken = True
    ticket = world.ask()
    with pytest.raises(BackendError, match="disk full"):
        world.pool.confirm(1000, ticket.request)
    assert world.count(State.WARM) == 2
    assert "disk full" in str(world.pool.census().last_error)
    world.journal.broken = False
    assert world.lease().state is State.LEASED


def test_a_ledger_that_can_not_be_written_stops_creation_until_it_can() -> None:
    world = World(1)
    world.journal.broken = True
    world.advance(10)
    assert world.backend.present == set()
    assert "disk full" in str(world.pool.census().last_error)
    world.journal.broken = False
    world.advance(4)
    assert world.count(State.WARM) == 1


def test_a_ledger_that_can_not_be_written_does_not_keep_containers_from_being_removed() -> None:
    world = warm_world(1)
    name = world.lease().name
    world.journal.broken = True
    world.pool.release(name, 1000)
    world.settle()
    assert name not in world.backend.present
    world.journal.broken = False
    restart(world)
    assert name not in world.journal.entries


def test_a_ttl_that_can_not_be_written_down_is_not_changed() -> None:
    world = warm_world(1)
    name = world.lease(ttl=50.0, pid=7).name
    world.journal.broken = True
    with pytest.raises(BackendError):
        world.pool.set_ttl(name, 1000, 500.0, drop_owner=True)
    assert world.pool.leased(name, 1000).owner_pid == 7
    world.advance(51)
    with pytest.raises(LeaseExpired):
        world.pool.leased(name, 1000)


def test_a_container_that_comes_up_while_the_ledger_fails_is_used_and_removed_by_the_next_service() -> None:
    world = World(1)
    world.backend.script("start", Fault(delay=1.0))
    world.settle()
    world.journal.broken = True
    world.advance(2)
    assert world.count(State.WARM) == 1
    (name,) = world.names(State.WARM)
    world.journal.broken = False
    restart(world)
    assert name not in world.backend.present


@pytest.mark.parametrize("leased", [False, True])
def test_a_container_whose_init_dies_while_it_is_being_taken_over_is_removed(leased: bool) -> None:
    world = warm_world(1)
    name = world.lease().name if leased else world.names(State.WARM)[0]
    init = world.backend.running[name]
    _die_when_watched(world, init)
    restart(world)
    assert name not in world.backend.present
    assert world.count(State.WARM) == 1
    assert init not in {watched.identity for watched in world.watch.watched}


def test_an_owner_that_dies_while_its_container_is_being_taken_over_loses_it() -> None:
    world = warm_world(1)
    name = world.lease(pid=7).name
    _die_when_watched(world, world.process(7))
    restart(world)
    assert name not in world.backend.present


def _die_when_watched(world: World, process: ProcessIdentity) -> None:
    watch = world.watch.watch

    def watch_and_die(identity: ProcessIdentity, callback: Callable[[], None]) -> Watched:
        watched = watch(identity, callback)
        if identity == process:
            world.watch.kill(identity)
        return watched

    world.watch.watch = watch_and_die  # type: ignore[method-assign]
