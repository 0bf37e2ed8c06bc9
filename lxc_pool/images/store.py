"""Keep base images on disk: versions that appear complete or not at all, and never change afterwards.

    DIRECTORY/.lock-NAME                          flock: whoever builds or sweeps NAME holds it
    DIRECTORY/NAME/.partial-RANDOM/               a build or removal in progress, or what a killed one left
    DIRECTORY/NAME/VERSION/{rootfs/,manifest.json}

A version directory is renamed into place with its manifest in it, and out of it before anything in it is removed, so
that readers need no lock. Only root may look into DIRECTORY: images may have setuid programs, and foreign content.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import fcntl
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from lxc_pool.errors import ImageError
from lxc_pool.images import init, manifest, tree
from lxc_pool.images.builders import BUILDERS, Builder, Report
from lxc_pool.images.manifest import Image, verify

__all__ = ["Image", "ImageStore", "verify"]

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_VERSION = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{6}")
_PARTIAL = ".partial-"
_DIRECTORY_MODE = 0o711
"""For what the store makes itself, but for its own directory: what is not secret, nobody needs to look around in."""

_STORE_MODE = 0o700
"""For the store's directory. Containers see images through mounts that the host's root makes."""


class ImageStore:
    """The base images in one directory. Threads and processes may share it: see the module for the locks.

    Args:
        directory: Where they are; made when something is first built.
        builders: What can be built, by name; by default those that come with lxc_pool.
    """

    def __init__(self, directory: Path, builders: Mapping[str, Builder] = BUILDERS) -> None:
        self.directory = directory
        self._builders = builders

    def newest(self, name: str) -> Image | None:
        """Return the latest version of *name*, or None if there is no complete one.

        Raises:
            ImageError: No image can have that name.
        """
        directory = self.directory / _checked(name)
        for version in reversed(_versions(directory)):
            image = manifest.load(directory / version)
            if image is not None:
                return image
        return None

    def list(self) -> tuple[Image, ...]:
        """Return every complete image, sorted by name, then oldest first."""
        return tuple(
            image
            for name in self._names()
            for version in _versions(self.directory / name)
            if (image := manifest.load(self.directory / name / version)) is not None
        )

    def ensure(self, name: str, report: Report) -> Image:
        """Return the latest version of *name*; build it if there is none yet.

        Waits, without a limit, while another process builds it, and then takes the other's.

        Args:
            name: The image's name.
            report: Takes one line for each step of a build.

        Raises:
            ImageError: There is none and it can't be built; the message says what there is, and how to build.
        """
        image = self.newest(name)
        if image is not None:
            return image
        self._builder(name)  # an unknown name must not leave a lock file
        with self._building(name):
            return self.newest(name) or self._build(name, report, self._builder(name), "")

    def build(self, name: str, report: Report, builder: Builder | None = None, origin: str = "") -> Image:
        """Build a new version of *name*, after any other build of it has ended.

        Args:
            name: The image's name.
            report: Takes one line for each step.
            builder: What fills it; None: the one that is known by that name.
            origin: What it is made of, in words.

        Raises:
            ImageError: It can't be built; nothing is left of the attempt.
        """
        _checked(name)
        builder = builder or self._builder(name)
        with self._building(name):
            return self._build(name, report, builder, origin)

    def find(self, reference: str) -> tuple[Image, ...]:
        """Return the versions that *reference* names, oldest first: `NAME` names all, `NAME:VERSION` one.

        Raises:
            ImageError: There is none of that name and version.
        """
        name, colon, version = reference.partition(":")
        _checked(name)
        found = tuple(image for image in self.list() if image.name == name and (not colon or image.version == version))
        if not found:
            present = ", ".join(image.ref for image in self.list()) or "none"
            raise ImageError(f"no base image {reference!r} in {self.directory}; images there: {present}")
        return found

    def remove(self, reference: str, in_use: Callable[[], Collection[str]]) -> tuple[Image, ...]:
        """Remove the versions that *reference* names, all or none; see `find`.

        Args:
            reference: Which.
            in_use: Returns the refs of versions that containers are cloned from; called under the image's lock.

        Raises:
            ImageError: There is none, or one is in use: nothing is removed. Or it could not be removed.
        """
        found = self.find(reference)
        with self._building(found[0].name):
            if used := sorted({image.ref for image in found} & set(in_use())):
                raise ImageError(
                    f"{', '.join(used)}: in use by containers, or what the running service makes new ones of; "
                    "build or import a newer version: the service removes old ones once nobody uses them"
                )
            self._discard(found)
        return found

    def collect(self, keep: Collection[str]) -> tuple[Image, ...]:
        """Remove versions that a newer one has replaced and nobody uses; and what interrupted builds left.

        Images that are being built just now are passed over.

        Args:
            keep: The refs of versions that are in use.

        Raises:
            ImageError: Some could not be removed; the rest is.
        """
        removed: tuple[Image, ...] = ()
        failures = []
        for name in self._names():
            try:
                with self._building(name, wait=False):
                    self._sweep(name)
                    versions = [image for image in self.list() if image.name == name]
                    old = tuple(image for image in versions[:-1] if image.ref not in keep)
                    self._discard(old)
                    removed += old
            except BlockingIOError:
                continue  # a live build
            except (ImageError, OSError) as error:
                failures.append(str(error))
        if failures:
            raise ImageError(f"could not remove old images: {'; '.join(failures)}")
        return removed

    def sweep(self) -> tuple[Path, ...]:
        """Remove what interrupted builds left, and return it; builds that are going on are left alone.

        Raises:
            ImageError: Some could not be removed; the rest is.
        """
        removed: tuple[Path, ...] = ()
        failures = []
        for name in self._names():
            try:
                with self._building(name, wait=False):
                    removed += self._sweep(name)
            except BlockingIOError:
                continue  # a live build
            except (ImageError, OSError) as error:
                failures.append(str(error))
        if failures:
            raise ImageError(f"could not remove what interrupted builds left: {'; '.join(failures)}")
        return removed

    def partial(self) -> tuple[Path, ...]:
        """Return what interrupted builds and removals have left; what is going on is not among it. Changes nothing."""
        found: tuple[Path, ...] = ()
        # Where there is nothing, no lock is taken: a collection of old images passes over one that it finds locked.
        for name in [name for name in self._names() if self._partial(name)]:
            with contextlib.ExitStack() as stack:
                try:
                    lock = os.open(self._lock_path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    stack.callback(os.close, lock)
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except FileNotFoundError:
                    pass  # nobody has ever built it
                except BlockingIOError:
                    continue
                found += self._partial(name)
        return found

    def _names(self) -> tuple[str, ...]:
        return tuple(name for name in _entries(self.directory) if _NAME.fullmatch(name))

    def _builder(self, name: str) -> Builder:
        builder = self._builders.get(_checked(name))
        if builder is None:
            present = ", ".join(image.ref for image in self.list()) or "none"
            known = ", ".join(f"lxc-pool image build {other}" for other in sorted({*self._builders, "debian"}))
            raise ImageError(
                f"no base image {name!r} in {self.directory}; images there: {present}; "
                f"to make one: {known}, lxc-pool image import {name} DIR|TAR"
            )
        return builder

    @contextlib.contextmanager
    def _building(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold the lock of *name*, so that nobody else builds it or removes partial builds of it.

        Raises:
            BlockingIOError: It is held by another and *wait* is False.
            ImageError: The directory can't be made or locked.
        """
        try:
            _make_directory(self.directory)
            if self.directory.stat().st_mode & 0o077:
                self.directory.chmod(_STORE_MODE)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open(self._lock_path(name), flags, 0o600)
        except OSError as error:
            raise ImageError(f"can't use the image directory {self.directory}: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child that a builder forked may still hold the descriptor
            os.close(lock)

    def _build(self, name: str, report: Report, builder: Builder, origin: str) -> Image:
        """Build under the lock of *name*."""
        began = time.monotonic()
        report(f"building base image {name}")
        try:
            self._sweep(name)
            _make_directory(self.directory / name)
            partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.directory / name))
            try:
                rootfs = partial / "rootfs"
                rootfs.mkdir()
                rootfs.chmod(0o755)
                builder(rootfs, report)
                image = self._publish(name, partial, origin)
            finally:
                tree.remove(partial)  # after publishing there is nothing of that name
        except OSError as error:
            raise ImageError(f"can't build base image {name!r} in {self.directory}: {error}") from error
        report(f"built {image.ref}, {image.size / 1e6:.1f} MB in {time.monotonic() - began:.2f} s")
        return image

    def _publish(self, name: str, partial: Path, origin: str) -> Image:
        """Measure what *partial* holds, write the manifest and make it a version."""
        created = time.time()
        newest = self.newest(name)
        if newest is not None:
            created = max(created, newest.created + 2e-6)  # even if the clock was set back
        stamp = dt.datetime.fromtimestamp(created, dt.UTC).strftime("%Y%m%d-%H%M%S-%f")
        version = f"{stamp}-{secrets.token_hex(3)}"
        measured = tree.measure(partial / "rootfs")
        final = self.directory / name / version
        probe = init.probe_for(partial / "rootfs")
        image = Image(name, version, final / "rootfs", measured.size, created, measured.checksum, probe, origin)
        manifest.save(partial, image)
        partial.chmod(_DIRECTORY_MODE)
        _sync(partial)
        partial.rename(final)
        return image

    def _discard(self, images: Collection[Image]) -> None:
        """Remove versions, under the lock of their name: first all from sight."""
        doomed = []
        for image in images:
            version = image.rootfs.parent
            doomed.append(version.with_name(f"{_PARTIAL}{image.version}"))
            version.rename(doomed[-1])
            _log.info("removing base image %s", image.ref)
        for directory in doomed:
            tree.remove(directory)

    def _sweep(self, name: str) -> tuple[Path, ...]:
        """Remove partial builds of *name*, under its lock."""
        left = self._partial(name)
        for partial in left:
            _log.info("removing %s, left by an interrupted build", partial)
            tree.remove(partial)
        return left

    def _partial(self, name: str) -> tuple[Path, ...]:
        directory = self.directory / name
        return tuple(directory / entry for entry in _entries(directory) if entry.startswith(_PARTIAL))

    def _lock_path(self, name: str) -> Path:
        return self.directory / f".lock-{name}"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ImageError(f"an image's name is 1 to 63 of a-z 0-9 . _ -, the first a letter or digit, not {name!r}")
    return name


def _entries(directory: Path) -> tuple[str, ...]:
    """Return the names of the directories in *directory*, sorted; none if it isn't one. Links count as nothing."""
    if not tree.is_directory(directory):
        return ()
    with os.scandir(directory) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False)))


def _versions(directory: Path) -> tuple[str, ...]:
    return tuple(entry for entry in _entries(directory) if _VERSION.fullmatch(entry))


def _make_directory(directory: Path) -> None:
    """Make *directory* and its missing parents, whatever the umask; leave existing ones as they are."""
    if not os.path.lexists(directory):
        if not directory.parent.exists():
            _make_directory(directory.parent)
        with contextlib.suppress(FileExistsError):  # another process was first
            directory.mkdir()
            directory.chmod(_DIRECTORY_MODE)
    if not tree.is_directory(directory):
        raise NotADirectoryError(f"{directory} is not a directory of its own")


def _sync(directory: Path) -> None:
    """Write the file system that holds *directory* to disk: a power cut must not leave a manifest with empty files.

    Source: syncfs(2), which the os module lacks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), f"syncfs {directory}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)
