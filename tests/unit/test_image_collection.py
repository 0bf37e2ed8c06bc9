"""When the pool has old images removed, and which it keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lxc_pool.backend.memory import Fault
from lxc_pool.errors import ImageError
from lxc_pool.images.store import Image
from lxc_pool.model import State
from tests.support.world import World

OLD, NEW = (Image("busybox", version, Path("/nonexistent"), 0, 0.0, "") for version in ("1", "2"))


def collections(world: World) -> list[frozenset[str]]:
    """Have each collection from now on noted."""
    made: list[frozenset[str]] = []
    world.backend.collect_images = made.append  # type: ignore[method-assign,assignment]  # a probe
    return made


def use(world: World, monkeypatch: pytest.MonkeyPatch, image: Image) -> None:
    """Let the pool find *image*, as if it had just started beside containers of another."""
    monkeypatch.setattr(world.backend, "newest", lambda _name: image)
    for shelf in world.pool._stock.shelves.values():
        shelf.image = None


def test_old_images_are_collected_once_the_pool_is_full() -> None:
    world = World(2)
    made = collections(world)
    world.settle()
    assert made == [frozenset({"busybox:1"})]
    assert world.count(State.WARM) == 2


def test_an_idle_pool_does_not_collect_again() -> None:
    world = World(1)
    made = collections(world)
    world.settle()
    world.pool.release(world.lease().name, 1000)
    world.advance(3600)
    assert len(made) == 1


def test_an_old_image_is_kept_until_its_last_container_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    world.settle()
    name = world.lease().name
    made = collections(world)
    use(world, monkeypatch, NEW)
    world.settle()
    assert made == [frozenset({"busybox:1", "busybox:2"})]
    world.pool.release(name, 1000)
    world.settle()
    assert made[1:] == [frozenset({"busybox:2"})]


def test_a_collection_that_fails_is_told_and_tried_again_with_the_next_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)

    def fail(_keep: frozenset[str]) -> None:
        raise ImageError("mounts in it")

    monkeypatch.setattr(world.backend, "collect_images", fail)
    world.settle()
    assert world.pool.census().last_error == "mounts in it"
    assert world.count(State.WARM) == 1
    made = collections(world)
    use(world, monkeypatch, NEW)
    world.settle()
    # The warm one is replaced, after which nothing of the old version is left.
    assert made == [frozenset({"busybox:1", "busybox:2"}), frozenset({"busybox:2"})]


def test_an_image_that_has_vanished_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    world.backend.script("clone", Fault(error=ImageError("base image busybox:1 is gone")))
    images = iter((OLD, dataclasses.replace(NEW)))
    monkeypatch.setattr(world.backend, "newest", lambda _name: next(images))
    world.advance(10)
    assert world.count(State.WARM) == 1
    assert world.pool.census().profiles["default"].image == "busybox:2"
