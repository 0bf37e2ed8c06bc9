"""A process of ours in a container, from its client's side: two pipes, a control socket, one deadline.

 Inside ── write ──pipe──► stdin   `execution.operations`
        ◄─ read ───pipe─── stdout
        ◄─ control ──────► its supervisor

What is to be written need not wait until the process has begun: the pipe takes it meanwhile. Whether it could begin,
the first one to wait for something hears. One thread at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence

from lxc_pool.client.control import Control
from lxc_pool.errors import ExecFailed
from lxc_pool.execution.operations import GRACE
from lxc_pool.execution.protocol import ExecRequest, Failed

PIPE_SIZE = 1024 * 1024
"""Bytes that a pipe holds. Source: what a user without privileges may ask for, /proc/sys/fs/pipe-max-size."""

Launch = Callable[[ExecRequest, tuple[int, int, int, int]], None]


class Late(Exception):
    """The deadline has passed. Never seen outside, and no OSError: that would be taken for a file's."""


class Cut(Exception):
    """The process inside has closed its end of a pipe. As `Late`."""


class Inside:
    """The process; `close` ends it, whatever it does."""

    def __init__(self, launch: Launch, request: ExecRequest, deadline: float | None) -> None:
        """Have it started.

        Args:
            launch: Sends the request.
            request: An operation.
            deadline: On the monotonic clock, for all that is done here but `close`; None for none.

        Raises:
            LxcPoolError: As *launch*.
        """
        self._deadline = deadline
        self._has_begun = False
        self._can_not_begin = False
        self._fds: list[int] = []
        theirs: list[int] = []
        ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = Control(ours)
        try:
            with other:
                try:
                    stdin, self._input = self._pipe()
                    theirs.append(stdin)
                    self._fds.append(self._input)
                    self._output, stdout = self._pipe()
                    theirs.append(stdout)
                    self._fds.append(self._output)
                    # not /dev/null: the container's would be opened instead, which may not be one
                    launch(request, (stdin, stdout, stdout, other.fileno()))
                finally:
                    for fd in theirs:
                        os.close(fd)
            for fd in self._fds:
                os.set_blocking(fd, False)
        except BaseException:
            self.close()
            raise

    @property
    def returncode(self) -> int | None:
        """How it ended, as `subprocess` has it; None: it has not, or nobody knows."""
        return self._control.returncode

    def await_begin(self) -> None:
        """Wait until it has begun; what would wait for it otherwise, does so first.

        Raises:
            ExecFailed: The container can't be entered, or has ended.
            OSError, ValueError: What is to be mounted can't be.
            Late: It took too long.
        """
        if self._has_begun:
            return
        event = self._control.await_start(self._left())
        if event is None:
            raise Late
        if isinstance(event, Failed):
            self._can_not_begin = True
            raise _as_error(event)
        self._has_begun = True

    def read(self, buffer: memoryview) -> int:
        """Read what there is, at least a byte; 0 at the end.

        Raises:
            Late: Nothing came in time.
            ExecFailed, OSError, ValueError: As `await_begin`.
        """
        self.await_begin()
        self.check()
        while True:
            try:
                return os.readv(self._output, [buffer])
            except BlockingIOError:
                self._wait(self._output, select.POLLIN)

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """Write all of the buffers.

        Raises:
            Late: They were not read in time.
            Cut: They won't be read.
        """
        self.check()
        left = [memoryview(buffer) for buffer in buffers]
        while left:
            try:
                written = os.writev(self._input, left)
            except BlockingIOError:
                self._wait(self._input, select.POLLOUT)
                continue
            except BrokenPipeError:
                raise Cut from None
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if left:
                left[0] = left[0][written:]

    def check(self) -> None:
        """Look at the clock, for a stream that never has to be waited for.

        Raises:
            Late: The deadline has passed.
        """
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise Late

    def finish(self) -> None:
        """Wait until it has ended.

        Raises:
            ExecFailed: It was killed, or nobody knows.
            Late: It runs on.
            OSError, ValueError: As `await_begin`.
        """
        self.await_begin()
        code = self._control.await_exit(self._left())
        if code is None:
            raise Late
        if code:
            raise ExecFailed(_words(code))

    def why_it_ended(self) -> ExecFailed:
        """Say why it has ended before its time."""
        try:
            self.finish()
        except ExecFailed as exc:
            return exc
        except Late:
            pass
        return ExecFailed(_words(0))

    def close(self) -> None:
        """End it, if it has not: let it tidy up for `GRACE` seconds, then kill it."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        try:
            # Of one that can't begin nothing is left by the time that this is told, nor will more be told of it.
            if not self._control.closed and not self._control.ended and not self._can_not_begin:
                with contextlib.suppress(ExecFailed):
                    self._control.signal(signal.SIGTERM)
                    if self._control.await_exit(GRACE) is None:
                        self._control.kill_tree()
        finally:
            self._control.close()

    def _pipe(self) -> tuple[int, int]:
        read, write = os.pipe()
        with contextlib.suppress(OSError):  # this user has too much in pipes already
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        return read, write

    def _left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _wait(self, fd: int, events: int) -> None:
        poller = select.poll()
        poller.register(fd, events)
        left = self._left()
        if not poller.poll(None if left is None else left * 1000):
            raise Late


def _as_error(event: Failed) -> Exception:
    if event.stage != "mount":
        return ExecFailed(f"the container could not be entered: {event.text}")
    return OSError(event.errno, event.text) if event.errno else ValueError(event.text)


def _words(code: int) -> str:
    if code == -signal.SIGKILL:
        return "the process inside was killed: the container has ended, or has no memory left"
    return f"our process inside ended with status {code} and did not say why; please report it"
