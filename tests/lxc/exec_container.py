"""A busybox container of this test's own, made by hand and started with lxc-start; later the pool's own may replace it.

Nothing is left: the container is killed, its directories and cgroups are removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lxc_pool.client.process import Process, run
from lxc_pool.execution.launcher import Launcher
from lxc_pool.execution.protocol import ExecRequest

SHIFT = 1_000_000
"""The first host id of an idmapped container."""

_PASSWD = """\
root:x:0:0:root:/root:/bin/sh
alice:x:1000:1000:Alice:/home/alice:/bin/sh
"""
_GROUP = """\
root:x:0:
alice:x:1000:
audio:x:29:alice
video:x:44:bob,alice
"""
_CONFIG = """\
lxc.uts.name = {name}
lxc.rootfs.path = overlay:{lower}:{upper}
lxc.net.0.type = empty
lxc.autodev = 1
lxc.mount.auto = proc:mixed sys:mixed
lxc.tty.max = 0
lxc.pty.max = 64
lxc.cap.drop = sys_module sys_time
"""
_IDMAP = f"lxc.idmap = u 0 {SHIFT} 65536\nlxc.idmap = g 0 {SHIFT} 65536\n"
_SECCOMP = "2\ndenylist\nkexec_load errno 1\nmkdir errno 95\nmkdirat errno 95\n"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_NUMBERS = itertools.count(1)


def make_rootfs(path: Path, *, shift: int = 0) -> None:
    """Make a busybox root file system; its ids begin at *shift*."""
    for directory in ("bin", "sbin", "proc", "sys", "dev", "etc", "tmp", "root", "home/alice", "locked"):
        (path / directory).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", path / "bin/busybox")
    applets = subprocess.run(["busybox", "--list"], check=True, capture_output=True, text=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (path / "bin" / applet).symlink_to("busybox")
    (path / "sbin/init").symlink_to("../bin/busybox")
    (path / "etc/inittab").write_text("::sysinit:/bin/true\n")
    (path / "etc/passwd").write_text(_PASSWD)
    (path / "etc/group").write_text(_GROUP)
    (path / "bin/not-executable").write_text("#!/bin/sh\n")
    (path / "tmp").chmod(0o1777)
    (path / "locked").chmod(0o700)
    path.chmod(0o755)
    for directory, _, files in os.walk(path):
        for name in (directory, *(f"{directory}/{file}" for file in files)):
            os.lchown(name, shift, shift)
    for name in ("home/alice",):
        os.lchown(path / name, shift + 1000, shift + 1000)


@dataclasses.dataclass
class ExecContainer:
    """A running container, and a launcher to run commands in it."""

    name: str
    lxcpath: Path
    init_pid: int
    init_pidfd: int
    launcher: Launcher

    def launch(self, request: ExecRequest, fds: tuple[int, int, int, int]) -> None:
        """Do what the pool's client and service do between them."""
        self.launcher.launch(os.getuid(), request, fds, (self.init_pidfd, self.init_pid))

    def run(self, args: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
        return run(self.launch, args, **options)

    def sh(self, script: str, **options: Any) -> str:
        """Run a shell script and return what it wrote."""
        options = {
            "capture_output": True,
            "text": True,
            "check": True,
            "timeout": 30,
            "stdin": subprocess.DEVNULL,
        } | options
        return str(self.run(["sh", "-c", script], **options).stdout)

    def popen(self, args: Any, **options: Any) -> Process:
        return Process.start(self.launch, args, **options)

    def pids(self) -> set[int]:
        """Return the host's pids of all that runs in the container's pid namespace."""
        namespace = os.readlink(f"/proc/{self.init_pid}/ns/pid")
        found = set()
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{entry}/ns/pid") == namespace and not _is_zombie(entry):
                        found.add(int(entry))
        return found

    def cgroups(self) -> list[Path]:
        """Return every directory of the container's payload."""
        root, name = Path("/sys/fs/cgroup"), f"lxc.payload.{self.name}"
        return [place / name for place in (root, *root.iterdir()) if (place / name).is_dir()]

    def stop(self) -> None:
        """Kill the container, and wait until it has stopped; its monitor may still be removing the cgroups."""
        subprocess.run(
            ["lxc-stop", "-P", str(self.lxcpath), "-n", self.name, "-k"],
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=30,
        )


@contextlib.contextmanager
def running(
    directory: Path, name: str, launcher: Launcher, *, idmapped: bool = False, seccomp: bool = False, extra: str = ""
) -> Iterator[ExecContainer]:
    """Run a container below *directory*, which has to be reachable by the shifted root.

    Its name is *name* with a number: the monitor of one that has stopped removes cgroups by their name, and would take
    those of the next one of that name.
    """
    name = f"{name}-{next(_NUMBERS)}"
    shift = SHIFT if idmapped else 0
    lower, lxcpath = directory / f"lower-{shift}", directory / "lxc"
    if not lower.exists():
        make_rootfs(lower, shift=shift)
    home = lxcpath / name
    for part in ("overlay/delta", "overlay/work", "rootfs"):
        (home / part).mkdir(parents=True)
    for part in (".", "overlay", "overlay/delta", "overlay/work", "rootfs"):
        (home / part).chmod(0o755)
        os.chown(home / part, shift, shift)
    config = _CONFIG.format(name=name, lower=lower, upper=home / "overlay/delta") + extra + (_IDMAP if idmapped else "")
    if seccomp:
        (home / "seccomp").write_text(_SECCOMP)
        config += f"lxc.seccomp.profile = {home}/seccomp\n"
    (home / "config").write_text(config)
    log = home / "log"
    started = subprocess.run(
        ["lxc-start", "-P", str(lxcpath), "-n", name, "-o", str(log), "-l", "INFO"],
        check=False,
        env={"PATH": _PATH},
        stdin=subprocess.DEVNULL,
        timeout=30,
    )
    container = None
    try:
        assert started.returncode == 0, log.read_text()
        info = subprocess.run(
            ["lxc-info", "-P", str(lxcpath), "-n", name, "-p", "-H"], check=True, capture_output=True, timeout=30
        )
        pid = int(info.stdout)
        container = ExecContainer(name, lxcpath, pid, os.pidfd_open(pid), launcher)
        yield container
    finally:
        if container is not None:
            container.stop()
            os.close(container.init_pidfd)
        shutil.rmtree(home)


def _is_zombie(pid: str) -> bool:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"
