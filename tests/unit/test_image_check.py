"""When the pool has its images compared with their checksums, and what becomes of one that has changed."""

from __future__ import annotations

import dataclasses

import pytest

from lxc_pool.backend.memory import HANG, Fault
from lxc_pool.errors import ImageError
from lxc_pool.model import State
from tests.support.world import World

CHANGED = Fault(error=ImageError("base image busybox:1 has changed since it was built"))


def verifications(world: World) -> list[str]:
    return [name for step, name in world.backend.history if step == "verify"]


def make_large(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the images be of a size that nobody wants to wait for."""
    newest = world.backend.newest

    def large(name: str) -> object:
        image = newest(name)
        assert image is not None
        return dataclasses.replace(image, size=300 << 20)

    monkeypatch.setattr(world.backend, "newest", large)


def test_a_small_image_is_looked_at_once_and_before_the_first_clone() -> None:
    world = World(2)
    world.settle()
    steps = [step for step, _name in world.backend.history]
    assert steps.index("verify") < steps.index("clone")
    world.pool.release(world.lease().name, 1000)
    world.pool.look_for_images()
    world.settle()
    assert verifications(world) == ["busybox:1"]


def test_a_large_one_is_looked_at_when_the_pool_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(2)
    make_large(world, monkeypatch)
    world.settle()
    steps = [step for step, _name in world.backend.history]
    assert steps.index("verify") > max(index for index, step in enumerate(steps) if step == "probe")
    assert world.count(State.WARM) == 2
    assert verifications(world) == ["busybox:1"]


def test_a_new_version_is_looked_at_too() -> None:
    world = World(1)
    world.settle()
    world.backend.publish("busybox")
    world.pool.look_for_images()
    world.settle()
    assert verifications(world) == ["busybox:1", "busybox:2"]


def test_nothing_is_made_of_one_that_has_changed_until_there_is_a_new_version() -> None:
    world = World(1)
    world.backend.script("verify", CHANGED)
    world.advance(600)
    assert not [step for step, _name in world.backend.history if step == "clone"]
    status = world.pool.census()
    assert "has changed since it was built" in (status.profiles["default"].last_error or "")
    assert verifications(world) == ["busybox:1"]
    world.backend.publish("busybox")
    world.pool.look_for_images()
    world.settle()
    assert world.count(State.WARM) == 1
    assert world.pool.census().profiles["default"].last_error is None


def test_what_is_warm_of_one_that_has_changed_goes_and_leases_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(2)
    make_large(world, monkeypatch)
    world.backend.script("verify", Fault(delay=5.0, error=CHANGED.error))
    world.advance(1)
    assert world.count(State.WARM) == 2
    leased = world.lease()
    world.advance(10)
    assert world.count(State.WARM) == 0
    assert world.count(State.LEASED) == 1
    assert "has changed" in (world.pool.census().last_error or "")
    world.pool.release(leased.name, 1000)
    world.advance(60)
    assert world.count(State.WARM) == 0


def test_whoever_has_mended_one_has_it_looked_at_again_before_anything_is_made_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(1)
    make_large(world, monkeypatch)
    world.backend.script("verify", CHANGED)
    world.advance(10)
    assert world.count(State.WARM) == 0
    world.backend.history.clear()
    world.pool.look_for_images()
    world.settle()
    steps = [step for step, _name in world.backend.history]
    assert steps.index("verify") < steps.index("clone")
    assert world.count(State.WARM) == 1


def test_one_that_can_not_be_looked_at_is_looked_at_later(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    make_large(world, monkeypatch)
    world.backend.script("verify", HANG)
    world.advance(2000)
    assert world.count(State.WARM) == 1
    world.pool.release(world.lease().name, 1000)
    world.advance(100)
    assert verifications(world) == ["busybox:1"] * 2
