"""The course of one command, as its supervisor sees it.

 waiting ── begin ──► entering ── report's end of file ──► running ── main process reaped ──► over ──► done
    └──── fail, killed ──┴─── Failed ────────────────────────────────────────────────────────────┘
                                                                  (once it is killed, or its client has gone)

The client may signal the main process while it runs, and kill the tree at any time; that this is done it hears by the
end of the connection (after `Exited`, if that was still due). The client's end kills the tree too, except once the
command is over: background processes go on, as with `subprocess`, and the client can still have them killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from lxc_pool.execution import packets, terminal
from lxc_pool.execution.cgroups import CommandCgroup
from lxc_pool.execution.protocol import (
    MAX_EVENT,
    OPENED,
    Exited,
    Failed,
    KillTree,
    ProtocolError,
    Signal,
    Started,
    decode_event,
    decode_order,
)
from lxc_pool.execution.strays import Hunt

KILL_TIMEOUT = 10.0
"""Seconds that a killed tree has to be gone in. Origin: a guess; a process in a frozen v1 cgroup never is."""

_KILL_PAUSE, _MAX_KILL_PAUSE = 0.001, 0.05
"""Seconds until it is looked whether a killed tree is gone, doubled from the first to the second. Origin: a guess."""


class Loop:
    """Call back when a descriptor can be read or its other end is closed, or when a time has come."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._poller = select.poll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call *callback* for as long as *fd* is readable."""
        self._callbacks[fd] = callback
        self._poller.register(fd, select.POLLIN)

    def forget(self, fd: int) -> None:
        """Undo `watch`."""
        if self._callbacks.pop(fd, None) is not None:
            self._poller.unregister(fd)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        """Call *callback*, once, *delay* seconds from now."""
        self._timers.append((time.monotonic() + delay, callback))

    def turn(self) -> None:
        """Wait for something to happen and handle it."""
        for fd, _ in self._poller.poll(self._patience()):
            callback = self._callbacks.get(fd)
            if callback is not None:  # else an earlier callback of this turn has closed it
                callback()
        if self._timers:
            now = time.monotonic()
            due = [timer for timer in self._timers if timer[0] <= now]
            self._timers = [timer for timer in self._timers if timer[0] > now]
            for _, late in due:
                late()

    def _patience(self) -> float | None:
        """Return the milliseconds until the first timer; None without one."""
        if not self._timers:
            return None
        return max(0.0, min(when for when, _ in self._timers) - time.monotonic()) * 1000


