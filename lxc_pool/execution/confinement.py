"""What the container's init is confined by, read from the host, and put on a command.

A process that enters namespaces keeps its own capabilities, seccomp filters, limits and security label; a command has
to take on init's, or it would be mightier than what the container was given. lxc-attach rereads them from the
configuration (liblxc 5.0.2, src/lxc/attach.c); init itself can't be out of date.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
from typing import NamedTuple

from lxc_pool.execution import namespaces
from lxc_pool.host import seccomp

_KINDS = (
    ("user", namespaces.CLONE_NEWUSER),
    ("mnt", namespaces.CLONE_NEWNS),
    ("uts", namespaces.CLONE_NEWUTS),
    ("ipc", namespaces.CLONE_NEWIPC),
    ("net", namespaces.CLONE_NEWNET),
    ("cgroup", namespaces.CLONE_NEWCGROUP),
    ("time", namespaces.CLONE_NEWTIME),
)
_LIMITS = tuple(getattr(resource, name) for name in sorted(dir(resource)) if name.startswith("RLIMIT_"))
_UNCONFINED = ("", "unconfined")


class Changes(NamedTuple):
    """What a process has to change to have a confinement's limits.

    Attributes:
        limits: Limits, each with its soft and its hard value.
        oom_score_adj: See proc(5); None if it is right.
    """

    limits: tuple[tuple[int, int, int], ...]
    oom_score_adj: str | None


class Confinement(NamedTuple):
    """The walls around a container's init.

    Attributes:
        flags: CLONE_NEW* of the namespaces that are not the host's, without the pid namespace.
        own_pids: Whether the container has a pid namespace of its own.
        dropped: The capabilities that are missing in CapBnd of /proc/PID/status.
        no_new_privs: NoNewPrivs there.
        filters: Seccomp filters, oldest first.
        limits: The soft and hard limit of each of `resource`'s RLIMIT_*.
        oom_score_adj: See proc(5).
        label: The AppArmor profile to execute under; None if there is none.
    """

    flags: int
    own_pids: bool
    dropped: tuple[int, ...]
    no_new_privs: bool
    filters: tuple[bytes, ...]
    limits: tuple[tuple[int, int], ...]
    oom_score_adj: str
    label: str | None

    def changes(self) -> Changes:
        """Return what forks of this process have to change."""
        score = self.oom_score_adj
        return Changes(
            tuple(
                (limit, *values)
                for limit, values in zip(_LIMITS, self.limits, strict=True)
                if resource.getrlimit(limit) != values
            ),
            score if score != _read("/proc/self/oom_score_adj") else None,
        )

    def apply_outside(self, changes: Changes) -> None:
        """Put on what needs the host's root or /proc: what *changes*, the label of the next execve(2).

        Raises:
            OSError: The kernel refused.
        """
        for limit in changes.limits:
            _set_limit(*limit)
        if changes.oom_score_adj is not None:
            with contextlib.suppress(PermissionError):  # without CAP_SYS_RESOURCE it can only be raised
                _write("/proc/self/oom_score_adj", changes.oom_score_adj)
        if self.label is not None:
            _write("/proc/self/attr/apparmor/exec", f"exec {self.label}")

    def apply_inside(self) -> None:  # pragma: no cover - runs in the container, where nothing can be recorded
        """Put on what holds from now on, as root of the container: keyring, capabilities, filters.

        Raises:
            OSError: The kernel refused.
        """
        namespaces.new_session_keyring()
        namespaces.limit_capabilities(self.dropped)
        if self.no_new_privs:
            namespaces.set_no_new_privs()
        for code in self.filters:
            seccomp.install(code)


class Reading:
    """Read a container's confinement from its init; for its seccomp filters, that has to stand still for a moment."""

    def __init__(self, pid: int) -> None:
        """Begin; the caller checks afterwards, by a pidfd, that *pid* was the process it meant.

        Raises:
            OSError: There is no such process, or it can't be traced.
        """
        self._pid = pid
        self._status = dict(line.split(":\t", 1) for line in _read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
        self._tracee = namespaces.Tracee(pid) if self._status.get("Seccomp", "0") == "2" else None

    def result(self) -> Confinement | None:
        """Return what was read; None as long as the process does not stand still.

        Raises:
            OSError: The process has ended, or its seccomp filters can't be read.
        """
        pid, status = self._pid, self._status
        filters = () if self._tracee is None else self._tracee.seccomp_filters()
        if filters is None:
            return None
        label = _read_optional(f"/proc/{pid}/attr/apparmor/current").rstrip("\0").rpartition(" (")
        return Confinement(
            flags=sum(flag for kind, flag in _KINDS if _differs(pid, kind)),
            own_pids=_differs(pid, "pid"),
            dropped=namespaces.missing_capabilities(int(status["CapBnd"], 16)),
            no_new_privs=status.get("NoNewPrivs", "0") == "1",
            filters=filters,
            limits=tuple(resource.prlimit(pid, limit) for limit in _LIMITS),
            oom_score_adj=_read(f"/proc/{pid}/oom_score_adj"),
            label=(name if (name := label[0] or label[2]) not in _UNCONFINED else None),
        )

    def close(self) -> None:
        """Give it up: the process has ended."""
        if self._tracee is not None:
            self._tracee.bury()


def _set_limit(limit: int, soft: int, hard: int) -> None:
    """Set a limit; without CAP_SYS_RESOURCE as near as the own hard limit, which is then the lower one, permits."""
    try:
        resource.setrlimit(limit, (soft, hard))
    except (ValueError, PermissionError):
        own_hard = resource.getrlimit(limit)[1]
        lower = own_hard if soft == resource.RLIM_INFINITY else soft
        resource.setrlimit(limit, (lower if own_hard == resource.RLIM_INFINITY else min(lower, own_hard), own_hard))


@functools.cache
def _own(kind: str) -> str:
    """Return which namespace this process, and whoever forks it, is in for good."""
    return os.readlink(f"/proc/self/ns/{kind}")


def _differs(pid: int, kind: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}") != _own(kind)
    except FileNotFoundError:
        if kind == "time":  # a kernel without CONFIG_TIME_NS
            return False
        raise


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "replace")


def _read_optional(path: str) -> str:
    with contextlib.suppress(OSError):
        return _read(path).strip()
    return ""


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
