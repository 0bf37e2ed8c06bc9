"""Run a program that fills an image, so that it can't outlive us, mount anything on the host, or fill the disk.

```
 us ── pipe ── unshare ── its own pid and mount namespaces: the program and whatever it starts
```

When we end, by whatever, the kernel kills `unshare`, with that the first process of the namespace, with that all of
them; the mounts go with the last. Nothing else has the pipe: once it is at its end, they are all gone.
"""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lxc_pool.errors import ImageError

RESERVE = 256 << 20
"""Bytes of the disk that making an image leaves free. Origin: the pool's `min_free`, below which nothing is created."""

_LOOK_PAUSE = 0.5
"""Seconds between two looks at the free space while a program runs; nothing tells when a disk is nearly full."""

_LAST_WORDS = 12
"""Lines of a failed program's output that go into the error."""

# Source: setpriv(1), unshare(1) of util-linux 2.36. The shell looks at its parent after the kernel has been told to
# kill it at the parent's end: if that has ended just before, it has another one now.
_LEASHED = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ "$PPID" = "$1" ] || exit 1; shift; exec "$@"', "sh")
_UNSHARED = ("unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--")


def need(program: str, package: str, what: str) -> None:
    """Check that a program is there.

    Raises:
        ImageError: It is not; the message says what it is for, and what to install.
    """
    if shutil.which(program, path=_path()) is None:
        raise ImageError(f"{what} needs {program}, which is not installed: apt-get install {package}")


def run(
    argv: Sequence[str],
    *,
    room: Path,
    heard: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    looked: Callable[[], None] = lambda: None,
) -> None:
    """Run *argv* as root, with its own mounts and processes, and wait for all of those to end.

    Args:
        argv: The program and its arguments.
        room: A directory on the disk that it fills.
        heard: Takes each line that it writes.
        environment: What to add to ours.
        looked: Called twice a second while it runs, and at its end: it may look at what there is so far.

    Raises:
        ImageError: It failed, with its last words; or the disk got too full, and it was killed.
        OSError: It can't be started.
    """
    last: deque[str] = deque(maxlen=_LAST_WORDS)

    def take(line: str) -> None:
        last.append(line)
        heard(line)

    process = subprocess.Popen(
        [*_LEASHED, str(os.getpid()), *_UNSHARED, *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": _path(), "LC_ALL": "C.UTF-8", **(environment or {})},
        start_new_session=True,  # Ctrl-C is for us to hear; we kill all of it
    )
    assert process.stdout is not None
    ended = False
    try:
        _listen(process.stdout.fileno(), room, take, looked)
        looked()
        ended = True
    finally:
        if not ended:
            process.kill()
            while os.read(process.stdout.fileno(), 1 << 16):
                pass  # until the last of them is gone
        process.wait()
        process.stdout.close()
    if process.returncode:
        lines = [line for line in last if line.startswith("E: ")] or [line for line in last if line]  # apt's errors
        said = "; ".join(lines) or "it said nothing"
        raise ImageError(f"{argv[0]} failed with exit status {process.returncode}: {said}")


def check_room(directory: Path) -> int:
    """Return the bytes that may still be written on the disk of *directory*.

    Raises:
        ImageError: There are none.
    """
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize - RESERVE
    if free <= 0:
        raise ImageError(f"the disk of {directory} has less than {RESERVE >> 20} MiB left: make room, then try again")
    return free


def _listen(descriptor: int, room: Path, take: Callable[[str], None], looked_at: Callable[[], None]) -> None:
    """Split what comes from *descriptor* into lines until its end, and watch the disk meanwhile."""
    rest = b""
    looked = float("-inf")
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if time.monotonic() - looked > _LOOK_PAUSE:
                check_room(room)
                looked_at()
                looked = time.monotonic()
            if not selector.select(_LOOK_PAUSE):
                continue
            data = os.read(descriptor, 1 << 16)
            *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
            rest = rest[-4096:]
            for line in lines:
                take(_readable(line))
            if not data:
                if rest:
                    take(_readable(rest))
                return


def _readable(line: bytes) -> str:
    text = line.decode(errors="replace")[:1000]
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()


def _path() -> str:
    """Return our PATH with where Debian keeps programs for root."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])
