"""Read back, from a container's cgroups, the limits that it was to have: liblxc ignores what the host does not know.

Source: Linux Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from lxc_pool.config import ProfileConfig

_PAGE = 4096

_MOST_CGROUPS = 500
"""Cgroups below a container's own, those of its commands included. A guess: systemd makes some dozens. The memory
controller can count 65 535 on the whole machine. Source: Linux mm/memcontrol.c, MEM_CGROUP_ID_MAX."""


def shares(weight: int) -> int:
    """Return version 1's cpu.shares for version 2's cpu.weight: 1024 for 100, as systemd has it."""
    return max(2, weight * 1024 // 100)


def problems(profile: ProfileConfig, directories: Iterable[Path]) -> list[str]:
    """Return every limit of *profile* that is not in force, in words.

    Args:
        profile: What is wanted.
        directories: The container's cgroup in each hierarchy.
    """
    wanted = {
        "number of processes": (profile.pids, ("pids.max",)),
        "memory": (profile.memory - profile.memory % _PAGE, ("memory.limit_in_bytes", "memory.max")),
        "cpu weight": (None, ("cpu.shares", "cpu.weight")),
    }
    cpu = {"cpu.shares": shares(profile.cpu), "cpu.weight": profile.cpu}
    found: dict[str, str] = {}
    for directory in directories:
        for _value, files in wanted.values():
            for file in files:
                try:
                    found[file] = (directory / file).read_text(encoding="ascii").strip()
                except OSError:  # another hierarchy's
                    continue
    bad = []
    for what, (value, files) in wanted.items():
        here = [file for file in files if file in found]
        expected = {file: str(cpu[file] if value is None else value) for file in here}
        if not here:
            bad.append(f"{what}: this host has no {' or '.join(files)} for it")
        bad += [
            f"{what}: {file} is {found[file]}, not {expected[file]}" for file in here if found[file] != expected[file]
        ]
    return bad


def seal(profile: ProfileConfig, directories: Iterable[Path]) -> None:
    """Close what liblxc leaves open of a running container's cgroups: how many it may make, and the host's swap.

    In a version 1 hierarchy nothing limits their number; so there its root may make none (liblxc gives it the
    directory), but in one without controllers, which systemd needs and which costs least.

    Args:
        profile: What the container was to have.
        directories: As for `problems`.

    Raises:
        OSError: The kernel refused.
    """
    for directory in directories:
        version, controllers = _kind(directory)
        if version == 2:
            (directory / "cgroup.max.descendants").write_text(str(_MOST_CGROUPS), encoding="ascii")
        elif controllers:
            # A directory without others in it has two links: then there is no need to look, which takes 0.1 ms.
            childless = directory.stat().st_nlink == 2
            for cgroup in (directory,) if childless else (parent for parent, _, _ in os.walk(directory)):
                os.chown(cgroup, 0, 0)
        # Not there on a host that does not count swap.
        for file, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", profile.memory)):
            with contextlib.suppress(FileNotFoundError):
                _overwrite(directory / file, str(value))


_kinds: dict[Path, tuple[int, bool]] = {}
"""What `_kind` has found of each hierarchy: a host keeps its own, and to list a cgroup takes 0.1 ms."""


def _kind(cgroup: Path) -> tuple[int, bool]:
    """Return the version of the hierarchy that a container's cgroup is in, and whether it has controllers of 1."""
    known = _kinds.get(cgroup.parent)
    if known is None:
        files = os.listdir(cgroup)
        common = ("cgroup.", "tasks", "notify_on_release", "release_agent", "lxc_pool.")
        version = 2 if "cgroup.max.descendants" in files else 1
        known = version, version == 1 and not all(file.startswith(common) for file in files)
        _kinds[cgroup.parent] = known
    return known


def _overwrite(file: Path, text: str) -> None:
    """Write to a file that is there; unlike `write_text`, never make one."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
