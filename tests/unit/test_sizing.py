"""How many warm containers each profile keeps: bounds, growth, shrinkage, and profiles that give way to others."""

from __future__ import annotations

import pytest

from lxc_pool.backend.memory import Fault
from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import ConfigError, StartFailed
from lxc_pool.model import State
from lxc_pool.service.census import WarmWait
from tests.support.world import World

IDLE = 300.0


def world_of(*profiles: ProfileConfig, total: int | None = None, workers: int = 2) -> World:
    """Return a settled pool of these profiles, with *total* places."""
    world = World(Config(profiles, workers, max=total, shrink_after=IDLE))
    world.settle()
    return world


def elastic(name: str = "default", size: int = 1, least: int = 1, most: int = 5) -> ProfileConfig:
    return ProfileConfig(name, size, min=least, max=most)


def warm(world: World) -> dict[str, int]:
    return {name: profile.size for name, profile in world.pool.census().profiles.items()}


def capacities(world: World) -> dict[str, int]:
    return {name: profile.capacity for name, profile in world.pool.census().profiles.items()}


# --- growth -----------------------------------------------------------------------------------------------------------


def test_a_get_that_finds_none_warm_makes_the_pool_keep_one_more() -> None:
    world = world_of(elastic())
    world.lease()
    world.ask()
    world.settle()
    assert capacities(world) == {"default": 2}
    world.settle()
    assert warm(world) == {"default": 1}  # the other one is offered


def test_a_get_that_does_not_wait_counts_as_well() -> None:
    world = world_of(elastic(size=0, least=0))
    world.pool.withdraw(world.ask())
    world.settle()
    assert warm(world) == {"default": 1}


def test_a_pool_never_grows_beyond_its_max() -> None:
    world = world_of(elastic(most=3))
    for _ in range(10):
        world.ask()
    assert capacities(world) == {"default": 3}
    world.settle()
    assert world.pool.census().profiles["default"].reserved == 3


def test_a_pool_without_bounds_keeps_its_size() -> None:
    world = world_of(ProfileConfig("default", 2))
    for _ in range(10):
        world.ask()
    assert capacities(world) == {"default": 2}
    world.advance(10 * IDLE)
    assert capacities(world) == {"default": 2}


def test_a_pool_that_is_still_being_filled_does_not_grow_for_those_that_it_will_serve_anyhow() -> None:
    world = World(Config((elastic(size=3),), 2))
    tickets = [world.ask() for _ in range(3)]
    assert capacities(world) == {"default": 3}
    tickets.append(world.ask())
    assert capacities(world) == {"default": 4}
    world.settle()
    assert all(ticket.offer for ticket in tickets)


def test_a_pool_whose_creations_fail_does_not_grow() -> None:
    world = world_of(elastic())
    world.lease()
    world.backend.script("start", *[Fault(error=StartFailed("no"))] * 100)
    world.settle()
    for _ in range(4):
        world.ask()
    assert capacities(world) == {"default": 1}


# --- shrinkage --------------------------------------------------------------------------------------------------------


def test_what_nobody_needs_is_given_up_half_by_half_down_to_min() -> None:
    world = world_of(elastic(size=9, least=2, most=9))
    for expected in (4, 2, 2):
        world.advance(IDLE)
        assert capacities(world) == warm(world) == {"default": expected}
    assert len(world.backend.present) == 2
    assert not world.watch.timers  # an idle pool of its least size waits for nothing


def test_no_more_is_given_up_than_min_allows() -> None:
    world = world_of(elastic(size=5, least=4, most=9))
    world.advance(3 * IDLE)
    assert warm(world) == {"default": 4}


def test_what_was_needed_once_in_a_while_stays_for_that_while() -> None:
    world = world_of(elastic(size=4, least=1))
    world.advance(IDLE / 2)
    names = [world.lease().name for _ in range(3)]
    world.settle()
    for name in names:
        world.pool.release(name, 1000)
    world.advance(IDLE / 2 + 1)
    assert capacities(world) == {"default": 3}  # one of four was never needed


def test_a_pool_does_not_shrink_while_it_is_all_in_use() -> None:
    world = world_of(elastic(size=2, least=0))
    for _ in range(5):
        world.advance(IDLE / 2)
        for _ in range(2):
            world.pool.release(world.lease().name, 1000)
    assert capacities(world) == {"default": 2}


def test_a_pool_that_has_grown_and_shrunk_can_grow_again() -> None:
    world = world_of(elastic(size=0, least=0, most=2))
    for _ in range(3):
        tickets = [world.ask() for _ in range(2)]
        world.settle()
        for ticket in tickets:
            assert ticket.offer
            world.pool.abandon(ticket.uid, ticket.request)
        world.settle()
        assert warm(world) == {"default": 2}
        world.advance(4 * IDLE)
        assert warm(world) == {"default": 0}
        assert world.backend.present == set()


def test_whoever_waits_for_a_full_pool_learns_that_it_is_full_as_it_shrinks() -> None:
    world = world_of(elastic(size=2, least=1))
    world.lease()
    world.backend.script("start", *[Fault(error=StartFailed("no"))] * 10_000)
    told = []
    world.pool.await_warm(WarmWait(None, lambda: told.append(1)))
    world.advance(IDLE - 1)
    assert not told
    world.advance(2 * IDLE)  # the second period has at no time needed the one that is warm
    assert told


# --- giving way -------------------------------------------------------------------------------------------------------


