"""The processes that own leases, each watched once, from its first request until it ends.

Who has nothing any more is still watched, for most come again; but not more of them than `_CROWD`: each costs the
service a descriptor, and a user may name as many processes as they can start.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable

from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.service.watchdog import Watch, Watched

_CROWD = 256
"""Processes from which on those are let go that have nothing. A guess: more than a machine's test runners are."""


class Owners:
    """Shared by all threads; *lock*, which is the pool's, guards who is watched."""

    def __init__(
        self,
        lock: threading.Lock,
        watch: Watch,
        *,
        died: Callable[[ProcessIdentity], None],
        needed: Callable[[], Iterable[ProcessIdentity]],
    ) -> None:
        """Make it.

        Args:
            lock: The pool's.
            watch: What watches them.
            died: Called, with the lock held, when an owner has ended.
            needed: Returns those that have or await something; called with the lock held.
        """
        self._lock = lock
        self._watch = watch
        self._died = died
        self._needed = needed
        self._watched: dict[ProcessIdentity, Watched] = {}
        self._crowd = _CROWD

    def hold(self, owner: ProcessIdentity) -> None:
        """Watch *owner* from now on; until others have come, if it has nothing by then. To be called without the lock.

        Raises:
            ValueError: It has ended.
        """
        with self._lock:
            if owner in self._watched:
                return
        ended = threading.Event()
        try:
            watched = self._watch.watch(owner, functools.partial(self._end, owner, ended))
        except ProcessLookupError as error:
            raise ValueError(f"owner {owner.pid} is not a living process") from error
        with self._lock:
            if ended.is_set():  # already: nobody will tell it again
                self._watch.forget(watched)
                raise ValueError(f"owner {owner.pid} has just ended")
            if self._watched.setdefault(owner, watched) is not watched:
                self._watch.forget(watched)  # another thread was faster
            elif len(self._watched) > self._crowd:
                self._let_go_of_idle_ones(owner)

    def are_watched(self, owner: ProcessIdentity) -> bool:
        """Whether *owner* is held and has not ended since. With the lock held."""
        return owner in self._watched

    def let_go(self) -> None:
        """Watch nobody any more. With the lock held."""
        for watched in self._watched.values():
            self._watch.forget(watched)
        self._watched.clear()

    def _let_go_of_idle_ones(self, newest: ProcessIdentity) -> None:
        needed = {newest, *self._needed()}
        for owner in [owner for owner in self._watched if owner not in needed]:
            self._watch.forget(self._watched.pop(owner))
        self._crowd = max(_CROWD, 2 * len(self._watched))  # or each that comes next would have all looked at

    def _end(self, owner: ProcessIdentity, ended: threading.Event) -> None:
        with self._lock:
            ended.set()
            watched = self._watched.pop(owner, None)
            if watched is not None:
                self._watch.forget(watched)
            self._died(owner)
