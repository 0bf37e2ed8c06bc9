"""Ctrl-C: end at once, but never between the making of a thing and the knowledge of it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
    """A signal asks this process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Interrupts:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Interrupted`, but not within a shield; ignore later ones.

    For the main thread.
    """

    def __init__(self) -> None:
        self._shields = 0
        self._pending: int | None = None
        self._armed = True

    def install(self) -> None:
        """Take over the signals, save those that the caller had ignored (nohup)."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._receive)

    def disarm(self) -> None:
        """Ignore every signal from now on: cleaning up must not be cut short."""
        self._armed = False

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Put a signal off until the block has ended."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
            if not self._shields and self._armed and self._pending is not None:
                self._armed = False
                raise Interrupted(self._pending)

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        if not self._armed:
            return
        if self._shields:
            self._pending = signum
            return
        self._armed = False
        raise Interrupted(signum)
