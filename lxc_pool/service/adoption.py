"""At the beginning: the pool takes over the containers that an earlier service left."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from lxc_pool.model import State
from lxc_pool.service.leases import Leases
from lxc_pool.service.ledger import Entry
from lxc_pool.service.lifecycle import Lease, Member, Reason
from lxc_pool.service.owners import Owners
from lxc_pool.service.reaper import Reaper
from lxc_pool.service.recovery import Verdict
from lxc_pool.service.stock import Stock
from lxc_pool.service.watchdog import Watch


class Adoption:
    """Carries out the verdicts about containers; takes the stock's lock itself."""

    def __init__(
        self,
        stock: Stock,
        leases: Leases,
        owners: Owners,
        reaper: Reaper,
        watch: Watch,
        *,
        arm_expiry: Callable[[str, Lease], None],
        init_died: Callable[[str], None],
    ) -> None:
        """Make it.

        Args:
            stock: Where containers go.
            leases: Where their leases go.
            owners: Who watches the holders of those.
            reaper: What becomes of the rest.
            watch: Who watches the inits.
            arm_expiry: Sets the timer of a lease; called with the lock held.
            init_died: Called when the init of a container has ended.
        """
        self._stock = stock
        self._leases = leases
        self._owners = owners
        self._reaper = reaper
        self._watch = watch
        self._arm_expiry = arm_expiry
        self._init_died = init_died

    def take_over(self, verdicts: Sequence[Verdict]) -> None:
        """Take in what goes on, and reap the rest."""
        for verdict in verdicts:
            member = verdict.member
            with self._stock.lock:
                self._stock.add_retired(verdict.profile)
                self._stock.add(member)
                if member.lease is not None:
                    self._leases.enter(member, member.lease)
                    self._arm_expiry(member.name, member.lease)
                elif member.state is State.WARM:
                    self._stock.shelf_of(member).put(member)
                if verdict.reason is not None:
                    if verdict.entry.lease is not None:
                        self._leases.remember(member.name, verdict.entry.lease.uid, verdict.reason)
                    member.retries = 1  # what state it is in is not known: remove it by force
                    self._reaper.reap(member, verdict.reason)
            if verdict.reason is None:
                self._watch_again(member, verdict.entry)

    def _watch_again(self, member: Member, entry: Entry) -> None:
        """Watch the processes of a container that an earlier service left; reap it if one of them has ended.

        It is in the pool already: one that ends from now on finds what ends with it.
        """
        init, reason = None, None
        try:
            if member.lease is not None and member.lease.owner is not None:
                self._owners.hold(member.lease.owner)
        except ValueError:
            reason = Reason.OWNER_DIED
        try:
            if entry.init is not None:
                init = self._watch.watch(entry.init, functools.partial(self._init_died, member.name))
        except ProcessLookupError:
            reason = reason or Reason.UNHEALTHY
        with self._stock.lock:
            if member.state is State.REAPING:  # meanwhile
                if init is not None:
                    self._watch.forget(init)
                return
            member.init = init
            if init is None or reason is not None:
                member.retries = 1  # as above
                self._reaper.reap(member, reason or Reason.ORPHAN)
