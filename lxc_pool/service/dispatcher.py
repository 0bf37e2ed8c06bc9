"""One thread that hands the pool's decisions to the lanes, so that nobody who asks for a container waits for that."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Dispatcher:
    """Call *work* after each `wake`; several wakes before it runs are one."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._due = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Let the work be done soon; callable from any thread, with any lock held."""
        self._due.set()

    def close(self) -> None:
        """End the thread once the work under way is done."""
        if self._thread is not None:
            self._closing = True
            self._due.set()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._closing:
                return
            try:
                self._work()
            except Exception:  # a bug in one decision must not end all refilling
                log.exception("the dispatcher failed")
