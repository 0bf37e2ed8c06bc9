"""The queue of those who wait for one profile: first come, first served within a user; users take turns."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.model import LeaseId
from lxc_pool.service.lifecycle import Member


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """One caller's wish for a container; guarded by the pool's lock.

    Attributes:
        request: The client's name for the wish.
        session: The connection that it came on.
        notify: Called, with the pool's lock held, once the ticket has been answered.
        offer: The container reserved for it.
        error: Why there will be none.
    """

    request: str
    uid: int
    profile: str
    id: LeaseId
    owner: ProcessIdentity
    ttl: float | None
    session: object
    notify: Callable[[], None]
    offer: Member | None = None
    error: Exception | None = None

    @property
    def answered(self) -> bool:
        """Whether there is an offer or an error."""
        return self.offer is not None or self.error is not None


class WaitQueue:
    """Tickets in the order in which they are served."""

    def __init__(self) -> None:
        self._users: OrderedDict[int, deque[Ticket]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._users.values())

    def __iter__(self) -> Iterator[Ticket]:
        """Iterate in the order in which the tickets would be served if no more came."""
        queues = [list(queue) for queue in self._users.values()]
        for turn in range(max(map(len, queues), default=0)):
            for queue in queues:
                if turn < len(queue):
                    yield queue[turn]

    def push(self, ticket: Ticket) -> None:
        """Add a ticket behind its user's others."""
        self._users.setdefault(ticket.uid, deque()).append(ticket)

    def pop(self) -> Ticket:
        """Take the next ticket; its user goes behind all others."""
        uid, queue = next(iter(self._users.items()))
        ticket = queue.popleft()
        if queue:
            self._users.move_to_end(uid)
        else:
            del self._users[uid]
        return ticket

    def remove(self, ticket: Ticket) -> None:
        """Take a ticket out of the queue, wherever it stands; not an error if it is not there."""
        queue = self._users.get(ticket.uid)
        if queue is not None and ticket in queue:
            queue.remove(ticket)
            if not queue:
                del self._users[ticket.uid]

    def position(self, ticket: Ticket) -> int:
        """Return how many are served before *ticket*, plus one."""
        return 1 + next((place for place, other in enumerate(self) if other is ticket), len(self))