class Command:
    """One command.

    Attributes:
        done: The supervisor may forget it.
        is_empty: It is over, and its cgroup is empty; it waits for nothing but an order to kill what has left that.
    """

    def __init__(
        self,
        loop: Loop,
        cgroup: CommandCgroup,
        control: socket.socket,
        hunt: Hunt,
        on_done: Callable[[Command], None],
        *,
        grace: float = 0.0,
        wants_terminal: bool = False,
    ) -> None:
        """Let it wait.

        Args:
            loop: What calls back.
            cgroup: Its own, which may not exist yet.
            control: The client; it is closed in the end.
            hunt: For what is killed with it, and not in its cgroup.
            on_done: Called when it is done.
            grace: Seconds that it has, once the client is gone, to end by itself after a SIGTERM.
            wants_terminal: Whether it sends out a master, which goes to the client.
        """
        self.done = False
        self.is_empty = False
        self._grace = grace
        self._wants_terminal = wants_terminal
        self._master = -1
        self.cgroup = cgroup
        self._hunt = hunt
        self._loop = loop
        self._control = control
        self._report: socket.socket | None = None
        self._on_done = on_done
        self._pid = 0
        self._pidfd = -1
        self._status: int | None = None
        self._failure: Failed | None = None
        self._entering = True
        self._killed = False
        self._killing = False
        self._kill_deadline = 0.0
        self._kill_pause = _KILL_PAUSE
        self._over = False
        self._container_ended = False
        loop.watch(control.fileno(), self._on_control)

    def begin(self, pid: int, pidfd: int, report: socket.socket) -> None:
        """Follow it from its fork on; it says on *report* what goes wrong. Takes over *pidfd* and *report*."""
        self._pid, self._pidfd, self._report = pid, pidfd, report
        self._loop.watch(pidfd, self._on_exit)
        self._loop.watch(report.fileno(), self._on_report)

    def fail(self, failure: Failed) -> None:
        """End it: it could not even be sent in."""
        self._failure = failure
        self._entering = False
        self._advance()

    def end_with_container(self) -> None:
        """Kill the main process, or let it not begin: the container has ended, and not all are in its pid namespace."""
        self._container_ended = True
        self._signal(signal.SIGKILL)
        if not self._pid:
            self._entering = False
            self._advance()
        elif self._over:
            # Its background processes ended with the container; a client may hold on to this for as long as it likes.
            self.cgroup.remove()
            self._finish()

    def _on_report(self) -> None:
        assert self._report is not None
        data, fd = packets.receive_beside(self._report)
        if fd >= 0:
            self._take_master(fd)
        if not data:
            self._close_report()
            self._entering = False
            if self._failure is None:
                self._tell_started()
            self._advance()
            return
        if data == OPENED:
            return
        try:
            event = decode_event(data)
        except ProtocolError as exc:
            event = Failed(0, "enter", str(exc))
        if isinstance(event, Failed):
            self._failure = event

    def _take_master(self, fd: int) -> None:
        """Keep the master of the command's terminal for the client, if it is one and the first."""
        if self._wants_terminal and self._master < 0:
            with contextlib.suppress(OSError):
                terminal.check_master(fd)
                self._master = fd
                return
        os.close(fd)

    def _tell_started(self) -> None:
        if not self._wants_terminal:
            self._tell(Started(self._pid))
        elif self._master >= 0:
            with contextlib.suppress(OSError):  # as in _tell
                packets.send_beside(self._control, Started(self._pid).encode(), self._master, socket.MSG_DONTWAIT)
            self._close_master()
        else:  # whoever could trace the command before its execve has kept or exchanged it
            self._failure = Failed(errno.ENOTTY, "enter", "no pseudo-terminal came out of the container")
            self._kill_tree()

    def _close_master(self) -> None:
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def _on_exit(self) -> None:
        self._loop.forget(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._advance()

    def _on_control(self) -> None:
        try:
            data = self._control.recv(MAX_EVENT)
            order = decode_order(data) if data else None
        except (OSError, ProtocolError):
            order = None  # who does not keep to the protocol is as good as gone
        if isinstance(order, Signal):
            self._signal(order.signum)
        elif isinstance(order, KillTree):
            self._kill_tree()
        elif self._over and not self._killing:
            self._finish()  # background processes go on
        else:
            self._close_control()
            if self._grace and self._pid:
                # Before it has begun that simply ends it; and it may have begun without our having heard of it yet.
                self._signal(signal.SIGTERM)
                self._loop.call_later(self._grace, self._end_grace)
            else:
                self._end_grace()

    def _end_grace(self) -> None:
        if not self._over:
            self._kill_tree()

    def _advance(self) -> None:
        """See whether the command is over, and tell the client."""
        if self._over or self._entering or self._killing or (self._pid and self._status is None):
            return
        self._over = True
        empty = self.cgroup.remove()  # before the client knows: then nothing of the command is left to be seen
        self._tell(self._failure or self._end())
        ran = self._status is not None
        if (empty and (self._container_ended or not ran)) or self._killed or self._control.fileno() < 0:
            self._finish()  # else the client may still want to kill what came of it, wherever that is
        else:
            self.is_empty = empty

    def _end(self) -> Exited | Failed:
        if self._status is not None:
            return Exited(self._status)
        if self._killed:
            return Exited(-signal.SIGKILL)
        return Failed(errno.ESRCH, "enter", "the container ended, or the way into it was cut off")

    def _kill_tree(self) -> None:
        self._killed = True
        self._signal(signal.SIGKILL)  # our child is found wherever it has gone
        if not self._pid:
            self._entering = False
        if not self._killing:
            self._killing = True
            self._kill_deadline = time.monotonic() + KILL_TIMEOUT
            self._kill_pause = _KILL_PAUSE
            self._go_on_killing()

    def _go_on_killing(self) -> None:
        if self.done:  # with its container
            return
        if not (self.cgroup.kill() and self._hunt.go_on()):
            if time.monotonic() < self._kill_deadline:
                self._loop.call_later(self._kill_pause, self._go_on_killing)
                self._kill_pause = min(2 * self._kill_pause, _MAX_KILL_PAUSE)
                return
            text = f"killed processes are still there after {KILL_TIMEOUT:g} s: is the container frozen?"
            self._failure = Failed(errno.EBUSY, "kill", text)
            self._tell(self._failure)
        self._killing = False
        if self._over:
            self.cgroup.remove()
            self._finish()
        else:
            self._advance()

    def _signal(self, signum: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):  # it has ended; EINVAL: there is no such signal
                signal.pidfd_send_signal(self._pidfd, signum)

    def _tell(self, event: Started | Failed | Exited) -> None:
        with contextlib.suppress(OSError):  # the client has gone, which the next read says too
            self._control.send(event.encode(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def _close_report(self) -> None:
        if self._report is not None:
            self._loop.forget(self._report.fileno())
            self._report.close()
            self._report = None

    def _close_control(self) -> None:
        if self._control.fileno() >= 0:
            self._loop.forget(self._control.fileno())
            # Not by closing alone: a fork that has not let go of its copy yet may be frozen with its own container.
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
            self._control.close()

    def _finish(self) -> None:
        self._close_master()
        self._close_report()
        self._close_control()
        self.done = True
        self._on_done(self)
