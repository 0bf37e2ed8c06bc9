"""The cgroups that a command joins, and the one of its own that its whole tree can be killed by.

Every limit of a container sits in one of its hierarchies, so a command joins the cgroup of its init in each.
Its own cgroup is a child of init's in the v2 hierarchy (pure or hybrid hosts), else of the freezer's (pure v1 hosts).

A write to `cgroup.procs` waits for an RCU grace period if nobody on the host moved a process in the last one, 8 to
13 ms on an idle host, and holds the lock of all cgroups meanwhile. A thread that writes 0 to `tasks` moves itself alone
and waits for none: 0.2 ms for nine hierarchies (measured; Linux 5.6 and later, see `cgroup_procs_write_start` in
kernel/cgroup/cgroup.c). What joins has one thread. The v2 hierarchy needs no write, see `namespaces.clone`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
from collections.abc import Iterator
from typing import NamedTuple

from lxc_pool.host import cgroup_tree

Mounts = dict[frozenset[str], str]
"""See `mounted`."""

_PAYLOAD, _MONITOR = "lxc.payload.", "lxc.monitor."
"""How liblxc names a container's two cgroups, side by side. Source: liblxc 5.0.2, src/lxc/cgroups/cgroup.h."""

UNIFIED = ""
"""How /proc/PID/cgroup names the v2 hierarchy."""

COMMANDS = "lxc_pool."
"""What the names of commands' cgroups begin with."""


class Membership(NamedTuple):
    """Where the container's init is.

    Attributes:
        join: Directories of v1 cgroups that a command has to join by itself.
        parent: The directory below which a command's own cgroup is made.
        unified: Whether *parent* is in the v2 hierarchy.
        pids: The directory of *join* that limits processes; None if there is none.
    """

    join: tuple[str, ...]
    parent: str
    unified: bool
    pids: str | None = None


def mounted() -> Mounts:
    """Return the mount point of each hierarchy, by its controllers; the v2 one has the name `UNIFIED` alone."""
    with open("/proc/self/mountinfo", "rb") as file:
        return parse_mounts(os.fsdecode(file.read()))


def parse_mounts(mountinfo: str) -> Mounts:
    """Read *mountinfo* (proc(5)); a mount of a part of a hierarchy does not count."""
    found: Mounts = {}
    for line in mountinfo.splitlines():
        fields, _, tail = line.partition(" - ")
        kind, _, rest = tail.partition(" ")
        if kind in ("cgroup", "cgroup2") and fields.split()[3] == "/":
            options = frozenset(rest.split()[-1].split(",")) if kind == "cgroup" else frozenset((UNIFIED,))
            mount_point = fields.split()[4].encode().decode("unicode_escape")  # proc(5): a space is \040
            found.setdefault(options, mount_point)
    return found


def membership(pid: int, mounts: Mounts) -> Membership:
    """Say what a command has to join to be where process *pid* is.

    Raises:
        FileNotFoundError: There is no such process, or no mount of a hierarchy that it is in.
    """
    with open("/proc/self/cgroup", "rb") as own, open(f"/proc/{pid}/cgroup", "rb") as its:
        return plan(os.fsdecode(own.read()), os.fsdecode(its.read()), mounts)


def plan(own: str, its: str, mounts: Mounts) -> Membership:
    """As `membership`, from the text of both processes' /proc/PID/cgroup.

    A v1 hierarchy in which both are in the same cgroup needs nothing.
    """
    mine = dict(_paths(own))
    join, freezer, unified, pids = [], None, None, None
    for controllers, path in _paths(its):
        wanted = frozenset(controllers.split(","))
        mount_point = next((point for options, point in mounts.items() if wanted <= options), None)
        if mount_point is None:
            if mine.get(controllers) == path:  # proc(5) names the v2 hierarchy once it has been mounted anywhere
                continue
            raise FileNotFoundError(2, f"the cgroup hierarchy {controllers or 'v2'!r} is not mounted")
        directory = mount_point + path.rstrip("/")
        if controllers == UNIFIED:
            unified = directory
        elif "freezer" in wanted:
            freezer = directory
        if controllers != UNIFIED and mine.get(controllers) != path:
            join.append(directory)
            pids = directory if "pids" in wanted else pids
    parent = unified or freezer
    if parent is None:
        raise FileNotFoundError(2, "neither a v2 nor a freezer cgroup hierarchy is mounted to hold the command")
    return Membership(tuple(join), parent, unified is not None, pids)


def payload(directory: str) -> str:
    """Return the cgroup of the container that *directory* is in: init may have made one of its own below it."""
    found = re.match(r".*?/lxc\.payload\.[^/]*", directory)  # its name is liblxc's choice
    return found[0] if found else directory


