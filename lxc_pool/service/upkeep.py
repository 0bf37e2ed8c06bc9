"""Upkeep: what the lanes are to do next, and what follows from what they did.

Runs on the dispatcher's thread (`dispatch`), the lanes' (`_done`) and the watchdog's (`_overdue`, `_retry`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Sequence

from lxc_pool.backend.protocol import Blueprint
from lxc_pool.config import Config
from lxc_pool.errors import BackendError, ImageError, LxcPoolError
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.images.store import Image
from lxc_pool.model import State
from lxc_pool.service.addresses import AddressBook
from lxc_pool.service.image_check import ImageCheck
from lxc_pool.service.jobs import CollectJob, CreateJob, DestroyJob, Job, LaneBroken, Outcome, PrepareJob, VerifyJob
from lxc_pool.service.lanes import Lane
from lxc_pool.service.lifecycle import Member
from lxc_pool.service.lull import Lull
from lxc_pool.service.shelf import Shelf
from lxc_pool.service.stock import Stock
from lxc_pool.service.watchdog import Timer, Watch, Watched

log = logging.getLogger(__name__)

_KILL_AGAIN = 1.0
"""Seconds after which killing a lane is tried again. A guess."""

_DESTROY_PAUSES = (0.1, 0.5, 2.0, 10.0, 60.0)
"""Seconds until a failed removal is tried again, by how often it has failed; the last one for ever after. Guesses."""

_OWN_DEADLINE = 0.9
"""Of the time that a creation may take, how much the engine has before it should give up by itself: it can say why,
while a lane that is killed can't. A guess."""

_ROOM_PAUSE = 2.0
"""Seconds until it is looked again whether an obstacle is gone. A guess: "within seconds" is what the pool promises."""


class JobTimeout(LxcPoolError):
    """A job took longer than it may; its lane was killed."""


@dataclasses.dataclass(slots=True, eq=False)
class Slot:
    """A lane and what it does; guarded by the pool's lock."""

    lane: Lane
    job: Job | None = None
    timer: Timer | None = None


