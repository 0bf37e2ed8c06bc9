"""A lane's worker: a process that does one job after another, and can be killed alone.

```
 lane ── Worker ── ProcessPoolExecutor(max_workers=1) ── the process: one task, that lasts as long as it does
             └──── socket: job, outcome, job, … ──────── the task: Backend
```

The executor has the process: it starts it, notices its death, and ends it. Jobs do not go through its queues, which are
three threads and two pipes to pass, and take 0.4 ms of CPU and as much of waiting of a container's 17 (measured).

Workers are forked from a single-threaded server process (`forkserver`) that has imported the backend already, so that a
killed one is replaced in milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from lxc_pool.backend.protocol import Backend
from lxc_pool.errors import InternalError, LxcPoolError
from lxc_pool.host import semaphores
from lxc_pool.host.processes import ProcessIdentity, die_at_end_of, identify, kill_tree
from lxc_pool.service.jobs import Job, LaneBroken, Outcome, perform
from lxc_pool.service.shortage import as_shortage

log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""How the service and its workers, which share its stderr, write their log."""

_KILL_TIMEOUT = 5.0
"""Seconds that a killed worker has to end, when its lane is closed. A guess: it takes a millisecond."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Bug:
    """A job failed in a way that it should not: the error, and where it was."""

    error: str
    traceback: str


class Worker:
    """The service's end. Does one job at a time; `_lock` guards who is told of it."""

    def __init__(self, backend: Backend) -> None:
        """Start the process; returns at once."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, type(backend).__module__])
        start_fork_server()
        self._lock = threading.Lock()
        self._ended = False
        self._done: Callable[[Outcome], None] | None = None
        self._channel, theirs = context.Pipe()
        with theirs:
            self._executor = ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(backend, theirs))
            self._process = self._executor.submit(_identify)
        self._reader = threading.Thread(target=self._read, name="lane", daemon=True)
        self._reader.start()
        self._executor.submit(_work).add_done_callback(self._hang_up)

    @property
    def busy(self) -> bool:
        """Whether it has a job."""
        with self._lock:
            return self._done is not None

    @property
    def pid(self) -> int | None:
        """The process's number, once that has come up."""
        known = self._process.done() and not self._process.cancelled() and self._process.exception() is None
        return self._process.result().pid if known else None

    def start(self, job: Job, done: Callable[[Outcome], None]) -> None:
        """Begin *job*; call *done* once, from any thread, when it has ended, or the worker has."""
        with self._lock:
            ended = self._ended
            if not ended:
                self._done = done
        if ended:
            done(LaneBroken("the lane's worker has died"))
        else:
            # Not before it is up: one that is killed as soon as it is, must not have found a job.
            self._process.add_done_callback(functools.partial(self._send, job))

    def kill(self) -> None:
        """Kill the process and its children: at once, or as soon as it is up.

        Raises:
            OSError: They can't be looked for, as when no descriptor is left: to be tried again.
        """
        if self._process.done():
            _kill(self._process)
        else:
            self._process.add_done_callback(_kill)  # should that fail: it ends when it finds nobody to work for
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self.pid is None:
            self._hang_up()

    def close(self) -> None:
        """End the process: in order if it is idle, else by force; and wait for that."""
        if not self.busy:
            self._send(None)
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._reader.join()
            return
        self._process.add_done_callback(_kill)
        # The executor's thread has to let go of its semaphores: after `stop_fork_server` nobody would count those. A
        # worker that hangs in the kernel does not end.
        end = functools.partial(self._executor.shutdown, cancel_futures=True)
        rest = threading.Thread(target=end, name="lane-end", daemon=True)
        rest.start()
        rest.join(_KILL_TIMEOUT)

    def _send(self, job: Job | None, _process: object = None) -> None:
        with self._lock, contextlib.suppress(OSError):  # it has died: the reader says so
            if not self._ended:
                self._channel.send(job)

    def _read(self) -> None:
        """Pass on what comes, until the process has ended."""
        with self._channel:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    self._report(self._channel.recv())
            with self._lock:
                self._ended = True
        self._report(LaneBroken("the lane's worker died"))

    def _report(self, outcome: Outcome | _Bug) -> None:
        with self._lock:
            done, self._done = self._done, None
        if isinstance(outcome, _Bug):
            log.error("a job failed in a way that it should not: %s\n%s", outcome.error, outcome.traceback)
            outcome = InternalError(outcome.error)
        if done is not None:
            done(outcome)

    def _hang_up(self, _task: object = None) -> None:
        """Let the reader come to the end, whoever else has the other one: the process has ended."""
        with self._lock:
            if not self._ended:
                end = socket.socket(fileno=self._channel.fileno())  # no duplicate: there may be no descriptor left
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.detach()


