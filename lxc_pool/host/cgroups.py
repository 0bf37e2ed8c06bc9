"""Find, empty and remove the control groups of containers, on hosts with version 1, version 2, or both.

liblxc 5 puts `lxc.payload.NAME` and `lxc.monitor.NAME` into every hierarchy. Started by root they are below the cgroup
of PID 1, wherever the starter itself is (measured); with `lxc.cgroup.relative = 1`, or not started by root, below the
starter's own. If a directory of that name is still there it appends `-1`, `-2`…

Source: liblxc 5.0.2, src/lxc/cgroups/cgfsng.c; cgroups(7).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import functools
import os
import re
import select
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil

from lxc_pool.errors import DestroyFailed
from lxc_pool.host import cgroup_tree
from lxc_pool.host.processes import MISSING, is_init

_V1_FLAGS = frozenset({"ro", "rw", "noprefix", "xattr", "clone_children", "cpuset_v2_mode", "favordynmods"})
"""What a version 1 mount lists beside its controllers. Source: kernel/cgroup/cgroup-v1.c, cgroup1_show_options."""

_BATCH = 256
"""Processes watched at a time while killing, so that a fork bomb can't use up the descriptors. A guess."""

_RETRY = 0.001
"""Seconds before a cgroup that is empty, yet busy, is tried again. Nothing tells when the kernel has let go of it."""


class Layout(enum.StrEnum):
    """Which versions of cgroups a host uses."""

    NONE = "none"
    V1 = "v1"
    HYBRID = "hybrid"
    V2 = "v2"


@dataclasses.dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted cgroup hierarchy.

    Attributes:
        mount_point: Where it is mounted.
        controllers: Those of a version 1 hierarchy, `name=…` for a named one; empty for version 2, where the file
            `cgroup.controllers` lists them.
        version: 1 or 2.
        root: The cgroup that is mounted there, `/` unless it is a part only, as in some containers.
    """

    mount_point: Path
    controllers: tuple[str, ...]
    version: int
    root: str = "/"

    @property
    def is_named(self) -> bool:
        """Whether it has a name and no controllers, as systemd's of version 1.

        The files in it do not tell: `perf_event` is a controller, and adds none.
        """
        return self.version == 1 and all(controller.startswith("name=") for controller in self.controllers)


def hierarchies(mountinfo: str | None = None) -> tuple[Hierarchy, ...]:
    """Return the host's cgroup hierarchies, each once, in the order of their mounting.

    Args:
        mountinfo: The text of a mountinfo file; None reads this process's.

    Raises:
        OSError: /proc can't be read.

    Source: proc_pid_mountinfo(5).
    """
    if mountinfo is None:
        mountinfo = _read("/proc/self/mountinfo")
    found: dict[str, Hierarchy] = {}
    for line in mountinfo.splitlines():
        mount, separator, filesystem = line.partition(" - ")
        fields, (kind, *rest) = mount.split(" "), filesystem.split(" ")
        if not separator or kind not in ("cgroup", "cgroup2") or len(fields) < 5 or not rest:
            continue
        if kind == "cgroup":
            hierarchy = Hierarchy(Path(_unescape(fields[4])), _controllers(rest[-1]), 1, _unescape(fields[3]))
        else:
            hierarchy = Hierarchy(Path(_unescape(fields[4])), (), 2, _unescape(fields[3]))
        device = fields[2]
        if device not in found or len(hierarchy.root) < len(found[device].root):
            found[device] = hierarchy
    return tuple(found.values())


def layout(trees: Iterable[Hierarchy]) -> Layout:
    """Tell how a host with these hierarchies is laid out."""
    versions = {tree.version for tree in trees}
    return {frozenset(): Layout.NONE, frozenset({1}): Layout.V1, frozenset({2}): Layout.V2}.get(
        frozenset(versions), Layout.HYBRID
    )


def container_cgroups(
    name: str, trees: Sequence[Hierarchy] | None = None, memberships: Sequence[str] | None = None
) -> tuple[Path, ...]:
    """Return every cgroup directory that liblxc has made for the container *name*, and that is still there.

    A directory `NAME-1` is taken for the second one of NAME: give no container a name that is another's, `-` and a
    number.

    Args:
        name: The container's name, valid for liblxc.
        trees: Where to look; None takes the host's.
        memberships: Texts of `/proc/PID/cgroup`, to look below those processes' cgroups as well as in the roots; None
            takes PID 1's and this process's.

    Raises:
        OSError: /proc can't be read.
    """
    pattern = re.compile(rf"lxc\.(payload|monitor)\.{re.escape(name)}(-\d+)?")
    return tuple(path for path, _match in _matching(pattern, trees, memberships))


def payload_cgroups(
    name: str, trees: Sequence[Hierarchy] | None = None, membership: str | None = None
) -> tuple[Path, ...]:
    """Return the cgroup of the running container *name* in each hierarchy, as liblxc names it at first.

    It is in the root, or below PID 1's own cgroup: in a pid namespace, that can be any.

    Args:
        name: The container's name.
        trees: Where to look; None takes the host's.
        membership: The text of PID 1's `/proc/1/cgroup`; None reads it if it is needed.

    Raises:
        OSError: /proc can't be read.
    """
    if trees is None:
        trees = hierarchies()
    directory = f"lxc.payload.{name}"
    found = tuple(Path(place) for tree in trees if os.path.isdir(place := f"{tree.mount_point}/{directory}"))
    if len(found) == len(trees):
        return found
    bases = _bases(trees, (_read("/proc/1/cgroup") if membership is None else membership,))
    return tuple(path for base in bases if (path := base / directory).is_dir())


def init_of(directories: Sequence[Path]) -> int | None:
    """Return the init of the container whose cgroups these are; None: it has ended.

    Raises:
        OSError: They can't be looked into.
    """
    for directory in directories:
        # It may have moved below, as systemd does; mostly it has not yet.
        for find in (cgroup_tree.own_pids, cgroup_tree.pids):
            for pid in sorted(find(directory)):
                if is_init(pid):
                    return pid
    return None


def task_count(name: str) -> int | None:
    """Return how many processes and threads the running container *name* has; None if that can't be told here."""
    for place in _pids_hierarchies():
        with contextlib.suppress(OSError, ValueError):
            return int(_read(f"{place}/lxc.payload.{name}/pids.current"))
    return None


