"""Random histories of a pool of several profiles, with faults, against what must hold after every step."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lxc_pool.backend.memory import HANG, Fault, Step
from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import BackendError, ConfigError, DestroyFailed, LeaseError, PoolClosed, PoolDraining, StartFailed
from lxc_pool.model import ProfileStatus, State
from lxc_pool.service.ledger import Entry
from lxc_pool.service.pool import Pool
from lxc_pool.service.recovery import judge
from lxc_pool.service.waiters import Ticket
from tests.support.world import MemoryLane, World

CREATION: tuple[Step, ...] = ("clone", "start", "probe")
REMOVAL: tuple[Step, ...] = ("stop", "destroy")

PROFILES = ("default", "other", "third")

SHAPES = (
    (ProfileConfig("default", 3),),
    (ProfileConfig("default", 2, min=1, max=4), ProfileConfig("other", 0, max=3), ProfileConfig("third", 1, min=0)),
    (ProfileConfig("default", 2, min=1, max=4, pids=7), ProfileConfig("other", 1), ProfileConfig("third", 1, min=0)),
    (ProfileConfig("other", 1, min=0, max=2), ProfileConfig("default", 1, min=0, max=2)),
    (ProfileConfig("default", 4, min=3, max=4), ProfileConfig("other", 0, max=2)),
)
"""Of configurations: with and without bounds, with other containers of a profile, with profiles that come and go."""

LIMITS = (None, 4)


@dataclasses.dataclass(eq=False)
class Holder:
    """A client's lease, as the client sees it: `ends` at a time, or with its owner if it has not lost that."""

    name: str
    ticket: Ticket
    ends: float | None
    owned: bool = True


def configuration(shape: int, limit: int | None) -> Config:
    return Config(SHAPES[shape], workers=2, max=limit, shrink_after=20.0)


