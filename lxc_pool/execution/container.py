"""One container as its user's supervisor sees it: the way in, and the commands that run there.

 lease, or first command ──► the way in is looked up: cgroups, and what init is confined by (`confinement`)
 each command            ──► a cgroup of its own, a fork into it (`entry.fork`), and its course (`command`)

For seccomp filters to be read, init has to stand still, which it does in microseconds, or once it is thawed; commands
wait for that in the order in which they came.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from lxc_pool.execution import cgroups, entry, operations, packets, strays
from lxc_pool.execution.command import Command, Loop
from lxc_pool.execution.confinement import Reading
from lxc_pool.execution.protocol import ExecRequest, Failed, ProtocolError, is_operation, wants_terminal

_SOON, _MAX_PAUSE = 0.001, 0.05
"""Seconds for which it is looked without a pause whether init stands still, 20 times what it takes on an idle host;
after that pauses are as long as it has waited, up to the second: it is frozen, or CPUs are busy. Origin: a guess."""


_TRACED = 1.0
"""Seconds for which another tracer of init is waited for: it may be another user's supervisor. Origin: a guess."""


class _Waiting(NamedTuple):
    command: Command
    request: bytes
    fds: list[int]


class Container:
    """Start commands in one container, and end them with it."""

    def __init__(
        self, loop: Loop, init_pid: int, pidfd: int, mounts: cgroups.Mounts, on_end: Callable[[Container], None]
    ) -> None:
        """Look at nothing yet.

        Args:
            loop: What calls back.
            init_pid: The container's init.
            pidfd: The same; it is taken over.
            mounts: See `cgroups.mounted`.
            on_end: Called when it ends; who is called calls `end`.
        """
        self._loop = loop
        self._init_pid = init_pid
        self._pidfd = pidfd
        self._mounts = mounts
        self._where: cgroups.Membership | None = None
        self._reading: Reading | None = None
        self._began = 0.0
        self._door: entry.Door | None = None
        self._waiting: list[_Waiting] = []
        self._commands: list[Command] = []
        self._left: list[cgroups.CommandCgroup] = []  # of commands that are done, but for background processes
        self._count = 0
        self._ended = False
        loop.watch(pidfd, lambda: on_end(self))

    @property
    def is_busy(self) -> bool:
        """Whether there are commands that somebody is in."""
        return not all(command.is_empty for command in self._commands)

    @property
    def has_ended(self) -> bool:
        """Whether its init has ended."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def prepare(self) -> None:
        """Look up the way in, for a command that may be to come; if it can't be, that will hear why."""
        with contextlib.suppress(OSError):
            self._look_up_cgroups()
            self._let_in()

    def launch(self, request: bytes, fds: list[int], control: socket.socket) -> None:
        """Send a command in; closes *fds*, its three streams, and *control* when the command is done."""
        try:
            where = self._look_up_cgroups()
        except OSError as exc:
            with control, contextlib.suppress(OSError):
                control.send(_not_entered(exc).encode(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            _close(fds)
            return
        self._count += 1
        cgroup = cgroups.CommandCgroup(where.parent, f"{cgroups.COMMANDS}{os.getpid()}.{self._count}")
        command = Command(
            self._loop,
            cgroup,
            control,
            strays.Hunt(cgroups.payload(where.parent), strays.mark(), self._give_up),
            self._on_done,
            grace=operations.GRACE if is_operation(request) else 0.0,
            wants_terminal=wants_terminal(request),
        )
        self._commands.append(command)
        self._waiting.append(_Waiting(command, request, fds))
        if len(self._waiting) == 1:
            self._let_in()

    def end(self) -> None:
        """End the commands with the container."""
        self._ended = True
        self._loop.forget(self._pidfd)
        os.close(self._pidfd)
        if self._reading is not None:
            self._reading.close()
        if self._door is not None:
            self._door.close()
        waiting, self._waiting = self._waiting, []
        for _, _, fds in waiting:
            _close(fds)
        for command in list(self._commands):
            command.end_with_container()
        self._remove_cgroups_at_end()

    def _look_up_cgroups(self) -> cgroups.Membership:
        if self._where is None:
            self._where = cgroups.membership(self._init_pid, self._mounts)
        return self._where

    def _let_in(self) -> None:
        """Let those in that are waiting, now or as soon as it can be."""
        if self._ended:
            return
        failure: Failed | None = None
        try:
            if not self._can_open_door():
                waited = time.monotonic() - self._began
                self._loop.call_later(0.0 if waited < _SOON else min(waited, _MAX_PAUSE), self._let_in)
                return
        except OSError as exc:
            failure = _not_entered(exc)
            self._began = 0.0
        waiting, self._waiting = self._waiting, []
        for command, request, fds in waiting:
            try:
                if command.done:
                    continue
                if failure is not None:
                    command.fail(failure)
                else:
                    self._enter(command, request, fds)
            finally:
                _close(fds)

    def _can_open_door(self) -> bool:
        """Look up the way in; return whether it is known.

        Raises:
            OSError: The container has ended, or can't be looked at.
        """
        if self._door is not None:
            return True
        assert self._where is not None
        if self._reading is None:
            self._began = self._began or time.monotonic()
            try:
                self._reading = Reading(self._init_pid)
            except PermissionError:
                if time.monotonic() - self._began < _TRACED:
                    return False
                raise
        try:
            confinement = self._reading.result()
        except OSError:
            self._reading = None
            raise
        if confinement is None:
            return False
        self._reading = None
        # what was read was init's: its pid can't have been reused while it lives
        signal.pidfd_send_signal(self._pidfd, 0)
        self._door = entry.Door.into(self._init_pid, self._pidfd, self._where, confinement)
        return True

    def _enter(self, command: Command, payload: bytes, streams: list[int]) -> None:
        door = self._door
        assert door is not None
        mine: list[int] = []  # what is the command's alone
        try:
            request = ExecRequest.decode(payload, trusted=True)
            command.cgroup.create()
            mine.append(command.cgroup.open())
            report, its_end = packets.pair()
            mine.append(its_end.detach())
            try:
                stdin, stdout, stderr = streams
                pid, pidfd = entry.fork(request, (stdin, stdout, stderr, mine[1]), mine[0], door)
            except OSError:
                report.close()
                raise
            command.begin(pid, pidfd, report)
        except ProtocolError as exc:
            command.fail(Failed(0, "enter", f"a malformed request: {exc}"))
        except OSError as exc:
            command.fail(_not_entered(exc))
        finally:
            _close(mine)  # the command's copy of report is now the last: its execve is our end of file

    def _give_up(self) -> None:
        """End the container: what has left the cgroup of a command that was killed can't be ended otherwise."""
        sys.stderr.write(
            f"lxc_pool: the container of init {self._init_pid} is ended: what had left the cgroup of a command went on "
            f"for {strays.TIMEOUT:g} s while it was killed\n"
        )
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _on_done(self, command: Command) -> None:
        self._commands.remove(command)
        self._left.append(command.cgroup)
        self._left = [cgroup for cgroup in self._left if not cgroup.remove()]
        if self._ended:
            self._remove_cgroups_at_end()

    def _remove_cgroups_at_end(self) -> None:
        """Remove the container's cgroups after its last command: liblxc may have tried while that was still there.

        Not before its monitor has ended. Told to stop, that one kills init, and then waits to read in the cgroup that
        it is not frozen; if it is removed just then, the monitor reads for ever, and whoever has told it waits
        (measured: one in ten, on an emulated processor).
        Source: liblxc 5.0.2, src/lxc/cgroups/cgfsng.c, freezer_cgroup_events_cb; on hosts with version 2 alone.
        """
        if self._where is None or self._commands:
            return
        try:
            monitor = cgroups.monitor_of(self._where.parent)
        except OSError:  # it can't be looked at: the backend removes them, too
            return
        if monitor is None:
            self._remove_cgroups()
            return

        def has_ended() -> None:
            self._loop.forget(monitor)
            os.close(monitor)
            self._remove_cgroups()

        self._loop.watch(monitor, has_ended)

    def _remove_cgroups(self) -> None:
        assert self._where is not None
        for directory in (*self._where.join, self._where.parent):
            with contextlib.suppress(OSError):  # mostly it was done before
                os.rmdir(directory)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _not_entered(exc: OSError) -> Failed:
    return Failed(exc.errno or 0, "enter", f"the container has ended, or can't be entered: {exc}")
