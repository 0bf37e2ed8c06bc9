"""What the pool keeps for each profile: its warm containers, its waiters, its image, and how creation is going."""

from __future__ import annotations

import random
from collections import Counter, deque

from lxc_pool.config import ProfileConfig
from lxc_pool.images.store import Image
from lxc_pool.model import ProfileStatus, State
from lxc_pool.service.backoff import Backoff
from lxc_pool.service.lifecycle import Member
from lxc_pool.service.waiters import WaitQueue


class Shelf:
    """One profile's part of the pool; guarded by the pool's lock.

    Attributes:
        capacity: Warm containers to keep.
        counts: Containers by state.
        image: What new ones are cloned from; None until it has been prepared.
        preparing: Whether a lane is preparing the image.
        filled: Whether it has ever been full.
    """

    def __init__(self, profile: ProfileConfig, rng: random.Random) -> None:
        self.profile = profile
        self.capacity = profile.size
        self._warm: deque[Member] = deque()
        self.waiters = WaitQueue()
        self.counts: Counter[State] = Counter()
        self.backoff = Backoff(rng)
        self.image: Image | None = None
        self.preparing = False
        self.filled = False

    @property
    def has_warm(self) -> bool:
        """Whether a container is warm."""
        return bool(self._warm)

    def put(self, member: Member, *, first: bool = False) -> None:
        """Take in a warm container: behind the others, or *first* of all."""
        if first:
            self._warm.appendleft(member)
        else:
            self._warm.append(member)

    def take(self) -> Member:
        """Take the warm container that is to be handed out next: the oldest."""
        return self._warm.popleft()

    def spare(self) -> Member:
        """Return the warm container that is to go first if one has to: the newest."""
        return self._warm[-1]

    def remove(self, member: Member) -> None:
        """Take a warm container off the shelf."""
        self._warm.remove(member)

    def wants_image(self, now: float) -> bool:
        """Whether a lane should prepare the image."""
        return self.capacity > 0 and self.image is None and not self.preparing and not self.backoff.remaining(now)

    def wants_container(self, now: float) -> bool:
        """Whether a lane should create a container.

        Those that are being reaped count too: otherwise a busy pool would create for ever and never get to removing.
            Stuck ones do not, or a few of them would end the pool.
        """
        if self.image is None or self.backoff.remaining(now):
            return False
        if not self.backoff.clear and self.counts[State.BUILDING]:
            return False  # one creation, to see whether the cause is gone
        return self.stock + self.counts[State.REAPING] < self.capacity

    @property
    def stock(self) -> int:
        """Containers that are, will be, or may again be warm."""
        return self.counts[State.WARM] + self.counts[State.RESERVED] + self.counts[State.BUILDING]

    def status(self) -> ProfileStatus:
        """Return the counts."""
        return ProfileStatus(
            capacity=self.capacity,
            size=self.counts[State.WARM],
            building=self.counts[State.BUILDING],
            reserved=self.counts[State.RESERVED],
            leased=self.counts[State.LEASED],
            reaping=self.counts[State.REAPING],
            stuck=self.counts[State.STUCK],
            waiting=len(self.waiters),
            image=self.image.ref if self.image else None,
        )
