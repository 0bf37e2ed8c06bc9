"""How long creation is held back after failures: doubling, with jitter, up to seconds, over at the first success."""

from __future__ import annotations

import random

_FIRST = 0.1
_LONGEST = 3.0
"""Seconds of the first and the longest pause. Guesses: short enough that the pool recovers "within seconds"."""


class Backoff:
    """The pause after failures in a row; guarded by the pool's lock.

    While it is not `clear`, one creation at a time is tried as a probe.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._failures = 0
        self._until = 0.0

    @property
    def clear(self) -> bool:
        """Whether the last creation succeeded."""
        return self._failures == 0

    def remaining(self, now: float) -> float:
        """Return the seconds until the next try is due."""
        return max(0.0, self._until - now)

    def fail(self, now: float) -> float:
        """Count a failure; return the time at which the next try is due.

        Several that were under way when the first of them failed count as one.
        """
        if self.remaining(now):
            return self._until
        pause = min(_LONGEST, _FIRST * 2**self._failures) * self._rng.uniform(0.5, 1.0)
        self._failures = min(self._failures + 1, 16)
        self._until = now + pause
        return self._until

    def succeed(self) -> None:
        """Be back at full speed."""
        self._failures = 0
        self._until = 0.0
