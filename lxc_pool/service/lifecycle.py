"""The states of a container, the moves between them, and the one record that the pool keeps of each."""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from lxc_pool.backend.protocol import Endpoint
from lxc_pool.errors import InternalError
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.model import ContainerInfo, LeaseId, State
from lxc_pool.service.ledger import Entry, LeaseEntry
from lxc_pool.service.watchdog import Timer, Watched

MOVES: Final[dict[State, frozenset[State]]] = {
    State.BUILDING: frozenset({State.WARM, State.REAPING}),
    State.WARM: frozenset({State.RESERVED, State.REAPING}),
    State.RESERVED: frozenset({State.WARM, State.LEASED, State.REAPING}),
    State.LEASED: frozenset({State.REAPING}),
    State.REAPING: frozenset({State.STUCK}),
    State.STUCK: frozenset({State.REAPING}),
}
"""Every move that there is; the end of a container is from REAPING to gone. There is none from LEASED to WARM."""


class Reason(enum.StrEnum):
    """Why a container is reaped."""

    RELEASED = "released"
    OWNER_DIED = "owner died"
    EXPIRED = "lease expired"
    START_FAILED = "start failed"
    UNHEALTHY = "its init died"
    DRAINED = "drained"
    SURPLUS = "pool made smaller"
    GAVE_WAY = "gave way to another profile"
    NOT_NEEDED = "not needed"
    PROFILE_REMOVED = "profile removed"
    CLOSED = "service ended"
    IMAGE_REPLACED = "image or profile changed"
    IMAGE_CHANGED = "its image is not what was made"
    ORPHAN = "left by an earlier service"


@dataclasses.dataclass(slots=True)
class Lease:
    """The right of one owner to one container.

    Attributes:
        request: The client's name for the wish that this lease answers.
        owner: The process whose end ends the lease; None after `keep`.
        ttl: Seconds that the lease lasts from its confirmation; None: it lasts until it is released or its owner ends.
        expires: Monotonic time at which it ends, if it has a ttl and is confirmed.
        expiry: The timer for that.
        revision: How often it was changed since its hand-off.
    """

    request: str
    id: LeaseId
    uid: int
    owner: ProcessIdentity | None
    ttl: float | None = None
    expires: float | None = None
    expiry: Timer | None = None
    revision: int = 0

    def entry(self) -> LeaseEntry:
        """Return what the ledger holds of it."""
        return LeaseEntry(self.request, self.id, self.uid, self.owner, self.expires, self.revision)


@dataclasses.dataclass(slots=True)
class Member:
    """One container of the pool; guarded by the pool's lock.

    Attributes:
        image: The version that it was cloned from.
        recipe: What it was made by, beside the image; see `ProfileConfig.recipe`.
        since: Monotonic time at which it came up, or its building began.
        init: The watched init of the container; None until it runs.
        lease: The lease, from RESERVED on until it is reaped.
        session: The connection that a reserved container is offered on; None once it is leased.
        retries: How often its removal has failed; above 0, it is removed by force.
        wait_until: Monotonic time until which its removal may be put off; None: that was not looked at.
        lost: Whether its init has died before it could be warm.
        endpoint: Its place in the pool's network, its own from the announcement of its building until it is gone.
    """

    name: str
    profile: str
    image: str
    recipe: str
    since: float
    state: State = State.BUILDING
    init: Watched | None = None
    lease: Lease | None = None
    session: object | None = None
    reason: str | None = None
    retries: int = 0
    wait_until: float | None = None
    lost: bool = False
    endpoint: Endpoint | None = None

    def move(self, state: State) -> None:
        """Go to another state.

        Raises:
            InternalError: There is no such move.
        """
        if state not in MOVES[self.state]:
            raise InternalError(f"{self.name} can't go from {self.state} to {state}")
        self.state = state

    def entry(self, state: State) -> Entry:
        """Return what the ledger holds of the container once it is in *state*."""
        lease = self.lease
        return Entry(
            name=self.name,
            profile=self.profile,
            state=state,
            since=self.since,
            image=self.image,
            recipe=self.recipe,
            init=self.init.identity if self.init else None,
            lease=lease.entry() if lease else None,
            reason=self.reason,
            endpoint=self.endpoint,
        )

    def info(self, now: float, *, private: bool) -> ContainerInfo:
        """Return what `ls` shows; without id and owner unless *private*."""
        lease = self.lease if private else None
        return ContainerInfo(
            name=self.name,
            profile=self.profile,
            state=self.state,
            id=lease.id if lease else None,
            owner_pid=lease.owner.pid if lease and lease.owner else None,
            owner_uid=lease.uid if lease else None,
            age=now - self.since,
            init_pid=self.init.identity.pid if self.init else None,
            reason=self.reason,
        )
