"""Somebody at a terminal: types at a program, and reads what it shows."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TIMEOUT = 30.0
"""Seconds until what is waited for counts as not coming. A guess: it comes in tenths of one."""


class Typist:
    """A program with a terminal of its own, which is its controlling one.

    Attributes:
        process: The program.
        shown: All that the terminal has shown.
    """

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path,
        *,
        size: tuple[int, int] = (24, 80),
        typed_ahead: bytes = b"",
        **streams: Any,
    ) -> None:
        self._master, self._slave = os.openpty()
        termios.tcsetwinsize(self._slave, size)
        os.write(self._master, typed_ahead)
        self._before = termios.tcgetattr(self._slave)
        self.shown = b""
        self.process = subprocess.Popen(
            # As at a login, whatever those who started the tests ignore: nohup, a shell's background.
            ["setsid", "--ctty", "env", "--default-signal=HUP,INT,QUIT", *command],
            cwd=cwd,
            env=os.environ | {"TERM": "vt220"},
            **dict.fromkeys(("stdin", "stdout", "stderr"), self._slave) | streams,
        )

    @property
    def is_raw(self) -> bool:
        """Whether the program has the terminal in raw mode."""
        return not termios.tcgetattr(self._slave)[3] & (termios.ICANON | termios.ISIG | termios.ECHO)

    @property
    def is_as_before(self) -> bool:
        """Whether the terminal is as it was when the program began."""
        return termios.tcgetattr(self._slave) == self._before

    @property
    def size(self) -> tuple[int, int]:
        """The terminal's rows and columns."""
        return termios.tcgetwinsize(self._slave)

    def type(self, keys: bytes) -> None:
        while keys:
            keys = keys[os.write(self._master, keys) :]

    def resize(self, rows: int, columns: int) -> None:
        """Do what the kernel does when a window changes: SIGWINCH to the foreground."""
        termios.tcsetwinsize(self._master, (rows, columns))

    def sees(self, pattern: bytes) -> re.Match[bytes]:
        """Wait until what is shown matches; what was shown up to there does not count the next time."""
        deadline = time.monotonic() + TIMEOUT
        while not (found := re.search(pattern, self.shown)):
            assert self._look(deadline), f"{pattern!r} is not shown, but {self.shown[-2000:]!r}"
        self.shown = self.shown[found.end() :]
        return found

    def ends(self) -> int:
        """Wait for the program's end, showing what it shows meanwhile; return its status as subprocess does."""
        descriptor = os.pidfd_open(self.process.pid)
        try:
            deadline = time.monotonic() + TIMEOUT
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            poller.register(self._master, select.POLLIN)
            while not any(fd == descriptor for fd, _ in poller.poll(max(0.0, deadline - time.monotonic()) * 1000)):
                assert self._look(deadline), f"it does not end; shown: {self.shown[-2000:]!r}"
        finally:
            os.close(descriptor)
        status = self.process.wait()
        while self._look(0):
            pass
        return status

    def close(self) -> None:
        """Kill the program if it runs, and take the terminal away."""
        self.process.kill()
        self.process.wait()
        for descriptor in (self._master, self._slave):
            os.close(descriptor)

    def _look(self, deadline: float) -> bool:
        """Take in what is shown next; return False if nothing is by *deadline*."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if ready:
            self.shown += os.read(self._master, 65536)
        return bool(ready)


@contextlib.contextmanager
def typist(command: Sequence[str], cwd: Path, **options: Any) -> Iterator[Typist]:
    """Sit somebody down at a terminal with a program."""
    somebody = Typist(command, cwd, **options)
    try:
        yield somebody
    finally:
        somebody.close()
