"""What bears a service's mark on the host, and what does not: with files and locks alone, no container is needed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lxc_pool.backend.lxc import removal
from lxc_pool.errors import BackendError, CloneFailed, HostDirError
from lxc_pool.host import bridge, cgroups, firewall, idranges, residue, semaphores
from lxc_pool.images.store import ImageStore
from lxc_pool.service import audit
from lxc_pool.service.directories import host_dir, name_prefix, state_dir
from lxc_pool.service.ledger import Ledger
from tests.support.processes import in_child
from tests.support.waiting import eventually

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and /run/lxc are root's")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of id ranges of the test's own."""
    path = tmp_path / "ids"
    monkeypatch.setattr(idranges, "REGISTRY", path)
    for function in (idranges.take, idranges.give_back, idranges.held):
        defaults = dict(function.__kwdefaults__ or {}, registry=path)
        monkeypatch.setattr(function, "__kwdefaults__", defaults)
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    with state_dir(path):
        ledger = Ledger(path / "ledger.db")
        ledger.open()
        ledger.close()
    return path


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return tmp_path / "host"


def prefix(state: Path) -> str:
    return name_prefix((state / "instance").read_text().strip())


def kinds(report: audit.Report) -> list[str]:
    return [trace.kind for trace in report.findings]


def test_a_directory_that_nobody_has_used_is_clean(tmp_path: Path, host: Path) -> None:
    assert audit.audit(tmp_path, host) == audit.Report((), None)


def test_containers_are_told_from_directories_by_their_configuration(state: Path, host: Path) -> None:
    for name in ("1", "2"):
        (state / "containers" / f"{prefix(state)}ab-{name}").mkdir()
    (state / "containers" / f"{prefix(state)}ab-2" / "config").touch()
    report = audit.audit(state, host)
    assert kinds(report) == ["directory", "container"]
    assert all(removal.problem is None for removal in audit.clean(report, state))
    assert not list((state / "containers").iterdir())


def test_without_a_ledger_nothing_can_be_said_of_containers(state: Path, host: Path) -> None:
    (state / "ledger.db").unlink()
    assert audit.audit(state, host).findings == ()  # as while the first service begins
    (state / "containers" / f"{prefix(state)}ab-1").mkdir()
    with pytest.raises(BackendError, match=f"the ledger {state}/ledger.db is gone"):
        audit.audit(state, host)
    assert kinds(audit.audit(state, host, everything=True)) == ["directory"]


@needs_root
def test_how_old_a_container_is_its_directory_says_and_not_its_cgroups(state: Path, host: Path) -> None:
    """The kernel gives cgroups new times whenever it has been short of memory."""
    old, young = (f"{prefix(state)}ab-{number}" for number in (1, 2))
    (state / "containers" / old).mkdir()
    eventually(lambda: audit.audit(state, host).findings[0].age > 0.1, "it is of some age")
    (state / "containers" / young).mkdir()
    cgroup = cgroups.hierarchies()[-1].mount_point / f"lxc.payload.{old}"
    cgroup.mkdir()
    try:
        report = audit.audit(state, host)
        ages = {trace.name: trace.age for trace in report.findings if trace.kind == "directory"}
        assert ages[young] < ages[old]
        older = audit.only_older(report, sum(ages.values()) / 2)
        assert [(trace.kind, trace.name) for trace in older.findings] == [("cgroup", old), ("directory", old)]
        assert audit.only_older(report, 3600).findings == ()
        audit.clean(older, state)
        assert not cgroup.exists()
        assert [path.name for path in (state / "containers").iterdir()] == [young]
    finally:
        if cgroup.exists():
            cgroup.rmdir()


def test_what_a_killed_build_of_an_image_has_left_is_residue_and_what_a_live_one_has_is_not(
    state: Path, host: Path
) -> None:
    reader, writer = os.pipe()

    def build_for_ever(_rootfs: Path, _report: object) -> None:
        os.write(writer, b"x")
        signal.pause()

    pid = os.fork()
    if pid == 0:
        try:
            ImageStore(state / "images", {"toy": build_for_ever}).ensure("toy", lambda _line: None)
        finally:
            os._exit(1)
    try:
        os.read(reader, 1)
        assert audit.audit(state, host).findings == ()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
    report = audit.audit(state, host)
    (partial,) = (state / "images" / "toy").iterdir()
    assert [(trace.kind, trace.name) for trace in report.findings] == [("directory", str(partial))]
    assert [removal.problem for removal in audit.clean(report, state)] == [None]
    assert list((state / "images" / "toy").iterdir()) == []


def test_what_a_service_may_have_taken_up_since_the_audit_is_left_to_it(state: Path, host: Path) -> None:
    for number in (1, 2):
        (state / "containers" / f"{prefix(state)}ab-{number}").mkdir()
    report = audit.audit(state, host)
    with state_dir(state):
        removals = audit.clean(report, state)
    assert len(removals) == 2
    assert all("has begun meanwhile" in str(removal.problem) for removal in removals)
    assert len(list((state / "containers").iterdir())) == 2