def cgroups_by_container(prefix: str) -> tuple[tuple[str, Path], ...]:
    """Return every cgroup directory that liblxc has made for containers whose names begin so, with the name.

    Raises:
        OSError: /proc can't be read.
    """
    pattern = re.compile(rf"lxc\.(?:payload|monitor)\.({re.escape(prefix)}.*)")
    return tuple((match[1], path) for path, match in _matching(pattern, None, None))


def pids(path: Path) -> tuple[int, ...]:
    """Return the processes in the cgroup *path* and in those below it, sorted; see `cgroup_tree.pids`.

    Raises:
        OSError: It can't be looked into: there is no descriptor left, say.
    """
    return tuple(sorted(cgroup_tree.pids(path)))


def kill(*paths: Path, timeout: float = 2.0) -> tuple[int, ...]:
    """Kill what runs in the cgroups *paths* and below them, even if it forks or is frozen.

    Give all cgroups of one container at once, so that its freezer and its limit on pids, which on version 1 hosts are
    in hierarchies of their own, can help. This process itself is spared, should it be in one of them.

    Args:
        *paths: Cgroup directories; those that are not there are fine.
        timeout: Seconds to wait until they are gone; 0 signals once and does not wait.

    Returns:
        The pids that are still there: none if all are empty.

    Raises:
        OSError: They can't be looked into.
    """
    deadline = time.monotonic() + timeout
    for path in paths:
        _write_if_there(path / "pids.max", "0")  # whoever forks faster than we kill
        _write_if_there(path / "freezer.state", "THAWED")  # a signal does not reach the frozen on version 1
    while True:
        with _watched(paths) as (watched, without):
            _signal(paths, watched, without)
            _await_exits(watched, deadline)
            psutil.wait_procs(without, max(0.0, deadline - time.monotonic()))
        left = _all_pids(paths)
        if not set(left) - {os.getpid()} or time.monotonic() >= deadline:
            return left
        os.sched_yield()  # listed, but no longer to be opened: the kernel is about to drop it


def remove(*paths: Path, timeout: float = 1.0) -> None:
    """Remove the cgroups *paths* with all below them.

    Args:
        *paths: Cgroup directories; those that are not there are fine.
        timeout: Seconds to go on while the kernel still holds one that is empty.

    Raises:
        DestroyFailed: Some are still there, and why: all the others have been removed.
    """
    deadline = time.monotonic() + timeout
    failures = [failure for path in paths if (failure := _remove(path, deadline))]
    if failures:
        raise DestroyFailed(f"can't remove {'; '.join(failures)}")


@functools.cache
def _pids_hierarchies() -> tuple[Path, ...]:
    """Return where pids may be counted; it is not looked again whether somebody has mounted more."""
    return tuple(tree.mount_point for tree in hierarchies() if tree.version == 2 or "pids" in tree.controllers)


