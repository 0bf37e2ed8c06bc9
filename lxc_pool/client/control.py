"""The client's end of a command's control socket."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time

from lxc_pool.errors import ExecFailed
from lxc_pool.execution import packets
from lxc_pool.execution.protocol import (
    Exited,
    Failed,
    KillTree,
    Signal,
    Started,
    decode_event,
)

KILL_TIMEOUT = 15.0
"""Seconds that a supervisor has to report a killed tree gone; it gives up itself after 10."""


class Control:
    """What a client knows of its command, and how it gives orders.

    Threads: any. `_lock` guards reading the socket, `returncode` and `_lost`; who holds it may be waiting for events.
    Once `returncode` is set it never changes.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take over *sock*, the other end of which is the supervisor's."""
        self.returncode: int | None = None
        self._master = -1
        self._socket = sock
        self._lock = threading.RLock()
        self._lost = ""

    @property
    def closed(self) -> bool:
        """Whether there is no supervisor to speak to any more."""
        return self._socket.fileno() < 0

    @property
    def ended(self) -> bool:
        """Whether nothing more will be learnt about the command."""
        return self.returncode is not None or bool(self._lost)

    def fileno(self) -> int:
        """Return the socket's descriptor; -1 once it is closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection: a command that runs is killed with its tree."""
        self._socket.close()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def take_terminal(self) -> int | None:
        """Return the master of the command's terminal, the caller's to close from now on; None without one."""
        master, self._master = self._master, -1
        return master if master >= 0 else None

    def await_start(self, timeout: float | None) -> Started | Failed | None:
        """Return how starting went; None if that is not known after *timeout* seconds (None: wait for ever).

        Raises:
            ExecFailed: The agent, or the supervisor, has ended.
        """
        event = self._receive(timeout)
        if isinstance(event, (Started, Failed)):
            return event
        if event is None and not self.closed:
            return None
        raise ExecFailed("the service's agent, or the command's supervisor, has ended")

    def await_exit(self, timeout: float | None) -> int | None:
        """Return the command's returncode; None if it has none after *timeout* seconds (None: wait for ever).

        Raises:
            ExecFailed: Its supervisor was killed, or could not kill it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            return self.returncode
        try:
            while self.returncode is None:
                if self._lost:
                    raise ExecFailed(self._lost)
                event = self._receive(None if deadline is None else deadline - time.monotonic())
                if isinstance(event, Exited):
                    self.returncode = event.status
                elif event is None and not self.closed:
                    return None
                elif not isinstance(event, Started):
                    self._lost = (
                        event.text
                        if isinstance(event, Failed)
                        else "how the command ended is unknown: its supervisor was killed"
                    )
            return self.returncode
        finally:
            self._lock.release()

    def signal(self, signum: int) -> None:
        """Send *signum* to the main process; to one that has ended, nothing.

        Raises:
            ValueError: There is no such signal.
        """
        number = int(signal.Signals(signum)) if signum else 0
        if self.await_exit(0) is None:
            self._send(Signal(number))

    def kill_tree(self) -> None:
        """Kill the command and all that came of it, and wait until they are gone.

        Raises:
            ExecFailed: They are not: the container is frozen, or hangs in the kernel.
        """
        self._send(KillTree())  # before the lock: who holds it may be waiting for the command's end
        deadline = time.monotonic() + KILL_TIMEOUT
        with self._lock:
            while not self.closed:
                event = self._receive(deadline - time.monotonic())
                if isinstance(event, Failed):
                    self._lost = self._lost or event.text
                    if event.stage == "kill":
                        raise ExecFailed(event.text)
                elif isinstance(event, Exited):
                    self.returncode = event.status if self.returncode is None else self.returncode
                elif event is None and not self.closed:
                    raise ExecFailed(f"the command's supervisor has not answered for {KILL_TIMEOUT:g} s")
        # the supervisor closes the connection once nothing is left to supervise

    def _receive(self, timeout: float | None) -> Started | Failed | Exited | None:
        """Return the next event; None if none comes in time, or the connection has ended, which closes it."""
        if self.closed:
            return None
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        if not poller.poll(None if timeout is None else max(0.0, timeout) * 1000):
            return None
        try:
            data, master = self._receive_packet()
        except ConnectionError:
            data, master = b"", -1
        if master >= 0:
            self._master = master
        if not data:
            self._socket.close()
            return None
        return decode_event(data)

    def _receive_packet(self) -> tuple[bytes, int]:
        try:
            return packets.receive_beside(self._socket)
        except ConnectionResetError:
            # The supervisor has closed its end with an order of ours unread. That is said once, and before what it had
            # said itself: how the command ended. Source: Linux net/core/datagram.c, __skb_try_recv_datagram.
            return packets.receive_beside(self._socket)

    def _send(self, order: Signal | KillTree) -> None:
        with contextlib.suppress(OSError):  # the supervisor has ended: so has the command
            self._socket.send(order.encode(), socket.MSG_NOSIGNAL)
