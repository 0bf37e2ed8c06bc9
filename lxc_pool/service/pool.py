"""The pool: who gets which container, for how long, and when a container's time has come.

```
 sessions ── request, confirm, release ──┐                      ┌─► Stock: all containers, one lock
 watchdog ── a process died, time is up ─┼─► Pool ◄──► Upkeep ──┤
 lanes ───── a job has ended ────────────┘                      └─► lanes: create, remove   (by way of the dispatcher)
```

The lock guards decisions only: no engine is called, no process is started or waited for while it is held.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import AccessDenied, BackendError, LeaseExpired, PoolClosed, PoolDraining, UnknownLease
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.model import ContainerInfo, State
from lxc_pool.service.addresses import AddressBook
from lxc_pool.service.adoption import Adoption
from lxc_pool.service.census import Census, WarmWait, WarmWaits
from lxc_pool.service.handoff import Handoff
from lxc_pool.service.lanes import Lane
from lxc_pool.service.leases import Leases, Quota
from lxc_pool.service.ledger import Journal
from lxc_pool.service.lifecycle import Lease, Reason
from lxc_pool.service.owners import Owners
from lxc_pool.service.reaper import NOBODY, Reaper
from lxc_pool.service.recovery import Verdict
from lxc_pool.service.renewal import Renewal
from lxc_pool.service.sizing import Sizing
from lxc_pool.service.stock import Stock
from lxc_pool.service.upkeep import Upkeep
from lxc_pool.service.waiters import Ticket
from lxc_pool.service.watchdog import Watch, Watched


class Pool:
    """Keeps containers warm and hands them out.

    Shared by all threads of the service; the stock's lock guards everything.

    Invariants, whenever the lock is free: warm + reserved + building of a profile is at most its capacity, unless that
    was just made smaller, and a few more while outdated ones are replaced; a container has a lease exactly in RESERVED
    and LEASED; nobody waits while one is warm.
    """

    def __init__(
        self,
        config: Config,
        lanes: Sequence[Lane],
        watch: Watch,
        journal: Journal,
        *,
        new_name: Callable[[], str],
        wake: Callable[[], None],
        obstacle: Callable[[int], str | None] = lambda _min_free: None,
        is_idle: Callable[[str], bool] = lambda _name: False,
        addresses: AddressBook | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Make a pool; nothing happens before the first `dispatch`.

        Args:
            config: What to keep.
            lanes: Who does the work; opened and closed by the caller.
            watch: The clock, and who notices deaths.
            journal: Where it is written down what there is.
            new_name: Returns a name that no container has or had.
            wake: Called, with the lock held, when `dispatch` should be called soon.
            obstacle: Returns why nothing can be created now, if that is so, given the bytes that have to be free.
            is_idle: Returns whether nothing but its init runs in a container; called without the lock.
            addresses: Where containers' addresses are from; None: no profile wants one.
            rng: For the jitter of pauses.
        """
        self._config = config
        self._watch = watch
        rng = rng or random.Random()  # noqa: S311  # for jitter
        addresses = addresses or AddressBook(None)
        self._stock = Stock(config.profiles, journal, rng, wake, addresses.fits)
        self._lock = self._stock.lock
        self._leases = Leases(self._stock)
        self._owners = Owners(self._lock, watch, died=self._owner_died, needed=self._owners_in_need)
        self._warm_waits = WarmWaits(self._stock)
        self._reaper = Reaper(self._stock, self._leases, watch)
        self._sizing = Sizing(config, self._stock, self._reaper, watch, self._warm_waits.look)
        self._handoff = Handoff(
            self._stock, self._leases, self._reaper, missed=self._sizing.missed, changed=self._warm_waits.look
        )
        self._renewal = Renewal(self._stock, self._reaper, self._handoff, self._sizing)
        self._adoption = Adoption(
            self._stock,
            self._leases,
            self._owners,
            self._reaper,
            watch,
            arm_expiry=self._arm_expiry,
            init_died=self._init_died,
        )
        self._upkeep = Upkeep(
            config,
            self._stock,
            lanes,
            watch,
            new_name=new_name,
            obstacle=obstacle,
            addresses=addresses,
            before=self._sizing.look_after,
            image_ready=self._renewal.image_ready,
            image_refused=self._renewal.image_refused,
            came_up=self._handoff.put,
            failed=functools.partial(self._reaper.reap, reason=Reason.START_FAILED),
            init_died=self._init_died,
            is_idle=is_idle,
            awaited=lambda: bool(self._warm_waits),
        )

    # --- what callers ask ---------------------------------------------------------------------------------------------

    def request(self, ticket: Ticket, quota: Quota | None = None) -> None:
        """Reserve a container for *ticket*, or queue it; a repeated request finds what the first one got.

        Args:
            ticket: The wish.
            quota: What its user may have; None: any number.

        Raises:
            PoolClosed, PoolDraining: Nothing is handed out.
            QuotaExceeded: The user has, or waits for, as many as it may.
            ValueError: Unknown profile, or the owner is dead.
        """
        while True:
            with self._lock:
                # Looked at under the same lock as the rest: one that has nothing yet may be let go for others.
                if self._owners.are_watched(ticket.owner):
                    self._take_in(ticket, quota)
                    return
            self._owners.hold(ticket.owner)

    def withdraw(self, ticket: Ticket) -> str:
        """Take a ticket that has no offer out of the queue; return why nothing came for it, in words.

        A ticket that was answered meanwhile is left as it is; the words are of no use then.
        """
        with self._lock:
            shelf = self._stock.shelves.get(ticket.profile)
            if ticket.answered or shelf is None:
                return ""
            place, queue = shelf.waiters.position(ticket), len(shelf.waiters)
            self._handoff.leave(ticket)
            return (
                f"no container of profile {ticket.profile!r} came free "
                f"({shelf.describe(self._watch.now())}; place {place} of {queue} in the queue)"
            )

    def confirm(
        self, uid: int, request: str, check: Callable[[str], None] = lambda _profile: None
    ) -> ContainerInfo | None:
        """Turn a reservation into a lease; None if there is none (any more). Confirming twice is as good as once.

        The caller has to call `settle` afterwards, when the client has its answer: it would compete with that.

        Args:
            uid: The user.
            request: The client's name for the wish.
            check: Called, with the lock held, with the profile; what it raises is raised, and the container goes back.
                The configuration may have changed since the user asked.

        Raises:
            BackendError: The ledger could not be written; the container goes back.
        """
        with self._lock:
            member = self._leases.of_request(uid, request)
            if member is None or member.lease is None:
                return None
            if member.state is State.RESERVED:
                if member.lease.owner is None or not self._owners.are_watched(member.lease.owner):
                    self._handoff.take_back(member)  # the owner died since it asked
                    return None
                if member.lease.ttl is not None:
                    member.lease.expires = self._watch.now() + member.lease.ttl
                try:
                    check(member.profile)
                    self._stock.move(member, State.LEASED)
                except (BackendError, AccessDenied, ValueError):
                    self._handoff.take_back(member)
                    raise
                member.session = None
                self._arm_expiry(member.name, member.lease)
            return member.info(self._watch.now(), private=True)

    def take_back(self, uid: int, request: str, session: object) -> None:
        """Undo a reservation that *session* holds, because that connection ended or its client took too long."""
        with self._lock:
            member = self._leases.of_request(uid, request)
            if member is not None and member.state is State.RESERVED and member.session is session:
                self._handoff.take_back(member)

    def abandon(self, uid: int, request: str, by: Mapping[str, object] = NOBODY) -> None:
        """Undo whatever *request* got: its reservation, or its lease. *by*: see `Reaper.reap`."""
        with self._lock:
            member = self._leases.of_request(uid, request)
            if member is None:
                return
            if member.state is State.RESERVED:
                self._handoff.take_back(member)
            else:
                self._reaper.reap(member, Reason.RELEASED, by)

    def set_ttl(self, name: str, uid: int | None, ttl: float, *, drop_owner: bool = False) -> None:
        """Let a lease end *ttl* seconds from now; with *drop_owner*, it no longer ends with its owner.

        Args:
            name: The leased container.
            uid: The caller; None: an administrator, who may touch any lease.
            ttl: Seconds; `max_keep` at most for a lease that has no owner: nothing else would end it.
            drop_owner: For `keep`.

        Raises:
            UnknownLease, LeaseExpired: See `leased`.
            BackendError: The ledger could not be written; nothing has changed.
        """
        with self._lock:
            member, lease = self._leases.find(name, uid)
            before = lease.expires, lease.owner
            if drop_owner:
                lease.owner = None
            lease.expires = self._watch.now() + (min(ttl, self._config.max_keep) if lease.owner is None else ttl)
            lease.revision += 1
            try:
                self._stock.rewrite(member)
            except BackendError:
                lease.expires, lease.owner = before
                raise
            if lease.expiry:
                lease.expiry.cancel()
            self._arm_expiry(name, lease)

    def release(self, name: str, uid: int | None, by: Mapping[str, object] = NOBODY) -> None:
        """End a lease; not an error if it has ended. *uid* as for `set_ttl`; *by*: see `Reaper.reap`.

        Raises:
            UnknownLease: It never was, or is another user's.
        """
        with self._lock:
            try:
                member = self._leases.find(name, uid)[0]
            except LeaseExpired:
                return
            self._reaper.reap(member, Reason.RELEASED, by)

    def leased(self, name: str, uid: int | None) -> ContainerInfo:
        """Return what is to be known of a leased container. *uid* as for `set_ttl`.

        Raises:
            UnknownLease: It never was, is long over, or is another user's.
            LeaseExpired: It has ended; the message says why.
        """
        with self._lock:
            return self._leases.find(name, uid)[0].info(self._watch.now(), private=True)

    def with_init(self, name: str, uid: int | None, use: Callable[[Watched, ProfileConfig], int]) -> int:
        """Return what *use* makes of a leased container's init and profile.

        It is called with the lock held, so that the init is still that one.

        Raises:
            UnknownLease, LeaseExpired: See `leased`.
        """
        with self._lock:
            member = self._leases.find(name, uid)[0]
            if member.init is None:
                raise UnknownLease(f"{name} has no init")
            return use(member.init, self._stock.shelf_of(member).profile)

    def containers(self, uid: int | None) -> tuple[ContainerInfo, ...]:
        """Return every container; with ids and owners of the leases of *uid*, or of all if that is None."""
        with self._lock:
            now = self._watch.now()
            return tuple(
                member.info(now, private=uid is None or (member.lease is not None and member.lease.uid == uid))
                for member in self._stock.members.values()
            )

    def census(self) -> Census:
        """Return the counts."""
        with self._lock:
            return Census.take(self._stock, self._watch.now())

    def await_warm(self, wait: WarmWait) -> None:
        """Call the wait's notify once, now or later, when that many containers are warm."""
        with self._lock:
            self._warm_waits.add(wait)
            self._stock.wake()

    def forget_wait(self, wait: WarmWait) -> None:
        """Drop a wait; not an error if it has been reached."""
        with self._lock:
            self._warm_waits.drop(wait)

    # --- what administrators ask --------------------------------------------------------------------------------------

    def resize(self, size: int) -> None:
        """Change the number of warm containers of the main profile (see `Config.main`); see `Sizing.resize`.

        Raises:
            ConfigError: The size is not allowed.
        """
        with self._lock:
            self._sizing.resize(size, self._stock.shelves[self._config.main.name])
            self._stock.wake()

    def reconfigure(self, config: Config) -> None:
        """Let another configuration be in force; see `Renewal` for what becomes of the containers."""
        with self._lock:
            self._upkeep.check.look_again()
            self._config = self._upkeep.config = config
            self._renewal.reconfigure(config)

    def look_for_images(self) -> None:
        """See whether there are newer versions of the images, and replace what was made of older ones."""
        with self._lock:
            self._upkeep.check.look_again()
            self._renewal.look_for_images()

    def drain(self) -> None:
        """Discard warm containers, send waiters away, hand out nothing until `resume`."""
        with self._lock:
            self._stock.draining = True
            self._handoff.turn_away_all(PoolDraining("the pool has been drained by an administrator"))
            self._reaper.clear(Reason.DRAINED)

    def resume(self) -> None:
        """Hand out containers again."""
        with self._lock:
            self._stock.draining = False
            self._stock.wake()

    # --- the end ------------------------------------------------------------------------------------------------------

    def close_to_new(self) -> None:
        """Send all waiters away and discard what is warm; leases go on."""
        with self._lock:
            self._stock.closed = True
            self._handoff.turn_away_all(PoolClosed("the service is ending"))
            self._reaper.clear(Reason.CLOSED)
            for member in list(self._stock.members.values()):
                if member.state is State.STUCK:
                    self._stock.move(member, State.REAPING)
            self._stock.wake()

    def end_leases(self) -> None:
        """Reap every container that is still leased or reserved."""
        with self._lock:
            for member in list(self._stock.members.values()):
                if member.state in (State.LEASED, State.RESERVED):
                    self._reaper.reap(member, Reason.CLOSED)

    def wait_until(self, *states: State, timeout: float | None, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait until no container is in one of *states*; return whether that came true within *timeout* seconds.

        Also returns when *unless* has become true and `interrupt` is called.
        """

        def none_left() -> bool:
            return not any(shelf.counts[state] for shelf in self._stock.shelves.values() for state in states)

        with self._stock.changed:
            limit = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
            self._stock.changed.wait_for(lambda: none_left() or unless(), limit)
            return none_left()

    def interrupt(self) -> None:
        """Let `wait_until` look again."""
        with self._stock.changed:
            self._stock.changed.notify_all()

    def let_go(self) -> None:
        """Stop watching everything; for the very end."""
        with self._lock:
            self._owners.let_go()
            for member in self._stock.members.values():
                if member.init is not None:
                    self._watch.forget(member.init)

    def settle(self) -> None:
        """Do what a confirmation leaves to be done: put it into its place in the ledger, fill the container's place."""
        with self._lock:
            self._stock.settle()
            self._stock.wake()

    # --- work ---------------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Give every idle lane what is to be done next."""
        self._upkeep.dispatch()

    def restore(self, verdicts: Sequence[Verdict]) -> None:
        """Take over what an earlier service left; before anything else is asked of the pool."""
        self._adoption.take_over(verdicts)

    def _take_in(self, ticket: Ticket, quota: Quota | None) -> None:
        """Do what `request` does, with the lock held and the owner watched."""
        self._config.profile(ticket.profile)
        member = self._leases.of_request(ticket.uid, ticket.request)
        if member is not None:
            member.session = ticket.session
            ticket.offer = member
            return
        if self._stock.closed:
            raise PoolClosed("the service is ending: it hands out no more containers")
        if self._stock.draining:
            raise PoolDraining("the pool is drained; an administrator can `lxc-pool resume` it")
        self._stock.shelves[ticket.profile].last_asked = self._watch.now()
        self._handoff.join(ticket, quota)
        if not ticket.answered:
            self._stock.wake()

    # --- deaths and times ---------------------------------------------------------------------------------------------

    def _owners_in_need(self) -> Iterator[ProcessIdentity]:
        """Go through the processes that have a lease or an offer, or wait for one; with the lock held."""
        yield from (lease.owner for _member, lease in self._leases if lease.owner is not None)
        yield from self._handoff.owners_waiting()

    def _owner_died(self, owner: ProcessIdentity) -> None:
        """End what an owner had; with the lock held."""
        self._handoff.owner_died(owner)
        for member, lease in self._leases:
            if lease.owner != owner:
                continue
            if member.state is State.LEASED:
                self._reaper.reap(member, Reason.OWNER_DIED)
            elif member.state is State.RESERVED:
                self._handoff.take_back(member)  # now, and not when it has not confirmed in time

    def _init_died(self, name: str) -> None:
        with self._lock:
            member = self._stock.members.get(name)
            if member is not None and member.state is State.BUILDING:
                member.lost = True  # it is watched already, but not in the pool yet: see Upkeep
            elif member is not None and member.state in (State.WARM, State.RESERVED, State.LEASED):
                self._reaper.reap(member, Reason.UNHEALTHY)

    def _expired(self, name: str, lease: Lease) -> None:
        with self._lock:
            member = self._stock.members.get(name)
            if member is not None and member.state is State.LEASED and member.lease is lease:
                self._reaper.reap(member, Reason.EXPIRED)

    def _arm_expiry(self, name: str, lease: Lease) -> None:
        if lease.expires is not None:
            lease.expiry = self._watch.call_at(lease.expires, functools.partial(self._expired, name, lease))
