"""`lxc-pool audit` and `cleanup` beside a busy service, after a killed one, and beside what is not the service's."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lxc_pool import State
from lxc_pool.cli.main import main
from lxc_pool.host import idranges
from lxc_pool.host.cgroups import hierarchies
from lxc_pool.host.residue import LOCKS
from lxc_pool.service import audit
from tests.support.faults import FaultyService
from tests.support.oracle import assert_healed
from tests.support.real_service import ROOT, Service
from tests.support.waiting import eventually

KINDS = {"container", "process", "cgroup", "mount", "directory", "netdev", "lock", "socket"}

LEASE_UNTIL_TOLD = """
    import select
    while not select.select([sys.stdin], [], [], 0)[0]:
        with pool.lease("x", 30) as container:
            container.run(["true"], check=True)
"""


def run_audit(service: Service) -> tuple[int, dict[str, Any]]:
    done = command(service, "audit", "--json")
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document.keys() == {"clean", "findings"}
    for finding in document["findings"]:
        assert finding.keys() == {"kind", "name", "detail"}
        assert finding["kind"] in KINDS
    assert done.returncode == (0 if document["clean"] else 1)
    assert document["clean"] is not bool(document["findings"])
    return done.returncode, document


def cleanup(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command(service, "cleanup", *arguments)


def command(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `lxc-pool`; in this process, which is a fifth of the work of another one."""
    words = ["--host-dir", str(service.host_dir), *arguments, "--state-dir", str(service.state_dir)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as error:  # argparse
            status = int(error.code or 0)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def snapshot(service: Service) -> object:
    """Return everything of a service's that is on the host."""
    return (
        sorted(str(path) for path in service.directory.rglob("*") if not path.name.startswith("ledger.db")),
        sorted(service.cgroups()),
        sorted(map(str, service._lock_files())),
        sorted(holder for _path, holder in idranges.held() if str(service.containers) in holder),
        in_containers(service),
    )


def in_containers(service: Service) -> list[int]:
    """Return the processes in cgroups of a service's containers."""
    found = []
    for pid in sorted(map(int, filter(str.isdecimal, os.listdir("/proc")))):
        with contextlib.suppress(OSError):
            if f"lxp-{service.instance}-" in Path(f"/proc/{pid}/cgroup").read_text():
                found.append(pid)
    return found


@pytest.fixture
def killed(service: FaultyService) -> Iterator[tuple[FaultyService, Any]]:
    """A service that was killed, with one live lease and two warm containers."""
    pool = service.start(size=2)
    with pool.lease("live") as container:
        pool.wait_ready()
        idle = in_containers(service)
        container.run(["true"], check=True)
        service.kill()
        eventually(lambda: in_containers(service) == idle, "what had started commands has ended with the service")
        eventually(lambda: not service.semaphores(), "what counts its semaphores has removed them, and ended")
        yield service, container
        if service.process is None and (service.state_dir / "instance").exists():
            service.start(size=2)
        if service.process is None:
            container._released = True  # the test has uninstalled everything


def test_beside_a_busy_service_it_never_finds_anything_and_cleanup_does_no_harm(service: FaultyService) -> None:
    pool = service.start(size=3)
    pool.wait_ready()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.client(LEASE_UNTIL_TOLD)) for _ in range(4)]
        eventually(lambda: pool.status().leased, "they are at it")
        for _ in range(30):
            report = audit.audit(service.state_dir, service.host_dir)
            assert report.findings == ()
            assert report.running == service.pid
            audit.clean(report, service.state_dir)
        assert run_audit(service) == (0, {"clean": True, "findings": []})
        assert cleanup(service, "--execute").stdout == "clean\n"
        for client in clients:
            assert client.stdin is not None
            client.stdin.close()
        assert [client.wait(30) for client in clients] == [0] * 4
    assert_healed(service, pool)
    assert pool.status().error_count == 0, service.log


@pytest.mark.parametrize(("seconds", "found"), [(0.2, 0), (60, 1)], ids=["ends", "stays"])
def test_a_monitor_that_is_about_to_end_is_no_residue(service: FaultyService, seconds: float, found: int) -> None:
    service.start(size=1)
    title = f"[lxc monitor] {service.containers} lxp-{service.instance}-0-1"
    with subprocess.Popen(["bash", "-c", f'exec -a "{title}" sleep {seconds}']) as process:
        eventually(lambda: title in Path(f"/proc/{process.pid}/cmdline").read_text(), "it has that name")
        findings = audit.audit(service.state_dir, service.host_dir).findings
        process.kill()
    assert [trace.kind for trace in findings] == ["process"] * found


