"""A container's console: where liblxc keeps what is written there, how much of it, and what was said last.

```
 init, /dev/console ── pty ── monitor ──► console.log, which is emptied whenever it is full
```

The file is in the container's directory, on the state dir's file system and out of the container's reach. It is
emptied and not rotated: under a flood (35 to 50 MB/s, measured) both keep within the size, but what is rotated is
written out to the disk, all of it, while what is emptied never gets there.
"""

from __future__ import annotations

import os
from pathlib import Path

from lxc_pool.plaintext import plain

SIZE = 128 << 10
"""Bytes that a console's log may have. What liblxc calls `auto`. Source: lxc.container.conf(5), lxc.console.size."""

_FILE = "console.log"

_PTYS = Path("/proc/sys/kernel/pty")
_SPARE = 64
"""Pseudo-terminals that have to be free for a container to get one as its console. A guess."""

_LAST_WORDS = 300
"""Characters of a console that an error quotes."""


def settings(directory: Path, ptys: Path = _PTYS) -> list[tuple[str, str]]:
    """Return the settings of a container's configuration that give it a console.

    It has none if the machine's pseudo-terminals are about to run out: containers that took them would keep all others
    from starting.

    Args:
        directory: The container's.
        ptys: The kernel's counts. Source: Linux Documentation/filesystems/devpts.rst.
    """
    used, most, reserved = (_number(f"{ptys}/{name}") for name in ("nr", "max", "reserve"))
    if used + _SPARE > most - reserved:
        return [("lxc.console.path", "none")]
    return [("lxc.console.logfile", str(directory / _FILE)), ("lxc.console.size", str(SIZE))]


def _number(file: str) -> int:
    with open(file, "rb", buffering=0) as content:
        return int(content.read())


def read(directory: Path) -> bytes:
    """Return what is in a console's log, the oldest first; empty if there is none."""
    try:
        descriptor = os.open(directory / _FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return os.read(descriptor, SIZE)
    finally:
        os.close(descriptor)


def last_words(directory: Path) -> str:
    """Return the end of what a console says, on one line and without what a terminal would obey; empty if nothing."""
    lines = (" ".join(line.split()) for line in plain(read(directory).decode(errors="replace")).split("\n"))
    return "; ".join(filter(None, lines))[-_LAST_WORDS:]
