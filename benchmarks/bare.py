"""What the machine can do without a service: processes that make and remove containers, and nothing else.

```
 benchmarks ── pipe: (warm-up, seconds) ──► worker 1 ── LxcBackend.create, destroy, create, …
            ◄── pipe: (cycles, seconds) ──  worker 2 …
```

A worker whose pipe is closed ends, after the cycle that it is in.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import NamedTuple, Self

from benchmarks.lab import STEP_TIMEOUT, Lab, LabError
from lxc_pool import LxcPoolError
from lxc_pool.backend.lxc.engine import LxcBackend
from lxc_pool.backend.protocol import Blueprint
from lxc_pool.config import ProfileConfig
from lxc_pool.images.store import Image

_CREATE_TIMEOUT = 30.0
"""Seconds, as the service has it by default."""


class Order(NamedTuple):
    """Work for so many seconds, of which the first ones do not count."""

    settle: float
    seconds: float


class Work(NamedTuple):
    """What a worker did, or the error that ended it; durations of each creation and removal, in seconds."""

    creations: list[float]
    removals: list[float]
    seconds: float
    error: str | None = None


class BareLoop:
    """The workers. `with` starts them, and ends them."""

    def __init__(self, lab: Lab, image: Image, workers: int) -> None:
        self._lab = lab
        self._image = image
        self._count = workers
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._creations: list[float] = []
        self._removals: list[float] = []

    def __enter__(self) -> Self:
        backend = LxcBackend(self._lab.lxcpath("bare/containers").parent)
        # Not forked: this process has threads, and a worker of the service's is no copy of one either.
        context = multiprocessing.get_context("spawn")
        for number in range(self._count):
            with self._lab.interrupts.shield():
                ours, theirs = context.Pipe()
                name = f"lxpb-{os.getpid()}-bare{number}"
                worker = context.Process(target=_work, args=(theirs, backend, self._image, name), daemon=True)
                worker.start()
                theirs.close()
                self._workers.append((worker, ours))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _worker, connection in self._workers:
            connection.close()
        for worker, _connection in self._workers:
            worker.join(STEP_TIMEOUT)
            if worker.is_alive():
                worker.kill()
                worker.join()

    def block(self, settle: float, seconds: float) -> float:
        """Let all work at once for *seconds*, after *settle* seconds that do not count; return the cycles a second."""
        for _worker, connection in self._workers:
            with contextlib.suppress(BrokenPipeError):  # it has died: the next read says so
                connection.send(Order(settle, seconds))
        rate = 0.0
        for _worker, connection in self._workers:
            if not connection.poll(settle + seconds + STEP_TIMEOUT):
                raise LabError("a worker of the bare loop hangs")
            try:
                work: Work = connection.recv()
            except (EOFError, ConnectionError) as error:
                raise LabError("a worker of the bare loop has died; its error is above") from error
            if work.error is not None:
                raise LabError(f"the bare loop failed: {work.error}")
            self._creations += work.creations
            self._removals += work.removals
            rate += len(work.removals) / work.seconds
        return rate

    def durations(self) -> tuple[list[float], list[float]]:
        """Return the seconds that each creation and each removal took, of all blocks."""
        return self._creations, self._removals


def _work(connection: Connection, backend: LxcBackend, image: Image, name: str) -> None:
    """Be a worker."""
    # Ctrl-C reaches the whole process group; when to end is for the parent to say.
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    number = 0
    with contextlib.suppress(EOFError, BrokenPipeError):
        backend.open()
        while True:
            order: Order = connection.recv()
            work = Work([], [], 0.0)
            try:
                settled = time.monotonic() + order.settle
                begin = end = time.monotonic()
                while end < settled + order.seconds and not connection.poll():
                    number += 1
                    durations = _cycle(backend, image, f"{name}-{number}")
                    end = time.monotonic()
                    if end - sum(durations) < settled:
                        begin = end
                        continue
                    work.creations.append(durations[0])
                    work.removals.append(durations[1])
                work = work._replace(seconds=max(end - begin, 1e-9))
            except (LxcPoolError, OSError) as error:
                work = work._replace(error=str(error))
            connection.send(work)


def _cycle(backend: LxcBackend, image: Image, name: str) -> tuple[float, float]:
    begin = time.monotonic()
    deadline = begin + _CREATE_TIMEOUT
    backend.create(Blueprint(name, ProfileConfig("default", 1), image, deadline))
    made = time.monotonic()
    backend.destroy(name, force=False)
    return made - begin, time.monotonic() - made
