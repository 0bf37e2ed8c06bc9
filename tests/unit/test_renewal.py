"""What a new configuration, or a new version of an image, means for the containers that there are."""

from __future__ import annotations

import dataclasses

import pytest

from lxc_pool.backend.memory import Fault
from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import StartFailed
from lxc_pool.model import State
from tests.support.world import World


def warm_world(*profiles: ProfileConfig, workers: int = 2) -> World:
    world = World(Config(profiles or (ProfileConfig("default", 4),), workers))
    world.settle()
    return world


def change(world: World, *profiles: ProfileConfig, **fields: object) -> None:
    """Let another configuration be in force, as SIGHUP does."""
    world.config = dataclasses.replace(world.config, profiles=profiles, **fields)  # type: ignore[arg-type]
    world.pool.reconfigure(world.config)


def outdated(world: World) -> int:
    return sum(profile.outdated for profile in world.pool.census().profiles.values())


def until_renewed(world: World) -> list[tuple[int, int]]:
    """Go on, a little at a time, until nothing is outdated; return how many were warm and how many were building."""
    seen = []
    world.settle()
    while outdated(world) or world.count(State.BUILDING) or world.count(State.REAPING):
        world.advance(0.1)
        seen.append((world.count(State.WARM), world.count(State.BUILDING)))
        assert len(seen) < 1000
    return seen


# --- profiles that change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field", [{"image": "debian"}, {"memory": 1 << 29}, {"privileged": True}, {"probe": ("true",)}, {"disk": 1 << 28}]
)
def test_a_changed_profile_rolls_over_and_leases_stay(field: dict[str, object]) -> None:
    world = warm_world()
    world.backend.publish("debian")
    leased = world.lease().name
    world.rest()
    old = set(world.names(State.WARM))
    change(world, ProfileConfig("default", 4, **field))  # type: ignore[arg-type]
    until_renewed(world)
    assert world.count(State.WARM) == 4
    assert not old & world.backend.present
    assert world.pool.leased(leased, 1000).state is State.LEASED


@pytest.mark.parametrize("field", [{"allow": ("a",)}, {"env": (("A", "b"),)}, {"probe_timeout": 5.0}, {"max": 9}])
def test_what_containers_are_not_made_by_changes_without_replacing_any(field: dict[str, object]) -> None:
    world = warm_world()
    old = world.names(State.WARM)
    change(world, ProfileConfig("default", 4, **field))  # type: ignore[arg-type]
    world.settle()
    assert world.names(State.WARM) == old


