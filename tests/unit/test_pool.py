"""The pool's logic, on the memory backend with a fake clock."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lxc_pool.backend.memory import HANG, Fault
from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import (
    CloneFailed,
    ConfigError,
    DestroyFailed,
    LeaseExpired,
    PoolClosed,
    PoolDraining,
    QuotaExceeded,
    StartFailed,
    UnknownLease,
)
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.model import State
from lxc_pool.service.census import WarmWait
from lxc_pool.service.jobs import Job, LaneBroken, Outcome
from lxc_pool.service.leases import Quota
from lxc_pool.service.lull import LONGEST, LULL
from lxc_pool.service.pool import Pool
from lxc_pool.service.waiters import Ticket
from lxc_pool.service.watchdog import Watched
from tests.support.world import World


def warm_world(size: int = 3, workers: int = 2, **profiles: int) -> World:
    world = World(size, workers, **profiles)
    world.settle()
    return world


def test_fills_up_to_its_size_and_no_further() -> None:
    world = warm_world(3)
    assert world.count(State.WARM) == 3
    assert len(world.backend.present) == 3


def test_never_has_more_creations_under_way_than_lanes() -> None:
    world = World(5, workers=2)
    world.backend.script("start", *[Fault(delay=1.0)] * 5)
    world.settle()
    assert world.count(State.BUILDING) == 2
    world.advance(1.0)
    assert (world.count(State.WARM), world.count(State.BUILDING)) == (2, 2)


def test_a_container_gets_its_id_as_it_leaves() -> None:
    world = warm_world(1)
    assert world.pool.containers(None)[0].id is None
    info = world.lease("my-job")
    assert (info.id, info.state, info.owner_pid, info.owner_uid) == ("my-job", State.LEASED, 100, 1000)


def test_an_offer_is_no_lease_until_it_is_confirmed() -> None:
    world = warm_world(1)
    ticket = world.ask()
    assert ticket.offer is not None
    assert ticket.offer.state is State.RESERVED
    with pytest.raises(UnknownLease):
        world.pool.leased(ticket.offer.name, 1000)


def test_an_unconfirmed_offer_goes_back_and_is_the_next_one_again() -> None:
    world = warm_world(2)
    ticket = world.ask()
    assert ticket.offer is not None
    name = ticket.offer.name
    world.pool.take_back(1000, ticket.request, "session")
    assert world.count(State.WARM) == 2
    assert world.pool.confirm(1000, ticket.request) is None
    assert world.lease().name == name


def test_an_offer_is_taken_back_only_by_the_connection_that_it_was_made_on() -> None:
    world = warm_world(1)
    ticket = world.ask(session="old")
    world.ask(session="new", request=ticket.request)
    world.pool.take_back(1000, ticket.request, "old")
    assert world.pool.confirm(1000, ticket.request) is not None


def test_confirming_twice_is_as_good_as_once() -> None:
    world = warm_world(1)
    ticket = world.ask()
    assert world.pool.confirm(1000, ticket.request) == world.pool.confirm(1000, ticket.request)


def test_a_repeated_request_finds_its_lease() -> None:
    world = warm_world(2)
    ticket = world.ask()
    world.pool.confirm(1000, ticket.request)
    again = world.ask(request=ticket.request, session="other")
    assert again.offer is ticket.offer
    assert world.count(State.LEASED) == 1


def test_the_request_of_another_user_with_the_same_name_is_another_request() -> None:
    world = warm_world(2)
    ticket = world.ask(uid=1)
    other = world.ask(uid=2, request=ticket.request)
    assert other.offer is not ticket.offer


def test_a_request_that_comes_again_takes_the_place_of_the_one_that_waits() -> None:
    world = World(1)
    first = world.ask()
    second = world.ask(request=first.request, session="other")
    assert isinstance(first.error, PoolClosed)
    world.settle()
    assert second.offer is not None
    assert world.pool.census().total("waiting") == 0


def test_the_place_of_a_leased_container_is_filled_once_its_client_has_the_answer() -> None:
    world = warm_world(1)
    woken: list[None] = []
    world.pool._stock.wake = lambda: woken.append(None)
    world.lease()
    assert not woken
    world.pool.settle()
    assert woken
    world.settle()
    assert world.count(State.WARM) == 1


def test_a_spike_of_one_more_than_there_are_gets_each_a_container_of_its_own_and_makes_no_surplus() -> None:
    world = warm_world(3)
    tickets = [world.ask(pid=pid) for pid in range(100, 104)]
    assert [ticket.offer is not None for ticket in tickets] == [True, True, True, False]
    for ticket in tickets[:3]:
        assert world.pool.confirm(1000, ticket.request)
    world.settle()
    assert world.pool.confirm(1000, tickets[3].request)
    world.rest()
    names = {ticket.offer.name for ticket in tickets if ticket.offer}
    assert len(names) == 4
    assert len(world.backend.present) == 4 + 3


def test_waiters_of_one_user_are_served_in_the_order_in_which_they_came() -> None:
    world = World(1, workers=1)
    tickets = [world.ask(pid=pid) for pid in range(100, 105)]
    served = []
    for _ in tickets:
        world.settle()
        ticket = next(t for t in tickets if t.offer is not None and t not in served)
        served.append(ticket)
        info = world.pool.confirm(1000, ticket.request)
        assert info
    assert served == tickets


def test_users_who_wait_take_turns() -> None:
    world = World(1, workers=1)
    tickets = [world.ask(uid=uid) for uid in (1, 1, 1, 2)]
    order: list[Ticket] = []
    while len(order) < 4:
        world.settle()
        ticket = next(t for t in tickets if t.offer is not None and t not in order)
        order.append(ticket)
        world.pool.confirm(ticket.uid, ticket.request)
    assert [ticket.uid for ticket in order] == [1, 2, 1, 1]


def test_somebody_who_gave_up_is_passed_over_and_learns_why() -> None:
    world = World(1)
    world.backend.script("start", Fault(error=StartFailed("no such device")))
    first, second = world.ask(), world.ask()
    world.settle()
    words = world.pool.withdraw(first)
    assert "no such device" in words
    assert "place 1 of 2" in words
    assert "0 warm" in words
    world.advance(10)
    assert (first.offer, second.offer is not None) == (None, True)


def test_a_released_container_is_destroyed_and_never_seen_again() -> None:
    world = warm_world(2)
    name = world.lease().name
    world.pool.release(name, 1000)
    world.rest()
    assert name not in world.backend.present
    assert name not in [info.name for info in world.pool.containers(None)]
    assert world.count(State.WARM) == 2


def test_releasing_twice_is_as_good_as_once() -> None:
    world = warm_world(1)
    name = world.lease().name
    world.pool.release(name, 1000)
    world.pool.release(name, 1000)
    world.settle()
    world.pool.release(name, 1000)


def test_what_is_not_the_callers_is_unknown() -> None:
    world = warm_world(2)
    name = world.lease(uid=1000).name
    for other in (name, world.names(State.WARM)[0], "nothing"):
        with pytest.raises(UnknownLease):
            world.pool.leased(other, 1001)
        with pytest.raises(UnknownLease):
            world.pool.release(other, 1001)
    assert world.pool.leased(name, None).name == name


def test_ids_and_owners_are_shown_to_their_user_and_to_administrators_alone() -> None:
    world = warm_world(2)
    name = world.lease("secret", uid=1000).name
    own, foreign, admin = (
        next(info for info in world.pool.containers(uid) if info.name == name) for uid in (1000, 1001, None)
    )
    assert (own.id, admin.id) == ("secret", "secret")
    assert (foreign.id, foreign.owner_pid, foreign.owner_uid) == (None, None, None)


def test_a_container_that_is_gone_is_watched_no_more() -> None:
    world = warm_world(2)
    before = [watched.identity for watched in world.watch.watched]
    info = world.lease()
    world.pool.release(info.name, 1000)
    world.rest()
    pids = [watched.identity.pid for watched in world.watch.watched]
    assert info.init_pid not in pids
    assert len(pids) == len(before) + 1  # and the owner


def test_when_the_owner_dies_all_its_containers_are_reaped() -> None:
    world = warm_world(3)
    mine = {world.lease(pid=7).name, world.lease(pid=7).name}
    other = world.lease(pid=8).name
    world.watch.kill(world.process(7))
    world.rest()
    assert not mine & world.backend.present
    assert world.names(State.LEASED) == [other]
    assert world.count(State.WARM) == 3


def test_an_owner_that_dies_between_offer_and_confirmation_gets_nothing() -> None:
    world = warm_world(1)
    ticket = world.ask(pid=7)
    world.watch.kill(world.process(7))
    assert world.pool.confirm(1000, ticket.request) is None
    assert world.count(State.WARM) == 1


def test_an_owner_that_dies_before_it_is_offered_anything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = warm_world(1)
    hold = world.pool._owners.hold

    def hold_the_dying(owner: ProcessIdentity) -> None:
        hold(owner)
        world.watch.kill(owner)

    monkeypatch.setattr(world.pool._owners, "hold", hold_the_dying)
    with pytest.raises(ValueError, match="owner 7"):
        world.ask(pid=7)
    assert world.count(State.WARM) == 1


def test_an_owner_that_dies_just_as_it_begins_to_be_watched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watches it has told so before anybody knew what to do with that, and does not tell it again."""
    world = warm_world(1)
    watch = world.watch.watch

    def watch_the_dying(identity: ProcessIdentity, callback: Callable[[], None]) -> Watched:
        watched = watch(identity, callback)
        world.watch.kill(identity)
        return watched

    with monkeypatch.context() as patch:
        patch.setattr(world.watch, "watch", watch_the_dying)
        with pytest.raises(ValueError, match="owner 7 has just ended"):
            world.ask(pid=7)
    assert world.count(State.WARM) == 1
    assert not [watched for watched in world.watch.watched if watched.identity == world.process(7)]


