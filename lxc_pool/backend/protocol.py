"""What the pool asks of a container engine.

Calls may block for as long as the engine does, so they are made in a lane's worker process only; a lane that takes
too long is killed, at any point, and `destroy` has to be able to clean up after that. Nothing here assumes that
containers run
on this host: a cluster of hosts would be one more implementation.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from lxc_pool.config import ProfileConfig
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.images.store import Image


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """A container's place in the pool's network.

    Attributes:
        bridge: What it is connected to.
        port: The name of the connection, on the bridge's side.
        mac: Its hardware address.
        address: Its IPv4 address, with the length of the network's prefix: `10.213.0.7/22`.
        gateway: Where its default route leads.
        resolvers: Whom it asks for names.
        isolated: Whether it is kept from others on the bridge that are isolated, too.
    """

    bridge: str
    port: str
    mac: str
    address: str
    gateway: str
    resolvers: tuple[str, ...]
    isolated: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Blueprint:
    """What a container is to be made of.

    Attributes:
        name: The engine's name for it; the service's own, never a user's.
        deadline: Monotonic time by which it has to be up.
        endpoint: Its place in the pool's network; None: it has none.
    """

    name: str
    profile: ProfileConfig
    image: Image
    deadline: float
    endpoint: Endpoint | None = None


class Backend(Protocol):
    """A container engine. Implementations hold no open resources, so that they can be sent to a worker process."""

    def open(self) -> None:
        """Get a worker process ready for the other calls; called once in each."""

    def prepare(self, image_name: str) -> Image:
        """Return the newest image of that name, building it first if it is one that can be built.

        Raises:
            ImageError: There is none, or it could not be built.
        """

    def collect_images(self, keep: frozenset[str]) -> None:
        """Remove image versions that a newer one has replaced, but for those in use.

        Args:
            keep: The refs of versions that containers are, or are about to be, cloned from.

        Raises:
            ImageError: Some could not be removed.
        """

    def verify_image(self, image: Image, *, gently: bool) -> None:
        """Check that an image is what was made.

        Args:
            image: Which version.
            gently: Stay out of everybody's way, however long it takes.

        Raises:
            ImageError: It has changed, or can't be read.
        """

    def create(self, blueprint: Blueprint) -> ProcessIdentity:
        """Clone, start and probe a container; return its init.

        Raises:
            ImageError: Its image is gone.
            CloneFailed, StartFailed: It is not up; whatever is there of it is left for `destroy`.
        """

    def destroy(self, name: str, *, force: bool) -> None:
        """Stop and remove a container and every trace of it, in whatever state it is; none is as good as gone.

        Args:
            force: Do not ask the engine, which did not manage before: kill its processes.

        Raises:
            DestroyFailed: Something of it is still there.
        """

    def leftovers(self) -> bool:
        """Return whether `destroy` has put something off that `sweep` is to do; as `newest`."""

    def sweep(self) -> None:
        """Remove what `destroy` has put off, for as long as it takes; in a process of its own.

        Raises:
            DestroyFailed: Something is still there; all else is gone.
        """

    def disk_bound(self) -> str:
        """Return, in a word or two, what bounds what a container made now can write to its disk; as `newest`."""

    def newest(self, image_name: str) -> Image | None:
        """Return the newest image of that name that is there; does not block, and may be called in the service.

        Raises:
            ImageError: No image can have that name.
        """

    def log_tail(self, name: str) -> str:
        """Return the last of what the engine logged about a container, empty if nothing; as `newest`."""

    def is_idle(self, name: str) -> bool:
        """Return whether nothing but its init runs in a container; no if that can't be told; as `newest`."""

    def console_log(self, name: str) -> bytes:
        """Return the last of what was written to a container's console, empty if nothing; as `newest`.

        It is as the container wrote it: anything.
        """

    def names(self) -> tuple[str, ...]:
        """Return the names of all containers, whole or not, that are there of this pool; as `newest`."""
