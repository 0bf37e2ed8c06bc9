"""What one user may take of the service itself: calls in a second, large messages at a time, lines in the log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

CONNECTION_COST = 10
"""Calls that a new connection counts as: its thread and handshake take that much (measured: 0.5 ms against 50 µs)."""

CALL_TIME = 100e-6
"""Seconds of CPU that a call may take; what takes longer counts as so many (measured: 50 µs; a listing of 100: 500)."""

LARGE_AT_A_TIME = 4
"""Large messages of one user in the service at once. A guess: each takes some 16 MiB until it is answered."""

_WINDOW = 10.0
"""Seconds over which a user's refusals are counted."""

_USERS = 1000
"""Users that are remembered; beyond, those are forgotten who have been quiet."""


class Pace:
    """How fast each user's calls are taken: a second's worth at once, then one after another. Thread-safe.

    Calls beyond are not refused but taken later: a quick client is slowed down, and nobody else is.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow *rate* calls a second for each user."""
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._used_until: dict[int, float] = {}

    def delay(self, uid: int, calls: int = 1) -> float:
        """Count *calls* of a user; return how many seconds they have to wait."""
        with self._lock:
            now = self._clock()
            if len(self._used_until) > _USERS:
                self._used_until = {user: until for user, until in self._used_until.items() if until > now}
            until = max(now, self._used_until.get(uid, now)) + calls / self._rate
            self._used_until[uid] = until
            return max(0.0, until - now - 1.0)


class Turns:
    """Lets so many things of one user be under way at once; the others wait. Thread-safe."""

    def __init__(self, most: int = LARGE_AT_A_TIME) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._taken: dict[int, int] = {}

    @contextlib.contextmanager
    def taken(self, uid: int, timeout: float) -> Iterator[None]:
        """Have a turn for the time of a `with`.

        Raises:
            TimeoutError: None came free within *timeout* seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._taken.get(uid, 0) < self._most, timeout):
                raise TimeoutError(f"uid {uid} has {self._most} large messages under way already")
            self._taken[uid] = self._taken.get(uid, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._taken[uid] -= 1
                if not self._taken[uid]:
                    del self._taken[uid]
                self._changed.notify_all()


class Quietly:
    """Bounds how many lines each user may cause in the log. Thread-safe."""

    def __init__(self, most: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow *most* lines within `_WINDOW` seconds."""
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[int, tuple[float, int]] = {}

    def may_speak(self, uid: int) -> tuple[bool, int]:
        """Return whether a line may be written now, and how many have been left out since the last one."""
        with self._lock:
            now = self._clock()
            if len(self._windows) > _USERS:
                self._windows = {user: window for user, window in self._windows.items() if now - window[0] < _WINDOW}
            began, count = self._windows.get(uid, (now, 0))
            left_out = max(0, count - self._most)
            if now - began >= _WINDOW:
                self._windows[uid] = (now, 1)
                return True, left_out
            self._windows[uid] = (began, count + 1)
            return count < self._most, 0
