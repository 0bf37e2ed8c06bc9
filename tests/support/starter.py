"""A stand-in for `lxc-start`, first on a service's PATH: it does what the real one does, unless a test wants a fault.

The faults are files in its directory, so that they reach whatever process calls it next.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_SCRIPT = """\
#!{directory}/lxc-sh
# Taken by one call only, whichever is first: a rename is atomic.
if {mv} {directory}/hang {directory}/hung.$$ 2>/dev/null; then
    read line < {directory}/never
fi
if [ -p {directory}/gate ]; then
    echo $$ >> {directory}/held
    read line < {directory}/gate
fi
if [ -e {directory}/fail ]; then
    exit 1
fi
exec {real} "$@"
"""


class Starter:
    """The stand-in, in a directory to put before the PATH."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._gate = directory / "gate"
        self._held = directory / "held"
        real, mv = shutil.which("lxc-start"), shutil.which("mv")
        assert real is not None
        # Its command line has to look like the real one's, whose first word is no shell.
        (directory / "lxc-sh").symlink_to("/bin/sh")
        os.mkfifo(directory / "never")
        program = directory / "lxc-start"
        program.write_text(_SCRIPT.format(directory=directory, real=real, mv=mv))
        program.chmod(0o755)

    def hang_once(self) -> None:
        """Let the next start hang for ever."""
        (self.directory / "hang").touch()

    def has_hung(self) -> bool:
        return any(self.directory.glob("hung.*"))

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Let every start fail, without a word."""
        (self.directory / "fail").touch()
        try:
            yield
        finally:
            (self.directory / "fail").unlink()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Let every start wait until the end of the block."""
        os.mkfifo(self._gate)
        # While there is a writer, nobody waits in opening; once there is none, all who read come to the end of file.
        writer = os.open(self._gate, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield
        finally:
            self._gate.unlink()
            self._held.unlink(missing_ok=True)
            os.close(writer)

    def held(self) -> int:
        """Return how many starts have come to the gate."""
        return len(self._held.read_text().split()) if self._held.exists() else 0
