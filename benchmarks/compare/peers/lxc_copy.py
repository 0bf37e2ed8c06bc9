"""LXC's own programs: `lxc-copy -e` makes an ephemeral container and starts it, `lxc-attach` enters it.

A file is pushed by what reads it from `lxc-attach`'s stdin. `lxc-stop -k` returns once the container is stopped; its
monitor removes it, which is not waited for in a test.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from benchmarks.cold import ColdContainers
from benchmarks.compare.commands import Commands
from benchmarks.compare.peers.ready import Ready, by_commands
from benchmarks.compare.place import Place
from benchmarks.lab import STEP_TIMEOUT, Lab, LabError
from lxc_pool.images.store import Image

_PAUSE = 0.01
"""Seconds between two looks whether the last container has been removed. A guess."""


@contextlib.contextmanager
def ready(lab: Lab, image: Image) -> Iterator[Ready]:
    """Have a base container."""
    base = ColdContainers(lab)
    base.prepare(image)

    def rest() -> None:
        deadline = time.monotonic() + STEP_TIMEOUT
        while len(list(base.lxcpath.iterdir())) > 1:
            if time.monotonic() > deadline:
                raise LabError(f"ephemeral containers are not removed: {[*base.lxcpath.iterdir()]}")
            time.sleep(_PAUSE)  # lxc-copy -e says nothing when its container is gone

    where = ("-P", str(base.lxcpath))
    attach = ("lxc-attach", *where, "-n", "{name}", "--clear-env", "--")
    with Place(lab, "lxc-copy") as place:
        commands = Commands(
            prefix=place.prefix,
            environment=place.environment,
            start=("lxc-copy", *where, "-n", base.name, "-N", "{name}", "-e"),
            run=attach,
            push=(*attach, "tee", "{dst}"),
            push_reads=True,
            remove=("lxc-stop", *where, "-n", "{name}", "-k"),
        )
        yield by_commands(place, commands, rest)
