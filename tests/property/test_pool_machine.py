"""Random histories of a pool, with faults, against what must hold after every step."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lxc_pool.backend.memory import HANG, Fault, Step
from lxc_pool.errors import BackendError, DestroyFailed, LeaseError, PoolClosed, PoolDraining, StartFailed
from lxc_pool.model import State
from lxc_pool.service.pool import Pool
from lxc_pool.service.recovery import judge
from lxc_pool.service.waiters import Ticket
from tests.support.world import MemoryLane, World

CREATION: tuple[Step, ...] = ("clone", "start", "probe")
REMOVAL: tuple[Step, ...] = ("stop", "destroy")


@dataclasses.dataclass(eq=False)
class Holder:
    """A client's lease, as the client sees it."""

    name: str
    ticket: Ticket


class PoolMachine(RuleBasedStateMachine):
    """Clients that ask, confirm, release and die; a service that is killed; an engine and a ledger that fail."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(size=3, workers=2)
        self.capacity = 3
        self.tickets: list[Ticket] = []
        self.leases: list[Holder] = []
        self.over: set[str] = set()
        self.asked: Counter[tuple[int, str]] = Counter()
        self.order: list[Ticket] = []
        self.pids = itertools.count(100)
        self.runs = itertools.count(1)

    # --- clients ------------------------------------------------------------------------------------------------------

    @rule(uid=st.sampled_from([1000, 1001]), ttl=st.sampled_from([None, None, 5.0, 50.0]), clients=st.integers(1, 5))
    def ask(self, uid: int, ttl: float | None, clients: int) -> None:
        for _ in range(clients):
            try:
                ticket = self.world.ask("job", uid=uid, pid=next(self.pids), ttl=ttl, session=object())
            except (PoolDraining, PoolClosed):
                return
            self.tickets.append(ticket)
            self.order.append(ticket)

    @rule(data=st.data())
    @precondition(lambda self: any(ticket.offer for ticket in self.tickets))
    def confirm(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from([ticket for ticket in self.tickets if ticket.offer]))
        self.tickets.remove(ticket)
        assert ticket.offer is not None
        try:
            info = self.world.pool.confirm(ticket.uid, ticket.request)
        except BackendError:
            return  # the ledger failed: it is back in the pool
        if info is not None:
            assert info.name not in self.over, "a container that was used is handed out again"
            assert info.name not in [lease.name for lease in self.leases], "a container has two owners"
            self.leases.append(Holder(info.name, ticket))
            self.over.add(info.name)

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

    @rule(data=st.data())
    @precondition(lambda self: self.leases)
    def owner_dies(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.leases.remove(lease)
        self.world.watch.kill(lease.ticket.owner)
        assert not self._is_leased(lease.name)

    @rule(data=st.data())
    @precondition(lambda self: self.world.backend.running)
    def container_dies(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.backend.running)))
        self.world.watch.kill(self.world.backend.running[name])
        self.leases = [lease for lease in self.leases if lease.name != name]

    # --- faults -------------------------------------------------------------------------------------------------------

    @rule(step=st.sampled_from(CREATION), kind=st.sampled_from(["fail", "hang", "slow"]))
    def creation_goes_wrong(self, step: Step, kind: str) -> None:
        faults = {"fail": Fault(error=StartFailed("no")), "hang": HANG, "slow": Fault(delay=3.0)}
        self.world.backend.script(step, faults[kind])

    @rule(step=st.sampled_from(REMOVAL), kind=st.sampled_from(["fail", "hang", "slow"]))
    def removal_goes_wrong(self, step: Step, kind: str) -> None:
        faults = {"fail": Fault(error=DestroyFailed("busy")), "hang": HANG, "slow": Fault(delay=3.0)}
        self.world.backend.script(step, faults[kind])

    @rule(broken=st.booleans())
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
            rng=random.Random(1),  # noqa: S311  # jitter
        )
        world.pool.restore(judge(entries, world.backend.names(), world.config, world.backend.newest, world.watch.now()))
        self.capacity = 3
        self.tickets.clear()
        self.order.clear()
        self.leases = [lease for lease in self.leases if self._is_leased(lease.name)]

    # --- administrators and time --------------------------------------------------------------------------------------

    @rule(size=st.integers(1, 5))
    def resize(self, size: int) -> None:
        self.world.pool.resize(size)
        self.capacity = size

    @rule()
    def drain(self) -> None:
        self.world.pool.drain()
        self.tickets = [ticket for ticket in self.tickets if ticket.offer]

    @rule()
    def resume(self) -> None:
        self.world.pool.resume()

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 10.0, 31.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.world.advance(seconds)
        self.leases = [lease for lease in self.leases if self._is_leased(lease.name) or lease.ticket.ttl is None]

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
    def capacity_is_never_exceeded(self) -> None:
        counts = Counter(info.state for info in self.world.pool.containers(None))
        reserved_or_building = counts[State.RESERVED] + counts[State.BUILDING]
        # A pool made smaller still has what is reserved or being built: that is reaped as it comes back.
        assert counts[State.WARM] + reserved_or_building <= max(self.capacity, reserved_or_building)

    @invariant()
    def every_lease_is_its_holders(self) -> None:
        for lease in self.leases:
            if lease.ticket.ttl is None:
                assert self.world.pool.leased(lease.name, lease.ticket.uid).state is State.LEASED

    @invariant()
    def nobody_waits_while_a_container_is_warm(self) -> None:
        census = self.world.pool.census()
        assert not (census.total("size") and census.total("waiting"))

    @invariant()
    def those_of_one_user_are_served_in_the_order_in_which_they_came(self) -> None:
        for uid in (1000, 1001):
            waiting = [ticket for ticket in self.order if ticket.uid == uid and ticket in self.tickets]
            answered = [ticket.answered for ticket in waiting]
            assert answered == sorted(answered, reverse=True), "somebody was overtaken"

    def teardown(self) -> None:
        """At the end every fault goes away, and with time the pool is whole again and every lease can be ended."""
        world = self.world
        world.journal.broken = False
        world.backend._faults.clear()
        world.pool.resume()
        for ticket in self.tickets:
            world.pool.withdraw(ticket)
            world.pool.abandon(ticket.uid, ticket.request)
        for info in world.pool.containers(None):
            if info.state is State.LEASED:
                world.pool.release(info.name, None)
        world.advance(200)
        counts = Counter(info.state for info in world.pool.containers(None))
        assert counts == {State.WARM: self.capacity}
        assert len(world.backend.present) == self.capacity

    def _is_leased(self, name: str) -> bool:
        return any(info.name == name and info.state is State.LEASED for info in self.world.pool.containers(None))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
