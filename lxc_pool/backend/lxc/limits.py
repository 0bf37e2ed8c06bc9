"""Read back, from a container's cgroups, the limits that it was to have: liblxc ignores what the host does not know.

Source: Linux Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lxc_pool.config import ProfileConfig

_PAGE = 4096


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
