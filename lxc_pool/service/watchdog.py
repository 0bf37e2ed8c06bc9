"""One thread that notices: the death of a process, and the coming of a time. It detects; the pool decides.

```
 watchdog thread ── epoll ┬─ pidfds of owners and of container inits (readable when the process ends)
                          ├─ an eventfd (a nearer timer was set, or the watchdog is closed)
                          └─ timeout: the nearest timer
```

Nothing is polled where the kernel has pidfds: an idle service does not wake up. Elsewhere `host.ends` polls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Protocol

from lxc_pool.host.ends import open_end, send
from lxc_pool.host.processes import ProcessIdentity

log = logging.getLogger(__name__)

_LONGEST_WAIT = 86400.0
"""Seconds of one wait at most; after that it looks again. epoll_wait(2) counts milliseconds in 32 bits."""

_CROWD = 256
"""Timers from which on cancelled ones are weeded out. A guess: few enough to be nothing, many enough to be rare."""


@dataclasses.dataclass(slots=True)
class Timer:
    """A callback that is due at a time, unless it is cancelled before."""

    when: float
    callback: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        """Let the callback not be called, if it has not been yet."""
        self.cancelled = True


@dataclasses.dataclass(slots=True)
class Watched:
    """A process that is watched.

    Attributes:
        descriptor: Its pidfd, or what `open_end` has in its place, open until `Watch.forget`.
    """

    identity: ProcessIdentity
    descriptor: int
    callback: Callable[[], None]


class Watch(Protocol):
    """What the pool needs of a watchdog; tests have one with a clock of their own."""

    def now(self) -> float:
        """Return the monotonic time in seconds."""

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call *callback* once at *when*."""

    def watch(self, identity: ProcessIdentity, callback: Callable[[], None]) -> Watched:
        """Call *callback* once when the process ends.

        Raises:
            ProcessLookupError: It has ended already.
            OSError: It can't be watched: there is no descriptor left, say.
        """

    def end(self, watched: Watched) -> None:
        """Kill a watched process; not an error if it has ended. To be called before it is forgotten."""

    def forget(self, watched: Watched) -> None:
        """Stop watching; not an error if the process has ended, or it is forgotten already."""


class Watchdog:
    """The real `Watch`.

    Shared by all threads of the service. `_lock` guards `_timers`, `_crowd` and `_watched`. Callbacks run on the
    watchdog's thread, without the lock, and must be brief.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._crowd = _CROWD
        self._watched: dict[int, Watched] = {}
        self._closing = False
        self._next_wake = float("inf")
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Start the thread."""
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and forget everything."""
        if self._thread is None or self._epoll is None:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._epoll.close()
        os.close(self._wake)
        for watched in list(self._watched.values()):
            self.forget(watched)
        self._thread = None

    def now(self) -> float:
        """See `Watch.now`."""
        return time.monotonic()

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """See `Watch.call_at`."""
        timer = Timer(when, callback)
        with self._lock:
            if len(self._timers) >= self._crowd:
                # Cancelled ones leave by themselves when their time comes; for a lease's ttl that may be in a day.
                self._timers = [entry for entry in self._timers if not entry[2].cancelled]
                heapq.heapify(self._timers)
                self._crowd = max(_CROWD, 2 * len(self._timers))
            heapq.heappush(self._timers, (when, next(self._order), timer))
            nearer = when < self._next_wake
        if nearer:
            os.eventfd_write(self._wake, 1)
        return timer

    def watch(self, identity: ProcessIdentity, callback: Callable[[], None]) -> Watched:
        """See `Watch.watch`."""
        watched = Watched(identity, open_end(identity), callback)
        with self._lock:
            self._watched[watched.descriptor] = watched
        assert self._epoll is not None, "the watchdog is not open"
        try:
            self._epoll.register(watched.descriptor, select.EPOLLIN | select.EPOLLONESHOT)
        except OSError:  # the kernel is short of memory, or of watches for this user
            self.forget(watched)
            raise
        return watched

    def end(self, watched: Watched) -> None:
        """See `Watch.end`."""
        send(signal.SIGKILL, watched.identity, watched.descriptor)

    def forget(self, watched: Watched) -> None:
        """See `Watch.forget`."""
        with self._lock:
            if self._watched.get(watched.descriptor) is not watched:
                return
            del self._watched[watched.descriptor]
        # Closing the descriptor takes it out of the epoll set; a callback that is on its way finds it forgotten.
        with contextlib.suppress(OSError):
            os.close(watched.descriptor)

    def _run(self) -> None:
        assert self._epoll is not None
        while not self._closing:
            for descriptor, _event in self._epoll.poll(self._timeout()):
                if descriptor == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                    continue
                with self._lock:
                    watched = self._watched.get(descriptor)
                # An event can be older than the process that has its descriptor's number now: look again.
                if watched is not None and _readable(descriptor):
                    self._call(watched.callback)
            for timer in self._due():
                if not timer.cancelled:
                    self._call(timer.callback)

    def _timeout(self) -> float | None:
        with self._lock:
            while self._timers and self._timers[0][2].cancelled:
                heapq.heappop(self._timers)
            self._next_wake = self._timers[0][0] if self._timers else float("inf")
            if not self._timers:
                return None
            return min(_LONGEST_WAIT, max(0.0, self._next_wake - time.monotonic()))

    def _due(self) -> list[Timer]:
        now = time.monotonic()
        due = []
        with self._lock:
            while self._timers and self._timers[0][0] <= now:
                due.append(heapq.heappop(self._timers)[2])
        return due

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:  # one callback's bug must not end the watching of everything else
            log.exception("a watchdog callback failed")


def _readable(descriptor: int) -> bool:
    poll = select.poll()  # select(2) can't take descriptors of 1024 and above
    poll.register(descriptor, select.POLLIN)
    return any(event & select.POLLIN for _descriptor, event in poll.poll(0))
