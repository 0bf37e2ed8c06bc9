"""What lxc_pool is compared with: each module makes a peer ready to be used by a test's commands.

A peer's daemon, where it has one, is the benchmark's own, in a directory of its own, told to leave the machine's
network alone; so is its image, which is imported from the root file system of the pool's busybox image.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

from benchmarks import programs
from benchmarks.compare.peers import docker, lxc_copy, lxd, podman
from benchmarks.compare.peers.ready import Ready
from benchmarks.lab import Lab
from lxc_pool.images.store import Image


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """One way to a fresh system.

    Attributes:
        title: Its name, in words.
        programs: What it needs.
        packages: Debian's packages that have them.
        version: The program that tells its version, with `--version`.
        target: How many times as long as with lxc_pool a test has to take, at least.
        open: Make it ready, in a lab, with systems of this image.
    """

    title: str
    programs: tuple[str, ...]
    packages: str
    version: str
    target: float
    open: Callable[[Lab, Image], AbstractContextManager[Ready]]

    @property
    def missing(self) -> str:
        """Why it can't be measured: which programs are not there, and how to get them; empty if it can."""
        path = programs.ENVIRONMENT["PATH"]
        absent = [program for program in self.programs if shutil.which(program, path=path) is None]
        return f"not installed: no {', '.join(absent)} (apt-get install {self.packages})" if absent else ""


PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "lxc-copy": Peer("lxc-copy -e", ("lxc-copy", "lxc-attach", "lxc-stop"), "lxc", "lxc-copy", 3, lxc_copy.ready),
        "docker": Peer("Docker", ("docker", "dockerd"), "docker.io", "dockerd", 5, docker.ready),
        "podman": Peer("Podman", ("podman", "conmon"), "podman runc", "podman", 5, podman.ready),
        "lxd": Peer("LXD launch", ("lxd", "lxc"), "lxd lxd-client", "lxd", 5, lxd.ready),
    }
)
"""By the name that `--peers` takes, in the order in which they are measured."""
