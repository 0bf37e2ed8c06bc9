"""One connection to the service: how it is made, and one call over it at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from collections.abc import Sequence
from multiprocessing import managers
from pathlib import Path
from typing import Any, Final

from lxc_pool import hostdir
from lxc_pool.errors import AccessDenied, AuthenticationFailed, HostDirError, ServiceUnavailable
from lxc_pool.wire import handshake, messages
from lxc_pool.wire.channel import Channel, ProtocolError, credentials

SERIALIZER: Final = "lxc-pool"
"""Our codec's name among those of `multiprocessing.managers`, which has "pickle" and "xmlrpclib"."""

_PAUSE = 0.02
"""Seconds between two tries to reach a service that is not there. Polled: the directory itself may not be there yet."""

_ORDERLY_END = 1.0
"""Seconds to look for a removed socket after a connection was lost: only a service that ended in order removes it."""


class AnswerLost(EOFError):
    """The connection was lost after a call was sent and before its answer came."""


class Connection:
    """One authenticated connection. Not thread-safe; not to be used after a fork."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._pid = os.getpid()

    @classmethod
    def open(cls, host_dir: Path, deadline: float, *, again: bool = False, grace: float = 0.0) -> Connection:
        """Connect, waiting until *deadline* (monotonic) for a service that is not there yet.

        Args:
            host_dir: The service's.
            deadline: When to give up.
            again: There was a connection before: if the socket has been removed, the service has ended in order, and
                there is little to wait for.
            grace: Seconds beyond *deadline* that a service which is there has for its part of connecting.

        Raises:
            ServiceUnavailable, AccessDenied, AuthenticationFailed, HostDirError: See `PoolManager.connect`.
        """
        began = time.monotonic()
        while True:
            try:
                return cls(_connect(host_dir, deadline + grace))
            except FileNotFoundError as error:
                reason = f"there is no {error.filename}"
                if again:
                    deadline = min(deadline, began + _ORDERLY_END)
            except (ConnectionError, EOFError, TimeoutError) as error:
                reason = f"the socket is there, but: {str(error) or type(error).__name__}"
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise ServiceUnavailable(
                    f"no service answers in {host_dir} ({reason}; waited {time.monotonic() - began:.1f} s); "
                    "is `lxc-pool serve` running, and is this its host dir?"
                )
            time.sleep(min(_PAUSE, remaining))  # see _PAUSE

    @property
    def usable(self) -> bool:
        """Whether it is this process's own: a forked child shares its parent's socket and must not use it."""
        return self._pid == os.getpid() and not self._channel.closed

    def call(self, call: messages.Call, deadline: float | None, descriptors: Sequence[int] = ()) -> Any:
        """Send *call* and return its result.

        Raises:
            AnswerLost: The connection was lost after all was sent: whether the call was made is not known.
            EOFError, OSError, ProtocolError: The connection is lost; the call was not made.
            LxcPoolError, TypeError, ValueError: The service's answer.
        """
        self._channel.deadline = deadline
        self._channel.send_bytes(messages.encode_call(call), descriptors)
        try:
            body = self._channel.recv_bytes()
        except (EOFError, OSError, ProtocolError) as error:
            raise AnswerLost(str(error)) from error
        return messages.decode_reply(call, body)

    def hold_server(self) -> int | None:
        """Return a pidfd of the service's process; None if there are none, or that one is not ours to see."""
        pid = self._channel.peer[0]
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid) if pid else None
        return None

    def close(self) -> None:
        """Close this end."""
        self._channel.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be half gone
            self.close()


def connect_channel(address: str, authkey: bytes) -> Channel:
    """Connect and prove each other; the `Client` that `multiprocessing.managers` asks for."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Channel(sock)
    try:
        sock.connect(address)
        handshake.prove_to_service(channel, authkey)
    except BaseException:
        channel.close()
        raise
    return channel


def _connect(host_dir: Path, deadline: float) -> Channel:
    path = hostdir.socket_path(host_dir)
    _check_socket(path)
    key = hostdir.read_key(host_dir)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Channel(sock)
    try:
        _reach(sock, path, deadline)
        _check_server(sock, path)
        channel.deadline = deadline
        try:
            handshake.prove_to_service(channel, key)
            reply = messages.decode_reply(_HELLO, _exchange(channel))
        except AuthenticationFailed as error:
            if hostdir.read_key(host_dir) != key:
                raise ConnectionResetError("the service was restarted just now") from error
            raise AuthenticationFailed(
                f"the key in {hostdir.key_path(host_dir)} is not the one of the service that listens on {path}; "
                "was the file changed since the service began? Restart the service"
            ) from error
        except ProtocolError as error:
            raise HostDirError(f"what listens on {path} is no lxc-pool service: {error}") from error
        if reply != messages.PROTOCOL:
            raise HostDirError(f"the service on {path} speaks version {reply} of the protocol, not {messages.PROTOCOL}")
    except BaseException:
        channel.close()
        raise
    return channel


_HELLO = messages.Hello(messages.PROTOCOL)


def _exchange(channel: Channel) -> bytes:
    channel.send_bytes(messages.encode_call(_HELLO))
    return channel.recv_bytes()


def _check_socket(path: Path) -> None:
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except PermissionError as error:
        raise AccessDenied(
            f"not allowed to look into {path.parent}: ask the administrator to put you into the group of that directory"
        ) from error
    except NotADirectoryError as error:
        raise HostDirError(f"{path.parent} is not a directory") from error
    if not stat.S_ISSOCK(mode):
        raise HostDirError(f"{path} is not a socket: {path.parent} is not a host dir of lxc_pool, or was tampered with")


def _reach(sock: socket.socket, path: Path, deadline: float) -> None:
    # A non-blocking connect answers EAGAIN when the service's backlog is full; a blocking one might wait for ever.
    sock.settimeout(min(max(0.001, deadline - time.monotonic()), 60.0))
    try:
        sock.connect(str(path))
    except PermissionError as error:
        raise AccessDenied(
            f"not allowed to connect to {path}: ask the administrator to put you into its group"
        ) from error
    except BlockingIOError as error:
        raise ConnectionRefusedError("the service is too busy to accept connections") from error
    sock.settimeout(None)


def _check_server(sock: socket.socket, path: Path) -> None:
    """Refuse a socket that some other user has planted."""
    uid = credentials(sock)[1]
    if uid not in (0, os.geteuid()):
        raise HostDirError(f"the server on {path} runs as uid {uid}, not as root: not using it")


managers.listener_client.setdefault(SERIALIZER, (None, connect_channel))  # type: ignore[attr-defined]  # not in typeshed
