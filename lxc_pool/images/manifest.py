"""One version of a base image, and the manifest that describes it on disk."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lxc_pool.errors import ImageError
from lxc_pool.images import tree

_log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_VERIFIED = "verified.json"
_FORMAT = 1
"""Of the manifest; one that is written otherwise gets the next number."""


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """One version of a base image, complete and immutable.

    Attributes:
        rootfs: The directory that containers are cloned from.
        size: Bytes in its regular files.
        created: When it was built, in seconds since the epoch; a later version of the same name is later here.
        checksum: Over the whole tree when it was built; see `verify`.
        probe: What has to succeed in a container before it counts as warm, unless its profile says otherwise; empty:
            that its init runs is enough.
        origin: What it was made of, in words.
    """

    name: str
    version: str
    rootfs: Path
    size: int
    created: float
    checksum: str
    probe: tuple[str, ...] = ()
    origin: str = ""

    @property
    def ref(self) -> str:
        """Return `name:version`."""
        return f"{self.name}:{self.version}"


def load(directory: Path) -> Image | None:
    """Return the image in the version directory *directory*; None, and a warning, if it is not one of ours."""
    try:
        fields: dict[str, Any] = json.loads((directory / _MANIFEST).read_bytes())
        if fields["format"] != _FORMAT:
            raise ValueError(f"the manifest's format is {fields['format']!r}, not {_FORMAT}")
        if (fields["name"], fields["version"]) != (directory.parent.name, directory.name):
            raise ValueError("the manifest is another image's")
        image = Image(
            name=fields["name"],
            version=fields["version"],
            rootfs=directory / "rootfs",
            size=int(fields["size"]),
            created=float(fields["created"]),
            checksum=str(fields["checksum"]),
            # Older manifests have neither.
            probe=tuple(str(word) for word in fields.get("probe", ())),
            origin=str(fields.get("origin", "")),
        )
        if not tree.is_directory(image.rootfs):
            raise ValueError("there is no rootfs directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("ignoring %s, which is no complete base image: %r", directory, error)
        return None
    return image


def save(directory: Path, image: Image) -> None:
    """Write the manifest of *image* into *directory*, complete or not at all.

    Raises:
        OSError: It can't be written.
    """
    fields = {"format": _FORMAT, **dataclasses.asdict(image)}
    del fields["rootfs"]  # where the store is, not what the image is: a store may be moved
    temporary = directory / f"{_MANIFEST}.new"
    temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    temporary.chmod(0o644)
    temporary.rename(directory / _MANIFEST)


def verify(image: Image, read: Callable[[int], None] = lambda _size: None) -> None:
    """Check that the tree of *image* is what was built; *read* is told of the bytes so far, as by `tree.measure`.

    Raises:
        ImageError: It has changed, or can't be read.
    """
    try:
        measured = tree.measure(image.rootfs, read)
    except OSError as error:
        raise ImageError(f"can't read base image {image.ref}: {error}") from error
    problem = None
    if measured.checksum != image.checksum:
        problem = (
            f"base image {image.ref} has changed since it was built ({measured.checksum}, not {image.checksum}); "
            "make a new version of it (lxc-pool image build, or import), and remove this one"
        )
    _record(image.rootfs.parent, problem)
    if problem is not None:
        raise ImageError(problem)


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """How it ended when an image was last compared with its checksum.

    Attributes:
        time: When, in seconds since the epoch.
        problem: What was wrong; None: nothing.
    """

    time: float
    problem: str | None


def last_verification(image: Image) -> Verification | None:
    """Return how the last `verify` of *image* ended; None if there was none."""
    try:
        fields = json.loads((image.rootfs.parent / _VERIFIED).read_bytes())
        return Verification(float(fields["time"]), fields["problem"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record(directory: Path, problem: str | None) -> None:
    """Write down beside the manifest how a verification ended; without that, it was one all the same."""
    temporary = directory / f"{_VERIFIED}.new-{os.getpid()}"
    try:
        temporary.write_text(json.dumps({"time": time.time(), "problem": problem}) + "\n", encoding="utf-8")
        temporary.rename(directory / _VERIFIED)
    except OSError as error:
        _log.warning("can't write down that %s was verified: %s", directory, error)
