"""The processes that own leases, each watched once, from its first request until it ends."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.service.watchdog import Watch, Watched


class Owners:
    """Shared by all threads; *lock*, which is the pool's, guards who is watched."""

    def __init__(self, lock: threading.Lock, watch: Watch, died: Callable[[ProcessIdentity], None]) -> None:
        """Make it; *died* is called, with the lock held, when an owner has ended."""
        self._lock = lock
        self._watch = watch
        self._died = died
        self._watched: dict[ProcessIdentity, Watched] = {}

    def hold(self, owner: ProcessIdentity) -> None:
        """Watch *owner* from now on. To be called without the lock.

        Raises:
            ValueError: It has ended.
        """
        with self._lock:
            if owner in self._watched:
                return
        try:
            watched = self._watch.watch(owner, functools.partial(self._end, owner))
        except ProcessLookupError as error:
            raise ValueError(f"owner {owner.pid} is not a living process") from error
        with self._lock:
            if self._watched.setdefault(owner, watched) is not watched:
                self._watch.forget(watched)  # another thread was faster

    def are_watched(self, owner: ProcessIdentity) -> bool:
        """Whether *owner* was held and has not ended since. With the lock held."""
        return owner in self._watched

    def let_go(self) -> None:
        """Watch nobody any more. With the lock held."""
        for watched in self._watched.values():
            self._watch.forget(watched)
        self._watched.clear()

    def _end(self, owner: ProcessIdentity) -> None:
        with self._lock:
            watched = self._watched.pop(owner, None)
            if watched is not None:
                self._watch.forget(watched)
            self._died(owner)
