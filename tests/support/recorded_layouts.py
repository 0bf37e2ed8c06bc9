"""Cgroup layouts of other hosts, from the recordings in `tests/security/layouts`, put up again in a directory."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TypedDict

from lxc_pool.config import ProfileConfig
from lxc_pool.host import cgroups

NAME = "lxp-recorded-1"
"""The container's."""

_RECORDINGS = Path(__file__).parents[1] / "security/layouts"
_MOUNTED = "/sys/fs/cgroup"

LAYOUTS = tuple(sorted(path.stem for path in _RECORDINGS.glob("*.json")))

Entry = tuple[str, int, int, str | None]
"""Mode (octal, with the type), uid, gid, and the content; None for a directory, and for what can't be read."""

Tree = dict[str, Entry]
"""By path."""


class Recording(TypedDict):
    """What `tests.security.layouts.record` writes.

    Attributes:
        made: When, on which kernel, with which liblxc.
        profile: The limits that the container was to have.
        first_id: The host's id of the container's root.
        mountinfo: The host's, as far as cgroups go.
        membership: /proc/PID/cgroup of the container's init.
        own_membership: That of who started it.
        first_membership: That of the host's first process.
        started: All cgroups once the container is up, before the pool seals them.
        sealed: What of them is otherwise after that.
        open_to_root: What the container's root can write to then, seen from inside.
        mounts_inside: The container's mountinfo, as far as cgroups go.
    """

    made: str
    profile: dict[str, int]
    first_id: int
    mountinfo: list[str]
    membership: list[str]
    own_membership: list[str]
    first_membership: list[str]
    started: Tree
    sealed: Tree
    open_to_root: list[str]
    mounts_inside: list[str]


def load(layout: str) -> Recording:
    """Read a recording."""
    recording: Recording = json.loads((_RECORDINGS / f"{layout}.json").read_text(encoding="ascii"))
    return recording


@dataclasses.dataclass(frozen=True)
class Host:
    """A recorded host, in a directory.

    Attributes:
        recording: What it is made from.
        root: What stands for /sys/fs/cgroup.
    """

    recording: Recording
    root: Path

    @classmethod
    def put_up(cls, layout: str, root: Path) -> Host:
        """Make the directories and files as liblxc left them; as root, with their owners and modes."""
        host = cls(load(layout), root)
        for path, (mode, uid, gid, content) in host.recording["started"].items():
            here = host.here(path)
            # Recorded in order: a directory comes before what is in it.
            if int(mode, 8) & 0o040000:
                here.mkdir(parents=True, exist_ok=True)
            else:
                here.write_text(content or "", encoding="ascii")
            if os.geteuid() == 0:
                os.chown(here, uid, gid)
                here.chmod(int(mode, 8) & 0o7777)
        return host

    def here(self, path: str) -> Path:
        """Return where something of that host's /sys/fs/cgroup is."""
        return self.root / os.path.relpath(path, _MOUNTED)

    @property
    def mountinfo(self) -> str:
        return "\n".join(self.recording["mountinfo"]).replace(_MOUNTED, str(self.root))

    @property
    def trees(self) -> tuple[cgroups.Hierarchy, ...]:
        return cgroups.hierarchies(self.mountinfo)

    @property
    def payload(self) -> tuple[Path, ...]:
        """The container's cgroup in each hierarchy."""
        return cgroups.payload_cgroups(NAME, self.trees)

    @property
    def profile(self) -> ProfileConfig:
        """The limits that the container was to have."""
        wanted = self.recording["profile"]
        return ProfileConfig("default", 1, memory=wanted["memory"], pids=wanted["pids"], cpu=wanted["cpu"])

    def open_to_root(self) -> set[Path]:
        """Return what of the container's cgroups its root can write to, going by owners and modes."""
        first = self.recording["first_id"]
        found = set()
        for cgroup in self.payload:
            for path in (cgroup, *cgroup.rglob("*")):
                status = path.stat()
                bits = 0o200 if status.st_uid == first else 0o020 if status.st_gid == first else 0o002
                if status.st_mode & bits:
                    found.add(path)
        return found

    def open_to_root_seen_from_inside(self) -> set[Path]:
        """Return what it could write to when that was tried on the recorded host."""
        outside = {line.split()[2]: line.split()[4] for line in self.recording["mountinfo"]}
        # By mount point inside, longest first: on version 1, what they are mounted on is no cgroup.
        inside = {
            fields[4]: f"{outside[fields[2]]}/lxc.payload.{NAME}"
            for fields in map(str.split, self.recording["mounts_inside"])
            if fields[2] in outside
        }
        found = set()
        for path in self.recording["open_to_root"]:
            for mount_point, cgroup in inside.items():
                if path == mount_point or path.startswith(f"{mount_point}/"):
                    found.add(self.here(cgroup + path.removeprefix(mount_point)))
        return found