def test_after_a_kill_all_but_live_leases_is_residue_and_cleanup_removes_just_that(killed: Any) -> None:
    service, container = killed
    warm = {path.name for path in service.containers.iterdir()} - {container.name}
    assert len(warm) == 2
    status, document = run_audit(service)
    assert status == 1
    found = document["findings"]
    assert {entry["name"] for entry in found if entry["kind"] != "socket"} == warm
    assert {entry["kind"] for entry in found} == {"container", "process", "cgroup", "lock", "socket"}
    assert not any(container.name in f"{entry['name']} {entry['detail']}" for entry in found)

    before = snapshot(service)
    dry = cleanup(service)
    assert dry.returncode == 1
    assert dry.stdout.count("would remove") == len(found)
    assert dry.stdout.endswith("add --execute to do it\n")
    assert json.loads(cleanup(service, "--json").stdout) == document
    assert snapshot(service) == before

    done = cleanup(service, "--execute", "--json")
    assert done.returncode == 0, done
    removed = json.loads(done.stdout)
    assert removed["clean"] is True
    assert [entry["problem"] for entry in removed["findings"]] == [None] * len(found)
    assert [path.name for path in service.containers.iterdir()] == [container.name]
    assert run_audit(service) == (0, {"clean": True, "findings": []})

    pool = service.start(size=2)
    container.run(["true"], check=True)
    assert_healed(service, pool, leased=[container.name])


def test_a_lease_whose_owner_is_dead_is_residue(service: FaultyService) -> None:
    service.start(size=1).wait_ready()
    with service.client("c = pool.get('x', 30); print(c.name, flush=True); sys.stdin.read()") as client:
        assert client.stdout is not None
        name = client.stdout.readline().strip()
        service.kill()
        assert name not in {entry["name"] for entry in run_audit(service)[1]["findings"]}
    assert name in {entry["name"] for entry in run_audit(service)[1]["findings"]}
    assert cleanup(service, "--execute").returncode == 0
    assert list(service.containers.iterdir()) == []
    service.assert_clean()


def test_each_kind_of_trace_is_seen_beside_a_running_service_and_removed(service: FaultyService) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as container, contextlib.ExitStack() as stack:
        names = [f"lxp-{service.instance}-dead-{number}" for number in (1, 2)]
        directory, bare = (service.containers / name for name in names)
        (directory / "disk").mkdir(parents=True)
        (directory / "config").touch()
        bare.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", directory / "disk"], check=True)
        umount = ["umount", "--lazy", str(directory / "disk")]
        stack.callback(lambda: subprocess.run(umount, check=False, stderr=subprocess.DEVNULL))
        groups = [
            tree.mount_point / f"lxc.{what}.{names[0]}" for tree in hierarchies() for what in ("payload", "monitor")
        ]
        for group in groups:
            group.mkdir()
        sleeper = stack.enter_context(subprocess.Popen(["sleep", "infinity"]))
        stack.callback(sleeper.kill)
        (groups[0] / "cgroup.procs").write_text(str(sleeper.pid))
        device = f"lxp{service.instance}adead"
        subprocess.run(["ip", "link", "add", device, "type", "bridge"], check=True)
        stack.callback(subprocess.run, ["ip", "link", "delete", device], check=False, stderr=subprocess.DEVNULL)
        lock = LOCKS / str(service.containers).lstrip("/") / f".{names[0]}"
        lock.touch()
        first = idranges.take(str(directory))
        partial = service.state_dir / "images" / "busybox" / ".partial-dead"
        (partial / "rootfs").mkdir(parents=True)

        status, document = run_audit(service)
        assert status == 1
        found = [(entry["kind"], entry["name"], entry["detail"].split(": ")[0]) for entry in document["findings"]]
        assert sorted(found) == sorted(
            [
                ("container", names[0], str(directory)),
                ("directory", names[1], str(bare)),
                ("mount", names[0], str(directory / "disk")),
                *(("cgroup", names[0], str(group)) for group in groups),
                ("process", names[0], f"{sleeper.pid} sleep infinity"),
                ("netdev", device, device),
                ("lock", names[0], str(lock)),
                ("lock", names[0], str(idranges.REGISTRY / str(first))),
                ("directory", str(partial), str(partial)),
            ]
        )
        done = cleanup(service, "--execute")
        assert (done.returncode, done.stdout.count(": removed\n")) == (0, len(found)), done.stdout
        assert sleeper.wait(30) == -signal.SIGKILL
        assert device not in [name for _index, name in socket.if_nameindex()]
        assert not [path for path in (directory, bare, *groups, lock, partial) if path.exists()]
        container.run(["true"], check=True)
    assert_healed(service, pool)


