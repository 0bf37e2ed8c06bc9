"""A backend whose containers are processes with a file each: they outlive their worker, as real ones do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from lxc_pool.backend.protocol import Blueprint
from lxc_pool.errors import CloneFailed
from lxc_pool.host.processes import ProcessIdentity, identify
from lxc_pool.images.store import Image

IMAGE = Image(name="busybox", version="1", rootfs=Path("/nonexistent"), size=0, created=0.0, checksum="process")


class ProcessBackend:
    """See `Backend`. *directory* has a file for each container, with its init's pid in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self) -> None:
        pass

    def prepare(self, image_name: str) -> Image:  # noqa: ARG002  # there is just one
        return IMAGE

    def collect_images(self, keep: frozenset[str]) -> None:
        pass

    def verify_image(self, image: Image, *, gently: bool) -> None:
        pass

    def create(self, blueprint: Blueprint) -> ProcessIdentity:
        path = self.directory / blueprint.name
        try:
            path.touch(exist_ok=False)
        except FileExistsError as error:
            raise CloneFailed(f"{blueprint.name} is there already") from error
        # The shell ends at once: its child is nobody's, as a container's monitor is, and holds nothing of the worker's.
        started = subprocess.run(
            ["sh", "-c", "sleep infinity >/dev/null 2>&1 & echo $!"],
            env={"PATH": os.environ["PATH"]},  # what has the service's is the service's own, see `host.own_processes`
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            check=True,
        )
        pid = int(started.stdout)
        path.write_text(str(pid), encoding="ascii")
        return identify(pid)

    def destroy(self, name: str, *, force: bool) -> None:  # noqa: ARG002  # there is no engine to be asked first
        path = self.directory / name
        if not path.exists():
            return
        if text := path.read_text(encoding="ascii"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(text), signal.SIGKILL)
        path.unlink()

    def leftovers(self) -> bool:
        """See `Backend.leftovers`: removed is removed."""
        return False

    def sweep(self) -> None:
        """See `Backend.sweep`."""

    def disk_bound(self) -> str:
        """See `Backend.disk_bound`: there is none."""
        return "none"

    def newest(self, image_name: str) -> Image | None:  # noqa: ARG002  # there is just one
        return IMAGE

    def log_tail(self, name: str) -> str:
        return f"{name} is a process"

    def is_idle(self, name: str) -> bool:  # noqa: ARG002  # nothing else ever runs in mere processes
        return True

    def console_log(self, name: str) -> bytes:  # noqa: ARG002  # mere processes have none
        return b""

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in self.directory.iterdir()))