def test_a_dead_owner_is_refused() -> None:
    world = warm_world(1)
    world.watch.kill(world.process(7))
    with pytest.raises(ValueError, match="owner 7"):
        world.ask(pid=7)
    assert world.count(State.WARM) == 1


def test_an_unknown_profile_is_refused_with_the_names_of_those_there_are() -> None:
    world = warm_world()
    with pytest.raises(ValueError, match=r"'big'.*default"):
        world.ask(profile="big")


def test_a_lease_with_a_ttl_ends_by_itself_counted_from_its_confirmation() -> None:
    world = warm_world(1)
    ticket = world.ask(ttl=5.0)
    world.advance(4)
    info = world.pool.confirm(1000, ticket.request)
    assert info
    world.advance(4)
    assert world.pool.leased(info.name, 1000).state is State.LEASED
    world.advance(1.5)
    with pytest.raises(LeaseExpired, match="expired"):
        world.pool.leased(info.name, 1000)


def test_renewing_puts_the_end_of_a_lease_off() -> None:
    world = warm_world(1)
    name = world.lease(ttl=5.0).name
    world.advance(4)
    world.pool.set_ttl(name, 1000, 5.0)
    world.advance(4)
    assert world.pool.leased(name, 1000).state is State.LEASED
    world.advance(2)
    with pytest.raises(LeaseExpired):
        world.pool.leased(name, 1000)


