"""Wait until a container has its network, whoever configures it: liblxc before its init runs, or its image after."""

from __future__ import annotations

import select
import time

from lxc_pool.host import addresses
from lxc_pool.host.netlink import Observer

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.25
"""Seconds between two looks at least; twice as long each time. Root of a container may change its network as fast as it
likes, and have many wait for it. Guesses: what an image does at its start is over after a few changes."""


class NetworkWait:
    """One caller's wait.

    Attributes:
        observer: Readable after each change that may matter.
        missing: What is missing yet, in words; empty: nothing.
        addresses: What the container has.
    """

    def __init__(self, end: int, pid: int) -> None:
        """Begin it; close it soon.

        Args:
            end: A descriptor that is readable once the container's init has ended.
            pid: Of that.

        Raises:
            OSError: The container can't be looked into; ProcessLookupError: it has ended.
        """
        self._end = end
        self._pid = pid
        self._looked = 0.0
        self._pause = _FIRST_PAUSE
        self.observer = Observer(pid)
        self.missing = ""
        self.addresses: tuple[str, ...] = ()

    def look(self) -> bool:
        """Return whether the network is there now.

        Raises:
            ProcessLookupError: The container has ended.
            ValueError: There is nothing to wait for.
        """
        if self._looked:
            time.sleep(max(0.0, self._looked + self._pause - time.monotonic()))
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self.observer.drain()  # before looking: what changes after it, wakes us again
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        if poll.poll(0):  # before looking, too: it dies before it loses its devices
            raise ProcessLookupError(self._pid)
        self.missing = self._missing()
        self._looked = time.monotonic()
        return not self.missing

    def close(self) -> None:
        """End it."""
        self.observer.close()

    def _missing(self) -> str:
        try:
            links = self.observer.links()
        except OSError as error:
            return f"its network devices can't be listed: {error}"
        if not links:
            raise ValueError(
                'the container has no network device but loopback: that takes a profile with network = "bridge"'
            )
        if not any(links.values()):
            return f"none of its network devices is up and connected: {', '.join(map(ascii, sorted(links)))}"
        self.addresses = addresses.of_process(self._pid)
        if not self.addresses:
            return "it has no address"
        if not any(links.get(device) for device in addresses.default_routes(self._pid)):
            return "it has no default route over a device that is up"
        return ""
