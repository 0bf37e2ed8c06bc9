"""The service's side: it starts the agent and sends commands to it.

 service's threads ──launch()──► SOCK_SEQPACKET pair ──► agent (a child of the service)

The agent is started by the first command, and again when it is found dead. What runs is not its child's child to lose:
commands go on without agent and service.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

from lxc_pool.errors import ExecFailed
from lxc_pool.execution import packets
from lxc_pool.execution.agent import FORGET, HEADER, LAUNCH, PREPARE
from lxc_pool.execution.protocol import ExecRequest

SEND_TIMEOUT = 5.0
"""Seconds that the agent may leave a packet unread before it counts as hung and is replaced. Origin: a guess."""

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


class Launcher:
    """Start commands in containers.

    Threads: any. `_lock` guards `_agent`, `_connection`, `_closed`, and sending: a descriptor that one thread sends to
    is not closed by another. A packet takes microseconds; SEND_TIMEOUT at most, if the agent hangs.
    """

    def __init__(self) -> None:
        """Start nothing; `open` or `with` does, and the agent comes with the first command."""
        self._lock = threading.Lock()
        self._agent: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
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
            self._end_agent(timeout)

    def launch(
        self, request: ExecRequest, stdio: tuple[int, int, int], control: int, init_pidfd: int, init_pid: int
    ) -> None:
        """Start a command; how that goes, its client learns on *control*.

        Every descriptor is duplicated: the caller closes its own afterwards, or the client never sees an end of file.

        Args:
            request: What to run.
            stdio: Its three streams, checked with `check_stdio` here.
            control: The supervisor's end of the client's SOCK_SEQPACKET pair.
            init_pidfd: The container's init.
            init_pid: The same.

        Raises:
            TypeError: A stream is of a kind that may not enter a container.
            ValueError: A descriptor is not open, or *control* no SOCK_SEQPACKET socket.
            ExecFailed: There is no agent and none can be started, or the launcher is closed.
        """
        for fd in stdio:
            check_stdio(fd)
        _check_control(control)
        self._send(LAUNCH, init_pid, request.encode(), [*stdio, control, init_pidfd])

    def mount(self, request: ExecRequest, descriptors: tuple[int, int, int], init_pidfd: int, init_pid: int) -> None:
        """Mount something; how that goes, its client learns on *stdout*, and on *control* where it can't be begun.

        Args:
            request: One for `protocol.MOUNT`.
            descriptors: What is to be mounted, a pipe, and the control socket; checked here.
            init_pidfd: As for `launch`.
            init_pid: As for `launch`.

        Raises:
            TypeError, ValueError, ExecFailed: As `launch`.
        """
        source, stdout, control = descriptors
        check_mountable(source)
        check_stdio(stdout)
        _check_control(control)
        self._send(LAUNCH, init_pid, request.encode(), [source, stdout, stdout, control, init_pidfd])

    def prepare(self, init_pidfd: int, init_pid: int) -> None:
        """Make the first command in a container as quick as the next ones, by sending its usher ahead of it.

        It costs two small processes on the host, as the first command does, one of them counted in the container's
        cgroups, until `forget` or the container's end.

        Raises:
            ExecFailed: As `launch`.
        """
        self._send(PREPARE, init_pid, b"", [init_pidfd])

    def forget(self, init_pid: int) -> None:
        """End what serves a container's commands, once there are none; good before a container is stopped.

        Raises:
            ExecFailed: As `launch`.
        """
        if self.agent_pid is not None:
            self._send(FORGET, init_pid, b"", [])

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

    def _send(self, operation: int, init_pid: int, body: bytes, fds: list[int]) -> None:
        payload = HEADER.pack(operation, init_pid) + body
        with self._lock:
            for _ in range(2):  # a second time if the agent turns out to be dead
                if self._closed:
                    raise ExecFailed("the launcher of commands is closed: the service is ending")
                if self._connection is None:
                    self._agent, self._connection = _start()
                try:
                    packets.send(self._connection, payload, fds)
                except (ConnectionError, TimeoutError):
                    self._end_agent(0)
                else:
                    return
        raise ExecFailed("the agent that runs commands ends at once; its error is on the service's stderr")

    def _end_agent(self, timeout: float) -> None:
        """Let the agent end by closing its connection; kill it if it has not after *timeout* seconds."""
        agent, connection, self._agent, self._connection = self._agent, self._connection, None, None
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
    except OSError as exc:
        ours.close()
        raise ExecFailed(f"the agent that runs commands can't be started: {exc}") from exc
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