class Upkeep:
    """Keep every lane busy with what is needed most.

    Attributes:
        config: Deadlines; may be replaced, with the lock held.
        check: What is known of the images' checksums.
    """

    def __init__(
        self,
        config: Config,
        stock: Stock,
        lanes: Sequence[Lane],
        watch: Watch,
        *,
        new_name: Callable[[], str],
        obstacle: Callable[[int], str | None],
        addresses: AddressBook,
        before: Callable[[], None],
        image_ready: Callable[[Shelf, Image], None],
        image_refused: Callable[[Image], None],
        came_up: Callable[[Member], None],
        failed: Callable[[Member], None],
        init_died: Callable[[str], None],
        is_idle: Callable[[str], bool],
        awaited: Callable[[], bool],
    ) -> None:
        """Make it; nothing happens before the first `dispatch`.

        Args:
            config: Deadlines; may be replaced, with the lock held.
            stock: What is decided about.
            lanes: Who does the work; opened and closed by the caller.
            watch: The clock, and who notices deaths.
            new_name: Returns a name that no container has or had.
            obstacle: Returns why nothing can be created now, if that is so, given the bytes that have to be free.
            addresses: Where containers' addresses are from.
            before: Called, with the lock held, before it is decided what is to be done next.
            image_ready: Called, with the lock held, for an image that has been prepared.
            image_refused: Called, with the lock held, for one that has changed since it was made.
            came_up: Called, with the lock held, for a container that is up and watched.
            failed: Called, with the lock held, for one that is not.
            init_died: Called when the init of a container has ended.
            is_idle: Returns whether nothing but its init runs in a container; called without the lock.
            awaited: Returns, with the lock held, whether somebody waits until the pool is full.
        """
        self.config = config
        self._stock = stock
        self._watch = watch
        self._new_name = new_name
        self._obstacle = obstacle
        self._obstructed = False
        self._addresses = addresses
        self._before = before
        self._image_ready = image_ready
        self._image_refused = image_refused
        self.check = ImageCheck(watch.now)
        self._came_up = came_up
        self._failed = failed
        self._init_died = init_died
        self._is_idle = is_idle
        self._lull = Lull(watch, stock.wake, awaited)
        self._turns = itertools.count(1)
        self._collection_due = True
        self._slots = [Slot(lane) for lane in lanes]

    def dispatch(self) -> None:
        """Give every idle lane what is to be done next."""
        obstacle = self._obstacle(self.config.min_free)
        self._look_at_released()
        while (pick := self._choose(obstacle)) is not None:
            slot, job = pick
            about_images = isinstance(job, (PrepareJob, CollectJob, VerifyJob))
            timeout = self.config.image_timeout if about_images else self.config.create_timeout
            if isinstance(job, CreateJob):
                timeout += job.blueprint.profile.probe_timeout or 0.0
            timer = self._watch.call_at(self._watch.now() + timeout, functools.partial(self._overdue, slot, job))
            with self._stock.lock:
                if slot.job is job:
                    slot.timer = timer
            slot.lane.start(job, functools.partial(self._done, slot, job))

    def _choose(self, obstacle: str | None) -> tuple[Slot, Job] | None:
        """Take one idle lane and the job for it; None if there is no such pair."""
        with self._stock.lock:
            slot = next((slot for slot in self._slots if slot.job is None), None)
            if slot is None:
                return None
            slot.job = self._next_job(obstacle)
            return None if slot.job is None else (slot, slot.job)

    def _next_job(self, obstacle: str | None) -> Job | None:
        """Choose: somebody waits → create; else remove what is to be removed; else create; else look at images.

        While containers are asked for, what of that can wait is put off; see `Lull`.
        """
        stock, now = self._stock, self._watch.now()
        shelves = [] if stock.closed or stock.draining else list(stock.shelves.values())
        if shelves:
            self._before()
        for shelf in shelves:
            if shelf.wants_image(now):
                shelf.preparing = shelf.profile.image
                shelf.look_again = False
                return PrepareJob(shelf.profile.image)
        if shelves and (verification := self._begin_verification(idle=False)):
            return verification
        wanting = [
            shelf
            for shelf in shelves
            if shelf.wants_container(now) and shelf.image is not None and self.check.permits(shelf.image)
        ]
        if wanting and obstacle is not None:
            self._await_room(obstacle, now, wanting)
            wanting = []
        wanting.sort(key=lambda shelf: shelf.turn)
        for shelf in wanting:
            if shelf.waiters and (creation := self._begin_creation(shelf, now)):
                return creation
        put_off = self._lull.is_to_come(shelves)
        if (member := self._to_remove(put_off=put_off)) is not None:
            del stock.to_reap[member.name]
            return DestroyJob(member.name, force=member.retries > 0)
        if put_off and (wanting or stock.to_reap):
            self._lull.look_for_it(shelves)
            wanting = [shelf for shelf in wanting if not shelf.has_plenty]
        if wanting:
            return self._begin_creation(wanting[0], now)
        return (self._begin_verification(idle=True) if shelves else None) or self._begin_collection()

    def _to_remove(self, *, put_off: bool) -> Member | None:
        """Return the container that is to be removed next, and not in the next lull if what can wait is *put_off*."""
        stock = self._stock
        for member in stock.to_reap.values():
            if not put_off or not self._lull.can_wait(member) or not stock.shelf_of(member).has_plenty:
                return member
        return None

    def _look_at_released(self) -> None:
        """Find out in which released containers nothing runs, so that their removal can wait."""
        with self._stock.lock:
            unknown = [
                member
                for member in self._stock.to_reap.values()
                if member.wait_until is None and self._lull.can_wait(member)
            ]
            if not unknown or not self._lull.is_to_come(tuple(self._stock.shelves.values())):
                return
        idle = [self._is_idle(member.name) for member in unknown]
        with self._stock.lock:
            for member, runs_nothing in zip(unknown, idle, strict=True):
                self._lull.put_off(member, idle=runs_nothing)

    def _begin_verification(self, *, idle: bool) -> VerifyJob | None:
        """Have an image compared with its checksum, if one is due; see `ImageCheck`."""
        image = self.check.take(idle=idle)
        return None if image is None else VerifyJob(image, gently=not self.check.comes_first(image))

    def _begin_collection(self) -> CollectJob | None:
        """Have old images removed, if there may be one that nobody uses any more."""
        if not self._collection_due or any(shelf.preparing is not None for shelf in self._stock.shelves.values()):
            return None
        self._collection_due = False
        images = {shelf.image.ref for shelf in self._stock.shelves.values() if shelf.image is not None}
        images |= self.check.busy
        return CollectJob(frozenset(images | {member.image for member in self._stock.members.values()}))

    def _await_room(self, obstacle: str, now: float, wanting: Sequence[Shelf]) -> None:
        """Look again in a while; nothing tells when a disk has room again."""
        if not self._obstructed:
            self._obstructed = True
            self._stock.note_error(obstacle, *wanting)
            log.warning("nothing is created: %s", obstacle)
            self._watch.call_at(now + _ROOM_PAUSE, self._look_again)

    def _look_again(self) -> None:
        self._obstructed = False
        self._stock.wake()

    def _begin_creation(self, shelf: Shelf, now: float) -> CreateJob | None:
        assert shelf.image is not None, "a shelf without an image wants no container"
        member = Member(self._new_name(), shelf.profile.name, shelf.image.ref, shelf.recipe, now)
        try:
            member.endpoint = self._addresses.take(member.name, shelf.profile)
        except BackendError as error:
            self._stock.note_error(str(error), shelf)
            self._back_off(shelf)
            return None
        try:
            self._stock.announce(member)
        except BackendError:
            self._addresses.give_back(member.name)
            self._back_off(shelf)
            return None
        shelf.turn = next(self._turns)
        deadline = now + _OWN_DEADLINE * self.config.create_timeout
        return CreateJob(Blueprint(member.name, shelf.profile, shelf.image, deadline, member.endpoint))

    def _done(self, slot: Slot, job: Job, outcome: Outcome) -> None:
        """Take in what a job came to."""
        if isinstance(outcome, LaneBroken):
            claimed = self._claim(slot, job)
            if claimed is not None:
                self._replace_lane(slot, claimed, outcome)
            return
        self._take_in(slot, job, outcome)

    def _take_in(self, slot: Slot, job: Job, outcome: Outcome) -> None:
        """Take in what came of a job that nothing more is heard of."""
        init: Watched | None = None
        if isinstance(job, CreateJob) and isinstance(outcome, ProcessIdentity):
            name = job.blueprint.name
            try:
                init = self._watch.watch(outcome, functools.partial(self._init_died, name))
            except ProcessLookupError:
                outcome = LxcPoolError(f"{name} came up and went down at once")
            except OSError as error:
                outcome = LxcPoolError(f"{name} came up, but can't be watched: {error}")
        with self._stock.lock:
            if slot.job is not job:  # its time was up meanwhile, and that has been dealt with
                if init is not None:
                    self._watch.forget(init)
                return
            if init is not None and isinstance(job, CreateJob) and self._stock.members[job.blueprint.name].lost:
                self._watch.forget(init)
                init, outcome = None, LxcPoolError(f"{job.blueprint.name} came up and went down at once")
            slot.job = None
            if slot.timer is not None:
                slot.timer.cancel()
                slot.timer = None
            self._settle(job, outcome, init)
        self.dispatch()  # here and not on the dispatcher's thread: a fifth of the service's CPU time (measured)

    def _overdue(self, slot: Slot, job: Job) -> None:
        """Give up on a job whose time is up."""
        claimed = self._claim(slot, job)
        if claimed is None:
            return
        try:
            found = slot.lane.diagnose(job)
        except Exception as error:  # noqa: BLE001  # whatever keeps us from looking must not keep the lane
            found = f"what it hangs on can't be seen: {error}"
        log.warning("a lane hangs in %s; it is killed and replaced; %s", _describe(job), found)
        timeout = JobTimeout(f"{_describe(job)} took longer than allowed and was killed")
        self._replace_lane(slot, claimed, timeout)

    def _replace_lane(self, slot: Slot, claimed: Job, outcome: Outcome) -> None:
        """Replace a lane, now or as soon as that is possible, and then take in what came of its job."""
        try:
            slot.lane.replace()
        except OSError as error:  # no descriptor is to be had, say
            log.warning("a lane can't be killed now: %s; it is tried again", error)
            again = functools.partial(self._replace_lane, slot, claimed, outcome)
            self._watch.call_at(self._watch.now() + _KILL_AGAIN, again)
            return
        self._take_in(slot, claimed, outcome)

    def _claim(self, slot: Slot, job: Job) -> Job | None:
        """Take a job on, to replace its lane; return what stands for it from now on, None if it has ended meanwhile.

        Whatever the old worker still says of it comes too late then: that its job failed because its child was killed,
        say, or that it died itself, for which the new worker would be killed, with the next job that it has.
        """
        with self._stock.lock:
            if slot.job is not job:
                return None
            slot.job = dataclasses.replace(job)
            return slot.job

    def _settle(self, job: Job, outcome: Outcome, init: Watched | None) -> None:
        """Move what the job was about to where it belongs now. With the lock held."""
        if isinstance(outcome, LxcPoolError):
            self._stock.note_error(str(outcome), *self._concerned(job))
            log.warning("%s failed: %s", _describe(job), outcome)
        match job:
            case PrepareJob():
                for shelf in self._concerned(job):
                    self._settle_prepared(shelf, outcome)
            case CreateJob(blueprint):
                (shelf,) = self._concerned(job)
                if isinstance(outcome, ImageError) and shelf.image is blueprint.image:
                    shelf.image = None  # it is gone: look for it again
                self._settle_created(self._stock.members[blueprint.name], outcome, init)
            case DestroyJob(name):
                self._settle_destroyed(self._stock.members[name], outcome)
            case CollectJob():
                pass  # what it failed at, the next one tries again
            case VerifyJob(image):
                self._settle_verified(image, outcome)

    def _concerned(self, job: Job) -> list[Shelf]:
        """Return the shelves that a job is to make something for."""
        match job:
            case PrepareJob(image):
                return [shelf for shelf in self._stock.shelves.values() if shelf.preparing == image]
            case CreateJob(blueprint):
                return [self._stock.shelf_of(self._stock.members[blueprint.name])]
            case VerifyJob(image):
                return [shelf for shelf in self._stock.shelves.values() if shelf.image and shelf.image.ref == image.ref]
            case DestroyJob() | CollectJob():
                return []

    def _settle_prepared(self, shelf: Shelf, outcome: Outcome) -> None:
        prepared, shelf.preparing = shelf.preparing, None
        if shelf.profile.image != prepared:
            return  # the configuration has changed meanwhile
        if isinstance(outcome, Image):
            self._collection_due = True
            shelf.backoff.succeed()
            self.check.learn(outcome)
            self._image_ready(shelf, outcome)
        elif shelf.image is None:
            self._back_off(shelf)

    def _settle_verified(self, image: Image, outcome: Outcome) -> None:
        if not isinstance(outcome, LxcPoolError):
            self.check.settle(image, None)
            log.info("image %s is what was made", image.ref)
        elif isinstance(outcome, ImageError):
            self.check.settle(image, str(outcome))
            self._image_refused(image)
        else:
            self.check.postpone(image)

    def _settle_created(self, member: Member, outcome: Outcome, init: Watched | None) -> None:
        shelf = self._stock.shelf_of(member)
        if init is not None and member.image in self.check.refused:
            self._watch.forget(init)
            self._failed(member)
            return
        if init is None:
            self._back_off(shelf)
            if isinstance(outcome, (LaneBroken, JobTimeout)):
                member.retries = 1  # the engine may hang over it again: remove it by force
            self._failed(member)
            return
        shelf.backoff.succeed()
        shelf.last_error = None
        member.init = init
        member.since = self._watch.now()
        self._came_up(member)

    def _settle_destroyed(self, member: Member, outcome: Outcome) -> None:
        if isinstance(outcome, LxcPoolError):
            pause = _DESTROY_PAUSES[min(member.retries, len(_DESTROY_PAUSES) - 1)]
            member.retries += 1
            member.reason = str(outcome)
            self._stock.move(member, State.STUCK)
            self._watch.call_at(self._watch.now() + pause, functools.partial(self._retry, member))
        else:
            self._addresses.give_back(member.name)
            image = self._stock.shelf_of(member).image
            self._stock.drop(member)
            self._collection_due |= image is None or image.ref != member.image

    def _retry(self, member: Member) -> None:
        with self._stock.lock:
            if member.state is State.STUCK:
                self._stock.move(member, State.REAPING)

    def _back_off(self, shelf: Shelf) -> None:
        self._watch.call_at(shelf.backoff.fail(self._watch.now()), self._stock.wake)


def _describe(job: Job) -> str:
    match job:
        case PrepareJob(image):
            return f"preparing image {image!r}"
        case CreateJob(blueprint):
            return f"creating {blueprint.name}"
        case DestroyJob(name):
            return f"removing {name}"
        case CollectJob():
            return "removing old images"
        case VerifyJob(image):
            return f"verifying image {image.ref}"
