"""The counter: warm containers on one side, those who wait on the other, and the offers between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from lxc_pool.errors import PoolClosed
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.model import State
from lxc_pool.service.leases import Leases, Quota
from lxc_pool.service.lifecycle import Lease, Member, Reason
from lxc_pool.service.reaper import Reaper
from lxc_pool.service.shelf import Shelf
from lxc_pool.service.stock import Stock
from lxc_pool.service.waiters import Ticket

log = logging.getLogger(__name__)


class Handoff:
    """Brings tickets and warm containers together; everything with the stock's lock held."""

    def __init__(
        self,
        stock: Stock,
        leases: Leases,
        reaper: Reaper,
        *,
        missed: Callable[[Shelf], None],
        changed: Callable[[], None],
    ) -> None:
        """Make it.

        Args:
            stock: What there is.
            leases: Where offers are written down.
            reaper: Where containers go that are of no use.
            missed: Called for a shelf that somebody waits for from now on.
            changed: Called when one more container is warm.
        """
        self._stock = stock
        self._leases = leases
        self._reaper = reaper
        self._missed = missed
        self._changed = changed
        self._waiting: dict[tuple[int, str], Ticket] = {}

    # --- who waits ----------------------------------------------------------------------------------------------------

    def join(self, ticket: Ticket, quota: Quota | None) -> None:
        """Serve a ticket at once, or let it wait.

        Raises:
            QuotaExceeded: Its user has, or waits for, as many as it may.
        """
        if (earlier := self._waiting.get((ticket.uid, ticket.request))) is not None:
            # The client has lost the connection that it waited on, before we noticed.
            self.leave(earlier)
            self._answer(earlier, PoolClosed("the same request came again, on a newer connection"))
        if quota is not None:
            waiting = sum(uid == ticket.uid for uid, _request in self._waiting)
            self._leases.require_room(ticket.uid, waiting, quota)
        shelf = self._stock.shelves[ticket.profile]
        if shelf.has_warm:  # then nobody waits
            self._offer(shelf, ticket)
            return
        shelf.waiters.push(ticket)
        self._waiting[ticket.uid, ticket.request] = ticket
        self._missed(shelf)

    def leave(self, ticket: Ticket) -> None:
        """Take a ticket out of the queue; not an error if it is not there."""
        if (shelf := self._stock.shelves.get(ticket.profile)) is not None:
            shelf.waiters.remove(ticket)
        if self._waiting.get((ticket.uid, ticket.request)) is ticket:
            del self._waiting[ticket.uid, ticket.request]

    def turn_away_all(self, error: Exception) -> None:
        """Answer everybody who waits with *error*."""
        for shelf in self._stock.shelves.values():
            self.turn_away(shelf, error)

    def turn_away(self, shelf: Shelf, error: Exception) -> None:
        """Answer those who wait for one profile with *error*."""
        while shelf.waiters:
            self._answer(shelf.waiters.pop(), error)

    def owner_died(self, owner: ProcessIdentity) -> None:
        """Let nobody wait for an owner that has ended."""
        for ticket in [ticket for ticket in self._waiting.values() if ticket.owner == owner]:
            self.leave(ticket)
            self._answer(ticket, ValueError(f"owner {owner.pid} has ended"))

    def owners_waiting(self) -> Iterator[ProcessIdentity]:
        """Go through the processes that somebody waits for."""
        return (ticket.owner for ticket in self._waiting.values())

    # --- what is there ------------------------------------------------------------------------------------------------

    def put(self, member: Member) -> None:
        """Let a container be warm, and be offered if somebody waits; or be reaped if there is no use for it."""
        shelf = self._stock.shelf_of(member)
        if self._stock.closed or self._stock.draining:
            self._reaper.reap(member, Reason.CLOSED if self._stock.closed else Reason.DRAINED)
            return
        if shelf.bars(member):
            self._reaper.reap(member, Reason.IMAGE_REPLACED)
            return
        replaced: Member | None = None
        if shelf.stock > shelf.capacity and not shelf.waiters:
            if not shelf.outdated:
                self._reaper.reap(member, Reason.SURPLUS if shelf.is_current(member) else Reason.IMAGE_REPLACED)
                return
            replaced = shelf.spare()
        came_back = member.state is State.RESERVED
        self._stock.move(member, State.WARM)
        shelf.put(member, first=came_back)  # one that came back is the oldest
        if replaced is not None:
            self._reaper.reap(replaced, Reason.IMAGE_REPLACED)
        if not shelf.filled:
            size = shelf.counts[State.WARM]
            log.info("%d of %d containers of profile %r are warm", size, shelf.capacity, member.profile)
            shelf.filled = size >= shelf.capacity
        self._serve(shelf)
        self._changed()

    def take_back(self, member: Member) -> None:
        """Put a reserved container back: nobody has used it."""
        self._leases.strike_out(member)
        member.session = None
        self.put(member)

    def _serve(self, shelf: Shelf) -> None:
        """Offer warm containers to those who wait."""
        while shelf.has_warm and shelf.waiters:
            ticket = shelf.waiters.pop()
            self._offer(shelf, ticket)
            self._answer(ticket)

    def _offer(self, shelf: Shelf, ticket: Ticket) -> None:
        """Reserve the container that is next for a ticket."""
        member = shelf.take()
        self._stock.move(member, State.RESERVED)
        member.session = ticket.session
        self._leases.enter(member, Lease(ticket.request, ticket.id, ticket.uid, ticket.owner, ticket.ttl))
        ticket.offer = member

    def _answer(self, ticket: Ticket, error: Exception | None = None) -> None:
        """Tell a ticket that has left the queue what it got."""
        self._waiting.pop((ticket.uid, ticket.request), None)
        ticket.error = error
        ticket.notify()
