"""The supervisor of a container's commands.

 agent ──packets: request, descriptors──► supervisor      own session, host's namespaces and cgroups
                                            │ fork  ▲ ▲ ▲
                                            ▼       │ │ └── a control socket for each command: its client
                                          usher     │ └──── a report socket for each: Started, Failed, executed
                                            └────► commands, its children (see `usher`)

One for each container, not for each command: its usher joins the container's v1 cgroups and reads its confinement once,
and a command then costs one fork. The service has both made ahead for the next containers on the shelf (`prepare`).

`run(["true"])` end to end takes 2.9 ms, and the first in a container that was not prepared 6.2 (medians; Linux 6.18,
hybrid cgroups, 2 CPUs). When it still was 6.7 ms, 1.4 were the way to the usher, 0.9 its fork, 2.2 the steps to
execve(2), mostly pages copied on write, and 1.4 the rest; the usher has since taken over what it can of the 2.2.
Supervisor and usher have 1.4 MB each of their own.

It outlives agent and service for as long as it has commands. One thread; what may block it is the end of killed
processes, `command.KILL_TIMEOUT` at most.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import traceback
from typing import NamedTuple, NoReturn

from lxc_pool.execution import cgroups, namespaces, operations, packets
from lxc_pool.execution.command import Command, Loop
from lxc_pool.execution.protocol import Failed, ProtocolError, is_operation, wants_terminal
from lxc_pool.execution.usher import usher

Mounts = dict[frozenset[str], str]


class Container(NamedTuple):
    """The container's init, twice: a pid to look into /proc with, and a pidfd that can't come to mean another."""

    init_pid: int
    pidfd: int


def supervise(container: Container, mounts: Mounts, orders: socket.socket) -> NoReturn:
    """Be a supervisor, in a fork of the agent, from here to its end.

    Args:
        container: Where the commands go.
        mounts: See `cgroups.mounted`.
        orders: Where they come from: packets of a request with stdin, stdout, stderr and control.
    """
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        namespaces.close_all_except((0, 1, 2, container.pidfd, orders.fileno()))
        Supervisor(container, mounts, orders).run()
        code = 0
    except BaseException:  # noqa: BLE001 - a fork must never return into its parent's code
        traceback.print_exc()
    finally:
        os._exit(code)


class Supervisor:
    """Serve a container until it, or the agent, and all commands have ended."""

    def __init__(self, container: Container, mounts: Mounts, orders: socket.socket) -> None:
        """Take over *orders*."""
        self._container = container
        self._mounts = mounts
        self._orders = orders
        self._loop = Loop()
        self._commands: list[Command] = []
        self._left: list[cgroups.CommandCgroup] = []  # of commands that are done, but for background processes
        self._count = 0
        self._where: cgroups.Membership | None = None
        self._usher: socket.socket | None = None
        self._usher_pidfd = -1
        self._serving = True

    def run(self) -> None:
        """Do it."""
        self._loop.watch(self._orders.fileno(), self._on_orders)
        self._loop.watch(self._container.pidfd, self._on_container_end)
        with contextlib.suppress(OSError):  # the first command will hear of it
            self._send_usher()
        while self._serving or self._commands:
            self._loop.turn()
            if any(command.done for command in self._commands):
                self._forget_done()
        self._dismiss_usher()
        self._remove_left_cgroups()

    def _forget_done(self) -> None:
        self._left += [command.cgroup for command in self._commands if command.done]
        self._commands = [command for command in self._commands if not command.done]
        self._left = [cgroup for cgroup in self._left if not cgroup.remove()]

    def _on_orders(self) -> None:
        try:
            packet = packets.receive(self._orders)
        except ProtocolError:
            traceback.print_exc()
            return
        except ConnectionError:
            packet = None
        if packet is None:
            self._loop.forget(self._orders.fileno())
            self._orders.close()
            self._serving = False
            return
        request, (stdin, stdout, stderr, control) = packet
        self._launch(request, [stdin, stdout, stderr], socket.socket(fileno=control))

    def _on_container_end(self) -> None:
        self._loop.forget(self._container.pidfd)
        self._loop.forget(self._orders.fileno())
        self._orders.close()  # the agent sees it and sends nothing more
        self._serving = False
        for command in self._commands:
            command.end_with_container()

    def _launch(self, request: bytes, fds: list[int], control: socket.socket) -> None:
        """Send a command in; closes *fds*, and *control* when the command is done."""
        cgroup: cgroups.CommandCgroup | None = None
        try:
            where, requests = self._send_usher()
            self._count += 1
            cgroup = cgroups.CommandCgroup(where.parent, f"lxc_pool.{os.getpid()}.{self._count}")
            cgroup.create()
            fds.append(cgroup.open())
            report, its_end = packets.pair()
            with its_end:
                fds.insert(3, os.dup(its_end.fileno()))
            grace = operations.GRACE if is_operation(request) else 0.0
            command = Command(self._loop, cgroup, control, report, grace, wants_terminal=wants_terminal(request))
            self._commands.append(command)
        except OSError as exc:
            failure = _not_entered(exc)
            if cgroup is not None:
                cgroup.remove()
            with control, contextlib.suppress(OSError):
                control.send(failure.encode(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        else:
            try:
                try:
                    packets.send(requests, request, fds)
                except ConnectionError:  # it was killed just now
                    self._dismiss_usher()
                    packets.send(self._send_usher()[1], request, fds)
            except OSError as exc:
                command.fail(_not_entered(exc))
        finally:
            for fd in fds:
                os.close(fd)

    def _send_usher(self) -> tuple[cgroups.Membership, socket.socket]:
        """Return where commands go, and the connection to an usher, a new one if there is none.

        Raises:
            OSError: The container has ended, its cgroups are out of reach, or no process is left.
        """
        if self._usher is None or self._where is None:
            self._where = cgroups.membership(self._container.init_pid, self._mounts)
            ours, other = packets.pair()
            with other:
                pid = os.fork()
                if not pid:
                    usher(other, self._container.init_pid, self._container.pidfd, self._where)
            try:
                self._usher_pidfd = os.pidfd_open(pid)
            except OSError:
                ours.close()
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            self._usher = ours
            self._loop.watch(self._usher_pidfd, self._dismiss_usher)
        return self._where, self._usher

    def _dismiss_usher(self) -> None:
        """Reap an usher that has ended, as the out-of-memory killer may have it, or end it."""
        if self._usher is None:
            return
        self._usher.close()
        self._usher = None
        self._loop.forget(self._usher_pidfd)
        os.waitid(os.P_PIDFD, self._usher_pidfd, os.WEXITED)
        os.close(self._usher_pidfd)
        self._remove_left_cgroups()

    def _remove_left_cgroups(self) -> None:
        """Remove the container's cgroups after its end, for liblxc may have tried while we were still in them."""
        if self._where is not None and _is_readable(self._container.pidfd):
            for directory in (*self._where.join, self._where.parent):
                with contextlib.suppress(OSError):  # mostly it was done before
                    os.rmdir(directory)


def _not_entered(exc: OSError) -> Failed:
    return Failed(exc.errno or 0, "enter", f"the container has ended, or can't be entered: {exc}")


def _is_readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))