@pytest.mark.parametrize(("size", "workers"), [(1, 1), (1, 3), (2, 2), (4, 2), (10, 5), (40, 5)])
def test_a_roll_over_never_has_fewer_warm_than_before_and_a_quarter_more_at_most(size: int, workers: int) -> None:
    world = warm_world(ProfileConfig("default", size), workers=workers)
    world.backend.script("start", *[Fault(delay=1.0)] * size)
    change(world, ProfileConfig("default", size, pids=7))
    seen = until_renewed(world)
    assert min(warm for warm, _building in seen) == size
    assert max(warm + building for warm, building in seen) <= size + max(1, size // 4)


def test_a_get_during_a_roll_over_is_served_by_a_new_one_if_there_is_one_and_else_by_an_old_one() -> None:
    world = warm_world(ProfileConfig("default", 2), workers=1)
    old = set(world.names(State.WARM))
    world.backend.script("start", *[Fault(delay=1.0)] * 10)
    change(world, ProfileConfig("default", 2, pids=7))
    assert world.lease().name in old
    while world.count(State.WARM) != 2:
        world.advance(0.5)
    assert outdated(world) == 1
    assert world.lease().name not in old
    assert world.lease().name in old


def test_an_old_one_that_was_offered_and_comes_back_is_replaced_too() -> None:
    world = warm_world(ProfileConfig("default", 2))
    ticket = world.ask()
    change(world, ProfileConfig("default", 2, pids=7))
    until_renewed(world)
    world.pool.take_back(1000, ticket.request, "session")
    until_renewed(world)
    assert ticket.offer is not None
    assert ticket.offer.name not in world.backend.present
    assert world.count(State.WARM) == 2


def test_one_that_was_being_built_as_the_profile_changed_is_replaced_too() -> None:
    world = World(1)
    world.backend.script("start", Fault(delay=1.0))
    world.settle()
    change(world, ProfileConfig("default", 1, pids=7))
    world.advance(1)
    until_renewed(world)
    assert world.names(State.WARM) == ["c2"]


def test_old_ones_are_handed_out_for_as_long_as_new_ones_do_not_come_up() -> None:
    world = warm_world(ProfileConfig("default", 2))
    world.backend.script("start", *[Fault(error=StartFailed("bad profile"))] * 1000)
    change(world, ProfileConfig("default", 2, pids=7))
    world.advance(30)
    assert world.count(State.WARM) == 2
    profile = world.pool.census().profiles["default"]
    assert (profile.outdated, profile.last_error) == (2, "bad profile")
    world.lease()


def test_a_change_that_is_taken_back_keeps_what_is_left_of_the_old_ones() -> None:
    world = warm_world(ProfileConfig("default", 2))
    old = set(world.names(State.WARM))
    world.backend.script("start", *[Fault(delay=1.0)] * 10)
    change(world, ProfileConfig("default", 2, pids=7))
    change(world, ProfileConfig("default", 2))
    world.advance(10)
    assert set(world.names(State.WARM)) == old


def test_an_image_that_is_still_being_prepared_as_the_profile_changes_to_another_is_not_taken_for_that() -> None:
    world = World(1)
    world.backend.publish("debian")
    world.backend.script("prepare", Fault(delay=5.0))
    world.settle()
    change(world, ProfileConfig("default", 1, image="debian"))
    world.advance(10)
    assert world.pool.census().profiles["default"].image == "debian:1"
    assert world.count(State.WARM) == 1


# --- profiles that come and go ----------------------------------------------------------------------------------------


def test_a_new_profile_begins_and_one_that_is_gone_drains() -> None:
    world = warm_world(ProfileConfig("default", 1), ProfileConfig("old", 2))
    leased = world.lease(profile="old").name
    waiting = [world.ask(profile="old") for _ in range(3)]
    change(world, ProfileConfig("default", 1), ProfileConfig("new", 2))
    world.settle()
    profiles = world.pool.census().profiles
    assert {name: (profile.size, profile.leased) for name, profile in profiles.items()} == {
        "default": (1, 0),
        "new": (2, 0),
        "old": (0, 1),
    }
    assert isinstance(waiting[2].error, ValueError)
    with pytest.raises(ValueError, match="unknown profile 'old'"):
        world.ask(profile="old")
    for ticket in waiting[:1]:  # one had an offer
        assert world.pool.confirm(ticket.uid, ticket.request)
        world.pool.abandon(ticket.uid, ticket.request)
    assert (profiles["old"].min, profiles["old"].max) == (0, 0)
    world.pool.release(leased, 1000)
    world.settle()
    assert list(world.pool.census().profiles) == ["default", "new"]


def test_a_profile_that_comes_back_before_its_leases_end_goes_on() -> None:
    world = warm_world(ProfileConfig("default", 1), ProfileConfig("other", 1))
    leased = world.lease(profile="other").name
    change(world, ProfileConfig("default", 1))
    world.settle()
    change(world, ProfileConfig("default", 1), ProfileConfig("other", 2))
    world.settle()
    assert world.pool.census().profiles["other"].size == 2
    world.pool.release(leased, 1000)
    world.settle()
    assert world.pool.census().profiles["other"].size == 2


def test_a_profile_that_comes_back_as_another_makes_containers_of_that() -> None:
    world = warm_world(ProfileConfig("default", 1), ProfileConfig("other", 1))
    world.lease(profile="other")
    world.backend.publish("debian")
    change(world, ProfileConfig("default", 1))
    new = ProfileConfig("other", 1, image="debian", pids=7)
    change(world, ProfileConfig("default", 1), new)
    world.settle()
    profile = world.pool.census().profiles["other"]
    assert (profile.size, profile.outdated, profile.image) == (1, 0, "debian:1")
    assert world.journal.entries[world.lease(profile="other").name].recipe == new.recipe


# --- who may have what ------------------------------------------------------------------------------------------------


def test_what_was_made_for_administrators_is_never_handed_out_once_everybody_may_have_the_profile() -> None:
    root = ProfileConfig("default", 2, privileged=True)
    world = warm_world(root)
    offered = world.ask(session="administrator's")
    assert offered.offer is not None
    old = {info.name for info in world.pool.containers(None)}
    change(world, ProfileConfig("default", 2))
    assert world.count(State.WARM) == 0
    world.pool.take_back(1000, offered.request, "administrator's")
    assert world.ask().offer is None
    world.settle()
    assert not old & world.backend.present
    assert world.count(State.WARM) + world.count(State.RESERVED) == 2


def test_what_is_still_handed_out_while_it_is_replaced_is_not_once_others_may_have_the_profile() -> None:
    world = warm_world(ProfileConfig("default", 1, pids=5, allow=("ci",)))
    world.backend.script("start", *[Fault(error=StartFailed("no"))] * 3)
    change(world, ProfileConfig("default", 1, pids=7, allow=("ci",)))
    world.settle()
    assert world.count(State.WARM) == 1
    change(world, ProfileConfig("default", 1, pids=7))
    assert world.count(State.WARM) == 0
    world.advance(10)
    assert world.names(State.WARM) != ["c1"]


def test_one_that_was_being_built_for_other_people_is_not_handed_out() -> None:
    world = World(Config((ProfileConfig("default", 1, privileged=True),), 1))
    world.backend.script("start", Fault(delay=1.0))
    world.settle()
    change(world, ProfileConfig("default", 1))
    ticket = world.ask()
    world.advance(5)
    assert ticket.offer is not None
    assert ticket.offer.name == "c2"


def test_whom_a_profile_is_for_replaces_nothing_by_itself() -> None:
    world = warm_world(ProfileConfig("default", 2, allow=("ci",)))
    before = world.names(State.WARM)
    change(world, ProfileConfig("default", 2))
    world.settle()
    assert world.names(State.WARM) == before


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_configuration_that_is_read_again_unchanged_changes_nothing() -> None:
    world = warm_world(ProfileConfig("default", 1, min=1, max=5), ProfileConfig("a", 1))
    world.pool.resize(3)
    world.settle()
    before = world.names(State.WARM)
    change(world, *world.config.profiles)
    world.settle()
    assert world.names(State.WARM) == before


def test_a_changed_size_is_taken_over_and_changed_bounds_are_kept_to() -> None:
    world = warm_world(ProfileConfig("default", 2, min=1, max=5))
    world.pool.resize(4)
    change(world, ProfileConfig("default", 2, min=1, max=3))
    assert world.pool.census().profiles["default"].capacity == 3
    change(world, ProfileConfig("default", 5, min=1, max=5))
    assert world.pool.census().profiles["default"].capacity == 5
    change(world, ProfileConfig("default", 1))
    world.settle()
    assert world.count(State.WARM) == 1


def test_a_smaller_limit_is_kept_to_at_once() -> None:
    profiles = ProfileConfig("a", 1, min=0, max=5), ProfileConfig("b", 1, min=1, max=5)
    world = warm_world(*profiles)
    for name in ("a", "a", "a", "b", "b"):
        world.ask(profile=name)
    world.settle()
    assert world.pool.census().total("capacity") > 3
    change(world, *profiles, max=3)
    assert world.pool.census().total("capacity") == 3


def test_a_resize_that_the_new_limit_has_no_room_for_is_forgotten() -> None:
    world = warm_world(ProfileConfig("default", 1), ProfileConfig("b", 1))
    world.pool.resize(9)
    change(world, *world.config.profiles, max=4)
    assert {name: p.capacity for name, p in world.pool.census().profiles.items()} == {"default": 1, "b": 1}


# --- images -----------------------------------------------------------------------------------------------------------


def test_a_new_version_of_an_image_is_taken_up_when_the_pool_is_told() -> None:
    world = warm_world(ProfileConfig("a", 2), ProfileConfig("b", 1))
    world.backend.publish("busybox")
    world.settle()
    assert outdated(world) == 0
    world.pool.look_for_images()
    until_renewed(world)
    assert {entry.image for entry in world.journal.entries.values()} == {"busybox:2"}
    assert world.count(State.WARM) == 3


def test_looking_for_images_that_are_as_they_were_changes_nothing() -> None:
    world = warm_world()
    before = world.names(State.WARM)
    world.pool.look_for_images()
    world.settle()
    assert world.names(State.WARM) == before


def test_a_search_that_fails_leaves_the_image_as_it_is() -> None:
    world = warm_world(ProfileConfig("default", 1))
    del world.backend.versions["busybox"]
    world.pool.look_for_images()
    world.settle()
    assert "no image" in str(world.pool.census().last_error)
    world.lease()
    world.settle()
    assert world.count(State.WARM) == 1


def test_a_profile_without_a_place_takes_the_new_version_once_it_gets_one() -> None:
    world = warm_world(ProfileConfig("default", 0))
    world.pool.withdraw(world.ask())
    world.advance(10_000)
    assert world.count(State.WARM) == 0
    world.backend.publish("busybox")
    world.pool.look_for_images()
    world.settle()
    ticket = world.ask()
    world.settle()
    assert ticket.offer is not None
    assert ticket.offer.image == "busybox:2"
