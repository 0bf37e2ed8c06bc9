"""Whether images are still what was made: each version is compared with its checksum once in a service's life.

A small one before anything is cloned from it, in milliseconds; a large one beside that, when a lane has nothing better
to do. What has changed is refused until somebody makes a new version, or says that it is to be looked at again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from lxc_pool.images.store import Image

_SMALL: Final = 32 << 20
"""Bytes of an image that containers wait for. A guess: busybox's 2 MB take 6 to 12 ms, a Debian's 204 MiB 1.1 s
(measured on a busy machine)."""

_PATIENCE: Final = 60.0
"""Seconds that a large one waits for a lane without work; then it is the next. A guess."""


class ImageCheck:
    """Which versions have been looked at; everything with the pool's lock held.

    Attributes:
        refused: What is wrong with those that have changed, by their ref.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.refused: dict[str, str] = {}
        self._now = now
        self._known: set[str] = set()
        self._due: dict[str, tuple[Image, float]] = {}
        self._under_way: str | None = None
        self._suspects: set[str] = set()

    @property
    def busy(self) -> frozenset[str]:
        """The refs of what is to be looked at, or is being: it has to stay."""
        return frozenset(self._due) | ({self._under_way} if self._under_way else frozenset())

    def learn(self, image: Image) -> None:
        """Take note that containers are going to be made of *image*."""
        if image.ref not in self._known:
            self._known.add(image.ref)
            self._due[image.ref] = (image, self._now() + _PATIENCE)

    def permits(self, image: Image) -> bool:
        """Return whether containers may be made of *image* now."""
        return image.ref not in self.refused and not (self.comes_first(image) and image.ref in self.busy)

    def take(self, *, idle: bool) -> Image | None:
        """Return what is to be looked at now, if there is something, and take it as begun; one at a time.

        Args:
            idle: Whether the lane has nothing else to do.
        """
        if self._under_way is not None:
            return None
        for image, patience in self._due.values():
            if idle or self.comes_first(image) or patience <= self._now():
                self._under_way = image.ref
                del self._due[image.ref]
                return image
        return None

    def settle(self, image: Image, problem: str | None) -> None:
        """Take note of how it ended: None: it is what was made."""
        self._under_way = None
        if problem is not None:
            self.refused[image.ref] = problem

    def postpone(self, image: Image) -> None:
        """Take note that it could not be looked at: its lane was killed, say. It is tried again later."""
        self._under_way = None
        self._due[image.ref] = (image, self._now() + _PATIENCE)

    def look_again(self) -> None:
        """Forget what was refused: somebody may have mended it."""
        self._known -= self.refused.keys()
        self._suspects |= self.refused.keys()
        self.refused.clear()

    def comes_first(self, image: Image) -> bool:
        """Return whether containers wait until it has been looked at."""
        return image.size <= _SMALL or image.ref in self._suspects
