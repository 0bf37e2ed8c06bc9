"""Containers that exist in memory only, and fail, hang or dawdle when told to, for tests."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lxc_pool.backend.protocol import Blueprint
from lxc_pool.errors import CloneFailed, ImageError, LxcPoolError
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.images.store import Image

Step = Literal["prepare", "verify", "clone", "start", "probe", "stop", "destroy"]


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong in one step.

    Attributes:
        delay: Seconds that the step takes; infinite: it hangs.
        error: What it ends with; None: it succeeds after all.
    """

    delay: float = 0.0
    error: LxcPoolError | None = None


HANG = Fault(delay=math.inf)


class MemoryBackend:
    """A `Backend` without an engine. Not thread-safe.

    Attributes:
        running: The init of every container that is up.
        present: The names of all containers, up or not.
        history: Every step that was begun, with the container's or image's name.
        consoles: What is in each container's console log, by its name.
        idle: The names of containers in which nothing but their inits runs.
        versions: The images that there are, each with the number of its newest version.
        kept: What the last collection of images had to keep; None: there was none.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Make an empty one; *sleep* is called for delays, with infinity for a hang."""
        self.running: dict[str, ProcessIdentity] = {}
        self.present: set[str] = set()
        self.history: list[tuple[Step, str]] = []
        self.consoles: dict[str, bytes] = {}
        self.idle: set[str] = set()
        self.versions = {"busybox": 1}
        self.kept: frozenset[str] | None = None
        self._sleep = sleep
        self._faults: dict[Step, deque[Fault]] = defaultdict(deque)
        self._pids = itertools.count(1_000_000)

    def script(self, step: Step, *faults: Fault) -> None:
        """Let the next times that *step* is reached go wrong like this, one fault each."""
        self._faults[step].extend(faults)

    def publish(self, image_name: str) -> None:
        """Let there be a new version of an image."""
        self.versions[image_name] = self.versions.get(image_name, 0) + 1

    def open(self) -> None:
        """See `Backend.open`."""

    def prepare(self, image_name: str) -> Image:
        """See `Backend.prepare`; nothing is built."""
        self._reach("prepare", image_name)
        image = self.newest(image_name)
        if image is None:
            raise ImageError(f"there is no image {image_name!r}")
        return image

    def collect_images(self, keep: frozenset[str]) -> None:
        """See `Backend.collect_images`; there is nothing to remove."""
        self.kept = keep

    def verify_image(self, image: Image, *, gently: bool) -> None:  # noqa: ARG002  # there is nobody in the way
        """See `Backend.verify_image`; it has changed if the test says so."""
        self._reach("verify", image.ref)

    def create(self, blueprint: Blueprint) -> ProcessIdentity:
        """See `Backend.create`."""
        name = blueprint.name
        if name in self.present:
            raise CloneFailed(f"{name} is there already")
        self._reach("clone", name)
        self.present.add(name)
        self._reach("start", name)
        self.running[name] = ProcessIdentity("memory", next(self._pids), 1)
        self._reach("probe", name)
        return self.running[name]

    def destroy(self, name: str, *, force: bool) -> None:  # noqa: ARG002  # there is no engine to be asked first
        """See `Backend.destroy`."""
        if name not in self.present:
            return
        self._reach("stop", name)
        self.running.pop(name, None)
        self._reach("destroy", name)
        self.present.remove(name)

    def leftovers(self) -> bool:
        """See `Backend.leftovers`: removed is removed."""
        return False

    def sweep(self) -> None:
        """See `Backend.sweep`."""

    def disk_bound(self) -> str:
        """See `Backend.disk_bound`: there is none."""
        return "none"

    def newest(self, image_name: str) -> Image | None:
        """See `Backend.newest`."""
        version = self.versions.get(image_name)
        if version is None:
            return None
        return Image(image_name, str(version), rootfs=Path("/nonexistent"), size=0, created=0.0, checksum="memory")

    def log_tail(self, name: str) -> str:
        """See `Backend.log_tail`."""
        return f"{name} in memory"

    def is_idle(self, name: str) -> bool:
        """See `Backend.is_idle`."""
        return name in self.idle

    def console_log(self, name: str) -> bytes:
        """See `Backend.console_log`."""
        return self.consoles.get(name, b"")

    def names(self) -> tuple[str, ...]:
        """See `Backend.names`."""
        return tuple(sorted(self.present))

    def _reach(self, step: Step, name: str) -> None:
        self.history.append((step, name))
        fault = self._faults[step].popleft() if self._faults[step] else Fault()
        if fault.delay:
            self._sleep(fault.delay)
        if fault.error is not None:
            raise fault.error
