"""The service's side: it has the agent fork a supervisor for each user, and sends commands to that.

 service's threads ──launch()──► SOCK_SEQPACKET pair ──► the user's supervisor
                   ──its other end──► agent (a child of the service) ──fork──┘

Both are started by the first command, and again when they are found dead. What runs is not the agent's to lose:
commands go on without agent and service.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lxc_pool.errors import ExecFailed
from lxc_pool.execution import packets
from lxc_pool.execution.protocol import ExecRequest
from lxc_pool.execution.supervisor import HEADER

log = logging.getLogger(__name__)

SEND_TIMEOUT = 5.0
"""Seconds that agent or supervisor may leave a packet unread before it counts as hung and is replaced. A guess."""

_NULL_DEVICE = os.makedev(1, 3)

# The agent's package is a stub without the real __init__: what that imports would be copied by every fork.
_BOOTSTRAP = """\
import sys, types
package = types.ModuleType("lxc_pool")
package.__path__ = [sys.argv[2]]
sys.modules["lxc_pool"] = package
from lxc_pool.execution.agent import main
main(int(sys.argv[1]))
"""


def check_stdio(fd: int) -> None:
    """Refuse a descriptor that would give a container more than a stream of bytes.

    Only anonymous pipes and /dev/null may enter. A directory or file opens the host's file system through
    /proc/self/fd, a terminal takes injected input (TIOCSTI), and a socket, of whatever kind, takes the interface ioctls
    of the network namespace it was made in: root of a privileged container could reconfigure the host's network by it.

    Looking at it takes for ever where its file system hangs, a client's FUSE, say: hold no lock. Closing it does, too.

    Raises:
        TypeError: It is of another kind; the message names it.
        ValueError: It is no open descriptor.
    """
    try:
        mode = os.fstat(fd)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        name = os.readlink(f"/proc/self/fd/{fd}")
    except OSError as exc:
        raise ValueError(f"descriptor {fd} can't be examined: {exc.strerror}") from None
    if not flags & os.O_PATH:
        if stat.S_ISFIFO(mode.st_mode) and name.startswith("pipe:["):
            return
        if stat.S_ISCHR(mode.st_mode) and mode.st_rdev == _NULL_DEVICE:
            return
    raise TypeError(
        f"only a pipe or /dev/null may be a command's stream, not {name} (type {stat.filemode(mode.st_mode)[0]})"
    )


def check_mountable(fd: int) -> None:
    """Refuse a descriptor that is more than a name for a file: what it names is looked at where that may take its time.

    Raises:
        ValueError: It is not one of O_PATH.
    """
    try:
        fine = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
    except OSError as exc:
        raise ValueError(f"descriptor {fd} can't be examined: {exc.strerror}") from None
    if not fine:
        raise ValueError(f"what is to be mounted has to be opened with O_PATH, descriptor {fd} was not")


class _Unread:
    """Tell since when the other side of a connection has read nothing, though there is something for it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._bytes = 0
        self._since = 0.0

    def look(self) -> float:
        """Return for how many seconds that is so; 0: it has read since, or there is nothing. To be called often."""
        unread, now = _unread_bytes(self._connection), time.monotonic()
        if unread < self._bytes or not unread:
            self._since = now
        self._bytes = unread
        return now - self._since if unread else 0.0

    def send(self, payload: bytes, fds: list[int]) -> None:
        """Send it; raises what `packets.send` does."""
        self.look()
        packets.send(self._connection, payload, fds)
        self._bytes = _unread_bytes(self._connection)


class _Line:
    """The connection to a supervisor. `lock` guards it: what one thread sends to is not closed by another."""

    def __init__(self, connection: socket.socket) -> None:
        self.lock = threading.Lock()
        self.connection: socket.socket | None = connection
        self.unread = _Unread(connection)

    def close(self) -> None:
        with self.lock:
            connection, self.connection = self.connection, None
            if connection is not None:
                connection.close()


