"""The client's side of a command's three streams.

 caller's pipe, or /dev/null ──────────────────────────────► the command, directly
 caller's file, terminal or socket ◄── Pump (a thread) ──pipe──► the command

Only pipes and /dev/null may enter a container (`execution.launcher.check_stdio` says why), so anything else is copied
by a daemon thread through a pipe of our own.

Every descriptor made here belongs to a `Streams`, which closes it on each way out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import subprocess
import threading
from typing import IO, Any

_NULL_DEVICE = os.makedev(1, 3)
_CHUNK = 64 * 1024  # bytes copied at once: a pipe's capacity

Target = int | IO[Any] | None
"""What a caller may name as a stream, as `subprocess` has it: PIPE, DEVNULL, STDOUT, a descriptor, a file, None."""


class Streams:
    """A command's streams, as its client sees them.

    Attributes:
        theirs: The three descriptors for the command; closed by `sent`.
        ours: Our ends of those that the caller wanted as PIPE, else -1; who takes one sets it to -1.
    """

    def __init__(self, stdin: Target, stdout: Target, stderr: Target) -> None:
        """Open pipes as asked for.

        Raises:
            ValueError: stdin or stdout is STDOUT, or a file has no descriptor.
            OSError: A descriptor is not open, or there are no more of them.
        """
        self.ours = [-1, -1, -1]
        self._theirs: list[int] = []
        self._pumps: list[Pump] = []
        try:
            self._theirs.append(self._input(stdin))
            self._theirs.append(self._output(1, stdout))
            self._theirs.append(self._error(stderr))
        except BaseException:
            self.close()
            raise

    @property
    def theirs(self) -> tuple[int, int, int]:
        """The descriptors to send."""
        stdin, stdout, stderr = self._theirs
        return stdin, stdout, stderr

    def sent(self) -> None:
        """Close the command's ends, which it has by now, and start copying."""
        self._close_theirs()
        for pump in self._pumps:
            pump.start()

    def settle(self, timeout: float | None) -> bool:
        """After the command's end: stop feeding it, and wait until all it wrote has been copied on.

        Args:
            timeout: Seconds; None for ever.

        Returns:
            Whether that is done. A background process that goes on writing is copied further all the same.
        """
        return all(pump.settle(timeout) for pump in self._pumps)

    def close(self) -> None:
        """Close all that nobody has taken; copying ends."""
        self._close_theirs()
        for index, fd in enumerate(self.ours):
            if fd >= 0:
                os.close(fd)
                self.ours[index] = -1
        for pump in self._pumps:
            pump.abandon()

    def _close_theirs(self) -> None:
        while self._theirs:
            os.close(self._theirs.pop())

    def _input(self, target: Target) -> int:
        if target == subprocess.STDOUT:
            raise ValueError("STDOUT can only be used for stderr")
        if target == subprocess.PIPE:
            read, self.ours[0] = os.pipe()
            return read
        fd = _duplicate(target, 0)
        if may_enter(fd):
            return fd
        read, write = _pipe_or_close(fd)
        self._pumps.append(Pump(fd, write, feeds=True))
        return read

    def _output(self, index: int, target: Target) -> int:
        if target == subprocess.STDOUT:
            raise ValueError("STDOUT can only be used for stderr")
        if target == subprocess.PIPE:
            self.ours[index], write = os.pipe()
            return write
        fd = _duplicate(target, index)
        if may_enter(fd):
            return fd
        for pump in self._pumps:
            # one file for both, a terminal or `>log 2>&1`: through one pipe, so that the order is kept
            if not pump.feeds and os.path.samestat(os.fstat(pump.sink), os.fstat(fd)):
                os.close(fd)
                return fcntl.fcntl(self._theirs[1], fcntl.F_DUPFD_CLOEXEC, 3)
        read, write = _pipe_or_close(fd)
        self._pumps.append(Pump(read, fd, feeds=False))
        return write

    def _error(self, target: Target) -> int:
        if target == subprocess.STDOUT:
            return fcntl.fcntl(self._theirs[1], fcntl.F_DUPFD_CLOEXEC, 3)
        return self._output(2, target)


