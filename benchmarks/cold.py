"""A container as one gets it without a pool: `lxc-copy`, `lxc-start`."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

from benchmarks import programs
from benchmarks.lab import Lab
from lxc_pool.images.store import Image

_BASE = "busybox"
"""What is copied. The image's path must contain it. Source: storage.c of liblxc 5.0.2."""


class ColdContainers:
    """Makes containers by LXC's own programs, from a base container of the very image that the pool clones.

    Attributes:
        name: The base container's.
        lxcpath: Where it is, once it has been prepared.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.name = _BASE
        self.lxcpath = Path()
        self._numbers = itertools.count(1)

    def prepare(self, image: Image) -> None:
        """Make the base container, which is never started."""
        self.lxcpath = self._lab.lxcpath("cold")
        base = self.lxcpath / _BASE
        base.mkdir()
        settings = {
            "lxc.rootfs.path": f"dir:{image.rootfs}",
            "lxc.uts.name": _BASE,
            "lxc.net.0.type": "empty",
            "lxc.autodev": "1",
            "lxc.tty.max": "0",
            "lxc.mount.auto": "proc:mixed sys:mixed cgroup:mixed",
        }
        (base / "config").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()), encoding="ascii")

    def copy_and_start(self) -> float:
        """Make a container and remove it; return the seconds that the making took, with both programs' own."""
        # It names this process: cgroups of all lxcpaths are side by side.
        name = f"lxpb-{os.getpid()}-{next(self._numbers)}"
        place = ("-P", str(self.lxcpath))
        with self._lab.interrupts.shield(), contextlib.ExitStack() as stack:
            seconds = programs.run("lxc-copy", *place, "-n", _BASE, "-N", name, "-s", "-B", "overlay")
            stack.callback(programs.run, "lxc-destroy", *place, "-n", name, "-f")
            return seconds + programs.run("lxc-start", *place, "-n", name, "-d")
