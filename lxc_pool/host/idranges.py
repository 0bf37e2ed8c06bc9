"""Ranges of user and group ids for user namespaces: one for each container, for all services of the machine.

A range is taken by making a file named by its first id in a directory that is the machine's, and is free again when
that is removed; who has it stands in the file. The directory is in /run: a range lives no longer than a boot, as a
container does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lxc_pool.errors import CloneFailed

SIZE = 65536
"""Ids in one range: what a Linux system expects to have."""

DEFAULT_BASE = 0x70000000
"""The first id. Above the ranges of systemd-nspawn, below 2**31. Source: systemd, docs/UIDS-GIDS.md."""

LIMIT = 0x7FFFFFFF
"""No range reaches beyond: some programs take ids for signed numbers. Source: the same."""

REGISTRY = Path("/run/lxc-pool-ids")

SUBID_FILES = (Path("/etc/subuid"), Path("/etc/subgid"))


def take(
    holder: str,
    base: int = DEFAULT_BASE,
    *,
    unless: Callable[[int], bool] = lambda _first: False,
    registry: Path = REGISTRY,
    subids: Iterable[Path] = SUBID_FILES,
) -> int:
    """Take a free range for *holder* and return its first id.

    Args:
        holder: Who is to have it.
        base: The least that its first id may be.
        unless: Says of a first id whether that range is of no use.
        registry: Where ranges are written down.
        subids: Where the host's own are.

    Raises:
        CloneFailed: None is free.
        OSError: The registry can't be written.
    """
    already = taken(registry=registry)
    given_away = list(_subordinate_ids(subids))
    # Multiples of the size alone, or those of services with different bases could overlap.
    for first in range(-(-base // SIZE) * SIZE, LIMIT - SIZE + 1, SIZE):
        if first in already or any(first < end and start < first + SIZE for start, end in given_away):
            continue
        if unless(first):
            continue
        try:
            try:
                _write_new(registry, str(first), holder)
            except FileNotFoundError:
                registry.mkdir(mode=0o700, exist_ok=True)
                _write_new(registry, str(first), holder)
        except FileExistsError:
            continue  # another lane or service was faster
        return first
    raise CloneFailed(f"no range of {SIZE} ids is free from {base} up: {len(already)} are taken, see {registry}")


def give_back(holder: str, first: int | None = None, *, registry: Path = REGISTRY) -> None:
    """Free every range of *holder*; not an error if it has none.

    Args:
        holder: Who has it.
        first: The first id of the only range that it has, if that is known: spares looking at all.
        registry: Where ranges are written down.
    """
    if first is not None:
        with contextlib.suppress(FileNotFoundError):
            (registry / str(first)).unlink()
        return
    for path, who in held(registry=registry):
        if who == holder:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def taken(*, registry: Path = REGISTRY) -> frozenset[int]:
    """Return the first ids of the ranges that are taken."""
    try:
        return frozenset(int(name) for name in os.listdir(registry) if name.isdecimal())
    except FileNotFoundError:
        return frozenset()


def holder(first: int, *, registry: Path = REGISTRY) -> str | None:
    """Return who has the range with that first id; None: nobody."""
    try:
        return (registry / str(first)).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def held(*, registry: Path = REGISTRY) -> Iterator[tuple[Path, str]]:
    """Go through the ranges that are taken: the file, and who has it."""
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(registry)):
            with contextlib.suppress(FileNotFoundError):
                path = registry / name
                yield path, path.read_text(encoding="utf-8", errors="replace")


def _write_new(directory: Path, name: str, text: str) -> None:
    """Make a file with *text* in it, at once: one without a holder, from a lane that was killed, would be nobody's."""
    descriptor = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file, _opened(directory) as place:
        file.write(text.encode())
        file.flush()
        # With a directory's descriptor, Python calls linkat(2), which can follow this link. Source: open(2), O_TMPFILE.
        os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=place, follow_symlinks=True)


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _subordinate_ids(files: Iterable[Path]) -> Iterator[tuple[int, int]]:
    """Go through the ranges that the host has given to its users. Source: subuid(5)."""
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            with open(file, "rb", buffering=0) as ranges:
                lines = ranges.readall().splitlines()
            for line in lines:
                fields = line.split(b":")
                if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
                    yield int(fields[1]), int(fields[1]) + int(fields[2])
