"""The few things asked of the kernel over netlink: what no file of /proc tells or does, or a program is slow for.

Source: netlink(7), rtnetlink(7); numbers from Linux include/uapi/linux/{netlink,rtnetlink,if_link}.h and
netfilter/{nfnetlink,nf_tables}.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

_NETLINK_ROUTE = 0
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 18, 19
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_IFLA_IFNAME, _IFLA_PROTINFO, _IFLA_BRPORT_ISOLATED = 3, 12, 33
_NESTED = 0x8000
_GROUPS = 0x1 | 0x10 | 0x40
"""Links, IPv4 addresses, IPv4 routes: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE."""

_NETLINK_NETFILTER = 12
_NFT_GETTABLE = 10 << 8 | 1
_NFTA_TABLE_NAME = 1
_NFPROTO_INET, _NFPROTO_BRIDGE = 1, 7

_IFF_LOOPBACK, _IFF_RUNNING = 0x8, 0x40
"""Running: up, and its other end too."""

_CLONE_NEWNET = 0x40000000
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")
_MOST = 1 << 16
"""Bytes of one answer. Source: netlink(7), which has dumps come in less than 32 KiB at a time."""

_MOST_LINKS = 256
"""Network devices that are looked at. A guess; root of a namespace may make tens of thousands, a second's work."""

_MOST_EVENTS = 200
"""Changes that are taken off at once: somebody may make them faster than that."""

_ANSWER_TIMEOUT = 1.0
"""Seconds for an answer of the kernel's, which takes microseconds."""

_T = TypeVar("_T")

_libc = ctypes.CDLL(None, use_errno=True)


def isolate(port: str) -> None:
    """Let a port of a bridge exchange nothing with other such ports. Source: bridge(8), `isolated`; Linux 4.18.

    Raises:
        OSError: There is no such port, or the kernel refused.
    """
    flag = _ATTRIBUTE.pack(5, _IFLA_BRPORT_ISOLATED) + b"\1\0\0\0"
    body = _LINK.pack(socket.AF_BRIDGE, 0, socket.if_nametoindex(port), 0, 0)
    body += _ATTRIBUTE.pack(4 + len(flag), _IFLA_PROTINFO | _NESTED) + flag
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as sock:
        sock.send(_HEADER.pack(_HEADER.size + len(body), _RTM_SETLINK, _REQUEST | _ACK, 1, 0) + body)
        for _ in _messages(sock):
            pass


def has_table(name: str) -> bool:
    """Return whether nftables has tables of that name, of the families bridge and inet; takes some 20 µs.

    Raises:
        OSError: The kernel did not answer.
    """
    text = name.encode("ascii") + b"\0"
    attribute = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(text), _NFTA_TABLE_NAME) + text + bytes(-len(text) % 4)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as sock:
        sock.settimeout(_ANSWER_TIMEOUT)
        for family in (_NFPROTO_BRIDGE, _NFPROTO_INET):
            body = struct.pack("=BBH", family, 0, 0) + attribute
            sock.send(_HEADER.pack(_HEADER.size + len(body), _NFT_GETTABLE, _REQUEST | _ACK, 1, 0) + body)
            try:
                for _ in _messages(sock):
                    pass
            except FileNotFoundError:
                return False
    return True


class Observer:
    """Looks into the network namespace of another process, whose owner may be hostile, and hears of each change in it.

    `fileno` is readable after a change of links, IPv4 addresses or IPv4 routes, until `drain`. Close it soon: it keeps
    the namespace alive.
    """

    def __init__(self, pid: int) -> None:
        """Open it.

        Args:
            pid: The process, which the caller has to see alive once more afterwards: a pid may be given to another.

        Raises:
            OSError: The kernel refused.
            ProcessLookupError: The process has ended.
        """
        self._too_many = False
        try:
            with open(f"/proc/{pid}/ns/net", "rb") as namespace:
                self._events, self._questions = _inside(namespace.fileno(), _open_pair)
        except FileNotFoundError as error:
            raise ProcessLookupError(f"process {pid} has ended") from error

    def fileno(self) -> int:
        """Return what to poll."""
        return self._events.fileno()

    def drain(self) -> None:
        """Take off what has come: that there was a change is all that counts."""
        for _ in range(_MOST_EVENTS):
            try:
                self._events.recv(_MOST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: more has come than it holds
                continue

    def links(self) -> dict[str, bool]:
        """Return all network devices but loopback by name, and whether they are up and connected.

        Raises:
            OSError: The kernel did not answer, or somebody inside keeps its answer from coming through; or they are
                more than anybody has.
        """
        if self._too_many:  # the rest of that answer is still to come
            raise OSError(errno.E2BIG, f"there are more than {_MOST_LINKS}")
        body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        self._questions.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETLINK, _REQUEST | _DUMP, 1, 0) + body)
        found: dict[str, bool] = {}
        for message in _messages(self._questions):
            if (link := _link(message)) is not None:
                found[link[0]] = link[1]
            if len(found) > _MOST_LINKS:
                self._too_many = True
                return self.links()
        return found

    def close(self) -> None:
        """Close it."""
        self._events.close()
        self._questions.close()


def _open_pair() -> tuple[socket.socket, socket.socket]:
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE)
    try:
        events.bind((0, _GROUPS))
        questions = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE)
    except OSError:
        events.close()
        raise
    questions.settimeout(_ANSWER_TIMEOUT)
    return events, questions


def _inside(namespace: int, action: Callable[[], _T]) -> _T:
    """Call *action* in a network namespace, given as a descriptor; raises what that raises, and OSError."""
    results: list[_T] = []
    errors: list[OSError] = []

    def go_and_act() -> None:
        try:
            if _libc.setns(namespace, _CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            results.append(action())
        except OSError as error:
            errors.append(error)

    # On a thread that ends with it: a thread's namespace is its own, and there is no way back that could fail.
    # Source: setns(2).
    thread = threading.Thread(target=go_and_act, name="namespace", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _messages(sock: socket.socket) -> Iterator[bytes]:
    """Go through the messages of the kernel's answer, each with its header, up to its end."""
    while True:
        data, (sender, _groups) = sock.recvfrom(_MOST)
        if sender != 0:
            continue  # not the kernel: whoever is root of a network namespace may send to any such socket in it
        while data:
            length, kind, _flags, _sequence, _pid = _HEADER.unpack_from(data)
            message, data = data[:length], data[(length + 3) & ~3 :]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", message, _HEADER.size)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return
            yield message


def _link(message: bytes) -> tuple[str, bool] | None:
    _length, kind, *_ = _HEADER.unpack_from(message)
    if kind != _RTM_NEWLINK:
        return None
    flags = _LINK.unpack_from(message, _HEADER.size)[3]
    if flags & _IFF_LOOPBACK:
        return None
    rest = message[_HEADER.size + _LINK.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, attribute = _ATTRIBUTE.unpack_from(rest)
        if attribute == _IFLA_IFNAME:
            name = rest[_ATTRIBUTE.size : length].rstrip(b"\0").decode("ascii", errors="replace")
            return name, bool(flags & _IFF_RUNNING)
        rest = rest[max(_ATTRIBUTE.size, (length + 3) & ~3) :]
    return None
