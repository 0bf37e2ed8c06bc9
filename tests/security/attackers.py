"""Who attacks: code in a container, and users of the host."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lxc_pool import Container
from lxc_pool.config import Config, ProfileConfig, parse
from lxc_pool.host import cgroups
from tests.support.processes import NOBODY, in_child

TIMEOUT = 30.0
"""Seconds that one attack may take; most take milliseconds."""

GROUP = NOBODY
"""The group that may use the service in these tests: every host has it, and nobody is in it."""

ALICE, BOB, STRANGER = 64001, 64002, 64003
"""Uids without an account. The first two are in the group, as a supplementary one."""


@dataclasses.dataclass(frozen=True)
class _Limits:
    """What the containers of these tests may use: little, so that it is soon used up."""

    size: int = 3
    memory: int = 96 << 20
    pids: int = 120
    disk: int = 16 << 20

    @property
    def configuration(self) -> str:
        return (
            f"[pool]\nsize = {self.size}\nworkers = 2\n[profile.default]\n"
            f"memory = {self.memory}\npids = {self.pids}\ndisk = {self.disk}\n"
        )

    @property
    def profile(self) -> ProfileConfig:
        config: Config = parse(self.configuration, origin="tests")
        return config.profiles[0]


LIMITS = _Limits()


class Attacker:
    """A container, and the program of `attack.c` in it.

    Attributes:
        container: The lease.
        first_id: The host's id of its root.
        cgroups: Its cgroup in each hierarchy.
    """

    def __init__(self, container: Container, program: bytes) -> None:
        self.container = container
        container.run(["sh", "-c", "cat >/attack && chmod 755 /attack"], input=program, check=True)
        self.first_id = int(Path(f"/proc/{container.init_pid}/uid_map").read_text().split()[1])
        self.cgroups = cgroups.payload_cgroups(container.name)

    def run(self, *arguments: str, user: str | int | None = None) -> dict[str, str]:
        """Let the program run to its end; return what it said of each try."""
        done = self.container.run(
            ["/attack", *arguments], capture_output=True, text=True, timeout=TIMEOUT, user=user, input=""
        )
        lines = [line for line in done.stdout.splitlines() if "=" in line]
        assert lines or done.returncode, done
        return dict(line.split("=", 1) for line in lines)

    def shell(self, script: str, user: str | int | None = None) -> str:
        """Run a script; return what it said, errors included."""
        done = self.container.run(
            ["sh", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            user=user,
        )
        return str(done.stdout)

    @contextlib.contextmanager
    def holding(self, *arguments: str) -> Iterator[str]:
        """Let the program take something and hold it; yield what it says when it has it."""
        process = self.container.popen(
            ["/attack", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip().partition("=")[2]
        finally:
            process.kill_tree()
            process.close()

    def cgroup_file(self, name: str) -> str:
        """Return what a file of its cgroups says, seen from the host; empty if no hierarchy has it."""
        for directory in self.cgroups:
            with contextlib.suppress(OSError):
                return (directory / name).read_text().strip()
        return ""


def as_person(uid: int, action: Callable[[], Any], groups: Sequence[int] = ()) -> Any:
    """Call *action* in a forked child as a user of the host; return its result, or the (type, words) it raised."""

    def change_and_act() -> Any:
        os.setgroups(list(groups))
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return action()

    return in_child(change_and_act)


def as_member(uid: int, action: Callable[[], Any]) -> Any:
    """As `as_person`, as somebody who may use the service."""
    return as_person(uid, action, [GROUP])