class Pump:
    """Copy from one descriptor to another in a daemon thread, which owns both.

    Threads: the caller's and its own. `_woken` is an eventfd, `_settled` an event; nothing else is shared.
    """

    def __init__(self, source: int, sink: int, *, feeds: bool) -> None:
        """Own *source* and *sink*; *feeds* if the command reads, else it writes."""
        self.sink = sink
        self.feeds = feeds
        self._source = source
        self._woken = -1
        self._settled = threading.Event()
        self._lock = threading.Lock()  # guards _open
        self._open = True
        self._thread = threading.Thread(target=self._run, name="lxc_pool-pump", daemon=True)

    def start(self) -> None:
        """Begin to copy."""
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread.start()

    def settle(self, timeout: float | None) -> bool:
        """Stop a pump that feeds; wait for one that drains until it has copied what is there."""
        self._wake()
        if self.feeds:
            if self._thread.ident is not None:
                self._thread.join(timeout)
                return not self._thread.is_alive()
            return True
        return self._settled.wait(timeout)

    def abandon(self) -> None:
        """Close what a pump that was never started owns; one that runs ends by itself when the command does."""
        if self._thread.ident is None:
            self._close()
        else:
            self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._open and self._woken >= 0:
                os.eventfd_write(self._woken, 1)

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # the other side has closed; the command sees it as a broken pipe
            if self.feeds:
                self._feed()
            else:
                self._drain()
        self._close()

    def _feed(self) -> None:
        os.set_blocking(self.sink, False)  # a pipe of our own: nobody else has this end
        poller = select.poll()
        poller.register(self._woken, select.POLLIN)
        poller.register(self._source, select.POLLIN)
        poller.register(self.sink, 0)  # POLLERR: the command has closed its end, read nothing more
        while True:
            ready = dict(poller.poll())
            if self._woken in ready or self.sink in ready:
                return
            data = self._read()
            if data is not None and not (data and self._write(data)):
                return

    def _drain(self) -> None:
        poller = select.poll()
        poller.register(self._woken, select.POLLIN)
        poller.register(self._source, select.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._source in ready:
                data = self._read()
                if not data or not self._write(data):
                    return
            else:
                self._settled.set()
                poller.unregister(self._woken)

    def _read(self) -> bytes | None:
        try:
            return os.read(self._source, _CHUNK)
        except BlockingIOError:
            return None

    def _write(self, data: bytes) -> bool:
        """Write all of *data*, but stop feeding when woken."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.sink, view) :]
            except BlockingIOError:
                poller = select.poll()
                poller.register(self.sink, select.POLLOUT)
                if self.feeds:
                    poller.register(self._woken, select.POLLIN)
                if self._woken in dict(poller.poll()):
                    return False
        return True

    def _close(self) -> None:
        with self._lock:
            if self._open:
                self._open = False
                for fd in (self._source, self.sink, self._woken):
                    if fd >= 0:
                        os.close(fd)
        self._settled.set()


def may_enter(fd: int) -> bool:
    """Tell whether *fd* may be passed into a container: an anonymous pipe, or /dev/null."""
    status = os.fstat(fd)
    if stat.S_ISFIFO(status.st_mode):
        return os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:[")
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL_DEVICE


def _duplicate(target: Target, inherited: int) -> int:
    """Return a descriptor of our own for what the caller named; what it does not have is /dev/null."""
    if target == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if target is None:
        try:
            return fcntl.fcntl(inherited, fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError:  # started with the stream closed
            return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    fd = target if isinstance(target, int) else target.fileno()
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def _pipe_or_close(fd: int) -> tuple[int, int]:
    try:
        return os.pipe()
    except OSError:
        os.close(fd)
        raise