def test_beside_a_service_whose_ledger_is_gone_nothing_is_removed(service: FaultyService) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as container:
        pool.wait_ready()
        before = snapshot(service)
        ledger, away = service.state_dir / "ledger.db", service.directory / "away"
        ledger.rename(away)
        try:
            for words in (["audit"], ["cleanup"], ["cleanup", "--execute"], ["cleanup", "--execute", "--older-than=0"]):
                done = command(service, *words)
                assert (done.returncode, done.stdout) == (2, ""), words
                assert f"the ledger {ledger} is gone" in done.stderr
        finally:
            away.rename(ledger)
        assert snapshot(service) == before
        container.run(["true"], check=True)
    assert_healed(service, pool)


def test_only_what_is_old_enough_is_removed(killed: Any) -> None:
    service, _container = killed
    before = snapshot(service)
    done = cleanup(service, "--execute", "--older-than", "3600")
    assert (done.returncode, done.stdout) == (0, "clean\n")
    assert snapshot(service) == before
    assert cleanup(service, "--older-than", "0").stdout.count("would remove") > 2
    for wrong in ("-1", "nan", "x"):
        refused = cleanup(service, f"--older-than={wrong}")
        assert (refused.returncode, "must be 0 or more seconds, not" in refused.stderr) == (2, True)
    assert cleanup(service, "--all", "--older-than", "1", "--execute").returncode == 2
    assert snapshot(service) == before


def test_an_uninstallation_waits_for_the_services_end_and_leaves_nothing(killed: Any) -> None:
    service, container = killed
    pool = service.start(size=2)
    pool.wait_ready()
    before = snapshot(service)
    refused = cleanup(service, "--all", "--execute")
    assert refused.returncode == 5
    assert f"pid {service.pid}" in refused.stderr
    assert snapshot(service) == before
    container.run(["true"], check=True)
    service.kill()
    pool.close()

    instance = service.instance
    dry = cleanup(service, "--all")
    assert dry.returncode == 1
    assert str(service.state_dir) in dry.stdout
    assert str(service.host_dir) in dry.stdout
    done = cleanup(service, "--all", "--execute")
    assert done.returncode == 0, done
    assert not service.state_dir.exists()
    assert not service.host_dir.exists()
    assert not (LOCKS / str(service.state_dir).lstrip("/")).exists()
    assert not service.cgroups(f"lxp-{instance}")
    assert not [holder for _path, holder in idranges.held() if str(service.containers) in holder]
    assert cleanup(service, "--all", "--execute").returncode == 0  # once more: nothing to do


def test_an_uninstallation_does_not_touch_a_host_dir_that_another_service_has(
    service: FaultyService, images: Path
) -> None:
    service.start(size=1).wait_ready()
    service.stop()
    other = Service(images)
    try:
        pool = other.start(size=1)
        service.host_dir, own = other.host_dir, service.host_dir
        done = cleanup(service, "--all", "--execute")
        service.host_dir = own
        assert done.returncode == 5
        assert f"pid {other.pid} runs on {other.host_dir}" in done.stderr
        assert pool.echo("x") == "x"
        assert other.connect().echo("y") == "y"
    finally:
        other.close()