def test_what_has_another_name_is_neither_named_nor_touched(state: Path, host: Path) -> None:
    for name in ("lxp-000000-ab-1", "mine", f"x{prefix(state)}ab-1"):
        (state / "containers" / name / "rootfs").mkdir(parents=True)
    report = audit.audit(state, host, everything=True)
    assert report.findings == ()
    (problem,) = [line for line in audit.uninstall(state, host) if line.startswith(str(state / "containers"))]
    assert "not the service's" in problem
    assert len(list((state / "containers").glob("*/rootfs"))) == 3


def test_semaphores_are_residue_once_no_service_runs_unless_somebody_else_has_made_them(
    state: Path, host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semaphores, "DIRECTORY", tmp_path / "shm")
    (tmp_path / "shm" / f"sem.{prefix(state)}directory").mkdir(parents=True)
    for name in (f"sem.{prefix(state)}sem-1", f"sem.{prefix(state)}others", "sem.mp-1", f"{prefix(state)}sem-1"):
        (tmp_path / "shm" / name).touch()
    (tmp_path / "shm" / f"sem.{prefix(state)}link").symlink_to(state / "instance")
    if os.geteuid() == 0:
        os.chown(tmp_path / "shm" / f"sem.{prefix(state)}others", 1000, 1000)
    else:
        (tmp_path / "shm" / f"sem.{prefix(state)}others").unlink()
    before = set((tmp_path / "shm").iterdir())
    with state_dir(state):
        assert audit.audit(state, host).findings == ()
    report = audit.audit(state, host)
    assert [(trace.kind, trace.name) for trace in report.findings] == [("lock", f"sem.{prefix(state)}sem-1")]
    assert [removal.problem for removal in audit.clean(report, state)] == [None]
    assert before - set((tmp_path / "shm").iterdir()) == {tmp_path / "shm" / f"sem.{prefix(state)}sem-1"}


def test_the_socket_and_the_key_of_a_dead_service_are_residue_and_those_of_a_live_one_are_not(
    state: Path, host: Path
) -> None:
    with host_dir(host, os.getegid(), bytes(32)), socket.socket(socket.AF_UNIX) as sock:
        os.chdir(host)  # the path is too long otherwise
        sock.bind("pool.sock")
        os.chdir("/")
        assert audit.audit(state, host).findings == ()
        (host / "authkey").rename(host / "saved")
    (host / "saved").rename(host / "authkey")
    report = audit.audit(state, host)
    assert [(trace.kind, Path(trace.name).name) for trace in report.findings] == [
        ("socket", "pool.sock"),
        ("socket", "authkey"),
    ]
    with host_dir(host, os.getegid(), bytes(32)):  # a service begins between the audit and the cleanup
        audit.clean(report, state)
        assert (host / "pool.sock").exists()
        assert (host / "authkey").exists()
    report = audit.audit(state, host)
    audit.clean(report, state)
    assert {path.name for path in host.iterdir()} == {"service.lock"}


def test_an_id_range_of_a_container_that_is_gone_is_found_and_freed(state: Path, host: Path, registry: Path) -> None:
    ours = state / "containers" / f"{prefix(state)}ab-7"
    others = (str(state / "containers" / "lxp-000000-ab-7"), f"/other/containers/{ours.name}", "")
    first = idranges.take(str(ours))
    rest = [idranges.take(holder) for holder in others]
    report = audit.audit(state, host)
    (trace,) = report.findings
    assert (trace.kind, trace.name, trace.path) == ("lock", ours.name, registry / str(first))
    assert [removal.problem for removal in audit.clean(report, state)] == [None]
    assert {int(path.name) for path in registry.iterdir()} == set(rest)


def test_an_id_range_that_is_anothers_by_now_is_no_trace_any_more(state: Path, host: Path, registry: Path) -> None:
    ours = state / "containers" / f"{prefix(state)}ab-7"
    idranges.take(str(ours))
    (trace,) = audit.audit(state, host).findings
    idranges.give_back(str(ours))
    assert idranges.take("/somebody/else") == int((trace.path or Path()).name)
    assert not residue.is_there(trace)
    assert registry.exists()


def test_an_id_range_never_stands_there_without_its_holder(
    tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_args: object, **_kwargs: object) -> None:
        os._exit(0)

    def take() -> None:
        # Whatever puts the name in place, there is no moment before it in which the file has a name and no holder.
        monkeypatch.setattr(os, "link", die)
        idranges.take("/holder")

    registry.mkdir()
    with pytest.raises(EOFError):
        in_child(take)
    assert list(registry.iterdir()) == []
    assert idranges.take("/holder") == idranges.DEFAULT_BASE
    assert [holder for _path, holder in idranges.held()] == ["/holder"]
    assert tmp_path.exists()