def test_a_kept_lease_outlives_its_owner_until_its_ttl() -> None:
    world = warm_world(1)
    name = world.lease(pid=7).name
    world.pool.set_ttl(name, 1000, 60.0, drop_owner=True)
    world.watch.kill(world.process(7))
    world.advance(59)
    assert world.pool.leased(name, 1000).owner_pid is None
    world.advance(2)
    assert name not in world.backend.present


@pytest.mark.parametrize("ttl", [60.0, math.inf])
def test_a_lease_without_an_owner_lasts_no_longer_than_it_may_and_counts_in_its_users_quota(ttl: float) -> None:
    world = World(Config((ProfileConfig("default", 2),), workers=2, max_keep=50.0))
    world.settle()
    name = world.lease(pid=7).name
    world.pool.set_ttl(name, 1000, ttl)  # its owner will end it
    world.advance(55)
    assert world.pool.leased(name, 1000).state is State.LEASED
    world.pool.set_ttl(name, 1000, ttl, drop_owner=True)
    world.watch.kill(world.process(7))
    ticket = Ticket("r", 1000, "default", "x", world.process(8), None, object(), lambda: None)
    with pytest.raises(QuotaExceeded, match="has 1 containers"):
        world.pool.request(ticket, Quota(leases=1, waiters=1))
    world.advance(49)
    world.pool.set_ttl(name, 1000, ttl)  # by whoever knows its name
    world.advance(49)
    assert world.pool.leased(name, 1000).owner_pid is None
    world.advance(2)
    assert name not in world.backend.present