class PoolMachine(RuleBasedStateMachine):
    """Clients that ask, confirm, release and die; a service that is killed, and told of new configurations and images;
    an engine and a ledger that fail.
    """

    def __init__(self) -> None:
        super().__init__()
        self.world = World(configuration(1, 4))
        self.world.journal.watch(self.no_more_is_begun_than_there_is_room_for)
        self.moved_bounds = False
        self.tickets: list[Ticket] = []
        self.leases: list[Holder] = []
        self.over: set[str] = set()
        self.order: list[Ticket] = []
        self.pids = itertools.count(100)
        self.runs = itertools.count(1)

    # --- clients ------------------------------------------------------------------------------------------------------

    @rule(
        uid=st.sampled_from([1000, 1001]),
        profile=st.sampled_from(PROFILES),
        ttl=st.sampled_from([None, None, 5.0, 50.0]),
        clients=st.integers(1, 5),
    )
    def ask(self, uid: int, profile: str, ttl: float | None, clients: int) -> None:
        for _ in range(clients):
            try:
                newer = self.has_current(profile)
                ticket = self.world.ask("job", uid=uid, profile=profile, pid=next(self.pids), ttl=ttl, session=object())
            except (PoolDraining, PoolClosed):
                return
            except ValueError:
                assert profile not in [known.name for known in self.world.config.profiles]
                return
            self.tickets.append(ticket)
            self.order.append(ticket)
            if newer:
                assert ticket.offer is not None
                shelf = self.world.pool._stock.shelves[profile]
                assert shelf.is_current(ticket.offer), "an outdated one is offered beside one that is not"

    @rule(data=st.data())
    @precondition(lambda self: any(ticket.offer for ticket in self.tickets))
    def confirm(self, data: st.DataObject) -> None:
        self.take(data.draw(st.sampled_from([ticket for ticket in self.tickets if ticket.offer])))

    def take(self, ticket: Ticket) -> None:
        """Confirm an offer."""
        self.tickets.remove(ticket)
        assert ticket.offer is not None
        try:
            info = self.world.pool.confirm(ticket.uid, ticket.request)
        except BackendError:
            return  # the ledger failed: it is back in the pool
        if info is not None:
            assert info.name not in self.over, "a container that was used is handed out again"
            assert info.profile == ticket.profile
            assert info.name not in [lease.name for lease in self.leases], "a container has two owners"
            ends = None if ticket.ttl is None else self.world.watch.now() + ticket.ttl
            self.leases.append(Holder(info.name, ticket, ends))
            self.over.add(info.name)

    @rule(
        uid=st.sampled_from([1000, 1001]),
        profile=st.sampled_from(PROFILES),
        ttl=st.sampled_from([None, 5.0, 50.0]),
        clients=st.integers(1, 3),
    )
    def get(self, uid: int, profile: str, ttl: float | None, clients: int) -> None:
        """Ask, wait a second, and take what is offered: what most clients do, and chance alone seldom."""
        before = list(self.tickets)
        self.ask(uid=uid, profile=profile, ttl=ttl, clients=clients)
        self.time_goes_by(seconds=1.0)
        for ticket in [ticket for ticket in self.tickets if ticket not in before and ticket.offer]:
            self.take(ticket)

    @rule(data=st.data())
    @precondition(lambda self: self.tickets)
    def vanish_before_confirming(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        self.tickets.remove(ticket)
        if ticket.offer is None:
            self.world.pool.withdraw(ticket)
        if ticket.offer is not None:
            self.world.pool.take_back(ticket.uid, ticket.request, ticket.session)

    @rule(data=st.data())
    @precondition(lambda self: self.leases)
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.leases.remove(lease)
        try:
            self.world.pool.release(lease.name, lease.ticket.uid)
        except LeaseError:
            assert not self._is_leased(lease.name)

    @rule(data=st.data(), ttl=st.sampled_from([5.0, 50.0]), keep=st.booleans())
    @precondition(lambda self: self.leases)
    def renew_or_keep(self, data: st.DataObject, ttl: float, keep: bool) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        try:
            self.world.pool.set_ttl(lease.name, lease.ticket.uid, ttl, drop_owner=keep)
        except BackendError:
            return  # the ledger failed: it ends as it would have
        lease.ends = self.world.watch.now() + ttl
        lease.owned = lease.owned and not keep

    @rule(data=st.data())
    @precondition(lambda self: self.leases)
    def owner_dies(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        if lease.owned:
            self.leases.remove(lease)
        self.world.watch.kill(lease.ticket.owner)
        assert self._is_leased(lease.name) is not lease.owned

    @rule(data=st.data())
    @precondition(lambda self: self.world.backend.running)
    def container_dies(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.backend.running)))
        self.world.watch.kill(self.world.backend.running[name])
        self.leases = [lease for lease in self.leases if lease.name != name]

    # --- faults -------------------------------------------------------------------------------------------------------

    # One rule of a kind each, and failures less often than not: chance takes all rules alike, and a pool that is
    # drained, or whose ledger fails, has no leases to speak of.
    @rule(step=st.sampled_from(CREATION + REMOVAL), kind=st.sampled_from(["fail", "hang", "slow"]))
    def engine_goes_wrong(self, step: Step, kind: str) -> None:
        error = StartFailed("no") if step in CREATION else DestroyFailed("busy")
        faults = {"fail": Fault(error=error), "hang": HANG, "slow": Fault(delay=3.0)}
        self.world.backend.script(step, faults[kind])

    @rule(broken=st.sampled_from([False, False, True]))
    def ledger_fails_or_works(self, broken: bool) -> None:
        self.world.journal.broken = broken

    @rule()
    def service_is_killed_and_started_again(self) -> None:
        world = self.world
        world.journal.broken = False
        entries = list(world.journal.entries.values())
        alive = set(world.backend.running.values())
        world.watch.dead |= {entry.init for entry in entries if entry.init is not None and entry.init not in alive}
        world.watch.timers.clear()
        world.watch.watched.clear()
        world.lanes = [MemoryLane(world.backend, world.watch) for _ in world.lanes]
        run, numbers = next(self.runs), itertools.count(1)
        world.pool = Pool(
            world.config,
            world.lanes,
            world.watch,
            world.journal,
            new_name=lambda: f"run{run}-{next(numbers)}",
            wake=lambda: None,
            is_idle=world.backend.is_idle,
            rng=random.Random(1),  # noqa: S311  # jitter
        )
        world.pool.restore(judge(entries, world.backend.names(), world.config, world.backend.newest, world.watch.now()))
        self.moved_bounds = False
        self.tickets.clear()
        self.order.clear()
        self.every_lease_is_its_holders()

    @rule()
    def nothing_runs_any_more(self) -> None:
        self.world.backend.idle |= self.world.backend.present

    # --- administrators and time --------------------------------------------------------------------------------------

    @rule(size=st.integers(1, 5))
    def resize(self, size: int) -> None:
        try:
            self.world.pool.resize(size)
        except ConfigError:
            assert self.world.config.max is not None
            return
        self.moved_bounds = True
        assert self.profiles()[self.world.config.main.name].capacity == size

    @rule(shape=st.integers(0, len(SHAPES) - 1), limit=st.sampled_from(LIMITS))
    def reload(self, shape: int, limit: int | None) -> None:
        before = self.leased()
        self.world.config = configuration(shape, limit)
        self.world.pool.reconfigure(self.world.config)
        self.tickets = [ticket for ticket in self.tickets if ticket.error is None]
        assert self.leased() == before, "a lease has not outlived the reload"

    @rule()
    def new_image(self) -> None:
        warm = {name for name, state in self.states().items() if state is State.WARM}
        self.world.backend.publish("busybox")
        self.world.pool.look_for_images()
        gone = warm - {name for name, state in self.states().items() if state is State.WARM}
        assert not gone, "an old container has gone before a new one was there"

    @rule(drained=st.sampled_from([False, False, False, True]))
    def drain_or_resume(self, drained: bool) -> None:
        if drained:
            self.world.pool.drain()
            self.tickets = [ticket for ticket in self.tickets if ticket.offer]
        else:
            self.world.pool.resume()

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 10.0, 31.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.world.advance(seconds)
        over = [lease for lease in self.leases if lease.ends is not None and lease.ends <= self.world.watch.now()]
        self.leases = [lease for lease in self.leases if lease not in over]
        for lease in over:
            assert not self._is_leased(lease.name), "a lease has outlived its time"

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def every_container_is_in_one_state_and_none_is_lost(self) -> None:
        infos = self.world.pool.containers(None)
        names = [info.name for info in infos]
        assert len(names) == len(set(names))
        unknown = self.world.backend.present - set(names)
        assert not unknown, f"the pool has lost {unknown}"
        unwritten = self.world.backend.present - set(self.world.journal.entries)
        assert not unwritten, f"the ledger has never heard of {unwritten}"
        census = self.world.pool.census()
        for state in State:
            field = "size" if state is State.WARM else str(state)
            assert census.total(field) == sum(info.state is state for info in infos)

    @invariant()
    def what_was_created_is_in_one_state_or_destroyed(self) -> None:
        backend, states = self.world.backend, self.states()
        created = {name for step, name in backend.history if step == "start"}
        destroyed = created - backend.present
        counts = Counter(states[name] for name in created - destroyed)
        assert len(created) == counts.total() + len(destroyed)
        for state in (State.WARM, State.RESERVED, State.LEASED):
            assert counts[state] == self.world.count(state), f"of those that are {state}, some are not there"

    @invariant()
    def no_lease_lasts_longer_than_its_owner_or_its_time(self) -> None:
        for member, lease in self.world.pool._leases:
            assert lease.owner not in self.world.watch.dead, f"{member.name} is a dead process's"
            if member.state is State.LEASED:
                assert lease.expires is None or lease.expires > self.world.watch.now()
                assert lease.owner is not None or lease.expires is not None, f"{member.name} would be leased for ever"

    @invariant()
    def what_is_handed_out_runs(self) -> None:
        for member in self.world.pool._stock.members.values():
            if member.state in (State.WARM, State.RESERVED, State.LEASED):
                assert member.init is not None
                assert member.init.identity not in self.world.watch.dead

    def no_more_is_begun_than_there_is_room_for(self, entry: Entry) -> None:
        """Look at what is being written down, before it is."""
        if entry.state is State.BUILDING and entry.name not in self.world.journal.entries:
            shelf = self.world.pool._stock.shelves[entry.profile]
            having = sum(shelf.counts[state] for state in (State.WARM, State.RESERVED, State.BUILDING))
            surge = max(1, shelf.capacity // 4) if shelf.outdated else 0
            assert having < shelf.capacity + surge, "one more is created than there is room for"

    @invariant()
    def capacity_is_never_exceeded(self) -> None:
        for name, profile in self.profiles().items():
            kept = profile.size + profile.reserved + profile.building
            # A profile made smaller still has what is reserved or being built: that is reaped as it comes back. While
            # outdated ones are replaced, there may be a quarter more, one at least.
            surge = max(1, profile.capacity // 4) if profile.outdated or not profile.size else 0
            assert profile.size <= profile.capacity + surge, name
            assert kept <= max(profile.capacity + surge, profile.reserved + profile.building), name

    @invariant()
    def every_profile_is_within_its_bounds_and_the_pools(self) -> None:
        capacities = 0
        for name, profile in self.profiles().items():
            assert profile.min <= profile.capacity <= profile.max, name
            capacities += profile.capacity
        if not self.moved_bounds:
            bounds = {profile.name: profile.bounds for profile in self.world.config.profiles}
            for name, profile in self.profiles().items():
                assert (profile.min, profile.max) == bounds.get(name, (0, 0))
        assert self.world.config.max is None or capacities <= self.world.config.max

    @invariant()
    def nobody_waits_for_a_profile_that_is_no_more(self) -> None:
        known = [profile.name for profile in self.world.config.profiles]
        for name, profile in self.profiles().items():
            assert name in known or not (profile.waiting or profile.size)

    @invariant()
    def an_outdated_container_is_offered_only_while_no_other_is_warm(self) -> None:
        """Of those in the queue: what would be offered next."""
        for shelf in self.world.pool._stock.shelves.values():
            members = [m for m in self.world.pool._stock.members.values() if m.state is State.WARM]
            mine = [member for member in members if member.profile == shelf.profile.name]
            assert shelf.outdated == sum(not shelf.is_current(member) for member in mine)
            if shelf.has_warm and shelf.outdated < len(mine):
                assert shelf.is_current(shelf._warm[0])

    @invariant()
    def every_lease_is_its_holders(self) -> None:
        for lease in self.leases:
            assert self.world.pool.leased(lease.name, lease.ticket.uid).state is State.LEASED

    @invariant()
    def nobody_waits_while_a_container_is_warm(self) -> None:
        for name, profile in self.profiles().items():
            assert not (profile.size and profile.waiting), name

    @invariant()
    def those_of_one_user_are_served_in_the_order_in_which_they_came(self) -> None:
        for uid, profile in itertools.product((1000, 1001), PROFILES):
            mine = [ticket for ticket in self.order if (ticket.uid, ticket.profile) == (uid, profile)]
            waiting = [ticket for ticket in mine if ticket in self.tickets]
            answered = [ticket.answered for ticket in waiting]
            assert answered == sorted(answered, reverse=True), "somebody was overtaken"

    def teardown(self) -> None:
        """At the end every fault goes away, and with time the pool is whole again and every lease can be ended."""
        world = self.world
        world.journal.broken = False
        world.backend._faults.clear()
        world.pool.resume()
        self.everybody_is_served()
        for info in world.pool.containers(None):
            if info.state is State.LEASED:
                world.pool.release(info.name, None)
        world.advance(200)
        census = world.pool.census()
        known = {profile.name: profile for profile in world.config.profiles}
        assert list(census.profiles) == list(known), "a profile that is no more is still there"
        for profile in census.profiles.values():
            assert profile.size == profile.capacity
            assert profile.outdated == 0
        counts = Counter(info.state for info in world.pool.containers(None))
        assert counts == Counter({State.WARM: census.total("capacity")})
        assert len(world.backend.present) == census.total("capacity")
        image = world.backend.newest("busybox")
        assert image is not None
        # Where the ledger has failed, there may be entries of containers that are gone.
        entries = [entry for name, entry in world.journal.entries.items() if name in world.backend.present]
        assert {entry.recipe for entry in entries} <= {profile.recipe for profile in known.values()}
        assert {entry.image for entry in entries} <= {image.ref}
        world.advance(100 * world.config.shrink_after)
        assert {name: profile.size for name, profile in self.profiles().items()} == {
            name: profile.min for name, profile in self.profiles().items()
        }, "nobody asks, and more than min are kept"

    def everybody_is_served(self) -> None:
        """Let clients confirm what they are offered, and release it."""
        waiting = [ticket for ticket in self.tickets if ticket.error is None]
        for _ in range(len(waiting) + 30):  # a creation that hangs, and the pauses after failures, take their time
            self.world.advance(10)
            for ticket in [ticket for ticket in waiting if ticket.offer]:
                waiting.remove(ticket)
                self.world.pool.confirm(ticket.uid, ticket.request)
                self.world.pool.abandon(ticket.uid, ticket.request)
            waiting = [ticket for ticket in waiting if ticket.error is None]
        assert not waiting, "somebody waits for ever"

    def has_current(self, profile: str) -> bool:
        """Return whether a container of that profile is warm that would be made so now."""
        shelf = self.world.pool._stock.shelves.get(profile)
        return shelf is not None and shelf.has_warm and self.profiles()[profile].size > shelf.outdated

    def profiles(self) -> dict[str, ProfileStatus]:
        return self.world.pool.census().profiles

    def states(self) -> dict[str, State]:
        return {info.name: info.state for info in self.world.pool.containers(None)}

    def leased(self) -> list[str]:
        return sorted(name for name, state in self.states().items() if state is State.LEASED)

    def _is_leased(self, name: str) -> bool:
        return any(info.name == name and info.state is State.LEASED for info in self.world.pool.containers(None))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
