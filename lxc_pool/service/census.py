"""What is reported of the pool as a whole, and who waits for it to be full."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lxc_pool.model import ProfileStatus, State
from lxc_pool.service.stock import Stock


@dataclasses.dataclass(slots=True, eq=False)
class WarmWait:
    """Somebody who waits until *count* containers are warm (None: as many as are kept)."""

    count: int | None
    notify: Callable[[], None]
    reached: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Census:
    """The counts of the pool at one moment."""

    profiles: dict[str, ProfileStatus]
    draining: bool
    error_count: int
    last_error: str | None
    backoff: float

    @classmethod
    def take(cls, stock: Stock, now: float) -> Census:
        """Count. With the lock held."""
        return cls(
            {name: shelf.status(now) for name, shelf in stock.shelves.items()},
            stock.draining,
            stock.error_count,
            stock.last_error,
            max(shelf.backoff.remaining(now) for shelf in stock.shelves.values()),
        )

    def total(self, field: str) -> int:
        """Return the sum over all profiles of one of their counts."""
        return sum(getattr(profile, field) for profile in self.profiles.values())


class WarmWaits:
    """Those who wait for warm containers; guarded by the stock's lock."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._waits: list[WarmWait] = []

    def __len__(self) -> int:
        return len(self._waits)

    def add(self, wait: WarmWait) -> None:
        """Call the wait's notify once, now or later, when that many containers are warm."""
        self._waits.append(wait)
        self.look()

    def drop(self, wait: WarmWait) -> None:
        """Forget a wait; not an error if it has been reached."""
        if wait in self._waits:
            self._waits.remove(wait)

    def look(self) -> None:
        """Tell those whose number has been reached."""
        if not self._waits:
            return
        shelves = self._stock.shelves.values()
        warm = sum(shelf.counts[State.WARM] for shelf in shelves)
        capacity = sum(shelf.capacity for shelf in shelves)
        for wait in list(self._waits):
            if warm >= (capacity if wait.count is None else wait.count):
                self._waits.remove(wait)
                wait.reached = True
                wait.notify()
