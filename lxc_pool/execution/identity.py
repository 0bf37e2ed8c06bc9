"""Who a command runs as, read from the container's own /etc/passwd and /etc/group.

Parsed by hand: `pwd` would go through NSS, which loads libraries by path, and that path is already the container's.
The files are the container's to write, so nothing in them is trusted beyond their effect on that container.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

MAX_FILE = 1024 * 1024
"""Bytes read of passwd and of group; entries beyond are not seen. Origin: a guess, some 15 000 users."""


class UnknownUser(LookupError):
    """The container has no such user or group; the text says which."""


class Identity(NamedTuple):
    """What setgroups(2), setgid(2), setuid(2) and the environment get."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str


ROOT = Identity(0, 0, (0,), "root", "/root")
"""What our own work in a container is done as, whatever its files say."""


class _User(NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


def load(user: str | None) -> Identity:
    """Find *user* in the files of the mount namespace that this process is in.

    Raises:
        UnknownUser: There is no such user or group.
    """
    passwd = read_capped("/etc/passwd")
    # as lxc-attach, root without further wishes gets no supplementary groups: one file less for most commands
    return resolve(user, passwd, b"" if user is None else read_capped("/etc/group"))


def resolve(user: str | None, passwd: bytes, group: bytes) -> Identity:
    """Find *user* in the text of a passwd and a group file.

    A number need not be in the files: its home is then `/` (root's `/root`) and its group, unless given, has the same
    number. An explicit group comes without the user's supplementary groups.

    Raises:
        UnknownUser: A name is not in the files.
    """
    wanted, _, wanted_group = ("0" if user is None else user).partition(":")
    found = _find_user(wanted, passwd)
    if wanted_group:
        gid = _find_group(wanted_group, group)
        return Identity(found.uid, gid, (gid,), found.name, found.home)
    return Identity(found.uid, found.gid, _groups_of(found, group), found.name, found.home)


def read_capped(path: str) -> bytes:
    """Read the first `MAX_FILE` bytes of a regular file; anything else, and no file, is as good as empty."""
    try:
        # O_NONBLOCK: the container may have put a FIFO there
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return b""
        # one read of a regular file is whole; one that grows meanwhile is cut, as one that is read too early would be
        return os.read(fd, min(status.st_size, MAX_FILE))
    except OSError:
        return b""
    finally:
        os.close(fd)


def _find_user(wanted: str, passwd: bytes) -> _User:
    by_name = by_uid = None
    number = int(wanted) if wanted.isdecimal() else None
    for fields in _entries(passwd, 7):
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is None or gid is None:
            continue
        entry = _User(fields[0], uid, gid, fields[5] or "/")
        if by_name is None and entry.name == wanted:
            by_name = entry
        if by_uid is None and uid == number:
            by_uid = entry
    # a number is a uid first, as in chown(1) of a name that does not exist; no distribution has all-digit names
    if by_uid is not None:
        return by_uid
    if by_name is not None:
        return by_name
    if number is None:
        raise UnknownUser(f"the container has no user {wanted!r}")
    return _User("root", 0, 0, "/root") if number == 0 else _User(wanted, number, number, "/")


def _find_group(wanted: str, group: bytes) -> int:
    if wanted.isdecimal():
        return int(wanted)
    for fields in _entries(group, 4):
        gid = _number(fields[2])
        if fields[0] == wanted and gid is not None:
            return gid
    raise UnknownUser(f"the container has no group {wanted!r}")


def _groups_of(user: _User, group: bytes) -> tuple[int, ...]:
    gids = [user.gid]
    for fields in _entries(group, 4):
        gid = _number(fields[2])
        if gid is not None and gid not in gids and user.name in fields[3].split(","):
            gids.append(gid)
    return tuple(gids)


def _entries(data: bytes, width: int) -> list[list[str]]:
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    return [fields for line in lines if len(fields := line.split(":")) == width]


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) <= 10 and int(text) < 2**32 - 1 else None
