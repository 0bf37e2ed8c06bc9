"""Read back, from a container's cgroups, the limits that it was to have: liblxc ignores what the host does not know.

Source: Linux Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lxc_pool.config import ProfileConfig
from lxc_pool.host import cgroups

_PAGE = 4096

_MOST_CGROUPS = 500
"""Cgroups below a container's own, those of its commands included. A guess: systemd makes some dozens. The memory
controller can count 65 535 on the whole machine. Source: Linux mm/memcontrol.c, MEM_CGROUP_ID_MAX."""


_LIMITS = ("pids.max", "memory.limit_in_bytes", "memory.max", "cpu.shares", "cpu.weight")
_SWAP, _MEMORY_AND_SWAP = "memory.swap.max", "memory.memsw.limit_in_bytes"


def shares(weight: int) -> int:
    """Return version 1's cpu.shares for version 2's cpu.weight: 1024 for 100, as systemd has it."""
    return max(2, weight * 1024 // 100)


def problems(profile: ProfileConfig, directories: Iterable[Path]) -> list[str]:
    """Return every limit of *profile* that is not in force, in words.

    Args:
        profile: What is wanted.
        directories: The container's cgroup in each hierarchy.
    """
    memory = profile.memory - profile.memory % _PAGE
    wanted = {
        "number of processes": {"pids.max": profile.pids},
        "memory": {"memory.limit_in_bytes": memory, "memory.max": memory},
        "cpu weight": {"cpu.shares": shares(profile.cpu), "cpu.weight": profile.cpu},
    }
    found: dict[str, str] = {}
    for directory in directories:
        for file in _hierarchy(directory).limits:
            with open(f"{directory}/{file}", "rb", buffering=0) as limit:
                found[file] = limit.read().decode("ascii").strip()
    bad = []
    for what, values in wanted.items():
        here = {file: value for file, value in values.items() if file in found}
        if not here:
            bad.append(f"{what}: this host has no {' or '.join(values)} for it")
        bad += [
            f"{what}: {file} is {found[file]}, not {value}" for file, value in here.items() if found[file] != str(value)
        ]
    return bad


def seal(profile: ProfileConfig, directories: Iterable[Path], trees: Iterable[cgroups.Hierarchy]) -> None:
    """Close what liblxc leaves open of a running container's cgroups: how many it may make, and the host's swap.

    In a version 1 hierarchy nothing limits their number; so there its root may make none (liblxc gives it the
    directory), but in a named one, which systemd needs and which costs least.

    Args:
        profile: What the container was to have.
        directories: As for `problems`.
        trees: The hierarchies that they are in.

    Raises:
        OSError: The kernel refused.
    """
    spared = tuple(f"{tree.mount_point}/" for tree in trees if tree.is_named)
    for directory in directories:
        hierarchy = _hierarchy(directory)
        if hierarchy.version == 2:
            (directory / "cgroup.max.descendants").write_text(str(_MOST_CGROUPS), encoding="ascii")
        elif not str(directory).startswith(spared):
            _take(directory)
        for file in hierarchy.swap:
            _overwrite(directory / file, str(0 if file == _SWAP else profile.memory))


def _take(cgroup: Path) -> None:
    """Make a cgroup and all below it the host's root's.

    Each is taken before it is looked into: what the container's root makes there until then is seen, and after that it
    can make no more.
    """
    left = [str(cgroup)]
    while left:
        directory = left.pop()
        os.chown(directory, 0, 0)
        # A directory without others in it has two links: then there is no need to look, which takes 0.1 ms.
        if os.stat(directory).st_nlink != 2:
            with os.scandir(directory) as entries:
                left += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]


class _Hierarchy(NamedTuple):
    """What there is in a container's cgroup of one hierarchy.

    Attributes:
        version: Of cgroups.
        limits: The files of the limits that can be read back there.
        swap: Those that bound swap; none on a host that does not count it.
    """

    version: int
    limits: tuple[str, ...]
    swap: tuple[str, ...]


_hierarchies: dict[str, _Hierarchy] = {}
"""What `_hierarchy` has found: a host keeps its own, and to look at all of them takes 0.5 ms of a start."""


def _hierarchy(cgroup: Path) -> _Hierarchy:
    """Return what is known of the hierarchy that a container's cgroup is in."""
    parent = os.path.dirname(cgroup)
    known = _hierarchies.get(parent)
    if known is None:
        files = os.listdir(cgroup)
        known = _hierarchies[parent] = _Hierarchy(
            2 if "cgroup.max.descendants" in files else 1,
            tuple(file for file in _LIMITS if file in files),
            tuple(file for file in (_SWAP, _MEMORY_AND_SWAP) if file in files),
        )
    return known


def _overwrite(file: Path, text: str) -> None:
    """Write to a file that is there; unlike `write_text`, never make one."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
