"""Who is at the other end of a connection, by the kernel's word, and what they may do."""

from __future__ import annotations

import dataclasses
import grp
import os
import socket

from lxc_pool.errors import AccessDenied
from lxc_pool.host.processes import ProcessIdentity, identify
from lxc_pool.wire.channel import credentials


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """The process that opened a connection, and the user it ran as then."""

    process: ProcessIdentity
    uid: int
    gid: int

    @property
    def is_admin(self) -> bool:
        """Whether the peer may shut the service down, resize and drain the pool, and see all leases."""
        return self.uid == 0 or self.uid == os.geteuid()

    @property
    def lease_scope(self) -> int | None:
        """The uid whose leases the peer may touch; None: anybody's."""
        return None if self.is_admin else self.uid


def peer_of(sock: socket.socket) -> Peer:
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
        return Peer(identify(pid), uid, gid)
    except ProcessLookupError as error:
        raise AccessDenied(f"process {pid}, which opened the connection, has ended") from error


def owner_of(peer: Peer, pid: int | None) -> ProcessIdentity:
    """Return the process that is to own a lease of *peer*: *pid*, or the peer itself if that is None.

    Raises:
        ValueError: No process has that pid.
        AccessDenied: It is another user's.
    """
    if pid is None:
        return peer.process
    try:
        owner = identify(pid)
        uid = os.stat(f"/proc/{pid}").st_uid
        os.close(os.pidfd_open(pid))  # fails for the id of a thread, which /proc has too but nobody can watch
    except OSError as error:
        raise ValueError(f"owner must be the pid of a living process, not {pid} ({error})") from error
    if uid != peer.uid and not peer.is_admin:
        raise AccessDenied(f"process {pid} is not yours: it runs as uid {uid}, you as {peer.uid}")
    return owner


def service_group(name: str) -> int:
    """Return the gid of the group that may use the service; root's if the host does not have that group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return 0