def start_fork_server() -> None:
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


@contextlib.contextmanager
def fork_server_in(directory: Path, prefix: str) -> Iterator[None]:
    """Let what the fork server and the executors of this process put on the host be found there after a SIGKILL.

    The fork server has its socket in *directory*, and not in a temporary one of its own; the names of the executors'
    semaphores carry *prefix*, that of the service's containers. What an earlier service has left of those is removed.
    At the end the fork server is ended: all lanes have to be closed then.

    Raises:
        OSError: *directory* can't be opened, or what was left can't be removed.
    """
    semaphores.remove(prefix)
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    # Nothing public says where; it is so in Python 3.4 to 3.14 (Lib/multiprocessing: util.py, get_temp_dir, and
    # synchronize.py, SemLock._make_name). By this name, the socket's path is short enough however long the directory's.
    place: dict[str, object] = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # noqa: SLF001
    semprefix = place["semprefix"]
    place.update(tempdir=f"/proc/self/fd/{descriptor}", semprefix=semaphores.name_prefix(prefix))
    try:
        yield
    finally:
        stop_fork_server()
        del place["tempdir"]
        place["semprefix"] = semprefix
        os.close(descriptor)


def stop_fork_server() -> None:
    """End the process that workers are forked from, once all lanes are closed; it would end a little after us."""
    gc.collect()  # replaced executors are in cycles; their semaphores have to go before the tracker that counts them
    # Nothing public ends these two; both functions are in Python 3.11 to 3.14, and the next lane starts them anew.
    with contextlib.suppress(FileNotFoundError):  # its socket has been removed together with the host dir
        multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]  # noqa: SLF001  # see above
    multiprocessing.resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # noqa: SLF001  # see above


def _kill(process: Future[ProcessIdentity]) -> None:
    if not process.cancelled() and process.exception() is None:
        kill_tree(process.result(), timeout=0)


_equipment: tuple[Backend, Connection, ProcessIdentity] | None = None
"""What the process works with, where its jobs come from, and who it is; set once in each."""


def _prepare(backend: Backend, channel: Connection) -> None:
    """Set the process up; runs in it."""
    global _equipment  # noqa: PLW0603  # a worker's initializer has no other place to leave it
    # Ctrl-C reaches the whole process group; when to end is for the service to say. SIGTERM and SIGHUP are
    # blocked from birth.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    service = multiprocessing.parent_process()
    if service is not None:
        die_at_end_of(service.sentinel)  # the fork server then ends too
    os.set_inheritable(channel.fileno(), False)  # what came over a socket is; source: CPython, Modules/socketmodule.c
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    backend.open()
    # Here, so that a process that can't say who it is, for want of descriptors, does not come up.
    _equipment = backend, channel, identify(os.getpid())


def _identify() -> ProcessIdentity:
    """Say who this is; runs in the process."""
    if _equipment is None:
        raise InternalError("the worker is not set up")
    return _equipment[2]


def _work() -> None:
    """Do jobs until there are no more; runs in the process."""
    if _equipment is None:
        raise InternalError("the worker has no backend")
    backend, channel, _identity = _equipment
    with channel, contextlib.suppress(EOFError, ConnectionError):
        while (job := channel.recv()) is not None:
            channel.send(_attempt(backend, job))


def _attempt(backend: Backend, job: Job) -> Outcome | _Bug:
    try:
        return perform(backend, job)
    except LxcPoolError as error:
        return error
    except Exception as error:  # noqa: BLE001  # a shortage, or our bug: the service is told, and the worker goes on
        return as_shortage(error) or _Bug(f"{type(error).__name__}: {error}", traceback.format_exc())
