"""A command on its way in is closed to the container, at each step; shown by one that is held there."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lxc_pool.execution import cgroups, entry, identity, namespaces, packets
from lxc_pool.execution.confinement import Confinement, Reading
from lxc_pool.execution.launcher import Launcher
from lxc_pool.execution.protocol import ExecRequest
from tests.lxc.exec_container import ExecContainer, running
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("lxc-start", "lxc-stop", "busybox"))),
    reason="needs root, lxc and busybox",
)

SUID_DUMPABLE = Path("/proc/sys/fs/suid_dumpable")


@pytest.fixture(scope="module")
def container() -> Iterator[ExecContainer]:
    directory = Path(tempfile.mkdtemp(prefix="lxc_pool-entry."))
    directory.chmod(0o755)
    try:
        with Launcher() as launcher, running(directory, f"entry-{os.getpid()}", launcher, idmapped=True) as made:
            yield made
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def changes_of_ids_make_dumpable() -> Iterator[None]:
    """Let the kernel do for the moment what `fs.suid_dumpable = 1` makes of who changes its ids (proc_sys_fs(5))."""
    before = SUID_DUMPABLE.read_text()
    try:
        SUID_DUMPABLE.write_text("1")
    except OSError as exc:
        pytest.skip(f"needs to set fs.suid_dumpable: {exc}")
    try:
        yield
    finally:
        SUID_DUMPABLE.write_text(before)


def confinement_of(container: ExecContainer) -> Confinement:
    reading = Reading(container.init_pid)
    found: list[Confinement] = []

    def read() -> bool:
        result = reading.result()
        found.extend([] if result is None else [result])
        return bool(found)

    eventually(read, "init stands still")
    return found[0]


@contextlib.contextmanager
def held(container: ExecContainer, request: ExecRequest, stdin: int) -> Iterator[int]:
    """Send a command in that stops itself on its way, as a supervisor does; yield its pid."""
    where = cgroups.membership(container.init_pid, cgroups.mounted())
    door = entry.Door.into(container.init_pid, container.init_pidfd, where, confinement_of(container))
    cgroup = cgroups.CommandCgroup(where.parent, f"{cgroups.COMMANDS}{os.getpid()}.held")
    cgroup.create()
    directory = cgroup.open()
    null = os.open(os.devnull, os.O_RDWR)
    report, its_end = packets.pair()
    namespaces.set_undumpable()  # as the agent does at its beginning
    try:
        pid, pidfd = entry.fork(request, (stdin, null, null, its_end.fileno()), directory, door)
    finally:
        namespaces.set_dumpable()
    try:
        its_end.close()
        waited = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert waited is not None
        assert waited.si_code == os.CLD_STOPPED, report.recv(4096)
        yield pid
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        report.close()
        door.close()
        for fd in (directory, null, pidfd):
            os.close(fd)
        eventually(cgroup.remove, "its cgroup is empty")


def stopping(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return *original* with a stop before it, for whoever is a fork of this process."""
    ours = os.getpid()

    def stop_first(*args: Any, **options: Any) -> Any:
        if os.readlink("/proc/self/ns/user") != host and os.getpid() != ours:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*args, **options)

    host = os.readlink("/proc/self/ns/user")
    return stop_first


LOOK = """\
for file in environ maps mem; do
    (: <>/proc/{pid}/$file) 2>/dev/null && echo $file
done
ls /proc/{pid}/fd/0 >/dev/null 2>&1 && echo fd
readlink /proc/{pid}/exe >/dev/null && echo exe
ls -d /proc/{pid} >/dev/null && echo there
"""


def seen_inside(container: ExecContainer, pid: int, user: int) -> list[str]:
    """Return what a user of the container can open of a process there, *pid* on the host."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    inside = status["NSpid"].split()[-1]
    return container.sh(LOOK.format(pid=inside), user=user, check=False).split()


@pytest.mark.usefixtures("changes_of_ids_make_dumpable")
@pytest.mark.parametrize(
    ("step", "user"),
    [
        pytest.param((identity, "load"), 0, id="as the container's root"),
        pytest.param((os, "chdir"), 0, id="as the user root"),
        pytest.param((os, "chdir"), 1000, id="as another user"),
    ],
)
def test_a_command_is_closed_before_its_program_runs(
    container: ExecContainer, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str], user: int
) -> None:
    monkeypatch.setattr(*step, stopping(getattr(*step)))
    request = ExecRequest(("sleep", "1000"), cwd="/", env={}, user=str(user))
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        with held(container, request, null) as pid:
            for who in {0, user}:
                assert seen_inside(container, pid, who) == ["there"]
            assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2", "3"]  # its streams, and where it reports
    finally:
        os.close(null)


def test_a_commands_umask_is_not_the_services(container: ExecContainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "die_with_parent", stopping(namespaces.die_with_parent))
    null = os.open(os.devnull, os.O_RDONLY)
    before = os.umask(0)
    try:
        with held(container, ExecRequest(("sleep", "1000"), env={}), null) as pid:
            assert "Umask:\t0022\n" in Path(f"/proc/{pid}/status").read_text()
    finally:
        os.umask(before)
        os.close(null)


def test_such_a_look_sees_what_it_may(container: ExecContainer) -> None:
    with container.popen(["sleep", "1000"], stdin=subprocess.DEVNULL) as command:
        try:
            eventually(lambda: os.readlink(f"/proc/{command.pid}/exe").endswith("busybox"), "its program runs")
            seen = seen_inside(container, command.pid, 0)
        finally:
            command.kill()
    assert seen == ["environ", "maps", "mem", "fd", "exe", "there"]
