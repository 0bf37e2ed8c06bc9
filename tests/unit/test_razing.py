"""Removing trees that an enemy has made."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool.host import razing

_LEVELS = 20_000
"""A path of it would have five million characters."""


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "top"
    path.mkdir()
    yield path
    assert path.is_dir()


def _empty(top: Path) -> None:
    descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        razing.empty(descriptor)
    finally:
        os.close(descriptor)


def _chain(top: Path, name: str, levels: int) -> None:
    directory = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=directory)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)


def test_depth_takes_neither_memory_nor_descriptors(top: Path) -> None:
    _chain(top, "d" * 255, _LEVELS)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, limits[1]))
    try:
        _empty(top)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert os.listdir(top) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 4096  # KiB


def test_all_kinds_of_entries_go_and_what_links_lead_to_stays(top: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("still there")
    for names in itertools.product("012", repeat=4):  # the names that directories get when they are lifted
        (top / "/".join(names)).mkdir(parents=True)
    for number in range(2500):
        (top / f"0/1/{number}.file").touch()
    (top / "5").touch()
    (top / "0/link").symlink_to(outside)
    (top / "0/file").symlink_to(outside / "file")
    (top / "link").symlink_to(outside)
    os.link(outside / "file", top / "0/1/hard")
    os.mkfifo(top / "1/fifo")
    os.mkdir(os.fsencode(top) + b"/1/\xff\xfe\n")
    (top / "2/closed").mkdir(mode=0)
    _empty(top)
    assert os.listdir(top) == []
    assert (outside / "file").read_text() == "still there"


def test_it_is_begun_again_by_whoever_comes_next(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for names in itertools.product("012", repeat=3):
        (top / "/".join(names) / "more").mkdir(parents=True)
    rename, calls = os.rename, itertools.count()

    def fail_now_and_then(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        if next(calls) % 3 == 2:
            raise InterruptedError(errno.EINTR, "a fault")
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_now_and_then)
        with pytest.raises(InterruptedError):
            _empty(top)
    assert os.listdir(top)
    _empty(top)
    assert os.listdir(top) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: flags and mounts")
def test_what_can_not_be_changed_is_made_so_that_it_can(top: Path) -> None:
    for flag, name in itertools.product("ia", ("a", "b")):
        (top / name / flag / "more").mkdir(parents=True)
        (top / name / flag / "file").touch()
        for path in (top / name / flag / "file", top / name / flag):
            done = subprocess.run(["chattr", f"+{flag}", path], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"the file system of {top} has no flags: {done.stderr}")
    _empty(top)
    assert os.listdir(top) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a mount")
def test_what_is_mounted_is_neither_entered_nor_removed(top: Path, tmp_path: Path) -> None:
    outside, place = tmp_path / "outside", top / "a/b"
    outside.mkdir()
    (outside / "file").touch()
    place.mkdir(parents=True)
    (top / "a/other").mkdir()
    subprocess.run(["mount", "--bind", outside, place], check=True)
    try:
        with pytest.raises(OSError, match="a/b"):
            _empty(top)
        assert (outside / "file").exists()
        assert not (top / "a/other").exists()
    finally:
        subprocess.run(["umount", place], check=True)
    _empty(top)
    assert os.listdir(top) == []