class Launcher:
    """Start commands in containers.

    Threads: any. `_lock` guards `_agent`, `_connection`, `_agent_unread`, `_lines`, `_closed`, and sending to the
    agent; each line has its own, so that one user's supervisor that hangs keeps nobody else waiting. A packet takes
    microseconds; SEND_TIMEOUT at most, if the other side hangs.
    """

    def __init__(self, later: Callable[[float, Callable[[], None]], object] = lambda _seconds, _act: None) -> None:
        """Start nothing; `open` or `with` does, and the agent comes with the first command.

        Args:
            later: Calls something in so many seconds, on a thread that must not wait.
        """
        self._later = later
        self._lock = threading.Lock()
        self._agent_unread: _Unread | None = None
        self._agent: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._lines: dict[int, _Line] = {}  # by the user's id
        self._closed = True

    def open(self) -> None:
        """Accept commands from now on."""
        with self._lock:
            self._closed = False

    def close(self, timeout: float = 5.0) -> None:
        """End the agent; commands that run go on.

        Args:
            timeout: Seconds until an agent that does not end is killed.
        """
        with self._lock:
            self._closed = True
            lines, self._lines = self._lines, {}
            self._end_agent(timeout)
        for line in lines.values():
            line.close()

    def launch(
        self, uid: int, request: ExecRequest, descriptors: tuple[int, int, int, int], init: tuple[int, int]
    ) -> None:
        """Start a command; how that goes, its client learns on *control*.

        Every descriptor is duplicated: the caller closes its own afterwards, or the client never sees an end of file.

        Args:
            uid: Whose command it is.
            request: What to run.
            descriptors: Its three streams, checked with `check_stdio` here, and the supervisor's end of the client's
                SOCK_SEQPACKET pair.
            init: The container's: a pidfd, and the pid.

        Raises:
            TypeError: A stream is of a kind that may not enter a container.
            ValueError: A descriptor is not open, or the last one no SOCK_SEQPACKET socket.
            ExecFailed: There is no supervisor and none can be started, or the launcher is closed.
        """
        *streams, control = descriptors
        for fd in streams:
            check_stdio(fd)
        _check_control(control)
        self._send(uid, request, [*streams, control], init)

    def prepare(self, uid: int, init: tuple[int, int]) -> None:
        """Have the way into a container looked up, if *uid* has run commands before, who may run one in it, too.

        It is no more than a hint: who can't take it at once does without.

        Args:
            uid: Who has leased it.
            init: As for `launch`.
        """
        pidfd, pid = init
        if not self._lock.acquire(blocking=False):  # somebody may be waiting for an agent that hangs
            return
        line = self._lines.get(uid)
        self._lock.release()
        if line is None or not line.lock.acquire(blocking=False):
            return
        try:
            if line.connection is not None and _takes_more(line.connection):
                with contextlib.suppress(OSError):  # whoever sends a command will see
                    line.unread.send(HEADER.pack(pid), [pidfd])
        finally:
            line.lock.release()

    def mount(self, uid: int, request: ExecRequest, descriptors: tuple[int, int, int], init: tuple[int, int]) -> None:
        """Mount something; how that goes, its client learns on *stdout*, and on *control* where it can't be begun.

        Args:
            uid: As for `launch`.
            request: One for `protocol.MOUNT`.
            descriptors: What is to be mounted, a pipe, and the control socket; checked here.
            init: As for `launch`.

        Raises:
            TypeError, ValueError, ExecFailed: As `launch`.
        """
        source, stdout, control = descriptors
        check_mountable(source)
        check_stdio(stdout)
        _check_control(control)
        self._send(uid, request, [source, stdout, stdout, control], init)

    def __enter__(self) -> Self:
        """Open, and close at the end."""
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    @property
    def agent_pid(self) -> int | None:
        """The agent's process; None if none has been started."""
        with self._lock:
            return None if self._agent is None else self._agent.pid

    def _send(self, uid: int, request: ExecRequest, fds: list[int], init: tuple[int, int]) -> None:
        pidfd, pid = init
        payload = HEADER.pack(pid) + request.encode()
        for _ in range(2):  # a second time if the supervisor turns out to be dead
            line = self._line(uid)
            try:
                with line.lock:
                    if line.connection is not None:
                        if (seconds := line.unread.look()) > SEND_TIMEOUT:
                            raise TimeoutError(f"it has read nothing for {seconds:.0f} s")
                        line.unread.send(payload, [*fds, pidfd])
                        return
            except (ConnectionError, TimeoutError) as exc:
                if isinstance(exc, TimeoutError):
                    log.warning(
                        "the supervisor of uid %s's commands hangs (stopped?): another one takes the next, those that "
                        "it has wait for it; %s",
                        uid,
                        exc,
                    )
                line.close()
            with self._lock:
                if self._lines.get(uid) is line:
                    del self._lines[uid]
        raise ExecFailed("the supervisor of this user's commands ends at once; its error is on the service's stderr")

    def _line(self, uid: int) -> _Line:
        """Return the connection to a user's supervisor, a new one's if there is none."""
        with self._lock:
            if self._closed:
                raise ExecFailed("the launcher of commands is closed: the service is ending")
            line = self._lines.get(uid)
            if line is None:
                line = self._lines[uid] = _Line(self._new_supervisor())
            return line

    def _new_supervisor(self) -> socket.socket:
        for _ in range(2):  # a second time if the agent turns out to be dead
            try:
                if self._connection is None:
                    self._agent, self._connection = _start()
                    self._agent_unread = _Unread(self._connection)
                ours, its = packets.pair()
            except OSError as exc:
                raise ExecFailed(f"the agent that runs commands can't be started: {exc}") from exc
            ours.settimeout(SEND_TIMEOUT)
            with its:
                try:
                    assert self._agent_unread is not None, "the agent runs"
                    self._agent_unread.send(b"", [its.fileno()])
                except (ConnectionError, TimeoutError):
                    ours.close()
                    self._end_agent(0)
                else:
                    self._later(SEND_TIMEOUT / 2, self._look_after_agent)
                    return ours
        raise ExecFailed("the agent that runs commands ends at once; its error is on the service's stderr")

    def _look_after_agent(self) -> None:
        """Kill an agent that hangs, so that whoever waits for it hears of that; the next command has another started.

        It is called until the agent has read what there is for it. It does not wait.
        """
        if self._lock.acquire(blocking=False):
            try:
                if self._agent is None or self._agent_unread is None:
                    return
                seconds = self._agent_unread.look()
                if not seconds:
                    return
                if seconds >= SEND_TIMEOUT:
                    log.warning("the agent that runs commands, %s, hangs (stopped?): it is killed", self._agent.pid)
                    self._agent.kill()
                    return
            finally:
                self._lock.release()
        self._later(SEND_TIMEOUT / 2, self._look_after_agent)

    def _end_agent(self, timeout: float) -> None:
        """Let the agent end by closing its connection; kill it if it has not after *timeout* seconds."""
        agent, connection, self._agent, self._connection = self._agent, self._connection, None, None
        self._agent_unread = None
        if agent is None or connection is None:
            return
        with connection:
            with contextlib.suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_WR)
            # Popen.wait with a timeout would sleep: up to 50 ms longer than the agent takes.
            poller = select.poll()
            poller.register(connection, 0)  # for POLLHUP: its end is closed by its end
            if not poller.poll(timeout * 1000):
                agent.kill()
        agent.wait()


def _unread_bytes(connection: socket.socket) -> int:
    """Return how much of what was sent is not read yet; bytes of the kernel's memory. Source: Linux, unix_outq_len."""
    (unread,) = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
    return int(unread)


def _takes_more(connection: socket.socket) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLOUT)
    return poller.poll(0) == [(connection.fileno(), select.POLLOUT)]


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, its = packets.pair()
    ours.settimeout(SEND_TIMEOUT)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        with its:
            agent = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOTSTRAP, str(its.fileno()), package],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                pass_fds=(its.fileno(),),
                start_new_session=True,  # a Ctrl-C at the service's terminal is the service's to handle
            )
    except OSError:
        ours.close()
        raise
    return agent, ours


def _check_control(fd: int) -> None:
    """Refuse what is not one end of a pair: on the other side of a named socket is some service, which trusts root."""
    try:
        sock = socket.socket(fileno=fd)  # not of a duplicate, for which there may be no descriptor left
        try:
            fine = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET and not sock.getpeername()
        finally:
            sock.detach()
    except OSError:
        fine = False
    if not fine:
        raise ValueError(f"descriptor {fd} is no end of a pair of SOCK_SEQPACKET sockets to control a command by")
