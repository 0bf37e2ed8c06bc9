"""The pool's data: every container, the shelves that they stand on, and the one lock that guards all of it."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from lxc_pool.config import ProfileConfig
from lxc_pool.errors import BackendError
from lxc_pool.model import State
from lxc_pool.service.ledger import Entry, Journal
from lxc_pool.service.lifecycle import Member
from lxc_pool.service.shelf import Fits, Shelf


class Stock:
    """What `Pool` (who gets what) and `Upkeep` (what is made and removed) decide about. All but `lock` needs the lock.

    Attributes:
        lock: Held for decisions only.
        changed: Its condition, notified when no container of a profile is left in a state, or one is gone.
        members: Every container by name.
        shelves: The profiles by name, as configured; behind them those that are retired.
        to_reap: Those in REAPING that no lane has taken on yet, oldest first.
        draining: Nothing is handed out or made until this ends.
        closed: The same, for ever.
        wake: Called when there may be something to do for a lane.
    """

    def __init__(
        self,
        profiles: Sequence[ProfileConfig],
        journal: Journal,
        rng: random.Random,
        wake: Callable[[], None],
        fits: Fits,
    ) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.members: dict[str, Member] = {}
        self.to_reap: OrderedDict[str, Member] = OrderedDict()
        self.draining = False
        self.closed = False
        self.error_count = 0
        self.last_error: str | None = None
        self.wake = wake
        self._journal = journal
        self._rng = rng
        self._fits = fits
        self.shelves = {profile.name: self._shelf(profile) for profile in profiles}

    def shelf_of(self, member: Member) -> Shelf:
        """Return the shelf of a container's profile."""
        return self.shelves[member.profile]

    def arrange(self, profiles: Sequence[ProfileConfig]) -> None:
        """Have a shelf for each of *profiles*, in their order, though not changed yet; those of others are retired."""
        shelves = {profile.name: self.shelves.get(profile.name) or self._shelf(profile) for profile in profiles}
        for shelf in shelves.values():
            shelf.retired = False
        for name, shelf in self.shelves.items():
            if name not in shelves:
                shelf.retired = True
                shelves[name] = shelf
        self.shelves = shelves

    def add_retired(self, profile: ProfileConfig) -> None:
        """Have a shelf for a profile that the configuration does not have, if there is none."""
        if profile.name not in self.shelves:
            shelf = self.shelves[profile.name] = self._shelf(profile)
            shelf.retired = True
            shelf.capacity = shelf.least = shelf.most = 0

    def forget_retired(self) -> None:
        """Drop retired shelves whose containers are gone."""
        for name, shelf in list(self.shelves.items()):
            if shelf.retired and not any(shelf.counts.values()):
                del self.shelves[name]

    def announce(self, member: Member) -> None:
        """Take in a container that is to be built.

        Raises:
            BackendError: The ledger could not be written; it is not taken in.
        """
        self._write(member, member.state)
        self.add(member)

    def add(self, member: Member) -> None:
        """Take in a container that is in the ledger, or has never been."""
        self.members[member.name] = member
        self.shelf_of(member).counts[member.state] += 1

    def move(self, member: Member, state: State) -> bool:
        """Bring a container into another state; see `Member.move`.

        Returns:
            Whether the ledger knows, if it has to.

        Raises:
            BackendError: It was to be leased and the ledger could not be written; it stays where it is.
        """
        known = self._record(member, state)
        counts = self.shelf_of(member).counts
        before = member.state
        member.move(state)
        counts[before] -= 1
        counts[state] += 1
        if state is State.REAPING:
            self.to_reap[member.name] = member
            self.wake()
        if not counts[before]:  # nobody waits for anything else
            self.changed.notify_all()
        return known

    def drop(self, member: Member) -> None:
        """Forget a container that is gone."""
        try:
            self._journal.erase(member.name)
        except BackendError as error:
            self.note_error(str(error))  # the next service finds an entry without a container, and erases that
        shelf = self.shelf_of(member)
        shelf.counts[member.state] -= 1
        del self.members[member.name]
        if shelf.retired:
            self.forget_retired()
        self.changed.notify_all()

    def settle(self) -> None:
        """Let the ledger put the last hand-off into its place; if it can't, it does so before the next one."""
        try:
            self._journal.settle()
        except BackendError as error:
            self.note_error(str(error))

    def rewrite(self, member: Member) -> None:
        """Bring a container's entry up to date with its lease.

        Raises:
            BackendError: The ledger could not be written.
        """
        self._write(member, member.state)

    def _shelf(self, profile: ProfileConfig) -> Shelf:
        return Shelf(profile, self._rng, self._fits)

    def _record(self, member: Member, state: State) -> bool:
        """Write a move down before it is made, where a restart would go wrong without it; return whether that went."""
        if state is State.LEASED:
            self._put(self._journal.intend, member.entry(state))
        elif state is State.REAPING or (state is State.WARM and member.state is State.BUILDING):
            # If this can't be written, the older entry stands: of a container that was being built, the next service
            # removes it; for others see `Reaper.reap`.
            try:
                self._write(member, state)
            except BackendError:
                return False
        return True

    def _write(self, member: Member, state: State) -> None:
        self._put(self._journal.write, member.entry(state))

    def _put(self, how: Callable[[Entry], None], entry: Entry) -> None:
        try:
            how(entry)
        except BackendError as error:
            self.note_error(str(error))
            raise

    def note_error(self, text: str, *shelves: Shelf) -> None:
        """Take note of a failure: it is why *shelves* are not ready."""
        self.error_count += 1
        self.last_error = text
        for shelf in shelves:
            shelf.last_error = text
