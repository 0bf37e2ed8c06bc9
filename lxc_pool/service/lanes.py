"""Lanes: where the slow work is done, one job at a time each, in a worker process that can be killed alone.

```
 service ── lane 0 ── ProcessPoolExecutor(max_workers=1) ── worker: Backend
         ── lane 1 ── ProcessPoolExecutor(max_workers=1) ── worker: Backend
         …
```

A killed worker breaks its whole executor, so each lane has one of its own. Workers are forked from a single-threaded
server process (`forkserver`) that has imported the backend already, so that a killed lane is replaced in milliseconds.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

from lxc_pool.backend.protocol import Backend, Blueprint
from lxc_pool.errors import BackendError, InternalError, LxcPoolError
from lxc_pool.host.processes import ProcessIdentity, describe_tree, die_at_end_of, kill_tree
from lxc_pool.images.store import Image

log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""How the service and its workers, which share its stderr, write their log."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PrepareJob:
    """See to it that an image is there."""

    image: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class CreateJob:
    """Clone, start and probe a container."""

    blueprint: Blueprint


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DestroyJob:
    """Stop and remove a container."""

    name: str
    force: bool


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class CollectJob:
    """Remove images that have been replaced; see `Backend.collect_images`."""

    keep: frozenset[str]


Job = PrepareJob | CreateJob | DestroyJob | CollectJob
Outcome = Image | ProcessIdentity | None | LxcPoolError
"""What a job came to: what the backend returned, or the error it raised."""


_KILL_TIMEOUT = 5.0
"""Seconds that a killed worker has to end, when its lane is closed. A guess: it takes a millisecond."""


class LaneBroken(BackendError):
    """The lane's worker died in the middle of the job; the lane has to be replaced."""


class Lane(Protocol):
    """Does one job at a time; tests have lanes that do it when told to."""

    def start(self, job: Job, done: Callable[[Outcome], None]) -> None:
        """Begin *job*; call *done* once, from any thread, when it has ended."""

    def diagnose(self, job: Job) -> str:
        """Say what the worker hangs on, for the log."""

    def replace(self) -> None:
        """Kill the worker, whatever it does, and have a new one. The job's *done* may or may not be called."""

    def close(self) -> None:
        """End the worker."""


class ProcessLane:
    """A `Lane` with a worker process. `_lock` guards which executor it has, so that none is made once it is closed."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._closed = False
        self._executor: ProcessPoolExecutor | None = None
        self._pid: Future[int] | None = None
        self._job: Future[Outcome] | None = None

    def open(self) -> None:
        """Start the worker; returns at once."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lxc_pool.service.lanes", type(self._backend).__module__])
        _start_fork_server()
        self._executor = ProcessPoolExecutor(1, context, initializer=_prepare_worker, initargs=(self._backend,))
        self._pid = self._executor.submit(os.getpid)

    def start(self, job: Job, done: Callable[[Outcome], None]) -> None:
        """See `Lane.start`."""
        try:
            if self._executor is None:
                raise InternalError("the lane is not open")
            future = self._job = self._executor.submit(_work, job)
        except (BrokenProcessPool, RuntimeError) as error:
            done(LaneBroken(f"the lane's worker is gone: {error}"))
            return
        future.add_done_callback(functools.partial(_report, done))

    def diagnose(self, job: Job) -> str:
        """See `Lane.diagnose`."""
        pid = self._pid
        known = pid is not None and pid.done() and not pid.cancelled() and pid.exception() is None
        words = describe_tree(pid.result()) if pid is not None and known else "its worker has not come up"
        match job:
            case CreateJob(blueprint):
                return f"{words}; engine's log: {self._backend.log_tail(blueprint.name) or '-'}"
            case DestroyJob(name):
                return f"{words}; engine's log: {self._backend.log_tail(name) or '-'}"
            case PrepareJob() | CollectJob():
                return words

    def replace(self) -> None:
        """See `Lane.replace`; does nothing once the lane is closed."""
        with self._lock:
            if self._closed or self._executor is None:
                return
            self._kill()
            self._executor.shutdown(wait=False, cancel_futures=True)
            self.open()

    def close(self) -> None:
        """End the worker: in order if it is idle, else by force. The lane can't be opened again."""
        with self._lock:
            self._closed = True
            executor, self._executor = self._executor, None
        if executor is None:
            return
        if self._job is not None and not self._job.done():
            self._kill()  # whoever is told now that the lane broke must not open it again
            # Its thread has to let go of its semaphores: after `stop_fork_server` nobody would count those. A worker
            # that hangs in the kernel does not end.
            end = functools.partial(executor.shutdown, cancel_futures=True)
            rest = threading.Thread(target=end, name="lane-end", daemon=True)
            rest.start()
            rest.join(_KILL_TIMEOUT)
        else:
            executor.shutdown(wait=True, cancel_futures=True)

    def _kill(self) -> None:
        if self._pid is not None:
            self._pid.add_done_callback(_kill_worker)  # at once, or as soon as it is known


