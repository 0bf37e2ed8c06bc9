"""The book of leases: which request got which container, and how those ended that are over."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator

from lxc_pool.errors import LeaseExpired, QuotaExceeded, UnknownLease
from lxc_pool.model import State
from lxc_pool.service.lifecycle import Lease, Member
from lxc_pool.service.stock import Stock

_REMEMBERED = 1000
"""Ended leases that the pool can still say the reason of."""


@dataclasses.dataclass(frozen=True, slots=True)
class Quota:
    """How many containers one user may have or wait for, and how many of its calls may wait."""

    leases: int
    waiters: int


class Leases:
    """Reservations and leases; a container has an entry exactly in RESERVED and LEASED. Guarded by the stock's lock."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._by_request: dict[tuple[int, str], Member] = {}
        self._ended: OrderedDict[str, tuple[int, str]] = OrderedDict()

    def __iter__(self) -> Iterator[tuple[Member, Lease]]:
        """Go through them all; they may be ended meanwhile."""
        return iter([(member, member.lease) for member in self._by_request.values() if member.lease is not None])

    def enter(self, member: Member, lease: Lease) -> None:
        """Write down what a request got."""
        member.lease = lease
        self._by_request[lease.uid, lease.request] = member

    def of_request(self, uid: int, request: str) -> Member | None:
        """Return what a request got, if it still has it."""
        return self._by_request.get((uid, request))

    def find(self, name: str, uid: int | None) -> tuple[Member, Lease]:
        """Return a leased container; *uid* None finds anybody's.

        Raises:
            UnknownLease: It never was, is long over, or is another user's.
            LeaseExpired: It has ended; the message says why.
        """
        member = self._stock.members.get(name)
        if member is not None and member.state is State.LEASED and member.lease is not None:
            if uid is None or uid == member.lease.uid:
                return member, member.lease
        elif name in self._ended and uid in (None, self._ended[name][0]):
            raise LeaseExpired(f"the lease of {name} has ended: {self._ended[name][1]}")
        raise UnknownLease(f"no lease of {name!r} is yours: it never was, is long over, or is another user's")

    def remember(self, name: str, uid: int, reason: str) -> None:
        """Keep in mind why the lease of *name* ended."""
        self._ended[name] = (uid, reason)
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def strike_out(self, member: Member) -> None:
        """Drop the reservation or lease of a container, if it has one."""
        lease, member.lease = member.lease, None
        if lease is not None:
            if lease.expiry:
                lease.expiry.cancel()
            del self._by_request[lease.uid, lease.request]

    def require_room(self, uid: int, waiting: int, quota: Quota) -> None:
        """Refuse a user's request beyond its quota.

        Raises:
            QuotaExceeded: The message says which.
        """
        having = sum(user == uid for user, _request in self._by_request)
        if waiting >= quota.waiters:
            raise QuotaExceeded(f"uid {uid} has {waiting} calls waiting, as many as one user may")
        if having + waiting >= quota.leases:
            raise QuotaExceeded(
                f"uid {uid} has {having} containers and waits for {waiting}, as many as one user may: release some"
            )