def _matching(
    pattern: re.Pattern[str], trees: Sequence[Hierarchy] | None, memberships: Sequence[str] | None
) -> Iterator[tuple[Path, re.Match[str]]]:
    """Go through the directories whose whole name *pattern* matches, where liblxc may have made them."""
    seen: set[Path] = set()
    for base in _bases(hierarchies() if trees is None else trees, memberships):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(base) as entries:
            for entry in entries:
                match = pattern.fullmatch(entry.name)
                path = base / entry.name
                if match and path not in seen and entry.is_dir(follow_symlinks=False):
                    seen.add(path)
                    yield path, match


def _controllers(options: str) -> tuple[str, ...]:
    """Return the controllers among the *options* of a version 1 mount."""
    return tuple(name for name in options.split(",") if name not in _V1_FLAGS and not name.startswith("release_agent="))


def _bases(trees: Sequence[Hierarchy], memberships: Sequence[str] | None) -> tuple[Path, ...]:
    """Return the directories below which liblxc may have made its own."""
    if memberships is None:
        memberships = (_read("/proc/1/cgroup"), _read("/proc/self/cgroup"))
    found: dict[Path, None] = {}
    for tree in trees:
        found[tree.mount_point] = None
        for text in memberships:
            for line in text.splitlines():
                number, controllers, path = line.split(":", 2)
                if (number == "0") if tree.version == 2 else (set(controllers.split(",")) == set(tree.controllers)):
                    # liblxc strips systemd's init.scope (prune_init_scope); "/.." is outside of our cgroup namespace.
                    relative = os.path.relpath(path.removesuffix("/init.scope") or "/", tree.root)
                    if ".." not in relative.split("/"):
                        found[tree.mount_point / relative] = None
    return tuple(found)


@contextlib.contextmanager
def _watched(paths: Sequence[Path]) -> Iterator[tuple[dict[int, int], list[psutil.Process]]]:
    """Yield pidfds, and their pids, of up to a batch of the processes in *paths*, never of this one.

    And those whose pidfds the kernel refuses.
    """
    descriptors: dict[int, int] = {}
    without: list[psutil.Process] = []
    try:
        for pid in [pid for pid in _all_pids(paths) if pid != os.getpid()][:_BATCH]:
            try:
                descriptors[os.pidfd_open(pid)] = pid
            except OSError as error:  # it has just ended, or there is no descriptor left: the next round
                if error.errno in MISSING:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        without.append(psutil.Process(pid))
        yield descriptors, without
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _signal(paths: Sequence[Path], watched: dict[int, int], without: Sequence[psutil.Process]) -> None:
    """Send SIGKILL to what is in *paths*: through the cgroup where it can, else to each of *watched* and *without*."""
    inside = set(_all_pids(paths))
    if os.getpid() not in inside and inside:
        for path in paths:
            _write_if_there(path / "cgroup.kill", "1")  # since Linux 5.14, version 2
    for descriptor, pid in watched.items():
        # A pid that was reused before it was opened is not listed now; one that is reused later leaves a dead pidfd.
        if pid in inside:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    for process in without:
        if process.pid in inside:
            with contextlib.suppress(psutil.Error):
                process.kill()  # psutil looks once more whether the pid is still that process's


def _await_exits(watched: dict[int, int], deadline: float) -> None:
    """Return once every process of *watched* has ended, or at the *deadline*."""
    poller, waiting = select.poll(), set(watched)
    for descriptor in waiting:
        poller.register(descriptor, select.POLLIN)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poller.poll(left * 1000):
            poller.unregister(descriptor)
            waiting.discard(descriptor)


def _remove(path: Path, deadline: float) -> str:
    """Remove *path* and what is below; return what went wrong, or an empty string."""
    while True:
        failure: OSError | None = None
        try:
            for directory in cgroup_tree.directories(path, topdown=False):
                try:
                    os.rmdir(directory)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    failure = failure or error
        except OSError as error:  # a cgroup that was not looked into is not a cgroup that is gone
            return f"{error.filename}: {error.strerror}"
        if failure is None:
            return ""
        if left := pids(path):
            return f"{path}: there are processes in it: {' '.join(map(str, left[:10]))}"
        if failure.errno != errno.EBUSY or time.monotonic() >= deadline:
            return f"{failure.filename}: {failure.strerror}"
        select.select([], [], [], _RETRY)


def _all_pids(paths: Iterable[Path]) -> tuple[int, ...]:
    return tuple(sorted({pid for path in paths for pid in pids(path)}))


def _write_if_there(path: Path, text: str) -> None:
    """Write *text* to a control file: without O_CREAT, and whether or not it takes it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()
