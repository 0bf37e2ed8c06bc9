"""Who is at the other end of a connection, by the kernel's word, and what they may do."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import grp
import os
import pwd
import select
import socket
import struct
from pathlib import Path

import psutil

from lxc_pool.config import Config
from lxc_pool.errors import AccessDenied, ConfigError
from lxc_pool.host.ends import open_end
from lxc_pool.host.processes import ProcessIdentity, identify
from lxc_pool.wire.channel import credentials

_SO_PEERGROUPS, _SO_PEERPIDFD = 59, 77
"""Not in Python's socket module. Source: Linux include/uapi/asm-generic/socket.h."""

_MAX_GROUPS = 65536
"""Supplementary groups of a process at most. Source: Linux include/uapi/linux/limits.h, NGROUPS_MAX."""


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """The process that opened a connection, and whom it ran as then.

    Attributes:
        gid: Its primary group.
        groups: Its groups, the supplementary ones too.
        program: What it calls itself, for the log: its own word.
        is_admin: Whether it may shut the service down, resize and drain the pool, and see and touch all leases.
    """

    process: ProcessIdentity
    uid: int
    gid: int
    groups: frozenset[int]
    program: str
    is_admin: bool

    @property
    def lease_scope(self) -> int | None:
        """The uid whose leases the peer may touch; None: anybody's."""
        return None if self.is_admin else self.uid

    def __str__(self) -> str:
        return f"pid {self.process.pid} ({self.program}) of uid {self.uid}"


class Policy:
    """Who may use the service, administrate it, and have which containers. Immutable."""

    def __init__(self, config: Config) -> None:
        """Look up the names of the configuration.

        Raises:
            ConfigError: The host has no such user or group.
        """
        self._group = _gid(config.group)
        self._users = None if config.users is None else frozenset(map(_uid, config.users))
        self._admins = frozenset({0, os.geteuid(), *map(_uid, config.admins)})
        self._allowed = {
            profile.name: None
            if profile.allow is None
            else (
                frozenset(_uid(name) for name in profile.allow if not name.startswith("@")),
                frozenset(_known_gid(name[1:]) for name in profile.allow if name.startswith("@")),
            )
            for profile in config.profiles
        }
        self._config = config
        self._privileged = {profile.name for profile in config.profiles if profile.privileged}

    @property
    def group(self) -> int:
        """The gid that may enter the host dir; root's if the host does not have the group."""
        return 0 if self._group is None else self._group

    def peer_of(self, sock: socket.socket) -> Peer:
        """Return who opened the connection *sock*.

        Raises:
            AccessDenied: The kernel does not say: the peer is in a pid namespace of its own, or has ended.
        """
        pid, uid, gid = credentials(sock)
        if pid == 0:
            raise AccessDenied(
                "your process has no pid here: connect from the pid namespace of the service or a child of it"
            )
        try:
            process = identify(pid)
            program = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
            if _has_ended(sock):
                raise ProcessLookupError(f"pid {pid} is another's now")
        except (ProcessLookupError, FileNotFoundError) as error:
            raise AccessDenied(f"process {pid}, which opened the connection, has ended") from error
        printable = "".join(character if character.isprintable() else "?" for character in program)
        return Peer(process, uid, gid, frozenset({gid, *_peer_groups(sock)}), printable, uid in self._admins)

    def look_again(self, peer: Peer) -> Peer:
        """Return *peer*, whom an earlier policy has looked at, as this one sees it."""
        return dataclasses.replace(peer, is_admin=peer.uid in self._admins)

    def require_user(self, peer: Peer) -> None:
        """Refuse whoever may not use the service at all.

        Raises:
            AccessDenied: The message says whom to ask.
        """
        if peer.is_admin:
            return
        if self._group not in peer.groups:
            raise AccessDenied(
                f"uid {peer.uid} is not in the service's group: ask the administrator to put you into it"
            )
        if self._users is not None and peer.uid not in self._users:
            raise AccessDenied(f"uid {peer.uid} is not among the service's users: ask the administrator to add you")

    def require_profile(self, peer: Peer, profile: str) -> None:
        """Refuse whoever may not have containers of a profile.

        Raises:
            ValueError: There is none of that name.
            AccessDenied: The message says why.
        """
        self._config.profile(profile)
        if peer.is_admin:
            return
        allowed = self._allowed[profile]
        if allowed is None:
            if profile in self._privileged:
                raise AccessDenied(
                    f"profile {profile!r} is privileged: its root is the host's, so administrators alone may have it"
                )
        elif peer.uid not in allowed[0] and not peer.groups & allowed[1]:
            raise AccessDenied(f"uid {peer.uid} is not among those whom profile {profile!r} is allowed to")


def owner_of(peer: Peer, pid: int | None) -> ProcessIdentity:
    """Return the process that is to own a lease of *peer*: *pid*, or the peer itself if that is None.

    Raises:
        ValueError: No process has that pid.
        AccessDenied: It is another user's, or the peer has numbers of its own for processes.
    """
    if pid is None:
        return peer.process
    if not _shares_pids(peer.process.pid):
        raise AccessDenied(
            f"process {pid} can't be made owner: your process is in a pid namespace of its own, whose pids are not ours"
        )
    try:
        owner = identify(pid)
        uid = psutil.Process(pid).uids().real  # not the owner of /proc/PID, which is root's where it is undumpable
        # Fails for the id of a thread, which /proc has too but nobody can watch, and if the pid is another's meanwhile.
        os.close(open_end(owner))
    except (OSError, psutil.Error) as error:
        raise ValueError(f"owner must be the pid of a living process, not {pid} ({error})") from error
    if uid != peer.uid and not peer.is_admin:
        raise AccessDenied(f"process {pid} is not yours: it runs as uid {uid}, you as {peer.uid}")
    return owner


def _has_ended(sock: socket.socket) -> bool:
    """Tell whether the process that opened a connection's other end has ended, so that its pid may be another's.

    Source: unix(7) of Linux 6.5 and later; before, nobody can tell.
    """
    try:
        descriptor = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        return error.errno != errno.ENOPROTOOPT
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(descriptor)


def _shares_pids(pid: int) -> bool:
    """Tell whether process *pid* is in this process's pid namespace."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except FileNotFoundError:  # it has just ended
        return False
    except PermissionError:  # only a service that is not root's: what can't be looked at, is not confined by it
        return True


def _peer_groups(sock: socket.socket) -> tuple[int, ...]:
    """Return the supplementary groups of a connection's other end. Source: unix(7) of Linux 4.13 and later."""
    try:
        # Python takes no more than 1024 bytes here.
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError as error:  # an old kernel: then the primary one counts alone
        return _many_peer_groups(sock) if error.errno == errno.ERANGE else ()
    return struct.unpack(f"{len(data) // 4}I", data)


def _many_peer_groups(sock: socket.socket) -> tuple[int, ...]:
    groups = (ctypes.c_uint32 * _MAX_GROUPS)()
    size = ctypes.c_uint32(ctypes.sizeof(groups))
    call = ctypes.CDLL(None, use_errno=True).getsockopt
    if call(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(size)) < 0:
        return ()
    return tuple(groups[: size.value // 4])


def _uid(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise ConfigError(f"this host has no user {name!r}, which the configuration names") from error


def _gid(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def _known_gid(name: str) -> int:
    gid = _gid(name)
    if gid is None:
        raise ConfigError(f"this host has no group {name!r}, which the configuration names")
    return gid
