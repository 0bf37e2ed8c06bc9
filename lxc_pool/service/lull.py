"""What can wait, waits for a lull: while lanes work, all else is slower, a short test by half (measured).

 asked for ──► what can wait is put off ──► nobody has asked for `LULL` seconds ──► it is done

What can wait: new containers while there are plenty, and the removal of released ones in which nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lxc_pool.service.lifecycle import Member, Reason
from lxc_pool.service.shelf import Shelf
from lxc_pool.service.watchdog import Watch

LULL = 0.05
"""Seconds without a `get` that are a lull. A guess: more than such a test takes, too little to be noticed."""

LONGEST = 1.0
"""Seconds for which a removal is put off at most. A guess: the container's memory may be wanted."""


class Lull:
    """Knows what is to wait; everything with the pool's lock held."""

    def __init__(self, watch: Watch, wake: Callable[[], None], awaited: Callable[[], bool]) -> None:
        """Wait for nothing yet.

        Args:
            watch: The clock.
            wake: Called when there may be a lull.
            awaited: Returns whether somebody waits until the pool is full, who has nothing put off.
        """
        self._watch = watch
        self._wake = wake
        self._awaited = awaited
        self._is_looked_for = False

    def is_to_come(self, shelves: Sequence[Shelf]) -> bool:
        """Tell whether what can wait is to wait: one of *shelves* was asked just now."""
        return bool(shelves) and not self._awaited() and self._watch.now() < _next(shelves)

    def look_for_it(self, shelves: Sequence[Shelf]) -> None:
        """Have `wake` called when it may have come."""
        if not self._is_looked_for:
            self._is_looked_for = True
            self._watch.call_at(_next(shelves), self._look)

    def put_off(self, member: Member, *, idle: bool) -> None:
        """Take note of whether the removal of a released container may be put off: nothing runs in an *idle* one."""
        member.wait_until = self._watch.now() + LONGEST if idle else 0.0

    def can_wait(self, member: Member) -> bool:
        """Tell whether a container that is to be removed can wait; as long as that is not known, it does."""
        if member.reason != Reason.RELEASED or member.retries:
            return False
        return member.wait_until is None or self._watch.now() < member.wait_until

    def _look(self) -> None:
        self._is_looked_for = False
        self._wake()


def _next(shelves: Sequence[Shelf]) -> float:
    return max(shelf.last_asked for shelf in shelves) + LULL