def test_id_ranges_run_out_with_a_word_where_they_are(registry: Path) -> None:
    base = idranges.LIMIT // idranges.SIZE * idranges.SIZE - 2 * idranges.SIZE
    taken = {idranges.take("/a", base), idranges.take("/b", base)}
    assert len(taken) == 2
    with pytest.raises(CloneFailed, match=str(registry)):
        idranges.take("/c", base)


def test_an_uninstallation_removes_what_the_service_has_made_and_can_be_repeated(state: Path, host: Path) -> None:
    with host_dir(host, os.getegid(), bytes(32)):
        with pytest.raises(HostDirError, match=f"pid {os.getpid()} runs on {host}"):
            audit.uninstall(state, host)
        assert (host / "authkey").exists()
    (state / "images" / "busybox" / "1" / "rootfs").mkdir(parents=True)
    for name in ("ledger.db", "ledger.db-wal", "ledger.db.corrupt-1"):
        (state / name).touch()
    assert audit.uninstall(state, host) == ()
    assert not state.exists()
    assert not host.exists()
    assert audit.uninstall(state, host) == ()


def test_an_uninstallation_does_not_touch_a_directory_that_no_service_has_used(tmp_path: Path, host: Path) -> None:
    (tmp_path / "images" / "holiday").mkdir(parents=True)
    host.mkdir()
    assert audit.uninstall(tmp_path, host) == ()
    assert (tmp_path / "images" / "holiday").exists()
    assert host.exists()


@needs_root
def test_what_is_mounted_in_a_containers_directory_is_taken_off_and_keeps_its_files(
    state: Path, host: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    (precious / "deep").mkdir(parents=True)
    (precious / "deep" / "file").write_text("mine")
    name = f"{prefix(state)}ab-1"
    place = state / "containers" / name / "rootfs"
    place.mkdir(parents=True)
    subprocess.run(["mount", "--bind", precious, place], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", place / "deep"], check=True)
    with (place / "deep" / "busy").open("w"):
        report = audit.audit(state, host)
        assert kinds(report) == ["mount", "mount", "directory"]
        removal.remove(name, state / "containers", force=True)
    assert not place.exists()
    assert (precious / "deep" / "file").read_text() == "mine"
    assert not any(residue.is_there(trace) for trace in report.findings)


@needs_root
def test_what_may_still_bring_a_container_up_is_killed_before_it_is_removed(state: Path) -> None:
    lxcpath, name = state / "containers", f"{prefix(state)}ab-1"
    (lxcpath / name).mkdir(parents=True)
    waits = [sys.executable, "-c", "import time; print(flush=True); time.sleep(1000)"]
    lines = {
        "its starter": ["lxc-start", *waits[1:], "-P", str(lxcpath), "-n", name],
        "its monitor": ["[lxc", *waits[1:], "monitor]", str(lxcpath), name],
        "another's starter": ["lxc-start", *waits[1:], "-P", str(lxcpath), "-n", f"{name}0"],
        "another service's": ["lxc-start", *waits[1:], "-P", f"{lxcpath}0", "-n", name],
        "somebody's": ["sleep", *waits[1:], "-P", str(lxcpath), "-n", name],
    }
    with contextlib.ExitStack() as stack:
        processes = {}
        for who, line in lines.items():
            process = stack.enter_context(subprocess.Popen(line, executable=sys.executable, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            processes[who] = process
        removal.remove(name, lxcpath, force=True)
        living = {who for who, process in processes.items() if process.poll() is None}
        assert living == {"another's starter", "another service's", "somebody's"}


@needs_root
def test_devices_and_rules_of_the_service_are_found_and_removed_and_others_are_not(state: Path, host: Path) -> None:
    instance = (state / "instance").read_text().strip()
    ours = {f"lxp{instance}", f"lxp{instance}a002", f"lxp-{instance}"}

    def in_a_network_of_its_own() -> tuple[set[tuple[residue.Kind, str]], list[str | None], set[str]]:
        assert ctypes.CDLL(None).unshare(0x40000000) == 0  # CLONE_NEWNET
        for name, *kind in (
            (f"lxp{instance}", "bridge"),
            (f"lxp{instance}a002", "veth", "peer", "name", "far0"),
            ("lxpffffff", "bridge"),
        ):
            subprocess.run(["ip", "link", "add", name, "type", *kind], check=True)
        for name in (f"lxp-{instance}", "lxp-ffffff"):
            subprocess.run(["nft", f"add table bridge {name}; add table inet {name}"], check=True)
        report = audit.audit(state, host)
        found = {(trace.kind, trace.name) for trace in report.findings}
        problems = [removal.problem for removal in audit.clean(report, state)]
        return found, problems, {*bridge.devices(), *firewall.tables()}

    found, problems, left = in_child(in_a_network_of_its_own)
    assert found == {("netdev", name) for name in ours}
    assert problems == [None, None, None]
    assert left == {"lo", "lxpffffff", "lxp-ffffff"}