def test_a_pool_full_of_one_profile_gives_way_to_a_request_for_another() -> None:
    world = world_of(elastic("a", 4, 1, 4), elastic("b", 0, 0, 2), total=4)
    assert warm(world) == {"a": 4, "b": 0}
    ticket = world.ask(profile="b")
    assert world.count(State.WARM) == 3  # there is room before another one is made
    world.settle()
    assert ticket.offer is not None
    assert ticket.offer.profile == "b"
    assert capacities(world) == {"a": 3, "b": 1}


def test_nothing_gives_way_while_there_is_room() -> None:
    world = world_of(elastic("a", 3, 1, 3), elastic("b", 0, 0, 2), total=4)
    world.ask(profile="b")
    world.settle()
    assert capacities(world) == {"a": 3, "b": 1}


def test_a_profile_keeps_its_min() -> None:
    world = world_of(elastic("a", 3, 2, 3), elastic("b", 0, 0, 3), total=3)
    tickets = [world.ask(profile="b") for _ in range(3)]
    world.settle()
    assert [ticket.offer is not None for ticket in tickets] == [True, False, False]
    assert capacities(world) == {"a": 2, "b": 1}
    assert warm(world)["a"] == 2


def test_the_profile_that_was_not_asked_for_the_longest_gives_way() -> None:
    world = world_of(elastic("a", 2, 0, 2), elastic("b", 2, 0, 2), elastic("c", 0, 0, 2), total=4)
    world.advance(1)
    world.lease(profile="b")
    world.advance(1)
    world.lease(profile="a")
    world.settle()
    world.ask(profile="c")
    assert capacities(world) == {"a": 2, "b": 1, "c": 1}


def test_a_profile_that_somebody_waits_for_does_not_give_way_to_one_that_has_a_place() -> None:
    world = world_of(elastic("a", 1, 0, 3), elastic("b", 1, 0, 3), total=2)
    world.lease(profile="a")
    world.lease(profile="b")
    waiting = world.ask(profile="a")
    world.ask(profile="b")
    assert capacities(world) == {"a": 1, "b": 1}
    world.settle()
    assert waiting.offer is not None


def test_a_profile_without_a_place_gets_one_that_comes_free_however_busy_the_others_are() -> None:
    world = world_of(elastic("a", 1, 0, 1), elastic("b", 0, 0, 1), total=1, workers=1)
    served = []
    world.lease(profile="a")
    waiting = [world.ask(profile=name, request=f"{name}{number}") for number in range(3) for name in ("a", "b")]
    for _ in range(20):
        world.settle()
        for ticket in waiting:
            if ticket.offer is not None and ticket not in served:
                served.append(ticket)
                assert world.pool.confirm(ticket.uid, ticket.request)
    assert sorted(ticket.request for ticket in served) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert served[0].profile != served[1].profile


def test_lanes_are_shared_between_profiles_that_are_waited_for() -> None:
    world = world_of(ProfileConfig("a", 3), ProfileConfig("b", 3), workers=1)
    for name in ("a", "b"):
        for _ in range(3):
            world.lease(profile=name)
    world.backend.script("start", *[Fault(delay=1.0)] * 6)
    a, b = ([world.ask(profile=name) for _ in range(3)] for name in ("a", "b"))
    world.advance(4.5)
    assert sum(ticket.offer is not None for ticket in a) == 2
    assert sum(ticket.offer is not None for ticket in b) == 2


# --- resize -----------------------------------------------------------------------------------------------------------


def test_a_resize_is_about_the_default_profile_and_of_a_fixed_size_for_good() -> None:
    world = world_of(ProfileConfig("a", 1), ProfileConfig("default", 1))
    world.pool.resize(3)
    world.settle()
    assert warm(world) == {"a": 1, "default": 3}
    profile = world.pool.census().profiles["default"]
    assert (profile.min, profile.max) == (3, 3)


def test_a_resize_moves_the_bound_that_is_in_the_way() -> None:
    world = world_of(elastic(size=2, least=1, most=3))
    for size, bounds in ((5, (1, 5)), (2, (1, 5))):
        world.pool.resize(size)
        world.settle()
        profile = world.pool.census().profiles["default"]
        assert (profile.size, profile.min, profile.max) == (size, *bounds)


def test_a_resize_makes_others_give_way_but_leaves_them_their_min() -> None:
    world = world_of(elastic("a", 2, 1, 2), elastic("default", 2, 1, 4), total=4)
    world.pool.resize(3)
    world.settle()
    assert warm(world) == {"a": 1, "default": 3}
    with pytest.raises(ConfigError, match="size must be at most 3, not 4"):
        world.pool.resize(4)
    assert capacities(world) == {"a": 1, "default": 3}


# --- reasons ----------------------------------------------------------------------------------------------------------


def test_why_a_profile_is_not_ready_is_with_that_profile_until_it_is() -> None:
    world = World(Config((ProfileConfig("a", 1), ProfileConfig("b", 1, image="missing")), 1))
    world.settle()
    profiles = world.pool.census().profiles
    assert profiles["a"].last_error is None
    assert "no image 'missing'" in str(profiles["b"].last_error)
    assert profiles["b"].backoff > 0
    ticket = world.ask(profile="b")
    assert "last error: there is no image 'missing'" in world.pool.withdraw(ticket)
    world.backend.publish("missing")
    world.advance(5)
    assert world.pool.census().profiles["b"].last_error is None
    assert world.count(State.WARM) == 2
