"""A backend for trying lanes: what it does follows from the names it is given. Workers import this module."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

from lxc_pool.backend.protocol import Blueprint
from lxc_pool.errors import DestroyFailed, ImageError
from lxc_pool.host.processes import ProcessIdentity, identify
from lxc_pool.images.store import Image


class TrialBackend:
    """Acts on words; *notes* is a directory in which it leaves what the test wants to know.

    Args:
        notes: The directory.
        gate: A path; the worker is not up before it exists. None: it is up at once.
    """

    def __init__(self, notes: Path, gate: Path | None = None) -> None:
        self.notes = notes
        self.gate = gate

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__dict__.update(state)
        while self.gate is not None and not self.gate.exists():
            time.sleep(0.005)

    def open(self) -> None:
        pass

    def prepare(self, image_name: str) -> Image:
        if image_name == "unknown":
            raise ImageError("no image 'unknown'")
        if image_name == "bug":
            raise KeyError("a bug")
        if image_name == "shortage":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if image_name == "linger":
            time.sleep(3600)
        if image_name == "die":
            os._exit(1)
        return Image(image_name, "1", Path("/nonexistent"), 0, 0.0, str(os.getpid()))

    def collect_images(self, keep: frozenset[str]) -> None:
        pass

    def verify_image(self, image: Image, *, gently: bool) -> None:
        pass

    def create(self, blueprint: Blueprint) -> ProcessIdentity:  # noqa: ARG002  # all are alike
        return identify(os.getpid())

    def destroy(self, name: str, *, force: bool) -> None:
        """Hang, with a child that hangs too, but for the name "gone"."""
        if name == "stuck":
            raise DestroyFailed(f"{name}, {force=}")
        if name == "gone":
            return
        child = subprocess.Popen(["sleep", "infinity"], stdin=subprocess.DEVNULL)
        (self.notes / "partial").write_text(f"{os.getpid()} {child.pid}", encoding="ascii")
        (self.notes / "partial").rename(self.notes / name)
        time.sleep(3600)

    def leftovers(self) -> bool:
        """See `Backend.leftovers`: removed is removed."""
        return False

    def sweep(self) -> None:
        """See `Backend.sweep`."""

    def disk_bound(self) -> str:
        """See `Backend.disk_bound`: there is none."""
        return "none"

    def newest(self, image_name: str) -> Image | None:
        raise NotImplementedError

    def names(self) -> tuple[str, ...]:
        return ()

    def log_tail(self, name: str) -> str:
        return f"the last words of {name}"

    def is_idle(self, name: str) -> bool:
        raise NotImplementedError

    def console_log(self, name: str) -> bytes:
        raise NotImplementedError
