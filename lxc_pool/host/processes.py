"""Know a process for what it is, hold on to it, and end its whole tree.

A pid alone is reused; boot id, pid and start time together are one process for ever. A pidfd, once open, can't change
its process. Source: proc_pid_stat(5) field 22, pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import os
import re
import select
import signal
import time
from pathlib import Path

import psutil

MISSING = (errno.ENOSYS, errno.EPERM)
"""What pidfd_open says where it is missing, or refused by a policy. Source: pidfd_open(2), seccomp(2)."""

_F_SETSIG = 10
"""Not in Python's fcntl module. Source: Linux include/uapi/asm-generic/fcntl.h."""

_PF_FORKNOEXEC = 0x00000040
"""The process was forked and has not executed anything since. Source: Linux include/linux/sched.h."""


_TOLD_OF_STATUS = ("State:", "VmRSS:", "Threads:", "SigPnd:", "ShdPnd:", "SigBlk:", "voluntary_ctxt_switches:")
"""Lines of /proc/PID/status that tell why a process does not go on: whether SIGKILL is pending, say."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process, told apart from every other that has had or will have its pid.

    Attributes:
        start_ticks: When it started, in clock ticks since boot.
    """

    boot_id: str
    pid: int
    start_ticks: int


@functools.cache
def boot_id() -> str:
    """Return the id of this boot of the kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def identify(pid: int) -> ProcessIdentity:
    """Return the identity of the process that has *pid* now.

    Raises:
        ProcessLookupError: No process has it, or only a zombie.
    """
    fields = _stat(pid)
    if fields[0] in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return ProcessIdentity(boot_id(), pid, int(fields[19]))


def open_pidfd(identity: ProcessIdentity) -> int:
    """Return a descriptor of just this process.

    Raises:
        ProcessLookupError: It has ended, whether or not its pid has been given to another.
    """
    descriptor = os.pidfd_open(identity.pid)
    try:
        # The pidfd is of whoever has the pid; only if that is still our process after opening, is it of ours.
        if identify(identity.pid) != identity:
            raise ProcessLookupError(f"process {identity.pid} has ended; its pid is another's now")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_our_own(pid: int) -> bool:
    """Return whether a process is neither another user's, who may call it what they like, nor a container's.

    By all of its uids, or a user's set-uid program would do, and by its namespaces.

    Raises:
        OSError: It has ended, or is one of the kernel's.
    """
    place = Path("/proc") / str(pid)
    uids = re.search(r"^Uid:((?:\t\d+)+)$", (place / "status").read_text(errors="replace"), re.MULTILINE)
    ours = uids is not None and {int(uid) for uid in uids[1].split()} == {os.geteuid()}
    return ours and all(
        os.stat(place / "ns" / kind).st_ino == os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "user")
    )


def is_init(pid: int) -> bool:
    """Return whether a process is the first of a pid namespace right below that of this process's /proc.

    Source: proc_pid_status(5), NSpid.
    """
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            status = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return f"\nNSpid:\t{pid}\t1\n".encode() in status


def printable(text: str) -> str:
    """Return *text* without what a terminal obeys: whoever runs a process says what its command line is."""
    return "".join(character if character.isprintable() else "?" for character in text)


def has_executed(identity: ProcessIdentity) -> bool:
    """Return whether the process lives and has executed its own program since it was forked.

    Raises:
        ProcessLookupError: It has ended.
    """
    fields = _stat(identity.pid)
    if fields[0] in "ZX" or int(fields[19]) != identity.start_ticks:
        raise ProcessLookupError(f"process {identity.pid} has ended")
    return not int(fields[6]) & _PF_FORKNOEXEC


def kill_tree(identity: ProcessIdentity, *, timeout: float = 5.0) -> list[int]:
    """Kill a process and all its descendants with SIGKILL; return the pids that still live after *timeout* seconds.

    Raises:
        OSError: They can't be looked for: there is no descriptor left, say.
    """
    try:
        root = psutil.Process(identity.pid)
        if identify(identity.pid) != identity:
            return []  # it has ended, and its pid is another's
        # The root first: it must not see its children end, and go on to what comes next.
        doomed = [root, *root.children(recursive=True)]
    except (psutil.NoSuchProcess, ProcessLookupError):
        return []
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        # All are held before the first is signalled: for want of descriptors some would be left, and not be found
        # again without their root.
        held = {process: _hold(process, stack) for process in doomed}
        for process, pidfd in held.items():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if pidfd is None:
                    process.kill()  # psutil compares pid and start time before it signals
                else:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return [process.pid for process, pidfd in held.items() if not _ends(process, pidfd, deadline)]


def _hold(process: psutil.Process, stack: contextlib.ExitStack) -> int | None:
    """Return a pidfd of just this process, open as long as the *stack*; None: it has ended, or there are no pidfds."""
    try:
        pidfd = os.pidfd_open(process.pid)
        stack.callback(os.close, pidfd)
        return pidfd if process.is_running() else None
    except ProcessLookupError:
        return None
    except OSError as error:
        if error.errno in MISSING:
            return None
        raise


def _ends(process: psutil.Process, pidfd: int | None, deadline: float) -> bool:
    """Wait for the end of a process; return whether it has come by the *deadline*."""
    patience = max(0.0, deadline - time.monotonic())
    if pidfd is None:
        return not psutil.wait_procs([process], timeout=patience)[1]
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(patience * 1000))


def describe_tree(pid: int) -> str:
    """Say what a process and its descendants are doing in the kernel, for the log: what a hang hangs on.

    Source: proc_pid_stack(5), proc_pid_wchan(5), proc_pid_status(5).
    """
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return f"process {pid} has ended"
    return "; ".join(_describe(process.pid) for process in tree)


def _describe(pid: int) -> str:
    words = []
    for name in ("cmdline", "wchan", "stack"):
        try:
            text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            text = f"({error.strerror})"
        words.append(f"{name} {printable(' '.join(text.replace(chr(0), ' ').split()))[:400] or '-'}")
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        lines = [line.split() for line in status.splitlines() if line.startswith(_TOLD_OF_STATUS)]
        words.append(f"status {' '.join(itertools.chain.from_iterable(lines))}")
    except OSError:
        words.append("ended meanwhile")
    return f"process {pid}: {', '.join(words)}"


def die_at_end_of(descriptor: int) -> None:
    """Let the kernel kill this process once the other end of a pipe is closed, by whatever; whatever it does then.

    A thread that waits for that would not do: liblxc's calls hold the GIL. PR_SET_PDEATHSIG would not either: a
    worker's parent is the fork server, which lives for as long as any worker does. Source: fcntl(2), F_SETSIG.
    """
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if poll.poll(0):
        os._exit(1)  # it was closed before that


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on: [0] state, [6] flags, [19] start time."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(f"there is no process {pid}") from error
    return text.rpartition(b")")[2].decode("ascii").split()
