"""After a restart: what becomes of each container that the ledger or the host knows of."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

from lxc_pool.backend.protocol import Endpoint
from lxc_pool.config import Config, ProfileConfig
from lxc_pool.images.store import Image
from lxc_pool.model import State
from lxc_pool.service.ledger import Entry
from lxc_pool.service.lifecycle import Lease, Member, Reason


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of one container.

    Attributes:
        member: The container, as the pool is to take it in: WARM, LEASED, or BUILDING if it is to be reaped.
        profile: Its profile; one of size 0 if the configuration has that no more.
        reason: Why it is to be reaped; None: it goes on.
    """

    member: Member
    entry: Entry
    profile: ProfileConfig
    reason: Reason | None


def judge(
    entries: Iterable[Entry],
    present: Iterable[str],
    config: Config,
    newest: Callable[[str], Image | None],
    now: float,
    *,
    fits: Callable[[Endpoint | None, ProfileConfig], bool] = lambda _endpoint, _profile: True,
) -> list[Verdict]:
    """Decide about every container; whether its processes live is for the pool to see when it watches them again.

    Args:
        entries: What the ledger knows.
        present: The names of the containers that are on the host.
        config: What this service is to keep.
        newest: Returns the newest version of an image.
        now: Monotonic time.
        fits: Whether a container's place in the network is what one of that profile would get now.
    """
    profiles = {profile.name: profile for profile in config.profiles}
    warm: Counter[str] = Counter()
    verdicts = []
    known = set()
    for entry in sorted(entries, key=lambda entry: entry.since):
        known.add(entry.name)
        profile = profiles.get(entry.profile) or ProfileConfig(entry.profile, size=0)
        reason = _reason(entry, profile, newest, now)
        if reason is None and entry.lease is None and not fits(entry.endpoint, profile):
            reason = Reason.IMAGE_REPLACED
        if reason is None and entry.lease is None:
            warm[profile.name] += 1
            if warm[profile.name] > profile.size:
                reason = Reason.SURPLUS
        verdicts.append(Verdict(_member(entry, goes_on=reason is None), entry, profile, reason))
    for name in sorted(set(present) - known):
        entry = Entry(name, config.profiles[0].name, State.BUILDING, now, "", "", None, None, None)
        verdicts.append(Verdict(_member(entry, goes_on=False), entry, config.profiles[0], Reason.ORPHAN))
    return verdicts


def _reason(entry: Entry, profile: ProfileConfig, newest: Callable[[str], Image | None], now: float) -> Reason | None:
    """Return why a container that the ledger knows has to go; None if it may stay."""
    if entry.state is State.LEASED and entry.lease is not None:
        return Reason.EXPIRED if entry.lease.expires is not None and entry.lease.expires <= now else None
    if entry.state is not State.WARM:
        return Reason.ORPHAN  # half made or half removed
    image = newest(profile.image)
    if image is None or image.ref != entry.image or profile.recipe != entry.recipe:
        return Reason.IMAGE_REPLACED
    return None


def _member(entry: Entry, *, goes_on: bool) -> Member:
    member = Member(entry.name, entry.profile, entry.image, entry.recipe, entry.since, endpoint=entry.endpoint)
    if goes_on:
        member.state = entry.state
        if entry.lease is not None:
            lease = entry.lease
            member.lease = Lease(
                lease.request, lease.id, lease.uid, lease.owner, expires=lease.expires, revision=lease.revision
            )
    return member
