"""Everything on this host that bears the mark of one service: its containers' traces, whoever made them.

Names carry the state dir's instance id, so that nothing of another service, or of anybody else, is ever found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil

from lxc_pool import hostdir
from lxc_pool.host import bridge, cgroups, firewall, idranges, locks, semaphores
from lxc_pool.host.processes import ProcessIdentity, identify, is_our_own, printable

Kind = Literal["container", "process", "cgroup", "mount", "directory", "netdev", "lock", "socket"]

LOCKS = Path("/run/lxc/lock")
"""Where liblxc keeps a lock file for each container, which it never removes (measured)."""

DISCARDED = ".discarded"
"""In the directory of the containers: where those are put whose upper layers are to be removed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """One thing that is there.

    Attributes:
        kind: What it is.
        name: The container that it belongs to; the device's, rules' or semaphore's own name; the path of a socket or
            of an image; or `pid N` of one of the service's own processes.
        detail: Where or what it is, for people.
        age: Seconds since it came to be; 0 or infinite where that can't be told. It is of cgroups, whose times are of
            when the kernel has read them in last, and again after it was short of memory (measured; Source: Linux
            fs/kernfs/inode.c, set_default_inode_attr); nor of mounts, whose times are of what is mounted.
        process: For a process.
        path: For all else.
        holder: For a range of ids: who has it, as the file says; it may be another's the next moment.
    """

    kind: Kind
    name: str
    detail: str
    age: float
    process: ProcessIdentity | None = None
    path: Path | None = None
    holder: str | None = None

    @property
    def of_container(self) -> bool:
        """Whether it belongs to a container."""
        return self.name.startswith("lxp-") and self.kind != "netdev" and not self.is_semaphore

    @property
    def is_semaphore(self) -> bool:
        """Whether it is a semaphore of the service's own."""
        return self.path is not None and self.path.parent == semaphores.DIRECTORY


def traces(prefix: str, lxcpath: Path, host_dir: Path) -> tuple[Trace, ...]:
    """Look at the host.

    Args:
        prefix: What all names of the service's containers begin with.
        lxcpath: The directory of its containers.
        host_dir: Where its socket is.
    """
    return (
        *_processes(prefix, lxcpath),
        *_mounts(prefix, lxcpath),
        *_cgroups(prefix),
        *_directories(prefix, lxcpath),
        *_discarded(prefix, lxcpath),
        *_netdevs(prefix),
        *_locks(prefix, lxcpath),
        *_id_ranges(prefix, lxcpath),
        *_semaphores(prefix, lxcpath.parent),
        *_sockets(host_dir),
    )


def discarded(prefix: str, lxcpath: Path) -> frozenset[str]:
    """Return the names of the containers whose upper layers are to be removed."""
    try:
        return frozenset(name for name in os.listdir(lxcpath / DISCARDED) if name.startswith(prefix))
    except FileNotFoundError:
        return frozenset()


def is_there(trace: Trace) -> bool:
    """Look again whether a trace is still there."""
    if trace.process is not None:
        try:
            return identify(trace.process.pid) == trace.process
        except ProcessLookupError:
            return False
    if trace.kind == "mount":
        return any(str(trace.path) == mount for mount in mount_points())
    if trace.kind == "socket" and trace.path is not None and locks.is_held(trace.path.with_name("service.lock")):
        return False  # a service has begun meanwhile: it is that one's now
    if trace.kind == "netdev":
        return trace.name in (*bridge.devices(), *firewall.tables())
    if trace.holder is not None:
        return any((path, holder) == (trace.path, trace.holder) for path, holder in idranges.held())
    return trace.path is not None and os.path.lexists(trace.path)


def _processes(prefix: str, lxcpath: Path) -> Iterator[Trace]:
    seen: set[int] = set()
    for name, path in _containers_cgroups(prefix):
        for pid in cgroups.pids(path):
            if pid not in seen and (trace := _process(pid, name)):
                seen.add(pid)
                yield trace
    # A start that was cut short is in no cgroup yet. By what it calls itself something is removed: it has to be ours.
    words = rf"(?:lxc-start|\[lxc monitor\]) .*{re.escape(str(lxcpath))} .*?({re.escape(prefix)}[A-Za-z0-9-]+)(?!\S)"
    pattern = re.compile(words)
    for process in psutil.process_iter(["cmdline"]):
        match = pattern.search(" ".join(process.info["cmdline"] or ()))
        if match and process.pid not in seen and (trace := _process(process.pid, match[1])):
            with contextlib.suppress(OSError):  # it has ended
                if is_our_own(process.pid):
                    yield trace


