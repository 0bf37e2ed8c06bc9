"""Lanes: where the slow work is done, one job at a time each, in a worker process that can be killed alone.

```
 service ── lane 0 ── Worker ── process: Backend
         ── lane 1 ── Worker ── process: Backend
         …
```

A killed worker breaks its whole executor, so each lane has one of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from lxc_pool.backend.protocol import Backend
from lxc_pool.errors import InternalError
from lxc_pool.host.processes import describe_tree
from lxc_pool.service.jobs import CollectJob, CreateJob, DestroyJob, Job, Outcome, PrepareJob, VerifyJob
from lxc_pool.service.worker import Worker

log = logging.getLogger(__name__)


class Lane(Protocol):
    """Does one job at a time; tests have lanes that do it when told to."""

    def start(self, job: Job, done: Callable[[Outcome], None]) -> None:
        """Begin *job*; call *done* once, from any thread, when it has ended."""

    def diagnose(self, job: Job) -> str:
        """Say what the worker hangs on, for the log."""

    def replace(self) -> None:
        """Kill the worker, whatever it does, and have a new one. The job's *done* may or may not be called.

        Raises:
            OSError: It can't be killed now; nothing has changed.
        """

    def close(self) -> None:
        """End the worker."""


class ProcessLane:
    """A `Lane` with a worker process. `_lock` guards which worker it has, so that none is made once it is closed."""

    def __init__(self, backend: Backend, after_destroy: Callable[[], None] = lambda: None) -> None:
        """Make one.

        Args:
            backend: What the worker works with.
            after_destroy: Called, on the thread that says so, when a container's removal has ended somehow.
        """
        self._after_destroy = after_destroy
        self._backend = backend
        self._lock = threading.Lock()
        self._closed = False
        self._worker: Worker | None = None

    def open(self) -> None:
        """Start the worker; returns at once."""
        self._worker = Worker(self._backend)

    def start(self, job: Job, done: Callable[[Outcome], None]) -> None:
        """See `Lane.start`."""
        worker = self._worker
        if worker is None:
            raise InternalError("the lane is not open")
        worker.start(job, self._then_after_destroy(done) if isinstance(job, DestroyJob) else done)

    def _then_after_destroy(self, done: Callable[[Outcome], None]) -> Callable[[Outcome], None]:
        def both(outcome: Outcome) -> None:
            done(outcome)
            self._after_destroy()

        return both

    def diagnose(self, job: Job) -> str:
        """See `Lane.diagnose`."""
        worker = self._worker
        pid = None if worker is None else worker.pid
        words = "its worker has not come up" if pid is None else describe_tree(pid)
        match job:
            case CreateJob(blueprint):
                return f"{words}; engine's log: {self._backend.log_tail(blueprint.name) or '-'}"
            case DestroyJob(name):
                return f"{words}; engine's log: {self._backend.log_tail(name) or '-'}"
            case PrepareJob() | CollectJob() | VerifyJob():
                return words

    def replace(self) -> None:
        """See `Lane.replace`; does nothing once the lane is closed."""
        with self._lock:
            if self._closed or self._worker is None:
                return
            self._worker.kill()
            try:
                self.open()
            except (OSError, EOFError, RuntimeError) as error:  # no descriptor, process or thread is to be had
                # The next job finds the old one dead, and this is tried again.
                log.warning("a lane's worker can't be started: %s", error)

    def close(self) -> None:
        """End the worker: in order if it is idle, else by force. The lane can't be opened again."""
        with self._lock:
            self._closed = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
