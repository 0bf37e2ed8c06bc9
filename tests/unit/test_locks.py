"""Lock files: who has one is told without taking it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lxc_pool.host import locks
from lxc_pool.service.directories import running_service, state_dir
from tests.support.processes import in_child, open_descriptors


def test_one_holds_it_and_everybody_can_see(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not locks.is_held(path)
    with path.open("w") as first, path.open("w") as second:
        assert not locks.is_held(path)
        assert locks.take(first.fileno())
        assert locks.is_held(path)
        assert in_child(lambda: locks.is_held(path))
        assert not locks.take(second.fileno())
    assert not locks.is_held(path)


def test_looking_leaves_no_descriptor(tmp_path: Path) -> None:
    before = open_descriptors()
    with state_dir(tmp_path):
        assert running_service(tmp_path) == os.getpid()
    assert running_service(tmp_path) is None
    assert open_descriptors() == before


def test_who_only_looks_does_not_keep_a_service_from_starting(tmp_path: Path) -> None:
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            locks.is_held(tmp_path / "service.lock")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(300):
            with state_dir(tmp_path):
                pass
    finally:
        done.set()
        thread.join()


def test_a_link_in_a_locks_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "service.lock").symlink_to("/dev/null")
    with pytest.raises(OSError, match="symbolic"):
        running_service(tmp_path)
