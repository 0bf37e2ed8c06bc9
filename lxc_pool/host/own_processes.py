"""The processes that a service has for itself: fork server, lanes' workers, sweeper, agent, supervisors.

They end with the service, or with the last command, unless somebody has stopped them (SIGSTOP), or the kernel holds
them up. So that they can be known then for what they are, the service puts a mark into its environment: who is executed
gets it from there, and a fork has its parent's. The mark names the instance and the service's process.

Nobody else's process is taken for one: it has to be our own user's by all of its uids, in our namespaces, and in no
container's cgroups. What is in those is known by them: see `residue`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import select
import signal
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from lxc_pool.host.ends import lives, open_end, send
from lxc_pool.host.processes import ProcessIdentity, boot_id, has_executed, identify, is_our_own, printable

VARIABLE = "LXC_POOL_SERVICE"
"""In the environment: `INSTANCE:PID:START_TICKS` of the service."""


_PATIENCE = 1.0
"""Seconds for which the end of a killed process is waited for. A guess: one that does not hang takes a millisecond."""


@dataclasses.dataclass(frozen=True, slots=True)
class OwnProcess:
    """One of them.

    Attributes:
        service: Whose it is.
        words: What it runs, for people; whoever has a set-uid program do so says what that is called.
        serves: The pids of the processes that it holds on to, if it was forked for that: of containers' inits, while
            there may be commands in them. None once somebody has stopped it and there are no commands left.
    """

    identity: ProcessIdentity
    service: ProcessIdentity
    words: str
    serves: frozenset[int]

    def is_needed(self, inits: Collection[int]) -> bool:
        """Return whether it serves one of the containers with these inits: commands outlive their service."""
        return not self.serves.isdisjoint(inits)


@contextlib.contextmanager
def marked(instance: str) -> Iterator[None]:
    """Let what this process starts bear the mark of its being the service of *instance*."""
    service = identify(os.getpid())
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = f"{instance}:{service.pid}:{service.start_ticks}"
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def left(instance: str) -> tuple[OwnProcess, ...]:
    """Return what services of *instance* have left that have ended."""
    return tuple(process for process in _all(instance) if not lives(process.service))


def let_go_on(instance: str) -> None:
    """Let go on what this service has, and somebody has stopped: it would not end in order, as it is to."""
    ourselves = identify(os.getpid())
    for process in _all(instance):
        if process.service == ourselves:
            with contextlib.suppress(ProcessLookupError):
                _send(signal.SIGCONT, process.identity)


def end(identity: ProcessIdentity) -> None:
    """Kill one, and wait until it has ended, for `_PATIENCE` at most; not an error if it had before."""
    with contextlib.suppress(ProcessLookupError):
        _send(signal.SIGKILL, identity, patience=_PATIENCE)


def _all(instance: str) -> Iterator[OwnProcess]:
    """Go through those of all services of *instance*, of this boot."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):  # it has ended
                process = _look_at(int(name), instance)
                if process is not None:
                    yield process


def _send(number: signal.Signals, identity: ProcessIdentity, patience: float = 0.0) -> None:
    """Send a signal; wait for the process's end for *patience* seconds at most."""
    descriptor = open_end(identity)
    try:
        send(number, identity, descriptor)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(patience * 1000)
    finally:
        os.close(descriptor)


def _look_at(pid: int, instance: str) -> OwnProcess | None:
    """Return the process if it is one.

    Raises:
        OSError: It has ended, or is one of the kernel's.
    """
    place = Path("/proc") / str(pid)
    mark = re.search(
        rf"(?:^|\0){VARIABLE}={re.escape(instance)}:(\d+):(\d+)\0".encode(), (place / "environ").read_bytes() + b"\0"
    )
    if mark is None:
        return None
    identity = identify(pid)
    if not is_our_own(pid) or f"lxp-{instance}-" in (place / "cgroup").read_text(errors="replace"):
        return None
    service = ProcessIdentity(boot_id(), int(mark[1]), int(mark[2]))
    words = " ".join((place / "cmdline").read_text(errors="replace").replace("\0", " ").split())
    supervisor = psutil.Process(pid)
    idle = supervisor.status() == psutil.STATUS_STOPPED and not supervisor.children()
    serves = frozenset() if idle or has_executed(identity) else frozenset(_held(place))
    return OwnProcess(identity, service, printable(words[:80]), serves) if identify(pid) == identity else None


def _held(place: Path) -> Iterator[int]:
    """Go through the processes that a process has pidfds of. Source: proc_pid_fdinfo(5)."""
    for file in (place / "fdinfo").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            held = re.search(r"^Pid:\t(\d+)$", file.read_text(errors="replace"), re.MULTILINE)
            if held is not None:
                yield int(held[1])
