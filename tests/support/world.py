"""A pool on the memory backend whose time and processes are the test's: no threads, no sleeps."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable

from lxc_pool.backend.memory import MemoryBackend
from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import BackendError, LxcPoolError
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.model import ContainerInfo, LeaseId, State
from lxc_pool.service.jobs import Job, Outcome, perform
from lxc_pool.service.ledger import Entry
from lxc_pool.service.lull import LULL
from lxc_pool.service.pool import Pool
from lxc_pool.service.waiters import Ticket
from lxc_pool.service.watchdog import Timer, Watched


class FakeWatch:
    """A `Watch` whose clock goes on when told to, and whose processes die when told to."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.timers: list[Timer] = []
        self.watched: list[Watched] = []
        self.dead: set[ProcessIdentity] = set()

    def now(self) -> float:
        return self.time

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(when, callback)
        self.timers.append(timer)
        return timer

    def watch(self, identity: ProcessIdentity, callback: Callable[[], None]) -> Watched:
        if identity in self.dead:
            raise ProcessLookupError(identity.pid)
        watched = Watched(identity, -1, callback)
        self.watched.append(watched)
        return watched

    def forget(self, watched: Watched) -> None:
        self.watched = [other for other in self.watched if other is not watched]

    def end(self, watched: Watched) -> None:
        self.dead.add(watched.identity)

    def kill(self, identity: ProcessIdentity) -> None:
        """Let a process die; whoever watches it is told."""
        self.dead.add(identity)
        for watched in [watched for watched in self.watched if watched.identity == identity]:
            watched.callback()

    def pop_due(self) -> Timer | None:
        """Take the earliest timer that is due now."""
        self.timers = [timer for timer in self.timers if not timer.cancelled]
        due = [timer for timer in self.timers if timer.when <= self.time]
        if not due:
            return None
        first = min(due, key=lambda timer: timer.when)
        self.timers.remove(first)
        return first

    def next_time(self) -> float:
        return min((timer.when for timer in self.timers if not timer.cancelled), default=math.inf)


class MemoryJournal:
    """A ledger in memory, that fails when told to."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.broken = False
        self._look: Callable[[Entry], None] = lambda _entry: None

    def watch(self, look: Callable[[Entry], None]) -> None:
        """Have *look* called, with the pool's lock held, for each entry that is about to be written."""
        self._look = look

    def write(self, entry: Entry) -> None:
        self._look(entry)
        if self.broken:
            raise BackendError("the ledger can't be written: disk full")
        self.entries[entry.name] = entry

    def erase(self, name: str) -> None:
        if self.broken:
            raise BackendError("the ledger can't be written: disk full")
        del self.entries[name]

    def intend(self, entry: Entry) -> None:
        self.write(entry)

    def settle(self) -> None:
        pass


class HungError(Exception):
    """The job would never end."""


class MemoryLane:
    """A `Lane` that does its job at once, and says so when the delays of its backend are over."""

    def __init__(self, backend: MemoryBackend, watch: FakeWatch) -> None:
        self.replaced = 0
        self._backend = backend
        self._watch = watch
        self._generation = 0
        self._slept = 0.0
        backend._sleep = self.sleep

    def sleep(self, seconds: float) -> None:
        if math.isinf(seconds):
            raise HungError
        self._slept += seconds

    def start(self, job: Job, done: Callable[[Outcome], None]) -> None:
        self._slept = 0.0
        self._backend._sleep = self.sleep
        try:
            outcome = perform(self._backend, job)
        except LxcPoolError as error:
            outcome = error
        except HungError:
            return
        report = functools.partial(self._report, self._generation, done, outcome)
        self._watch.call_at(self._watch.now() + self._slept, report)

    def diagnose(self, job: Job) -> str:
        return f"{job} hangs"

    def replace(self) -> None:
        self._generation += 1
        self.replaced += 1

    def close(self) -> None:
        pass

    def _report(self, generation: int, done: Callable[[Outcome], None], outcome: Outcome) -> None:
        if generation == self._generation:
            done(outcome)


class World:
    """A pool, its backend, its lanes and its clock."""

    def __init__(self, size: int | Config = 3, workers: int = 2, **profiles: int) -> None:
        """Make them for a default profile of that size, for *profiles* of those sizes, or for a configuration."""
        if isinstance(size, Config):
            self.config = size
        else:
            self.config = Config(
                profiles=tuple(ProfileConfig(*item) for item in (profiles or {"default": size}).items()),
                workers=workers,
                create_timeout=30.0,
            )
        self.watch = FakeWatch()
        self.backend = MemoryBackend()
        self.journal = MemoryJournal()
        self.lanes = [MemoryLane(self.backend, self.watch) for _ in range(self.config.workers)]
        numbers = itertools.count(1)
        self.pool = Pool(
            self.config,
            self.lanes,
            self.watch,
            self.journal,
            new_name=lambda: f"c{next(numbers)}",
            wake=lambda: None,
            is_idle=self.backend.is_idle,
            rng=random.Random(1),  # noqa: S311  # jitter
        )
        self._requests = itertools.count(1)

    # --- time ---------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let everything happen that happens without time going on."""
        while True:
            self.pool.dispatch()
            timer = self.watch.pop_due()
            if timer is None:
                return
            timer.callback()

    def advance(self, seconds: float) -> None:
        """Let *seconds* go by, with everything that happens in them."""
        end = self.watch.time + seconds
        self.settle()
        while (when := self.watch.next_time()) <= end:
            self.watch.time = max(when, self.watch.time)
            self.settle()
        self.watch.time = end

    def rest(self) -> None:
        """Let nobody ask for anything until the shelves are being filled again, and all happen that happens then."""
        self.settle()
        self.advance(LULL)

    # --- callers ------------------------------------------------------------------------------------------------------

    def process(self, pid: int = 100) -> ProcessIdentity:
        """Return a client's process."""
        return ProcessIdentity("world", pid, 1)

    def ask(
        self,
        identity: LeaseId = "job",
        *,
        uid: int = 1000,
        profile: str = "default",
        pid: int = 100,
        ttl: float | None = None,
        request: str | None = None,
        session: object = "session",
    ) -> Ticket:
        """Ask for a container, as a client's `get` does first."""
        ticket = Ticket(
            request=request or f"r{next(self._requests)}",
            uid=uid,
            profile=profile,
            id=identity,
            owner=self.process(pid),
            ttl=ttl,
            session=session,
            notify=lambda: None,
        )
        self.pool.request(ticket)
        return ticket

    def lease(self, identity: LeaseId = "job", **kwargs: object) -> ContainerInfo:
        """Get a container that is there, in both steps."""
        ticket = self.ask(identity, **kwargs)  # type: ignore[arg-type]  # passed through as they are
        assert ticket.offer is not None, "none was warm"
        info = self.pool.confirm(ticket.uid, ticket.request)
        assert info is not None
        return info

    # --- what there is ------------------------------------------------------------------------------------------------

    def count(self, state: State) -> int:
        """Return how many containers are in *state*."""
        return sum(info.state is state for info in self.pool.containers(None))

    def names(self, state: State) -> list[str]:
        """Return the names of the containers in *state*."""
        return [info.name for info in self.pool.containers(None) if info.state is state]
