"""A peer that is ready to be used: what the suite is told of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.compare.commands import Commands
from benchmarks.compare.place import Place


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """What the suite is told of a peer, and how to wait until it has nothing more to do.

    Attributes:
        arguments: For the suite's pytest.
        rest: Return once the work that goes on behind a session is done.
    """

    arguments: tuple[str, ...]
    rest: Callable[[], object] = lambda: None


def by_commands(place: Place, commands: Commands, rest: Callable[[], object] = lambda: None) -> Ready:
    """Make a peer that is used by commands."""
    file = place.directory / "commands.json"
    commands.write(file)
    return Ready(("--commands", str(file)), rest)


def archive(place: Place, rootfs: str) -> str:
    """Make a tar archive of a root file system; return its path."""
    path = str(place.directory / "rootfs.tar")
    place.run("tar", "--create", "--numeric-owner", f"--directory={rootfs}", f"--file={path}", ".")
    return path
