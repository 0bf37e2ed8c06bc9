"""What the pool keeps for each profile: its warm containers, its waiters, its image, and how creation is going."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from lxc_pool.backend.protocol import Endpoint
from lxc_pool.config import ProfileConfig
from lxc_pool.images.store import Image
from lxc_pool.model import ProfileStatus, State
from lxc_pool.service.backoff import Backoff
from lxc_pool.service.lifecycle import Member
from lxc_pool.service.waiters import WaitQueue
from lxc_pool.service.watchdog import Timer

_SURGE: Final = 4
"""Outdated containers are replaced so many times fewer at once than the shelf has, but one at least. A guess: few
enough beside the others not to be noticed, enough to be through with many slow ones."""


_PLENTY: Final = 4
"""There are plenty of warm ones down to this part of the capacity. A guess: most of a burst is served without the lanes
in its way, and there is something left of it when they begin."""

Fits = Callable[[Endpoint | None, ProfileConfig], bool]
"""Whether a container's place in the network is what one of that profile would get now."""


class Shelf:
    """One profile's part of the pool; guarded by the pool's lock.

    Warm containers that were made of another version of the image, or as another configuration wanted them, are
    *outdated*: they are handed out only while none of the others is warm, and replaced a few at a time.

    Attributes:
        profile: What new ones are made as.
        recipe: The profile's.
        capacity: Warm containers to keep now: from `least` to `most`, see `Sizing`.
        counts: Containers by state.
        image: What new ones are cloned from; None until it has been prepared.
        preparing: The name of the image that a lane is preparing.
        look_again: Whether there may be a newer image than `image`.
        changed_images: The refs of versions that are not what was made.
        filled: Whether it has been full since it got its profile or its size.
        retired: Whether the configuration has the profile no more: it lasts until its containers are gone.
        last_error: Why the newest image or container is not ready; None once one is.
        last_asked: Monotonic time of the last request.
        turn: The higher, the later it had its last turn with a lane.
        low: The fewest warm ones since the period began that `Sizing` looks at.
        period: The timer of that.
    """

    def __init__(self, profile: ProfileConfig, rng: random.Random, fits: Fits) -> None:
        self.profile = profile
        self.recipe = profile.recipe
        self.capacity = profile.size
        self.least, self.most = profile.bounds
        self._warm: deque[Member] = deque()
        self._outdated: deque[Member] = deque()
        self._allowed = {self.recipe}
        self._fits = fits
        self.waiters = WaitQueue()
        self.counts: Counter[State] = Counter()
        self.backoff = Backoff(rng)
        self.image: Image | None = None
        self.preparing: str | None = None
        self.look_again = False
        self.changed_images: set[str] = set()
        self.filled = False
        self.retired = False
        self.last_error: str | None = None
        self.last_asked = 0.0
        self.turn = 0
        self.low = 0
        self.period: Timer | None = None

    # --- warm containers ----------------------------------------------------------------------------------------------

    @property
    def has_warm(self) -> bool:
        """Whether a container is warm."""
        return bool(self._warm or self._outdated)

    @property
    def has_plenty(self) -> bool:
        """Whether there are enough warm ones that others need not be made while containers are being asked for."""
        return self.filled and self.counts[State.WARM] * _PLENTY > self.capacity

    @property
    def outdated(self) -> int:
        """How many warm ones are to be replaced."""
        return len(self._outdated)

    def put(self, member: Member, *, first: bool = False) -> None:
        """Take in a warm container: behind the others, or *first* of all."""
        queue = self._warm if self.is_current(member) else self._outdated
        if first:
            queue.appendleft(member)
        else:
            queue.append(member)

    def take(self) -> Member:
        """Take the warm container that is to be handed out next: the oldest that is not outdated, if there is one."""
        member = self._warm.popleft() if self._warm else self._outdated.popleft()
        self.low = min(self.low, self.counts[State.WARM] - 1)
        return member

    def spare(self) -> Member:
        """Return the warm container that is to go first if one has to: an outdated one, or else the newest."""
        return self._outdated[0] if self._outdated else self._warm[-1]

    def remove(self, member: Member) -> None:
        """Take a warm container off the shelf."""
        if member in self._outdated:
            self._outdated.remove(member)
        else:
            self._warm.remove(member)

    def is_current(self, member: Member) -> bool:
        """Whether a container is what would be made now."""
        return (
            member.recipe == self.recipe
            and (self.image is None or member.image == self.image.ref)
            and self._fits(member.endpoint, self.profile)
        )

    def bars(self, member: Member) -> bool:
        """Whether a container must not be handed out: it was made for others than may have the profile now.

        Or of an image that is not what was made.
        """
        return member.recipe not in self._allowed or member.image in self.changed_images

    def barred(self) -> list[Member]:
        """Return the warm containers that must not be handed out."""
        return [member for member in [*self._outdated, *self._warm] if self.bars(member)]

    def change(self, profile: ProfileConfig) -> None:
        """Let new ones be made as *profile* wants it.

        Old ones are barred if they are other containers and were for other people: one for administrators, say, whose
        root is the host's, of a profile that is now for everybody. And if they reach what is out of reach now.
        """
        old, recipe = self.profile, self.recipe
        self.profile, self.recipe = profile, profile.recipe
        others = (old.privileged, old.allow) != (profile.privileged, profile.allow)
        reached = {old.network, *old.reach} - {"empty"}
        if others or not reached <= {profile.network, *profile.reach}:
            self._allowed.clear()
        self._allowed.add(self.recipe)
        if profile.image != old.image:
            self.image = None
        if recipe != self.recipe:
            # What was wrong may have been the old profile's fault.
            self.backoff.succeed()
            self.last_error = None

    def sort_out(self) -> int:
        """Find out which of the warm ones are outdated, after the profile or the image has changed; return how many."""
        members = sorted([*self._outdated, *self._warm], key=lambda member: member.since)
        self._warm = deque(member for member in members if self.is_current(member))
        self._outdated = deque(member for member in members if not self.is_current(member))
        return len(self._outdated)

    # --- what is to be made -------------------------------------------------------------------------------------------

    def wants_image(self, now: float) -> bool:
        """Whether a lane should prepare the image, or look for a newer one."""
        if self.capacity == 0 or self.preparing is not None:
            return False
        return self.look_again or (self.image is None and not self.backoff.remaining(now))

    def wants_container(self, now: float) -> bool:
        """Whether a lane should create a container.

        Those that are being reaped count too: otherwise a busy pool would create for ever and never get to removing.
            Stuck ones do not, or a few of them would end the pool.
        """
        if self.image is None or self.look_again or self.preparing is not None or self.backoff.remaining(now):
            return False
        if not self.backoff.clear and self.counts[State.BUILDING]:
            return False  # one creation, to see whether the cause is gone
        return self.stock + self.counts[State.REAPING] < self.capacity + self.surge

    @property
    def surge(self) -> int:
        """Containers that there may be above the capacity: an outdated one goes when its replacement has come."""
        return max(1, self.capacity // _SURGE) if self._outdated else 0

    @property
    def stock(self) -> int:
        """Containers that are, will be, or may again be warm."""
        return self.counts[State.WARM] + self.counts[State.RESERVED] + self.counts[State.BUILDING]

    # --- reports ------------------------------------------------------------------------------------------------------

    def status(self, now: float) -> ProfileStatus:
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
            min=self.least,
            max=self.most,
            outdated=len(self._outdated),
            backoff=self.backoff.remaining(now),
            last_error=self.last_error,
        )

    def describe(self, now: float) -> str:
        """Return the counts, and what is wrong, in words."""
        counts = self.counts
        words = ", ".join(f"{counts[state]} {state}" for state in State if counts[state] or state is State.WARM)
        backoff = self.backoff.remaining(now)
        return (
            f"{words}; capacity {self.capacity}"
            + (f"; creation is held back for {backoff:.1f} s" if backoff else "")
            + (f"; last error: {self.last_error}" if self.last_error else "")
        )