def _start_fork_server() -> None:
    """Start the process that workers are forked from, unless it runs, with SIGTERM and SIGHUP blocked, and so are they.

    The signal may come to all processes at once: from systemd with its `KillMode=control-group`, or to a process group.
    When to end is for the service to say; without the fork server it would take all workers for dead.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        multiprocessing.resource_tracker.ensure_running()  # it ignores SIGTERM, and unblocks that here when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_fork_server() -> None:
    """End the process that workers are forked from, once all lanes are closed; it would end a little after us."""
    gc.collect()  # replaced executors are in cycles; their semaphores have to go before the tracker that counts them
    # Nothing public ends these two; both functions are in Python 3.11 to 3.14, and the next lane starts them anew.
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]  # noqa: SLF001  # see above
    multiprocessing.resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # noqa: SLF001  # see above


def _kill_worker(pid: Future[int]) -> None:
    if not pid.cancelled() and pid.exception() is None:
        kill_tree(pid.result(), timeout=0)


def _report(done: Callable[[Outcome], None], future: Future[Outcome]) -> None:
    """Turn what the executor says into an outcome; runs on the executor's thread."""
    if future.cancelled():
        done(LaneBroken("the lane was replaced before the job began"))
        return
    error = future.exception()
    if error is None:
        done(future.result())
    elif isinstance(error, BrokenProcessPool):
        # From another thread: this one may hold the executor's lock (Python 3.12.1 and later), and who is told replaces
        # the lane, which takes that lock too.
        broken = LaneBroken(f"the lane's worker died: {error}")
        threading.Thread(target=done, args=(broken,), name="lane-broken", daemon=True).start()
    elif isinstance(error, LxcPoolError):
        done(error)
    else:
        log.error("a job failed in a way that it should not", exc_info=error)
        done(InternalError(f"{type(error).__name__}: {error}"))


_backend: Backend | None = None
"""The worker's backend; set once in each worker process."""


def _prepare_worker(backend: Backend) -> None:
    global _backend  # noqa: PLW0603  # a worker's initializer has no other place to leave it
    # Ctrl-C reaches the whole process group; when to end is for the service to say. SIGTERM and SIGHUP are
    # blocked from birth.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    service = multiprocessing.parent_process()
    if service is not None:
        die_at_end_of(service.sentinel)  # the fork server then ends too
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    backend.open()
    _backend = backend


def _work(job: Job) -> Outcome:
    """Do one job; runs in the worker."""
    if _backend is None:
        raise InternalError("the worker has no backend")
    return perform(_backend, job)


def perform(backend: Backend, job: Job) -> Outcome:
    """Let *backend* do *job*.

    Raises:
        LxcPoolError: It failed.
    """
    match job:
        case PrepareJob(image):
            return backend.prepare(image)
        case CreateJob(blueprint):
            return backend.create(blueprint)
        case DestroyJob(name, force):
            backend.destroy(name, force=force)
            return None
        case CollectJob(keep):
            backend.collect_images(keep)
            return None
