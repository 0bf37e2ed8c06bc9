"""LXD, by its command line, with a daemon of the benchmark's own and its `dir` storage, which needs nothing else.

Containers are privileged: LXD's default, unprivileged ones take about a third longer to start (measured).
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

from benchmarks.compare.commands import Commands
from benchmarks.compare.peers.ready import Ready, archive, by_commands
from benchmarks.compare.place import Place
from benchmarks.lab import STEP_TIMEOUT, Lab
from lxc_pool.images.store import Image

_IMAGE = "lxpb"

_METADATA = f"""\
architecture: {platform.machine()}
creation_date: 1
properties:
  description: busybox
"""
"""What LXD has to know of an image. Source: https://documentation.ubuntu.com/lxd/ (image format)."""


@contextlib.contextmanager
def ready(lab: Lab, image: Image) -> Iterator[Ready]:
    """Have a daemon with the image.

    Raises:
        LabError: It does not start.
    """
    with Place(lab, "lxd") as place:
        place.set(LXD_DIR=f"{place.directory}/lxd", LXD_CONF=f"{place.directory}/client")
        place.start_daemon("lxd", "--group", "root")
        place.run("lxd", "waitready", f"--timeout={STEP_TIMEOUT:.0f}")
        (place.directory / "metadata.yaml").write_text(_METADATA, encoding="ascii")
        place.run("tar", "--create", "--file=metadata.tar", "metadata.yaml")
        place.run("lxc", "storage", "create", "default", "dir")
        place.run("lxc", "profile", "device", "add", "default", "root", "disk", "path=/", "pool=default")
        place.run("lxc", "profile", "set", "default", "security.privileged=true")
        place.run("lxc", "image", "import", "metadata.tar", archive(place, str(image.rootfs)), f"--alias={_IMAGE}")
        commands = Commands(
            prefix=place.prefix,
            environment=place.environment,
            start=("lxc", "launch", _IMAGE, "{name}", "--quiet"),
            run=("lxc", "exec", "{name}", "--disable-stdin", "--force-noninteractive", "--"),
            push=("lxc", "file", "push", "--quiet", "{src}", "{name}{dst}"),
            remove=("lxc", "delete", "--force", "{name}"),
        )
        yield by_commands(place, commands)
