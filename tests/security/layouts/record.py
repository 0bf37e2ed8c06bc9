"""Record the cgroups of one container on this host: as liblxc leaves them, as the pool does, as its root sees them.

The recordings beside this file are of hosts that the tests do not run on. Each was made by one command, in a virtual
machine whose root is this host's, see `scripts/layout_vm.py`:

    scripts/layout_vm.py --kernel /tmp/kernel --results tests/security/layouts v1 -- \\
        python -m tests.security.layouts.record v1 /mnt

`tests.support.recorded_layouts` reads them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from lxc_pool.backend.lxc import limits
from lxc_pool.backend.lxc.container_config import first_id
from lxc_pool.backend.lxc.engine import LxcBackend
from lxc_pool.backend.protocol import Blueprint
from lxc_pool.config import ProfileConfig
from lxc_pool.host import cgroups
from tests.support.recorded_layouts import NAME, Entry, Recording, Tree

_MOST = 200
"""Bytes kept of a file: no limit needs more, and statistics tell nothing here."""

_TIMEOUT = 300.0
"""Seconds for the container to come up: it takes some, where the processor is emulated."""

_OPEN_TO_ROOT = """\
find /sys/fs/cgroup -name .lxc -prune -o -print | while read path; do
    if [ -d "$path" ]; then mkdir "$path/try" && rmdir "$path/try" && echo "$path"
    else (: >>"$path") && echo "$path"
    fi 2>/dev/null
done
"""
"""What a container's root can open for writing, or make a directory in: it tries, for busybox's `test -w` does not.
`.lxc` is made by lxc-attach, through which it is asked, on version 2."""


def main(layout: str, directory: Path) -> None:
    """Start a container with the default profile, and write `LAYOUT.json`."""
    profile = ProfileConfig("default", 1)
    mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    mount_points = [tree.mount_point for tree in cgroups.hierarchies(mountinfo)]
    started: Tree = {}
    seal = limits.seal

    def record_and_seal(
        profile: ProfileConfig, directories: Iterable[Path], trees: Iterable[cgroups.Hierarchy]
    ) -> None:
        started.update(_tree(mount_points))
        seal(profile, directories, trees)

    limits.seal = record_and_seal
    with tempfile.TemporaryDirectory(prefix="lxp-record.") as state:
        backend = LxcBackend(Path(state))
        os.chmod(state, 0o711)  # noqa: S103  # as a state dir: the container's root goes through
        backend.lxcpath.mkdir()
        image = backend.prepare(profile.image)
        backend.open()
        try:
            init = backend.create(Blueprint(NAME, profile, image, time.monotonic() + _TIMEOUT))
            sealed = _tree(mount_points)
            first = first_id(backend.lxcpath / NAME)
            assert first is not None, "the default profile is unprivileged"
            recording = Recording(
                made=f"{datetime.datetime.now(datetime.UTC):%F}, Linux {platform.release()}, liblxc {_version()}",
                profile={"memory": profile.memory, "pids": profile.pids, "cpu": profile.cpu},
                first_id=first,
                mountinfo=_of_cgroups(mountinfo.splitlines()),
                membership=Path(f"/proc/{init.pid}/cgroup").read_text(encoding="ascii").splitlines(),
                own_membership=Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines(),
                first_membership=Path("/proc/1/cgroup").read_text(encoding="ascii").splitlines(),
                started=started,
                sealed={path: entry for path, entry in sealed.items() if NAME in path and started.get(path) != entry},
                open_to_root=_inside(backend.lxcpath, _OPEN_TO_ROOT),
                mounts_inside=[
                    line for line in _inside(backend.lxcpath, "cat /proc/self/mountinfo") if "cgroup" in line
                ],
            )
        finally:
            backend.destroy(NAME, force=False)
    with (directory / f"{layout}.json").open("w", encoding="ascii") as file:
        file.write(_text(recording))


def _tree(mount_points: Iterable[Path]) -> Tree:
    """Return every directory and file there is in the hierarchies mounted at *mount_points*."""
    found: Tree = {}
    for mount_point in mount_points:
        for directory, _, files in os.walk(mount_point):
            found[directory] = _entry(directory)
            found.update({f"{directory}/{file}": _entry(f"{directory}/{file}") for file in sorted(files)})
    return dict(sorted(found.items()))


def _entry(path: str) -> Entry:
    status = os.lstat(path)
    content = None
    if not os.path.isdir(path):
        try:
            with open(path, "rb") as file:
                content = file.read(_MOST).decode("ascii")
        except OSError:  # it can only be written to, or tells nothing in its state
            content = None
    return (f"{status.st_mode:o}", status.st_uid, status.st_gid, content)


def _of_cgroups(mountinfo: Iterable[str]) -> list[str]:
    return [line for line in mountinfo if "cgroup" in line]


def _inside(lxcpath: Path, script: str) -> list[str]:
    """Return the lines that a shell in the container writes."""
    command = ["lxc-attach", "-P", str(lxcpath), "-n", NAME, "--clear-env", "-v", "PATH=/sbin:/bin:/usr/sbin:/usr/bin"]
    done = subprocess.run([*command, "--", "/bin/sh", "-c", script], check=False, capture_output=True, text=True)
    return done.stdout.splitlines()


def _version() -> str:
    return subprocess.run(["lxc-start", "--version"], check=True, capture_output=True, text=True).stdout.strip()


def _text(recording: Recording) -> str:
    """Return JSON with a line for each path, so that two recordings can be compared."""
    parts = []
    for key, value in recording.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(entry)}" for path, entry in value.items())
            parts.append(f" {json.dumps(key)}: {{\n{lines}\n }}")
        elif isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(line)}" for line in value)
            parts.append(f" {json.dumps(key)}: [\n{lines}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
