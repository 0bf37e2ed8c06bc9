"""Requests with descriptors between service, agent and supervisors: one packet of a SOCK_SEQPACKET pair each.

A packet is limited by the socket's send buffer (208 KiB by default), so a long payload travels as a memfd.
"""

from __future__ import annotations

import array
import os
import socket
import sys

from lxc_pool.execution.protocol import MAX_EVENT, MAX_REQUEST, ProtocolError

MAX_FDS = 8
"""Descriptors in one packet: stdin, stdout, stderr, control, pidfd, one for a long payload, two to spare."""

INLINE = 32 * 1024
"""Bytes of a payload that goes into the packet itself. Origin: a guess, well below any send buffer."""

_INT = array.array("i").itemsize
_INLINE, _BY_FD = b"i", b"m"


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two ends of a new connection, not inheritable."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, payload: bytes, fds: list[int]) -> None:
    """Send *payload* and duplicates of *fds*; the caller's stay open.

    Raises:
        OSError: The other end is closed (BrokenPipeError, ConnectionResetError); TimeoutError if it does not read.
    """
    if len(payload) <= INLINE:
        _send(sock, _INLINE + payload, fds)
        return
    memfd = os.memfd_create("lxc_pool-request", os.MFD_CLOEXEC)
    try:
        view = memoryview(payload)
        while view:
            view = view[os.write(memfd, view) :]
        _send(sock, _BY_FD, [*fds, memfd])
    finally:
        os.close(memfd)


def receive(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    """Receive what `send` sent; None at the end of the connection. The descriptors are the caller's to close.

    Raises:
        ProtocolError: It is not a packet of `send`'s; its descriptors are closed.
    """
    space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(INLINE + 1, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, body in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    received = list(fds)
    if not data and not received:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("a packet is too long, or this process has no descriptors left")
        if data[:1] == _INLINE:
            return data[1:], received
        if data != _BY_FD or not received:
            raise ProtocolError("not a packet of a request")
        with os.fdopen(received.pop(), "rb") as file:
            file.seek(0)
            return file.read(MAX_REQUEST + INLINE), received
    except BaseException:
        for fd in received:
            os.close(fd)
        raise


def send_beside(sock: socket.socket, message: bytes, fd: int, flags: int = 0) -> None:
    """Send a message of a control or report socket, and a duplicate of *fd* beside it.

    Raises:
        OSError: The other end is closed; BlockingIOError with MSG_DONTWAIT, if it does not read.
    """
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
    sock.sendmsg([message], [rights], socket.MSG_NOSIGNAL | flags)


def receive_beside(sock: socket.socket) -> tuple[bytes, int]:
    """Receive a message of a control or report socket, and the descriptor beside it: the caller's to close; -1: none.

    Raises:
        OSError: As recvmsg(2).
    """
    # CMSG_LEN, not CMSG_SPACE, whose padding would have room for a second one: the kernel drops what has no room
    data, ancillary, _, _ = sock.recvmsg(MAX_EVENT, socket.CMSG_LEN(_INT), socket.MSG_CMSG_CLOEXEC)
    for level, kind, body in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(body) == _INT:
            return data, int.from_bytes(body, sys.byteorder)
    return data, -1


def _send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