def test_a_warm_container_whose_init_dies_is_replaced_before_anyone_gets_it() -> None:
    world = warm_world(2)
    name = world.names(State.WARM)[0]
    world.watch.kill(world.backend.running[name])
    assert world.lease().name != name
    world.settle()
    assert name not in world.backend.present
    assert world.count(State.WARM) == 2


def test_a_leased_container_whose_init_dies_ends_the_lease_and_says_so() -> None:
    world = warm_world(1)
    name = world.lease().name
    world.watch.kill(world.backend.running[name])
    with pytest.raises(LeaseExpired, match="its init died"):
        world.pool.leased(name, 1000)


def test_a_reserved_container_whose_init_dies_is_not_confirmed() -> None:
    world = warm_world(1)
    ticket = world.ask()
    assert ticket.offer is not None
    world.watch.kill(world.backend.running[ticket.offer.name])
    assert world.pool.confirm(1000, ticket.request) is None


@pytest.mark.parametrize("step", ["clone", "start", "probe"])
def test_a_container_that_does_not_come_up_is_destroyed_and_never_handed_out(step: str) -> None:
    world = World(1)
    world.backend.script(step, Fault(error=StartFailed("liblxc says no")))  # type: ignore[arg-type]
    world.settle()
    assert world.count(State.WARM) == 0
    assert world.backend.present == set()
    census = world.pool.census()
    assert (census.error_count, census.last_error) == (1, "liblxc says no")
    assert census.backoff > 0


def test_failures_hold_creation_back_longer_and_longer_but_seconds_at_most() -> None:
    world = World(4, workers=4)
    world.backend.script("start", *[Fault(error=StartFailed("no"))] * 500)
    world.advance(60)
    tries = sum(step == "start" for step, _name in world.backend.history)
    assert 20 < tries < 80


def test_the_pool_is_back_at_full_size_seconds_after_the_cause_of_failures_is_gone() -> None:
    world = World(4, workers=4)
    world.backend.script("start", *[Fault(error=StartFailed("no"))] * 30)
    world.advance(120)
    assert world.count(State.WARM) == 4
    assert world.pool.census().backoff == 0
    world.backend.script("start", *[Fault(error=CloneFailed("again"))] * 10_000)
    for name in world.names(State.WARM):
        world.watch.kill(world.backend.running[name])
    world.advance(3600)
    world.backend._faults["start"].clear()
    world.advance(4)
    assert world.count(State.WARM) == 4


def test_while_creation_fails_one_at_a_time_is_tried() -> None:
    world = World(4, workers=4)
    world.backend.script("start", *[Fault(error=StartFailed("no"))] * 4)
    world.settle()
    world.backend.script("start", *[Fault(delay=1.0)] * 8)
    world.advance(0.5)
    assert world.count(State.BUILDING) == 1


