"""What a process of ours does inside a container, without a program of the container's: `protocol.OPERATIONS`.

 client ── frames ──► stdin   files-in    stdout ── DONE path, or FAILED ──► client
                              files-out   stdout ── frames ────────────────► client
 mounting.seal ── mount ──►   mount       stdout ── DONE, or FAILED ───────► client
 mountinfo ──────────────►    unmount     stdout ── DONE, or FAILED ───────► client

It enters as a command does (`entry`), into the same namespaces, cgroup and confinement, but for the pid namespace: for
as long as it runs it is a copy of our program. In the container's /proc, root of a privileged container, which has
CAP_SYS_PTRACE, could trace it, undumpable as it is, and open its `exe`: the host's Python, to be overwritten once
nothing runs it any more (CVE-2019-5736). Outside it can be neither seen, traced nor signalled. What it does is done
with the rights of the container's root alone.

Nothing may be imported any more: the path that modules are looked for in is the container's by now. What has to be done
before it enters, `prepare` does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from lxc_pool.execution import identity, mounting, namespaces, trees
from lxc_pool.execution.frames import FrameError, FrameReader, FrameWriter, StreamEnd
from lxc_pool.execution.protocol import MOUNT
from lxc_pool.execution.tree_sink import Policy, TreeSink
from lxc_pool.execution.tree_source import send

PARENTS, MERGE = "p", "m"
"""Letters of files-in's third argument: make missing directories; fill a directory that exists."""

READONLY, WRITABLE = "r", "w"
"""mount's second argument."""

GRACE = 2.0
"""Seconds that an operation has to remove what it has begun, once it is told to end by SIGTERM. Origin: a guess."""

_WITHDRAWAL = (signal.SIGTERM,)
_INPUT, _OUTPUT = 0, 1
_BROKEN, _WITHDRAWN = 1, 2  # exit statuses, for people


class _WithdrawnError(BaseException):
    """SIGTERM has come: the client wants no more of it, or is gone. Raised only where we read and write."""


class _Silent:
    """Watch nothing: the client does."""

    def moved(self, count: int) -> None:
        """Ignore it."""

    def entered(self) -> None:
        """Ignore it."""

    def skipped(self, path: bytes) -> None:
        """Ignore it."""


def perform(argv: Sequence[str]) -> int:
    """Do what a request asks for, from inside the container; return the exit status. Raises nothing.

    Args:
        argv: `files-in`, the destination, the name in it, letters of options, the owner or nothing;
            `files-out` and the source; `mount` and the destination, with more for `prepare`; `unmount` and that.
    """
    frames = FrameWriter(_write)
    try:
        _settle()
        path = b""
        try:
            if argv[0] == "files-in":
                _, destination, name, options, owner = argv
                path = _files_in(_encoded(destination), _encoded(name), options, owner)
            elif argv[0] == MOUNT:
                mounting.attach(_INPUT, _encoded(argv[1]))
            elif argv[0] == "unmount":
                mounting.detach(_all_of(_INPUT), _encoded(argv[1]))
            else:
                send(_encoded(argv[1]), frames, _Silent())
        except OSError as exc:
            frames.failed(exc.errno or errno.EIO, _as_bytes(exc.filename), exc.strerror or str(exc))
        except (ValueError, FrameError, StreamEnd, identity.UnknownUser) as exc:
            frames.failed(0, b"", str(exc.args[0]))
        else:
            frames.done(path)
    except _WithdrawnError:
        return _WITHDRAWN
    except BaseException:  # noqa: BLE001 - there is nobody to tell: a fork must not return, and stderr is the client's
        return _BROKEN
    return 0


def prepare(argv: Sequence[str], init_pid: int, user_namespace: int | None) -> None:
    """Do what an operation needs outside, as root of the host; the result takes the place of its stdin.

    The stdin of `mount` is what is to be mounted (O_PATH); that of all other operations, a pipe.

    Args:
        argv: `mount`, the destination, `READONLY` or `WRITABLE`, and the caller's uid and gid; or as for `perform`.
        init_pid: The container's init. Whether it still was that, entering will show.
        user_namespace: A pidfd of it, if the container has a user namespace of its own.

    Raises:
        mounting.Refusal: It can't be done.
    """
    if argv[0] not in (MOUNT, "unmount"):
        return
    mounting.limit_time()
    namespaces.die_with_parent(signal.SIGKILL)  # again at the end: it does not outlast the changes of ids
    try:
        if argv[0] == "unmount":
            result = os.open(f"/proc/{init_pid}/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        else:
            _, _, access, uid, gid = argv
            caller = mounting.Owner(int(uid), int(gid))
            result = mounting.seal(_INPUT, readonly=access == READONLY, caller=caller, container=user_namespace)
        os.dup2(result, _INPUT, inheritable=False)
        os.close(result)
    except OSError as exc:
        text = f"what it takes outside the container can't be done: {exc.strerror}"
        raise mounting.Refusal(exc.errno or errno.EIO, text) from None


def _files_in(destination: bytes, name: bytes, options: str, owner: str) -> bytes:
    """Make what comes on stdin; return where it is."""
    found = identity.load(owner) if owner else identity.ROOT
    pair = (found.uid, found.gid)

    def own(fd: int) -> None:
        os.fchown(fd, *pair)

    place = trees.find_place(destination, name, parents=PARENTS in options, own=own)
    policy = Policy(owner=pair, merge=MERGE in options)
    TreeSink(place, FrameReader(_read), policy, _Silent()).receive()
    return place.path


def _settle() -> None:
    """Be no longer what the agent's commands inherit, but a program that tidies up."""
    sys.path.clear()
    sys.meta_path.clear()
    sys.path_hooks.clear()
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):  # as errors, please
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WITHDRAWAL)
    signal.signal(signal.SIGTERM, _withdraw)


def _withdraw(_signum: int, _frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _WithdrawnError


@contextlib.contextmanager
def _withdrawable() -> Iterator[None]:
    """Let SIGTERM in: everywhere else it could cut short the removal of what was begun."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WITHDRAWAL)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _WITHDRAWAL)


def _all_of(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


def _read(buffer: memoryview) -> int:
    with _withdrawable():
        return os.readv(_INPUT, [buffer])


def _write(buffers: Sequence[bytes | bytearray | memoryview]) -> None:
    left = [memoryview(buffer) for buffer in buffers]
    while left:
        with _withdrawable():
            written = os.writev(_OUTPUT, left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _as_bytes(path: object) -> bytes:
    if isinstance(path, bytes):
        return path
    return os.fsencode(path) if isinstance(path, str) else b""
