"""The supervisor of a user's commands.

 service ──packets: request, descriptors──► supervisor      own session, host's namespaces and cgroups
                                              │ clone3  ▲ ▲
                                              ▼         │ └── a control socket for each command: its client
                                           commands ────┘     a report socket for each: Failed, or executed

One for each user, so that whatever somebody does with commands, it is their own that wait for it; and no more, since a
process for each container would have to be forked before its first command: 3.3 ms, when there was one, and 1.4 MB.

It outlives agent and service for as long as it has commands. One thread, and nothing in it waits for a container.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import traceback
from typing import NoReturn

from lxc_pool.execution import cgroups, namespaces, packets
from lxc_pool.execution.command import Loop
from lxc_pool.execution.container import Container
from lxc_pool.execution.protocol import ProtocolError

HEADER = struct.Struct("<i")
"""What a packet of the service begins with: the pid of a container's init. A request follows; descriptors are stdin,
stdout, stderr, control, and a pidfd of the init. With that alone, it says that commands may be to come."""


def supervise(orders: socket.socket, mounts: cgroups.Mounts) -> NoReturn:
    """Be a supervisor, in a fork of the agent, from here to its end.

    Args:
        orders: Where commands come from.
        mounts: See `cgroups.mounted`.
    """
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        namespaces.close_all_except((0, 1, 2, orders.fileno()))
        Supervisor(orders, mounts).run()
        code = 0
    except BaseException:  # noqa: BLE001 - a fork must never return into its parent's code
        traceback.print_exc()
    finally:
        os._exit(code)


class Supervisor:
    """Serve one user until the service, and all commands, have ended."""

    def __init__(self, orders: socket.socket, mounts: cgroups.Mounts) -> None:
        """Take over *orders*."""
        self._orders = orders
        self._mounts = mounts
        self._loop = Loop()
        self._containers: dict[int, Container] = {}  # by the pid of the init
        self._ended: list[Container] = []  # whose last commands are just being ended
        self._serving = True

    def run(self) -> None:
        """Do it."""
        self._loop.watch(self._orders.fileno(), self._on_orders)
        while self._serving or any(container.is_busy for container in (*self._containers.values(), *self._ended)):
            self._loop.turn()
            self._ended = [container for container in self._ended if container.is_busy]

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
        payload, fds = packet
        try:
            (init_pid,) = HEADER.unpack_from(payload)
            *streams, pidfd = fds
            stdin, stdout, stderr, control = streams or (-1, -1, -1, -1)
        except (struct.error, ValueError):
            traceback.print_exc()
            for fd in fds:
                os.close(fd)
            return
        container = self._container(init_pid, pidfd)
        if streams:
            container.launch(payload[HEADER.size :], [stdin, stdout, stderr], socket.socket(fileno=control))
        else:
            container.prepare()

    def _container(self, init_pid: int, pidfd: int) -> Container:
        """Return the container, a new one if there is none; takes over *pidfd*."""
        known = self._containers.get(init_pid)
        if known is not None:
            if not known.has_ended:
                os.close(pidfd)
                return known
            self._on_end(known)  # and the pid has come to mean another
        container = Container(self._loop, init_pid, pidfd, self._mounts, self._on_end)
        self._containers[init_pid] = container
        return container

    def _on_end(self, container: Container) -> None:
        """Let go of a container that has ended."""
        self._containers = {pid: other for pid, other in self._containers.items() if other is not container}
        container.end()
        self._ended.append(container)