@contextlib.contextmanager
def foreign(service: Service) -> Iterator[Callable[[], list[Path]]]:
    """Have things that look like the service's on the host, and are not."""
    base = Path("/sys/fs/cgroup")
    roots = [base / "unified" if (base / "unified").is_dir() else base]
    roots += [base / name for name in ("pids", "memory") if (base / name / "tasks").exists()]
    near = service.instance[:-1] + ("0" if service.instance[-1] != "0" else "1")
    names = [f"lxp-{near}-ab12-1", "lxp-", f"my-lxp-{service.instance}-ab12-1"]
    paths = [root / f"lxc.payload.{name}" for root in roots for name in names]
    locks = LOCKS / str(service.containers).lstrip("/")
    locks.mkdir(parents=True, exist_ok=True)
    paths += [service.containers / name for name in names]
    for path in paths:
        path.mkdir()
    files = [service.containers / names[0] / "config", *(locks / f".{name}" for name in names)]
    for file in files:
        file.touch()
    # A range of another service's, for a container that has the very name of one of ours.
    holder = f"/nowhere/state/containers/lxp-{service.instance}-ab12-1"
    first = idranges.take(holder)
    sleeper = subprocess.Popen(["sleep", "infinity"])
    (paths[0] / "cgroup.procs").write_text(str(sleeper.pid))
    everything = [*paths, *files, idranges.REGISTRY / str(first)]
    try:
        yield lambda: [path for path in everything if not path.exists()]
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
        idranges.give_back(holder, first)
        for file in files:
            file.unlink(missing_ok=True)
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()


def test_what_is_not_the_services_is_never_named_or_touched(killed: Any) -> None:
    service, container = killed
    with foreign(service) as gone:
        ours = {path.name for path in service.containers.iterdir() if path.name.startswith(f"lxp-{service.instance}-")}
        _status, document = run_audit(service)
        named = {entry["name"] for entry in document["findings"] if entry["kind"] != "socket"}
        assert named == ours - {container.name}
        assert cleanup(service, "--execute").returncode == 0
        assert gone() == []
        pool = service.start(size=2)
        pool.wait_ready()
        assert run_audit(service)[1]["clean"]
        container.release()
        eventually(lambda: container.name not in {info.name for info in pool.containers()}, "it is removed")
        service.kill()
        done = cleanup(service, "--all", "--execute")
        assert done.returncode == 5
        assert "not the service's" in done.stderr
        assert gone() == []


def test_what_can_not_be_removed_is_reported_and_the_rest_goes(killed: Any) -> None:
    service, container = killed
    first, second = sorted({path.name for path in service.containers.iterdir()} - {container.name})
    file = service.containers / first / "keep"
    file.touch()
    if subprocess.run(["chattr", "+i", file], check=False).returncode:
        pytest.skip("this file system has no immutable files")
    try:
        done = cleanup(service, "--execute")
        assert done.returncode == 5
        assert f"container {first}: {service.containers / first}: NOT removed: " in done.stdout
        assert not service.has_traces(second)
        document = json.loads(cleanup(service, "--execute", "--json").stdout)
        assert document["clean"] is False
        assert {entry["name"] for entry in document["findings"] if entry["problem"]} == {first}
    finally:
        subprocess.run(["chattr", "-i", file], check=True)
    assert cleanup(service, "--execute").returncode == 0


def test_the_administrators_script_does_it_from_cron(killed: Any, tmp_path: Path) -> None:
    service, container = killed
    log = tmp_path / "log"
    script = [sys.executable, str(ROOT / "scripts" / "lxc_pool_admin.py"), "cleanup", "--host-dir", service.host_dir]
    script += ["--state-dir", service.state_dir, "--log", log]

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [*map(str, script), *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    assert run() == (1, "")
    assert run("--execute", "--older-than", "3600") == (0, "")
    assert run("--execute") == (0, "")
    assert run("--execute") == (0, "")
    lines = log.read_text().splitlines()
    assert sum("would remove" in line for line in lines) > 2
    assert sum(line.endswith(": removed") for line in lines) > 2
    assert [line.rpartition(" ")[2] for line in lines if "exit status" in line] == ["1", "0", "0", "0"]
    assert [path.name for path in service.containers.iterdir()] == [container.name]
    assert run("--no-such-option") == (2, "")
    assert log.read_text().endswith(" exit status 2\n")
    script[-2:] = [f"--log={tmp_path}/another"]
    assert run() == (0, "")
    assert "clean" in (tmp_path / "another").read_text()
    script[-1] = f"--log={tmp_path}/nowhere/log"
    status, said = run("--execute")
    assert status == 2
    assert f"can't write to --log {tmp_path}/nowhere/log: No such file or directory" in said


def test_audits_do_not_keep_a_service_from_starting(service: FaultyService) -> None:
    service.start(size=1)
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            audit.audit(service.state_dir, service.host_dir)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(2):
            service.kill()
            service.start(size=1)
    finally:
        done.set()
        thread.join()
    pool = service.connect()
    assert_healed(service, pool)
    assert not [info for info in pool.containers() if info.state is State.STUCK]
