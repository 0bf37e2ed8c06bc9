"""A container as the tests of this suite see it: a machine that board is, or is not, installed on."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lxc_pool import Container, Process

RELEASES = Path(__file__).parent / "board"
TIMEOUT = 20.0
"""Seconds for one command; each takes milliseconds."""


class Machine:
    """One container, for one test."""

    def __init__(self, container: Container) -> None:
        """Take the container; nothing happens in it yet."""
        self.container = container

    def sh(self, script: str, *, user: str | None = None) -> str:
        """Run a shell script that has to succeed; return what it wrote."""
        done = self.try_sh(script, user=user)
        assert done.returncode == 0, f"{script!r} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_sh(self, script: str, *, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a shell script that may fail."""
        return self.container.run(
            ["sh", "-c", script], capture_output=True, text=True, timeout=TIMEOUT, user=user, stdin=subprocess.DEVNULL
        )

    def unpack(self, version: str) -> str:
        """Put a release on the machine; return the directory."""
        self.container.push(RELEASES / version, "/home/", dirs_exist_ok=True)
        return f"/home/{version}"

    def install(self, version: str) -> None:
        """Install a release, or upgrade to it."""
        self.sh(f"{self.unpack(version)}/install")

    def service(self, verb: str) -> int:
        """Do what the init script does for *verb*; return its exit status."""
        return self.try_sh(f"/etc/init.d/board {verb}").returncode

    def version(self) -> str:
        """Ask the running service for its version."""
        return self.sh("wget -q -O - http://127.0.0.1:8080/version").strip()

    def post(self, text: str) -> None:
        """Post a message."""
        self.sh(f"wget -q -O - --post-data '{text}' http://127.0.0.1:8080/cgi-bin/messages")

    def messages(self) -> list[str]:
        """Ask the running service for all messages."""
        return self.sh("wget -q -O - http://127.0.0.1:8080/cgi-bin/messages").splitlines()

    def daemons(self) -> int:
        """Count the daemons that run; `pidof` would count those, too, that init has not reaped yet."""
        return len(self.try_sh("grep -l 'ht[t]pd' /proc/[0-9]*/cmdline").stdout.split())

    def start(self, script: str) -> Process:
        """Start a shell script beside the test, with its output to be read."""
        return self.container.popen(
            ["sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def files(self) -> set[str]:
        """Return every file of the system with its type, mode and owner."""
        # utmp is init's: it writes there of every process that it reaps.
        pruned = " -o ".join(f"-path {path}" for path in ("/proc", "/sys", "/dev", "/home", "/run/utmp"))
        return set(self.sh(rf"find / -xdev \( {pruned} \) -prune -o -exec stat -c '%A %u:%g %n' {{}} +").splitlines())
