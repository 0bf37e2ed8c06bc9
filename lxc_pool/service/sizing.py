"""How many warm containers each profile keeps: within its own bounds, and the whole pool's.

A *place* is room for one warm container. A profile gets one more when a `get` finds none warm; it gives up half of
those that nobody has needed for `shrink_after` seconds. If all places of the pool are taken, one comes from another
profile: one with an idle container, or, for a profile that has no place at all, one that has just come free.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping

from lxc_pool.config import Config, ProfileConfig, check_size
from lxc_pool.errors import ConfigError
from lxc_pool.service.lifecycle import Reason
from lxc_pool.service.reaper import Reaper
from lxc_pool.service.shelf import Shelf
from lxc_pool.service.stock import Stock
from lxc_pool.service.watchdog import Watch

log = logging.getLogger(__name__)


class Sizing:
    """Decides about places; with the stock's lock held, but for what the watchdog calls.

    Invariants: a shelf's capacity is within its bounds; those of all shelves add up to the pool's limit at most.
    """

    def __init__(self, config: Config, stock: Stock, reaper: Reaper, watch: Watch, changed: Callable[[], None]) -> None:
        """Make it; *changed* is called when a capacity may have become smaller."""
        self._stock = stock
        self._reaper = reaper
        self._watch = watch
        self._changed = changed
        self._limit = config.max
        self._shrink_after = config.shrink_after

    # --- one more -----------------------------------------------------------------------------------------------------

    def missed(self, shelf: Shelf) -> None:
        """Keep one more from now on: somebody has asked, and none was warm.

        Not while creation fails: more of it would not help. And not while the shelf is being filled for the first time,
        unless more wait than it will hold.
        """
        shelf.low = 0
        if shelf.capacity and not (shelf.backoff.clear and (shelf.filled or len(shelf.waiters) > shelf.capacity)):
            return
        self._grow(shelf)

    def look_after(self) -> None:
        """See to it that a profile that somebody waits for has a place, as soon as there is one to be had."""
        for shelf in self._stock.shelves.values():
            if shelf.waiters and shelf.capacity == 0:
                self._grow(shelf)
            self._observe(shelf)

    def _grow(self, shelf: Shelf) -> None:
        if shelf.capacity >= shelf.most:
            return
        if self._limit is not None and self._total() >= self._limit:
            donor = self._donor(shelf)
            if donor is None:
                return
            log.info("profile %r gives a place to %r", donor.profile.name, shelf.profile.name)
            self._shrink(donor, donor.capacity - 1, Reason.GAVE_WAY)
        shelf.capacity += 1

    def _donor(self, shelf: Shelf) -> Shelf | None:
        """Return who can give a place to *shelf*: the one that has not been asked for the longest.

        Where a container is warm, nobody waits for it.
        """
        candidates = [
            other
            for other in self._stock.shelves.values()
            if other is not shelf and other.capacity > other.least and (other.has_warm or _may_take(shelf, other))
        ]
        return min(candidates, key=lambda other: (not other.has_warm, other.last_asked), default=None)

    # --- fewer --------------------------------------------------------------------------------------------------------

    def _observe(self, shelf: Shelf) -> None:
        """Begin a period, if there is a place that could be given up and none is under way."""
        if shelf.period is None and shelf.capacity > shelf.least:
            shelf.low = shelf.capacity
            shelf.period = self._watch.call_at(
                self._watch.now() + self._shrink_after, functools.partial(self._end_period, shelf)
            )

    def _end_period(self, shelf: Shelf) -> None:
        """Give up half of the places that were not needed for a whole period; on the watchdog's thread."""
        with self._stock.lock:
            shelf.period = None
            unneeded = min(shelf.low, shelf.capacity)
            surplus = min((unneeded + 1) // 2, shelf.capacity - shelf.least)
            if surplus > 0 and not self._stock.closed:
                capacity = shelf.capacity - surplus
                log.info("profile %r needs no more than %d warm containers", shelf.profile.name, capacity)
                self._shrink(shelf, capacity, Reason.NOT_NEEDED)
            self._observe(shelf)

    def _shrink(self, shelf: Shelf, capacity: int, reason: Reason) -> None:
        """Let a shelf have *capacity* places, and reap what has none any more."""
        shelf.capacity = capacity
        while shelf.has_warm and shelf.stock > capacity:
            self._reaper.reap(shelf.spare(), reason)
        self._changed()

    # --- by order -----------------------------------------------------------------------------------------------------

    def resize(self, size: int, main: Shelf) -> None:
        """Let *main* keep *size* warm containers; other profiles give way.

        A profile of a fixed size has this one from then on. Else a bound that is in the way moves, and the size goes on
        changing within the bounds.

        Raises:
            ConfigError: The size is not allowed.
        """
        check_size(size)
        others = [shelf for shelf in self._stock.shelves.values() if shelf is not main]
        if self._limit is not None and (room := self._limit - sum(shelf.least for shelf in others)) < size:
            raise ConfigError(
                f"size must be at most {room}, not {size}: pool.max is {self._limit}, others have their min"
            )
        fixed = main.least == main.most
        main.least = size if fixed else min(main.least, size)
        main.most = size if fixed else max(main.most, size)
        main.filled = main.filled and size <= main.capacity
        self._shrink(main, size, Reason.SURPLUS)
        self._keep_to_limit(others)

    def reconfigure(self, config: Config, before: Mapping[str, ProfileConfig]) -> None:
        """Take over new sizes and bounds; a profile whose own have not changed keeps what it has come to.

        Args:
            config: The new configuration; the shelves have its profiles already.
            before: The profiles that there were.
        """
        self._limit, self._shrink_after = config.max, config.shrink_after
        shelves = list(self._stock.shelves.values())
        # A resize may have moved a bound to where there is no room for it now.
        afresh = self._limit is not None and sum(shelf.least for shelf in shelves) > self._limit
        for shelf in shelves:
            old, new = before.get(shelf.profile.name), shelf.profile
            if shelf.retired:
                shelf.least = shelf.most = 0
                self._shrink(shelf, 0, Reason.PROFILE_REMOVED)
            elif afresh or old is None or (old.size, old.bounds) != (new.size, new.bounds):
                shelf.least, shelf.most = new.bounds
                kept = None if afresh or old is None or old.size != new.size else shelf.capacity
                capacity = new.size if kept is None else min(max(kept, shelf.least), shelf.most)
                shelf.filled = shelf.filled and capacity <= shelf.capacity
                self._shrink(shelf, capacity, Reason.SURPLUS)
        self._keep_to_limit(shelves)
        for shelf in shelves:
            if shelf.period is not None:
                shelf.period.cancel()
                shelf.period = None

    def _keep_to_limit(self, shelves: list[Shelf]) -> None:
        """Take places away until the pool's limit is kept: from those that have not been asked for the longest."""
        while self._limit is not None and self._total() > self._limit:
            shelf = min((s for s in shelves if s.capacity > s.least), key=lambda s: s.last_asked)
            self._shrink(shelf, shelf.capacity - 1, Reason.GAVE_WAY)

    def _total(self) -> int:
        return sum(shelf.capacity for shelf in self._stock.shelves.values())


def _may_take(shelf: Shelf, other: Shelf) -> bool:
    """Whether a shelf without a place may take an empty one of another: if somebody waits there too, by turns."""
    return shelf.capacity == 0 and other.stock < other.capacity and (not other.waiters or shelf.turn < other.turn)
