"""Frames over a Unix stream socket, with a cap on size, a deadline on each operation, and descriptors beside them.

The framing is that of `multiprocessing.connection.Connection` (four bytes of length, big-endian, then the body), so
that the standard library's handshake works over it. Source: CPython 3.11–3.13, Lib/multiprocessing/connection.py.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

MAX_MESSAGE = 4 * 1024 * 1024
"""Bytes in one message at most: a command's arguments and environment fit (execve(2) allows 2 MiB), a bomb does not."""

MAX_DESCRIPTORS = 4
"""Descriptors beside one message: stdin, stdout, stderr and the control socket of a command."""

LARGE_MESSAGE = 64 * 1024
"""Bytes beyond which a message is a large one; see `Channel.before_large`. A guess: only commands are."""

_UCRED = struct.Struct("3i")
"""pid, uid, gid. Source: unix(7), SO_PEERCRED."""

_LONGEST_WAIT = 86400.0
"""Seconds of one wait at most: poll(2) counts milliseconds in 32 bits."""

_SEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
"""A program that uses us may have given SIGPIPE back its deadly default."""

_HEADER = struct.Struct("!i")
_CHUNK = 16 * 1024
_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)


class ProtocolError(Exception):
    """The peer sent what no peer of ours sends; the connection is of no more use."""


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of the process that opened the other end of *sock*, by the kernel's word.

    The pid is 0 if that process is in a pid namespace that has no number here.
    """
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


class Channel:
    """One end of a connection. Not thread-safe: each thread has its own.

    The socket stays a blocking one, and what may not block says so: a timeout of Python's would be set anew, and
    polled for, before every system call, which together is a tenth of a warm `get`.

    Attributes:
        deadline: Monotonic time by which the operation under way must be through; None: no limit.
            `TimeoutError` is raised past it, and the channel is of no more use then.
        before_large: Called before more of a message is received than `LARGE_MESSAGE`; it may wait, or raise.
    """

    def __init__(self, sock: socket.socket, *, accept_descriptors: bool = False) -> None:
        self.deadline: float | None = None
        self.before_large: Callable[[], object] = lambda: None
        sock.settimeout(None)
        self._socket = sock
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._accept_descriptors = accept_descriptors
        self._received = bytearray()
        self._descriptors: list[int] = []
        self._lost = False

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    @property
    def peer(self) -> tuple[int, int, int]:
        """Pid, uid and gid of the other end; see `credentials`."""
        return credentials(self._socket)

    @property
    def closed(self) -> bool:
        """Whether this end has been closed."""
        return self._socket.fileno() < 0

    @property
    def pending(self) -> bool:
        """Whether bytes have arrived that are not part of a message taken so far."""
        return bool(self._received)

    def send_bytes(self, body: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send one message, with *descriptors* beside it.

        Raises:
            ValueError: The message is larger than a message may be; nothing was sent.
            TimeoutError: The deadline has passed.
            OSError: The peer is gone.
        """
        if len(body) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(body)} bytes is larger than the {MAX_MESSAGE} that one may have")
        frame = memoryview(_HEADER.pack(len(body)) + body)
        self._check_deadline()
        while frame:
            try:
                if descriptors:
                    sent = socket.send_fds(self._socket, [frame], list(descriptors), _SEND)
                    descriptors = ()
                else:
                    sent = self._socket.send(frame, _SEND)
            except BlockingIOError:
                self._await_writable()
            else:
                frame = frame[sent:]

    def recv_bytes(self, maxlength: int | None = None, *, rest_within: float | None = None) -> bytes:
        """Receive one message.

        Args:
            maxlength: Bytes that it may have; None: `MAX_MESSAGE`.
            rest_within: Seconds that the rest of it may take once its first byte is here.

        Raises:
            EOFError: The peer has closed its end.
            ProtocolError: The message is longer than allowed, or was cut off.
            TimeoutError: The deadline has passed.
            OSError: The connection broke.
        """
        limit = MAX_MESSAGE if maxlength is None else maxlength
        if not self._received:
            self._receive()
        if rest_within is not None:
            # A silent peer may stay, one that stops in the middle of a message may not.
            self.deadline = time.monotonic() + rest_within
        while len(self._received) < _HEADER.size:
            self._receive()
        (length,) = _HEADER.unpack_from(self._received)
        if not 0 <= length <= limit:
            raise ProtocolError(f"a message claims {length} bytes; at most {limit} are allowed")
        if length > LARGE_MESSAGE:
            self.before_large()
        end = _HEADER.size + length
        while len(self._received) < end:
            self._receive()
        body = bytes(self._received[_HEADER.size : end])
        del self._received[:end]
        return body

    def take_descriptors(self) -> list[int]:
        """Return the descriptors that came since the last call; they are the caller's to close.

        Raises:
            OSError: This process had none left for some of them, which are lost; so are the others, and closed.
        """
        if self._lost:
            self._drop_descriptors()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        taken, self._descriptors = self._descriptors, []
        return taken

    def close(self) -> None:
        """Close this end, and every descriptor that nobody took."""
        self._drop_descriptors()
        self._socket.close()

    def break_off(self) -> None:
        """End the connection in both directions, so that a thread that waits on it wakes; it stays to be closed."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _drop_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        self._lost = False

    def _receive(self) -> None:
        self._await_readable()
        if self._accept_descriptors:
            chunk, ancillary, flags, _address = self._socket.recvmsg(_CHUNK, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    came = array.array("i")
                    came.frombytes(data[: len(data) - len(data) % came.itemsize])
                    self._descriptors.extend(came)
            # It also says that more came than there may be; those are not missed. Source: recvmsg(2), MSG_CTRUNC.
            if flags & socket.MSG_CTRUNC and len(self._descriptors) < MAX_DESCRIPTORS:
                self._lost = True
            if len(self._descriptors) > MAX_DESCRIPTORS:
                raise ProtocolError(f"more than {MAX_DESCRIPTORS} descriptors came beside one message")
        else:
            chunk = self._socket.recv(_CHUNK)
        if not chunk:
            if self._received:
                raise ProtocolError("the connection was closed in the middle of a message")
            raise EOFError("the peer closed the connection")
        self._received += chunk

    def _await_readable(self) -> None:
        """Wait for something to receive; without a deadline, receiving itself waits."""
        while self.deadline is not None and not self._readable.poll(self._patience()):
            pass

    def _await_writable(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        while not poll.poll(self._patience()):
            pass

    def _patience(self) -> float:
        """Return how many milliseconds to wait before the deadline is looked at again."""
        self._check_deadline()
        remaining = _LONGEST_WAIT if self.deadline is None else self.deadline - time.monotonic()
        return max(0.0, min(remaining, _LONGEST_WAIT)) * 1000

    def _check_deadline(self) -> None:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise TimeoutError("the deadline has passed")