def _process(pid: int, name: str) -> Trace | None:
    try:
        process = psutil.Process(pid)
        words = " ".join(process.cmdline()) or process.name()
        return Trace(
            "process", name, f"{pid} {printable(words[:80].strip())}", age_of_process(pid), process=identify(pid)
        )
    except (psutil.Error, ProcessLookupError):
        return None


def _mounts(prefix: str, lxcpath: Path) -> Iterator[Trace]:
    for mount in reversed(mount_points()):  # what was mounted last comes off first
        path = Path(mount)
        if path.is_relative_to(lxcpath) and path != lxcpath:
            name = path.relative_to(lxcpath).parts[0]
            if name.startswith(prefix):
                yield Trace("mount", name, mount, math.inf, path=path)


def mount_points() -> list[str]:
    """Return where something is mounted in this process's mount namespace, in the order of mounting."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        fields = [line.split(" ")[4] for line in file]
    return [re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field) for field in fields]


def _cgroups(prefix: str) -> Iterator[Trace]:
    for name, path in _containers_cgroups(prefix):
        yield Trace("cgroup", name, str(path), math.inf, path=path)


def _containers_cgroups(prefix: str) -> Iterator[tuple[str, Path]]:
    """Go through the cgroups with the names of their containers, without the number that liblxc may append to one."""
    for name, path in cgroups.cgroups_by_container(prefix):
        match = re.match(rf"{re.escape(prefix)}[0-9a-f]+-\d+", name)
        yield match[0] if match else name, path


def _directories(prefix: str, lxcpath: Path) -> Iterator[Trace]:
    try:
        names = sorted(os.listdir(lxcpath))
    except FileNotFoundError:
        return
    for name in names:
        if not name.startswith(prefix):
            continue  # somebody else's, whatever it does here
        path = lxcpath / name
        kind: Kind = "container" if (path / "config").exists() else "directory"
        yield Trace(kind, name, str(path), age(path), path=path)


def _discarded(prefix: str, lxcpath: Path) -> Iterator[Trace]:
    for name in sorted(discarded(prefix, lxcpath)):
        path = lxcpath / DISCARDED / name
        yield Trace("directory", name, f"{path}: an upper layer, not removed yet", age(path), path=path)


def _netdevs(prefix: str) -> Iterator[Trace]:
    """Find the bridge, the ports on it, and the rules; how old they are, the kernel does not say."""
    instance = prefix.removeprefix("lxp-").removesuffix("-")
    for name in sorted(bridge.devices()):
        if name.startswith(bridge.device_prefix(instance)):
            what = "bridge" if name == bridge.device_prefix(instance) else "port of a container on a bridge"
            yield Trace("netdev", name, f"{name}: {what}", math.inf)
    for name in firewall.tables(instance):
        yield Trace("netdev", name, f"{name}: tables of nftables, see `nft list table bridge {name}`", math.inf)


def _locks(prefix: str, lxcpath: Path) -> Iterator[Trace]:
    directory = LOCKS / str(lxcpath).lstrip("/")
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    for file in names:
        if file.startswith(f".{prefix}"):
            yield Trace("lock", file[1:], str(directory / file), age(directory / file), path=directory / file)


def _id_ranges(prefix: str, lxcpath: Path) -> Iterator[Trace]:
    """Find the ranges of ids that are written down as containers'."""
    for path, holder in idranges.held():
        directory = Path(holder)
        if directory.parent == lxcpath and directory.name.startswith(prefix):
            detail = f"{path}: {idranges.SIZE} ids"
            yield Trace("lock", directory.name, detail, age(path), path=path, holder=holder)


def _semaphores(prefix: str, state_dir: Path) -> Iterator[Trace]:
    """Find what executors of a service that is gone have left."""
    if locks.is_held(state_dir / "service.lock"):
        return
    for path in semaphores.files(prefix):
        yield Trace("lock", path.name, f"{path}: a semaphore, and no service runs", age(path), path=path)


def _sockets(host_dir: Path) -> Iterator[Trace]:
    """Find the socket, and the key to it, of a service that is gone."""
    if locks.is_held(host_dir / "service.lock"):
        return
    for path in hostdir.left_by_a_killed_service(host_dir):
        if os.path.lexists(path):
            yield Trace("socket", str(path), f"{path}: no service runs here", age(path), path=path)


def age_of_process(pid: int) -> float:
    """Return for how many seconds a process has been there; 0 if it is no more."""
    try:
        return max(0.0, time.time() - psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def age(path: Path) -> float:
    """Return for how many seconds a file has been as it is; 0 if that can't be told."""
    try:
        return max(0.0, time.time() - os.lstat(path).st_ctime)
    except OSError:
        return 0.0
