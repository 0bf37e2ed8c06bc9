"""What boots an image: its /sbin/init, looked up as a container would see it, and how to tell that it has come up."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lxc_pool.errors import ImageError

_MOST_LINKS = 40
"""Links on the way to one file, as in the kernel. Source: path_resolution(7)."""

SYSTEMD_PROBE = ("sh", "-c", "case $(systemctl is-system-running --wait) in running | degraded) ;; *) exit 1 ;; esac")
"""Succeeds once systemd has started everything, whether or not all of it came up. Source: systemctl(1)."""


def check_bootable(rootfs: Path) -> None:
    """Check that there is an init: a container of the pool boots as a machine does.

    Raises:
        ImageError: There is none that is executable.
    """
    init = resolve(rootfs, "/sbin/init")
    if init is None or not init.stat().st_mode & 0o111 or not stat.S_ISREG(init.stat().st_mode):
        raise ImageError(
            "there is no /sbin/init in it: containers of a pool boot their own; install one into it first "
            "(Debian: systemd-sysv; Alpine has busybox's)"
        )


def probe_for(rootfs: Path) -> tuple[str, ...]:
    """Return the command that tells that a container of this image is up; empty: its init's running is enough."""
    init = resolve(rootfs, "/sbin/init")
    return SYSTEMD_PROBE if init is not None and init.name == "systemd" else ()


def resolve(rootfs: Path, path: str) -> Path | None:
    """Return the file that *path* is for who has *rootfs* as its root; None: there is none.

    Nobody may change the tree meanwhile.
    """
    pending = [part for part in path.split("/") if part not in ("", ".")]
    here = rootfs
    links = 0
    while pending:
        part = pending.pop(0)
        if part == "..":
            here = here.parent if here != rootfs else here
            continue
        try:
            kind = (here / part).lstat().st_mode
        except OSError:
            return None
        if not stat.S_ISLNK(kind):
            here = here / part
            continue
        links += 1
        if links > _MOST_LINKS:
            return None
        target = os.readlink(here / part)
        if target.startswith("/"):
            here = rootfs
        pending[:0] = [part for part in target.split("/") if part not in ("", ".")]
    return here
