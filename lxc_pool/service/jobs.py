"""The jobs that lanes do, one at a time each, and what comes of them."""

from __future__ import annotations

import dataclasses

from lxc_pool.backend.protocol import Backend, Blueprint
from lxc_pool.errors import BackendError, LxcPoolError
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.images.store import Image


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


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class VerifyJob:
    """Compare an image with its checksum; see `Backend.verify_image`."""

    image: Image
    gently: bool


Job = PrepareJob | CreateJob | DestroyJob | CollectJob | VerifyJob
Outcome = Image | ProcessIdentity | None | LxcPoolError
"""What a job came to: what the backend returned, or the error it raised."""


class LaneBroken(BackendError):
    """The lane's worker died in the middle of the job; the lane has to be replaced."""


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
        case VerifyJob(image, gently):
            backend.verify_image(image, gently=gently)
            return None
