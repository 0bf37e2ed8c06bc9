"""The end of a container, whatever state it is in: what it had ends, and it is given to the lanes to be removed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from lxc_pool.model import State
from lxc_pool.service import trail
from lxc_pool.service.leases import Leases
from lxc_pool.service.lifecycle import Lease, Member, Reason
from lxc_pool.service.stock import Stock
from lxc_pool.service.watchdog import Watch

NOBODY: Final[Mapping[str, object]] = MappingProxyType({})
"""Who has asked for a container's end, where nobody has."""


class Reaper:
    """Reaps containers; everything with the stock's lock held."""

    def __init__(self, stock: Stock, leases: Leases, watch: Watch) -> None:
        self._stock = stock
        self._leases = leases
        self._watch = watch

    def reap(self, member: Member, reason: Reason, by: Mapping[str, object] = NOBODY) -> None:
        """Let a container be removed, from whatever state it is in; *by* says in the trail who has asked for it."""
        if member.state is State.REAPING or member.state is State.STUCK:
            return
        if member.state is State.WARM:
            self._stock.shelf_of(member).remove(member)
        if member.state is State.LEASED and member.lease is not None:
            self._leases.remember(member.name, member.lease.uid, reason)
            self._record_end(member, member.lease, reason, by)
        else:
            trail.record("reap", name=member.name, reason=reason, was=member.state, profile=member.profile)
        self._leases.strike_out(member)
        init, member.init = member.init, None
        member.reason = reason
        written = self._stock.move(member, State.REAPING)
        if init is not None:
            if not written:
                # The ledger has it warm or leased. Should this service be killed before a lane comes to it, the next
                # one sees by its dead init that its time is over.
                self._watch.end(init)
            self._watch.forget(init)

    def clear(self, reason: Reason) -> None:
        """Reap every warm container."""
        for shelf in self._stock.shelves.values():
            while shelf.has_warm:
                self.reap(shelf.spare(), reason)

    def _record_end(self, member: Member, lease: Lease, reason: Reason, by: Mapping[str, object]) -> None:
        trail.record(
            "end",
            name=member.name,
            reason=reason,
            id=lease.id,
            uid=lease.uid,
            owner=lease.owner.pid if lease.owner else None,
            seconds=self._watch.now() - member.since,
            **by,
        )