def pids_of_no_command(directory: str) -> set[int]:
    """Return the processes in a container's cgroup *directory* and below, but for what is in the cgroup of a command.

    That is a directory of ours: root of a container in a user namespace may take its name, but not its owner.

    Raises:
        OSError: One can't be looked into.
    """
    found: set[int] = set()
    places = [directory]
    while places:
        place = places.pop()
        found |= cgroup_tree.own_pids(place)
        for child in cgroup_tree.children(place):
            with contextlib.suppress(FileNotFoundError):  # it has been removed meanwhile
                if not (os.path.basename(child).startswith(COMMANDS) and os.stat(child).st_uid == os.geteuid()):
                    places.append(child)
    return found


def open_tasks(directory: str) -> int:
    """Return a descriptor that `enter` takes, of a v1 cgroup.

    Raises:
        OSError: It can't be opened.
    """
    return os.open(directory + "/tasks", os.O_WRONLY | os.O_CLOEXEC)


def enter(tasks: int) -> None:
    """Move this process, which has one thread, into the v1 cgroup.

    Raises:
        OSError: It has been removed, or the kernel refused.
    """
    os.write(tasks, b"0")


def check_limit(directory: str) -> None:
    """Refuse one process more in the v1 cgroup than it permits: forks are, and who joins is not.

    Raises:
        OSError: EAGAIN, as fork(2) says it; or it can't be looked at.
    """
    most = _read(directory + "/pids.max")
    if most.isdigit() and int(_read(directory + "/pids.current")) >= int(most):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def monitor_of(payload: str) -> int | None:
    """Return a pidfd of liblxc's monitor of the container whose cgroup is *payload*; None if there is none any more.

    Raises:
        OSError: It can't be looked at, or there is no descriptor left.
    """
    directory, name = os.path.split(payload)
    if not name.startswith(_PAYLOAD):  # init has moved into one below
        return None
    cgroup = f"{directory}/{_MONITOR}{name.removeprefix(_PAYLOAD)}"
    for pid in cgroup_tree.own_pids(cgroup):
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if pid in cgroup_tree.own_pids(cgroup):  # nobody has got its pid meanwhile
            return descriptor
        os.close(descriptor)
    return None


class CommandCgroup:
    """The cgroup of one command. It may outlive its supervisor, if background processes of the command do."""

    def __init__(self, parent: str, name: str) -> None:
        """Name the cgroup; `create` makes it."""
        self.directory = f"{parent}/{name}"

    def create(self) -> None:
        """Make the directory; one of the same name that nobody is in any more is taken over."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.directory)

    def open(self) -> int:
        """Return a descriptor of the directory."""
        return os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def kill(self) -> bool:
        """Kill every process in the cgroup and below; what can't be looked at is not, nor who forks just then.

        Returns:
            Whether there was none any more, as there will be after some calls; a process in a frozen v1 cgroup can't
            die, one in a hung mount may not.
        """
        try:
            if not (pids := cgroup_tree.pids(self.directory)):
                return True
            try:
                _write(self.directory + "/cgroup.kill", b"1")
            except OSError:  # before Linux 5.14, and in v1: no such file
                self._kill(pids)
        except OSError:  # no descriptor is left, say: what can't be looked into is not empty
            pass
        return False

    def remove(self) -> bool:
        """Remove the cgroup and those below it, if nothing runs there; what is left goes with the container.

        Returns:
            Whether it is gone.
        """
        try:
            os.rmdir(self.directory)
        except FileNotFoundError:
            return True
        except OSError:  # processes, or cgroups that the command made
            with contextlib.suppress(OSError):  # one can't be looked into; so it is still there
                for directory in cgroup_tree.directories(self.directory, topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(directory)
            return not os.path.exists(self.directory)
        return True

    def _kill(self, pids: set[int]) -> None:
        """Kill those of *pids* that there are descriptors for."""
        pidfds: dict[int, int] = {}
        try:
            for pid in pids:
                try:
                    pidfds[os.pidfd_open(pid)] = pid
                except ProcessLookupError:
                    pass
                except OSError:
                    if not pidfds:
                        raise
                    break  # as many as there is room for
            # who is listed again after its pidfd was opened is ours, and not a stranger with a reused pid
            still = self._listed_beside(pidfds)
            for fd, pid in pidfds.items():
                if pid in still:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            for fd in pidfds:
                os.close(fd)

    def _listed_beside(self, pidfds: dict[int, int]) -> set[int]:
        """Return what runs here; let go of as many of *pidfds* as have to make room for that, all but one."""
        while True:
            try:
                return cgroup_tree.pids(self.directory)
            except OSError:
                if len(pidfds) < 2:
                    raise
                os.close(pidfds.popitem()[0])


def _paths(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        yield controllers, path


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64).strip()
    finally:
        os.close(fd)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