@pytest.mark.parametrize("step", ["clone", "start", "probe"])
def test_a_lane_that_hangs_in_a_creation_is_replaced_and_the_rest_goes_on(step: str) -> None:
    world = World(2, workers=2)
    world.backend.script(step, HANG)  # type: ignore[arg-type]
    world.settle()
    assert world.count(State.WARM) == 1
    world.advance(29)
    assert sum(lane.replaced for lane in world.lanes) == 0
    world.advance(5)
    assert sum(lane.replaced for lane in world.lanes) == 1
    assert world.count(State.WARM) == 2
    assert len(world.backend.present) == 2
    assert "longer than allowed" in str(world.pool.census().last_error)


def test_the_last_word_of_a_worker_that_is_killed_costs_the_next_one_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, workers=1)
    (lane,) = world.lanes
    start, replace = lane.start, lane.replace
    reports: list[Callable[[Outcome], None]] = []

    def start_it(job: Job, done: Callable[[Outcome], None]) -> None:
        reports.append(done)
        start(job, done)

    def replace_it() -> None:
        replace()
        if reports:
            reports.pop()(LaneBroken("the lane's worker died"))  # of the job that hung

    monkeypatch.setattr(lane, "start", start_it)
    monkeypatch.setattr(lane, "replace", replace_it)
    world.backend.script("start", HANG)
    world.advance(40)
    assert lane.replaced == 1
    assert world.count(State.WARM) == 1


