"""This process's terminal, lent to a command whose own terminal is in a container.

 terminal ──keys, raw──► relay ──► master ═ the command's terminal
          ◄───────────── relay ◄── master
 SIGWINCH ──► the master's new size        any way out ──► the terminal as it was

Raw: keys that mean a signal, an end of file or an editing of the line mean it in the container, to whatever runs in the
foreground there. One thread, the main one, since Python runs signal handlers there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import termios
import tty
from contextlib import AbstractContextManager

from lxc_pool.cli.borrowed import borrowed, drain
from lxc_pool.client.container import Container
from lxc_pool.client.process import Process

STDIN, STDOUT, STDERR = range(3)

_CHUNK = 64 * 1024
"""Bytes moved at once."""

_TAIL = 128 * 1024
"""Bytes read of what a command left in its terminal when it ended: more than the kernel keeps (64 KiB and 4 KiB, Linux
6.18, tty_buffer.c and n_tty.c), and an end where a process that it left behind goes on writing."""


def is_wanted(choice: bool | None) -> bool:
    """Decide whether a command gets a terminal.

    Args:
        choice: What the user says; None: nothing, so that it gets one if our stdin and stdout are terminals.

    Raises:
        ValueError: One is asked for, but our stdin is none: what comes there goes to the command as it is.
    """
    if choice and not os.isatty(STDIN):
        raise ValueError("--tty needs a terminal on stdin; without it, what comes there is passed on as it is")
    return os.isatty(STDIN) and os.isatty(STDOUT) if choice is None else choice


def run(container: Container, argv: list[str], *, everything: bool) -> int:
    """Run a command with a terminal of its own, joined to ours, to its end; return its status as subprocess does.

    Args:
        container: Where.
        argv: The command.
        everything: Whether stderr is the command's terminal even if ours is none.

    Raises:
        OSError, ExecFailed, LxcPoolError: As `Container.popen` and `Process.wait`; our terminal is as it was.
    """
    rows, columns = termios.tcgetwinsize(STDIN)
    stderr = None if everything or os.isatty(STDERR) else STDERR
    environment = {"TERM": term} if (term := os.environ.get("TERM")) else None
    with container.popen(argv, stderr=stderr, env=environment, tty=os.terminal_size((columns, rows))) as process:
        with _lent(process) as woken:
            _Relay(process, woken).run()
        return process.wait()


def _lent(process: Process) -> AbstractContextManager[int]:
    """Make our terminal raw, and the command's as large as ours, for as long as the block lasts; see `borrowed`."""
    modes = termios.tcgetattr(STDIN)

    def lend() -> None:
        with contextlib.suppress(termios.error):
            tty.setraw(STDIN, termios.TCSADRAIN)  # not the default, which throws away what was typed ahead
        resize()

    def restore() -> None:
        with contextlib.suppress(termios.error):  # it has been hung up
            termios.tcsetattr(STDIN, termios.TCSANOW, modes)

    def resize() -> None:
        if process.terminal is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetwinsize(process.terminal, termios.tcgetwinsize(STDIN))

    return borrowed(lend, restore, {signal.SIGWINCH: resize})


class _Relay:
    """Copy between our terminal and a command's until the command ends."""

    def __init__(self, process: Process, woken: int) -> None:
        assert process.terminal is not None, "it was started with one"
        self._process = process
        self._master = process.terminal
        self._woken = woken
        self._typed = b""  # and not taken by the command's terminal yet
        self._open = True  # somebody in the container has the command's terminal open
        self._poller = select.epoll()

    def run(self) -> None:
        """Do it."""
        with self._poller:
            for fd in (STDIN, self._master, self._process, self._woken):
                self._poller.register(fd, select.EPOLLIN)
            while self._process.returncode is None:
                for fd, events in self._poller.poll():
                    if fd == STDIN:
                        self._read_keys()
                    elif fd == self._woken:
                        drain(self._woken)
                    elif fd != self._master:
                        self._process.poll()
                    else:  # keys first, for a flood of output must not keep back the Ctrl-C that is to end it
                        if events & select.EPOLLOUT and self._typed:
                            self._send_keys()
                        self._show()
            self._show_tail()

    def _read_keys(self) -> None:
        try:
            self._typed = os.read(STDIN, _CHUNK)
        except BlockingIOError:  # another process of ours has made it so
            return
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        self._poller.unregister(STDIN)  # until the command's terminal has taken it; for good at our terminal's end
        if self._typed:
            self._watch_master()

    def _send_keys(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._typed = self._typed[os.write(self._master, self._typed) :]
        if not self._typed:
            self._watch_master()
            self._poller.register(STDIN, select.EPOLLIN)

    def _show(self) -> int:
        """Copy a piece of what the command wrote; return its length."""
        try:
            data = os.read(self._master, _CHUNK)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""
        if self._open != bool(data):
            self._open = bool(data)
            self._watch_master()
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(STDOUT, view) :]
            except BlockingIOError:  # as in _read_keys
                select.select([], [STDOUT], [])
        return len(data)

    def _show_tail(self) -> None:
        left = _TAIL
        while left > 0 and (count := self._show()):
            left -= count

    def _watch_master(self) -> None:
        # While nobody in the container has it open it is readable all the time, with EIO: then wait for the change.
        events = select.EPOLLIN | (select.EPOLLOUT if self._typed else 0)
        self._poller.modify(self._master, events if self._open else select.EPOLLIN | select.EPOLLET)
