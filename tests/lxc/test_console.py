"""What containers write to their consoles: kept within bounds, shown as text, to their holders alone."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lxc_pool import Container, LeaseExpired, PoolServiceProxy
from lxc_pool.backend.lxc import console
from lxc_pool.images import busybox
from lxc_pool.images.store import ImageStore
from tests.support.real_service import Service
from tests.support.waiting import eventually

FLOOD = 20 << 20
"""Bytes, far beyond what is kept."""


def say(container: Container, script: str) -> None:
    """Run a script whose output goes to the console."""
    container.run(["sh", "-c", f"exec >/dev/console 2>&1; {script}"], check=True, timeout=10)


def log_of(service: Service, container: Container) -> Path:
    return service.containers / container.name / "console.log"


def monitor_of(container: Container) -> int:
    return int(Path(f"/proc/{container.init_pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_what_is_written_to_the_console_is_read_as_text(pool: PoolServiceProxy, shared_service: Service) -> None:
    with pool.lease("x") as container:
        assert container.console_log() == ""
        say(container, r"echo one; printf '\033[31mtwo\033[0m\033]0;t\007\n\377\302\205\342\200\256three\n'")
        eventually(lambda: container.console_log() == "one\ntwo\n\N{REPLACEMENT CHARACTER}three\n", "all is there")
        assert container.console_log(lines=1) == "\N{REPLACEMENT CHARACTER}three\n"
        assert container.console_log(lines=0) == ""
        for wrong, error in ((-1, ValueError), ("1", TypeError), (True, TypeError)):
            with pytest.raises(error, match="lines must be"):
                container.console_log(wrong)  # type: ignore[arg-type]  # that is the point
        shown = shared_service.cli("logs", container.name, "--tail", "2")
        assert (shown.returncode, shown.stdout) == (0, "two\n\N{REPLACEMENT CHARACTER}three\n")
        document = json.loads(shared_service.cli("logs", "--json", container.name).stdout)
        assert document == {"name": container.name, "console": container.console_log()}
        assert shared_service.cli("logs", container.name, "-n", "x").returncode == 2
    with pytest.raises(LeaseExpired):
        container.console_log()
    assert shared_service.cli("logs", container.name).returncode == 5
    eventually(lambda: not shared_service.has_traces(container.name), "the log goes with the container")


def test_a_console_that_is_flooded_stays_within_bounds(pool: PoolServiceProxy, shared_service: Service) -> None:
    with pool.lease("x") as container:
        monitor, log = Path(f"/proc/{monitor_of(container)}/io"), log_of(shared_service, container)

        def taken() -> int:
            return int(monitor.read_text().split()[1])

        begun, most = taken(), 0
        with container.popen(["sh", "-c", "yes $(seq 1000) >/dev/console"], stdin=subprocess.DEVNULL) as flood:
            while taken() - begun < FLOOD:
                most = max(most, log.stat().st_size)
                assert len(container.console_log().encode()) <= console.SIZE
            assert pool.echo("x") == "x"
            flood.kill()
        assert most > 1000
        assert most <= console.SIZE
        assert [path.name for path in log.parent.iterdir() if path.name.startswith("console")] == ["console.log"]
        say(container, "echo; echo and after it")
        eventually(lambda: container.console_log(1) == "and after it\n", "it goes on")


def test_the_log_is_for_root_alone_and_out_of_the_containers_reach(
    pool: PoolServiceProxy, shared_service: Service
) -> None:
    with pool.lease("x") as container:
        status = log_of(shared_service, container).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o600, 0, 0)
        # Its root may do to its console what it likes.
        say(container, "rm -f /dev/console; umount -l /dev/console; mknod /dev/console c 1 3; true")
        container.run(["sh", "-c", "echo x >/dev/pts/0; rm -rf /dev/pts; umount -l /dev/pts"], timeout=10)
        assert isinstance(container.console_log(), str)


def test_a_container_without_a_log_has_an_empty_one(pool: PoolServiceProxy, shared_service: Service) -> None:
    with pool.lease("x") as container:
        log_of(shared_service, container).unlink()  # it was made by a service that kept none
        assert container.console_log() == ""
        assert (shared_service.cli("logs", container.name).returncode) == 0


def test_what_an_init_says_before_it_dies_is_in_the_error(service: Service) -> None:
    def build(rootfs: Path, report: Callable[[str], None]) -> None:
        busybox.build(rootfs, report)
        init = rootfs / "sbin/init"
        init.unlink()
        init.write_text("#!/bin/sh\necho\nprintf 'no \\033[31mroot\\007 disk\\nplease\\t insert one\\n'\n")
        init.chmod(0o755)

    ImageStore(service.state_dir / "images").build("busybox", lambda _line: None, build)
    pool = service.start(size=1)
    said: list[str] = []

    def told() -> bool:
        if (error := pool.status().last_error) is not None:
            said.append(error)
        return bool(said) and said[-1].endswith("its console's last words: no root disk; please insert one")

    eventually(told, "it is said why", 60)
    # Or it was up just long enough to be handed on.
    assert all("stopped at once" in error or "went down at once" in error for error in said), said


def test_it_is_without_a_console_where_terminals_run_out(tmp_path: Path) -> None:
    for name, value in {"max": 4096, "reserve": 1024, "nr": 3000}.items():
        (tmp_path / name).write_text(f"{value}\n")
    assert dict(console.settings(Path("/c"), tmp_path))["lxc.console.logfile"] == "/c/console.log"
    (tmp_path / "nr").write_text("3050\n")
    assert console.settings(Path("/c"), tmp_path) == [("lxc.console.path", "none")]