def test_a_lane_that_hangs_while_there_are_no_descriptors_is_replaced_once_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(2, workers=2)
    world.backend.script("start", HANG)

    def fail(*_arguments: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        for lane in world.lanes:
            patch.setattr(lane, "diagnose", fail)
            patch.setattr(lane, "replace", fail)
        world.advance(40)
        assert world.count(State.WARM) == 1
        assert world.count(State.BUILDING) == 1
    world.advance(5)
    assert sum(lane.replaced for lane in world.lanes) == 1
    assert world.count(State.WARM) == 2
    assert len(world.backend.present) == 2


def test_a_lane_that_breaks_while_there_are_no_descriptors_is_replaced_once_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(2, workers=2)
    world.backend.script("start", Fault(error=LaneBroken("the lane's worker died")))

    def fail() -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        for lane in world.lanes:
            patch.setattr(lane, "replace", fail)
        world.advance(3)
        assert (world.count(State.WARM), world.count(State.BUILDING)) == (1, 1)
    world.advance(5)
    assert sum(lane.replaced for lane in world.lanes) == 1
    assert world.count(State.WARM) == 2
    assert len(world.backend.present) == 2


def test_a_container_that_can_not_be_watched_is_given_to_nobody_and_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(1)

    def fail(*_arguments: object) -> Watched:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(world.watch, "watch", fail)
        world.settle()
        assert world.count(State.WARM) == 0
        assert "can't be watched" in str(world.pool.census().last_error)
    world.advance(5)
    assert world.count(State.WARM) == 1
    assert sum(lane.replaced for lane in world.lanes) == 0
    assert len(world.backend.present) == 1


@pytest.mark.parametrize("step", ["stop", "destroy"])
def test_a_lane_that_hangs_in_a_removal_is_replaced_and_the_removal_tried_again(step: str) -> None:
    world = warm_world(1)
    name = world.lease().name
    world.backend.script(step, HANG)  # type: ignore[arg-type]
    world.pool.release(name, 1000)
    world.advance(40)
    assert name not in world.backend.present
    assert world.count(State.STUCK) == 0


def test_an_image_that_takes_longer_than_a_container_may_is_waited_for() -> None:
    world = World(1)
    world.backend.script("prepare", Fault(delay=100.0))
    world.advance(90)
    assert world.count(State.BUILDING) == 0
    assert sum(lane.replaced for lane in world.lanes) == 0
    world.advance(11)
    assert world.count(State.WARM) == 1


def test_the_building_of_an_image_that_hangs_is_given_up_after_600_seconds_and_tried_again() -> None:
    world = World(1)
    world.backend.script("prepare", HANG)
    world.advance(599)
    assert (world.count(State.WARM), sum(lane.replaced for lane in world.lanes)) == (0, 0)
    world.advance(10)
    assert (world.count(State.WARM), sum(lane.replaced for lane in world.lanes)) == (1, 1)
    assert "preparing image 'busybox' took longer than allowed" in str(world.pool.census().last_error)


def test_a_container_that_can_not_be_removed_is_stuck_visible_retried_and_no_capacity() -> None:
    world = warm_world(1)
    world.backend.script("destroy", *[Fault(error=DestroyFailed("device busy"))] * 2)
    name = world.lease().name
    world.pool.release(name, 1000)
    world.settle()
    info = next(info for info in world.pool.containers(None) if info.name == name)
    assert (info.state, info.reason) == (State.STUCK, "device busy")
    assert world.count(State.WARM) == 1
    world.advance(1)
    assert name not in world.backend.present


def test_what_is_stuck_is_tried_once_more_at_the_end_whatever_its_pause() -> None:
    world = warm_world(1)
    world.backend.script("destroy", *[Fault(error=DestroyFailed("device busy"))] * 5)
    name = world.lease().name
    world.pool.release(name, 1000)
    world.advance(15)  # from now on it would be 60 s
    assert name in world.names(State.STUCK)
    world.pool.close_to_new()
    world.settle()
    assert world.backend.present == set()


def test_many_stuck_containers_do_not_end_the_pool() -> None:
    world = warm_world(2)
    world.backend.script("stop", *[Fault(error=DestroyFailed("no"))] * 100_000)
    for _ in range(10):
        world.pool.release(world.lease().name, 1000)
        world.settle()
    assert world.count(State.WARM) == 2
    assert world.count(State.STUCK) + world.count(State.REAPING) == 10


def test_a_pool_of_one_size_can_be_given_another() -> None:
    world = warm_world(2)
    world.pool.resize(4)
    world.settle()
    assert world.count(State.WARM) == 4
    world.pool.resize(1)
    world.settle()
    assert world.count(State.WARM) == 1
    assert len(world.backend.present) == 1


@pytest.mark.parametrize("size", [0, -1, 1001, True, 1.5])
def test_a_size_that_no_pool_can_have_is_refused(size: int) -> None:
    world = warm_world(2)
    with pytest.raises(ConfigError, match="size"):
        world.pool.resize(size)
    assert world.count(State.WARM) == 2


def test_a_reserved_container_is_not_kept_when_the_pool_was_made_smaller_meanwhile() -> None:
    world = warm_world(2)
    ticket = world.ask()
    world.pool.resize(1)
    world.pool.take_back(1000, ticket.request, "session")
    world.settle()
    assert len(world.backend.present) == 1


def test_draining_discards_warm_ones_sends_waiters_away_and_leaves_leases() -> None:
    world = warm_world(1)
    leased = world.lease().name
    waiter = world.ask()
    world.pool.drain()
    world.settle()
    assert isinstance(waiter.error, PoolDraining)
    assert world.backend.present == {leased}
    with pytest.raises(PoolDraining):
        world.ask()
    world.pool.resume()
    world.settle()
    assert world.count(State.WARM) == 1


def test_what_is_being_built_while_the_pool_is_drained_is_discarded() -> None:
    world = World(1)
    world.backend.script("start", Fault(delay=1.0))
    world.settle()
    world.pool.drain()
    world.advance(2)
    assert world.backend.present == set()


def test_closing_sends_waiters_away_and_leaves_nothing_once_leases_are_ended() -> None:
    world = warm_world(1)
    leased = world.lease().name
    waiter = world.ask()
    world.pool.close_to_new()
    world.settle()
    assert isinstance(waiter.error, PoolClosed)
    assert world.backend.present == {leased}
    with pytest.raises(PoolClosed):
        world.ask()
    assert not world.pool.wait_until(State.LEASED, timeout=0)
    world.pool.end_leases()
    world.settle()
    assert world.pool.wait_until(State.LEASED, State.REAPING, timeout=0)
    assert world.backend.present == set()


def test_profiles_have_containers_and_queues_of_their_own() -> None:
    world = warm_world(small=1, large=2)
    assert world.lease(profile="small").profile == "small"
    waiter = world.ask(profile="small")
    assert world.lease(profile="large").profile == "large"
    assert not waiter.answered
    census = world.pool.census()
    assert (census.profiles["small"].waiting, census.profiles["large"].size) == (1, 1)


def test_abandoning_undoes_a_request_in_whichever_step_it_is() -> None:
    world = warm_world(2)
    reserved, leased = world.ask(), world.ask()
    world.pool.confirm(1000, leased.request)
    world.pool.abandon(1000, reserved.request)
    world.pool.abandon(1000, leased.request)
    world.pool.abandon(1000, "unheard of")
    world.rest()
    assert world.count(State.WARM) == 2
    assert world.count(State.LEASED) == 0
    assert leased.offer is not None
    assert leased.offer.name not in world.backend.present


def test_while_containers_are_asked_for_and_there_are_plenty_none_is_made() -> None:
    world = warm_world(8)
    for remaining in (7, 6, 5, 4, 3):
        world.lease()
        world.advance(LULL / 2)
        assert world.names(State.BUILDING) == []
        assert world.count(State.WARM) == remaining
    world.advance(LULL)
    assert world.count(State.WARM) == 8
    assert not world.watch.timers  # what is full waits for nothing


def test_when_a_quarter_is_left_containers_are_made_though_others_are_asked_for() -> None:
    world = warm_world(8)
    for _ in range(6):
        world.lease()
    world.settle()
    assert world.count(State.WARM) > 2


def test_while_containers_are_asked_for_a_released_one_in_which_nothing_runs_is_not_removed() -> None:
    world = warm_world(8)
    idle, busy = world.lease(), world.lease()
    world.backend.idle.add(idle.name)
    for container in (idle, busy):
        world.pool.release(container.name, None)
    world.settle()
    assert world.backend.present >= {idle.name}
    assert busy.name not in world.backend.present
    world.advance(LULL)
    assert idle.name not in world.backend.present
    assert world.count(State.WARM) == 8
    assert not world.watch.timers


def test_no_removal_is_put_off_for_longer_than_a_second() -> None:
    world = warm_world(8)
    idle = world.lease()
    world.backend.idle.add(idle.name)
    world.pool.release(idle.name, None)
    world.settle()
    released = world.watch.now()
    while idle.name in world.backend.present:
        ticket = world.ask()
        world.pool.take_back(ticket.uid, ticket.request, "session")
        world.advance(LULL / 4)
    assert LONGEST <= world.watch.now() - released < LONGEST + 2 * LULL


def test_what_was_not_released_or_has_no_plenty_beside_it_is_removed_whoever_asks() -> None:
    world = warm_world(8)
    expired = world.lease(ttl=LULL / 2)
    world.backend.idle |= world.backend.present
    world.lease()
    world.advance(LULL / 2)
    world.lease()
    assert expired.name not in world.backend.present
    released = [world.lease().name for _ in range(2)]
    for name in released:
        world.pool.release(name, None)
    world.settle()
    assert world.backend.present >= set(released)
    while world.count(State.WARM) > 2:
        world.lease()
    world.settle()
    assert not world.backend.present & set(released)


def test_a_pool_that_is_drained_or_whose_filling_is_awaited_puts_nothing_off() -> None:
    ends: list[Callable[[Pool], object]] = [Pool.drain, lambda pool: pool.await_warm(WarmWait(None, lambda: None))]
    for end in ends:
        world = warm_world(8)
        idle = world.lease()
        world.backend.idle |= world.backend.present
        world.pool.release(idle.name, None)
        world.settle()
        assert idle.name in world.backend.present
        end(world.pool)
        world.settle()
        assert idle.name not in world.backend.present


def test_a_first_filling_waits_for_no_lull() -> None:
    world = World(8)
    world.ask()
    world.settle()
    assert world.count(State.WARM) + world.count(State.RESERVED) == 8


def test_whoever_waits_for_a_full_pool_waits_for_no_lull() -> None:
    world = warm_world(8)
    world.lease()
    told: list[str] = []
    world.pool.await_warm(WarmWait(None, lambda: told.append("full")))
    world.settle()
    assert told == ["full"]
    assert world.count(State.WARM) == 8


def test_whoever_waits_for_warm_containers_is_told_once_they_are() -> None:
    world = World(2)
    told: list[str] = []
    all_of_them = WarmWait(None, lambda: told.append("all"))
    one = WarmWait(1, lambda: told.append("one"))
    forgotten = WarmWait(1, lambda: told.append("forgotten"))
    for wait in (all_of_them, one, forgotten):
        world.pool.await_warm(wait)
    world.pool.forget_wait(forgotten)
    world.pool.forget_wait(forgotten)
    world.settle()
    assert told == ["one", "all"]
    assert all_of_them.reached


def test_nothing_is_watched_any_more_once_the_pool_lets_go() -> None:
    world = warm_world(2)
    world.lease()
    world.pool.let_go()
    assert world.watch.watched == []


def test_an_init_that_dies_while_it_is_being_taken_in_is_never_warm() -> None:
    world = World(1, workers=1)
    watch = world.watch.watch
    doomed: list[ProcessIdentity] = []

    def watch_and_die(identity: ProcessIdentity, callback: Callable[[], None]) -> Watched:
        watched = watch(identity, callback)
        if not doomed:
            doomed.append(identity)
            world.watch.kill(identity)  # the watchdog's thread is quicker than the lane's
        return watched

    world.watch.watch = watch_and_die  # type: ignore[method-assign]
    world.settle()
    assert world.count(State.WARM) == 0
    assert "went down at once" in str(world.pool.census().last_error)
    world.advance(1)
    assert world.names(State.WARM) == ["c2"]
    assert world.backend.present == {"c2"}
    assert len(world.watch.watched) == 1


def test_a_reservation_of_an_owner_that_dies_goes_back_at_once_though_its_connection_lives() -> None:
    world = warm_world(1)
    ticket = world.ask(pid=7)
    assert ticket.offer is not None
    other = world.ask(pid=8)
    assert not other.answered
    world.watch.kill(world.process(7))
    assert other.offer is not None
    assert world.pool.confirm(1000, ticket.request) is None
    assert world.pool.confirm(1000, other.request) is not None


def test_whoever_waits_for_an_owner_that_dies_waits_no_longer() -> None:
    world = warm_world(1)
    world.lease()
    world.backend.script("start", HANG)
    dead, alive = world.ask(pid=7), world.ask(pid=8)
    world.watch.kill(world.process(7))
    assert isinstance(dead.error, ValueError)
    assert not alive.answered
    assert world.pool.census().total("waiting") == 1


def test_of_processes_that_have_nothing_only_some_are_watched_and_all_of_those_that_have() -> None:
    world = warm_world(2)
    world.backend.script("start", HANG)
    leased = world.lease(pid=7).name
    offered, waiting = world.ask(pid=8), world.ask(pid=9)
    assert offered.offer is not None
    for pid in range(1000, 4000):
        world.pool.withdraw(world.ask(pid=pid))
    assert len(world.watch.watched) < 600
    for pid in (9, 8, 7):
        world.watch.kill(world.process(pid))
    assert isinstance(waiting.error, ValueError)
    assert world.names(State.RESERVED) == []
    assert leased not in world.names(State.LEASED)
    # One that was let go is watched again when it comes again.
    again = world.lease(pid=1000).name
    world.watch.kill(world.process(1000))
    assert again not in world.names(State.LEASED)
