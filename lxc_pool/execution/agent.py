"""The agent: a small process that forks a supervisor for every container in which commands are run.

 service ──packets: op, request, descriptors──► agent ──fork──► supervisors (see `supervisor`)
                                                  └──packets: request, descriptors──► the right one

Separate from the service, because a fork of a process with threads and much memory is neither safe nor quick. It ends
when the service's end of its connection closes; supervisors end with the last of their commands. One thread.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import signal
import socket
import struct
import sys
import traceback
from typing import NamedTuple

from lxc_pool.execution import cgroups, namespaces, packets
from lxc_pool.execution.protocol import Failed, ProtocolError
from lxc_pool.execution.supervisor import Container, supervise

HEADER = struct.Struct("<Bi")
"""What a packet of the service begins with: an operation, and the pid of a container's init."""

LAUNCH, PREPARE, FORGET = 1, 2, 3
"""Operations. LAUNCH: descriptors stdin, stdout, stderr, control, pidfd. PREPARE: pidfd. FORGET: none."""


class _Supervised(NamedTuple):
    orders: socket.socket
    pidfd: int


class Agent:
    """Serve one connection to the service."""

    def __init__(self, service: socket.socket, mounts: dict[frozenset[str], str]) -> None:
        """Take over *service*; see `cgroups.mounted` for *mounts*."""
        self._service = service
        self._mounts = mounts
        self._supervised: dict[int, _Supervised] = {}  # by the pid of the container's init
        self._poller = select.poll()

    def serve(self) -> None:
        """Handle packets until the service closes the connection."""
        self._poller.register(self._service, select.POLLIN)
        while True:
            ready = {fd for fd, _ in self._poller.poll()}
            for init_pid, supervised in list(self._supervised.items()):
                if supervised.orders.fileno() in ready:  # it takes nothing more: its container has ended
                    self._forget(init_pid)
            if self._service.fileno() in ready and not self._serve_packet():
                return

    def _serve_packet(self) -> bool:
        try:
            packet = packets.receive(self._service)
        except ProtocolError as exc:
            sys.stderr.write(f"lxc_pool agent: {exc}\n")
            return True
        except ConnectionError:
            return False
        if packet is None:
            return False
        payload, fds = packet
        try:
            self._handle(payload, fds)
        except Exception:  # noqa: BLE001 - one bad request must not end the commands to come
            traceback.print_exc()
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _handle(self, payload: bytes, fds: list[int]) -> None:
        operation, init_pid = HEADER.unpack_from(payload)
        if operation == LAUNCH:
            *streams, control, pidfd = fds
            self._launch(Container(init_pid, pidfd), payload[HEADER.size :], streams, control)
        elif operation == PREPARE:
            (pidfd,) = fds
            self._supervisor(Container(init_pid, pidfd))
        elif operation == FORGET:
            self._forget(init_pid)
        else:
            raise ProtocolError(f"unknown operation {operation}")

    def _launch(self, container: Container, request: bytes, streams: list[int], control: int) -> None:
        try:
            try:
                packets.send(self._supervisor(container), request, [*streams, control])
            except ConnectionError:  # it was killed, or its container ended just now
                self._forget(container.init_pid)
                packets.send(self._supervisor(container), request, [*streams, control])
        except OSError as exc:
            failure = Failed(exc.errno or 0, "enter", f"there is no supervisor for the command: {exc}")
            with socket.socket(fileno=os.dup(control)) as client, contextlib.suppress(OSError):
                client.send(failure.encode(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def _supervisor(self, container: Container) -> socket.socket:
        """Return the connection to the container's supervisor, which is forked if there is none."""
        known = self._supervised.get(container.init_pid)
        if known is not None:
            try:
                signal.pidfd_send_signal(known.pidfd, 0)
            except ProcessLookupError:  # the pid has come to mean another container
                self._forget(container.init_pid)
            else:
                return known.orders
        ours, its = packets.pair()
        with its:
            if not os.fork():
                supervise(container, self._mounts, its)
        self._supervised[container.init_pid] = _Supervised(ours, os.dup(container.pidfd))
        self._poller.register(ours, select.POLLIN)
        return ours

    def _forget(self, init_pid: int) -> None:
        """Close the connection to a supervisor, which then ends with the last of its commands."""
        supervised = self._supervised.pop(init_pid, None)
        if supervised is not None:
            self._poller.unregister(supervised.orders)
            supervised.orders.close()
            os.close(supervised.pidfd)


def main(fd: int) -> None:
    """Be the agent of the service at the other end of *fd*."""
    namespaces.set_undumpable()
    for signum in range(1, signal.NSIG):
        # what a command inherits: Python ignores SIGPIPE and SIGXFSZ, the service may ignore others
        with contextlib.suppress(OSError, ValueError):
            signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps supervisors
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # commands get the container's own limits
    agent = Agent(socket.socket(fileno=fd), cgroups.mounted())
    gc.disable()
    gc.freeze()  # a collection in a fork would copy every page it marks
    agent.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]))
