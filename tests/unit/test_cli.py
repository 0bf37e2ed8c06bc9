"""The command line against a service in this process: what it prints, and with which status it ends."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lxc_pool import PoolManager, PoolServiceProxy, hostdir
from lxc_pool.backend.memory import HANG, Fault
from lxc_pool.cli import main as module
from lxc_pool.cli.main import main, status_of
from lxc_pool.cli.output import Progress, print_table
from lxc_pool.client.connection import Connection
from lxc_pool.config import Config
from lxc_pool.errors import (
    AccessDenied,
    AuthenticationFailed,
    ConfigError,
    HostDirError,
    InternalError,
    LeaseExpired,
    PoolTimeout,
    QuotaExceeded,
    ServiceUnavailable,
    StartFailed,
)
from lxc_pool.host import requirements
from lxc_pool.host.requirements import Requirement
from lxc_pool.images import store
from lxc_pool.model import State
from lxc_pool.progress import Milestone
from lxc_pool.service import daemon
from tests.support.memory_service import SOON, MemoryService, memory_service
from tests.support.processes import as_nobody, sleeper


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryService]:
    with memory_service(2) as service, sleeper() as leader:
        service.reaches(size=2)
        monkeypatch.setenv("LXC_POOL_HOST_DIR", str(service.host_dir))
        monkeypatch.setattr(os, "getsid", lambda _pid: leader.pid)
        yield service


class Terminal:
    """Runs commands and keeps what they printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def run(self, *argv: object) -> int:
        self._capsys.readouterr()
        try:
            status = main([str(word) for word in argv])
        except SystemExit as stop:  # argparse's way to end
            status = int(stop.code or 0)
        self.out, self.err = self._capsys.readouterr()
        return status

    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def lxc_pool(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


def take_all(service: MemoryService, lxc_pool: Terminal) -> list[str]:
    """Lease every container to this process, and let the next ones never come up."""
    service.backend.script("start", HANG)
    names = []
    for _ in range(2):
        assert lxc_pool.run("get") == 0
        names.append(lxc_pool.out.strip())
    service.reaches(size=0, leased=2, building=1)
    return names


# --- what there is ----------------------------------------------------------------------------------------------------


def test_status_shows_the_counts(service: MemoryService, lxc_pool: Terminal) -> None:
    assert lxc_pool.run("status") == 0
    assert f"running, pid {os.getpid()}" in lxc_pool.out
    assert str(service.socket_path) in lxc_pool.out
    header, row = lxc_pool.out.splitlines()[2:4]
    assert dict(zip(header.split(), row.split(), strict=True)) | {"profile": "default", "size": "2"} == dict(
        zip(header.split(), row.split(), strict=True)
    )
    assert lxc_pool.run("--json", "status") == 0
    assert lxc_pool.document()["profiles"]["default"]["image"] == "busybox:1"


def test_status_shows_what_goes_wrong(service: MemoryService, lxc_pool: Terminal) -> None:
    service.backend.script("start", *[Fault(error=StartFailed("the engine's words"))] * 3)
    assert lxc_pool.run("resize", 3) == 0
    service.reaches(size=3)
    assert lxc_pool.run("drain") == 0
    assert lxc_pool.run("status") == 0
    assert lxc_pool.out.startswith("drained")
    assert "3 errors, the last one: the engine's words" in lxc_pool.out


def test_status_shows_how_long_creation_is_held_back(
    service: MemoryService, lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = service.pool._stock.shelves["default"]
    monkeypatch.setattr(shelf.backoff, "remaining", lambda _now: 2.5)
    assert lxc_pool.run("status") == 0
    assert "creation is held back for 2.5 s" in lxc_pool.out


def test_ls_lists_every_container(service: MemoryService, lxc_pool: Terminal) -> None:
    assert lxc_pool.run("get", "--id", "my-job") == 0
    name = lxc_pool.out.strip()
    assert lxc_pool.run("ls") == 0
    (row,) = [line for line in lxc_pool.out.splitlines() if line.startswith(name)]
    assert row.split()[1:5] == ["default", "leased", "my-job", str(os.getsid(0))]
    assert lxc_pool.run("ls", "--json") == 0
    (info,) = [info for info in lxc_pool.document() if info["name"] == name]
    assert (info["id"], info["state"], info["owner_uid"]) == ("my-job", "leased", os.getuid())
    service.reaches(size=2)


@pytest.mark.parametrize("before", [True, False])
def test_the_host_dir_may_stand_before_or_after_the_command(
    service: MemoryService, lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch, *, before: bool
) -> None:
    monkeypatch.setenv("LXC_POOL_HOST_DIR", "/nonexistent")
    option = ["--host-dir", service.host_dir]
    argv = [*option, "status", "--json"] if before else ["--json", "status", *option]
    assert lxc_pool.run(*argv) == 0
    assert lxc_pool.document()["size"] == 2


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_wait_ends_when_the_containers_are_warm(service: MemoryService, lxc_pool: Terminal) -> None:
    assert lxc_pool.run("wait") == 0
    assert lxc_pool.err == "2 of 2 containers are warm\n"
    assert lxc_pool.run("wait", "-n", 1, "--json") == 0
    assert lxc_pool.document()["size"] == 2
    assert lxc_pool.err == ""
    assert lxc_pool.run("wait", "--timeout", "inf") == 0
    service.reaches(size=2)


def test_wait_says_no_if_they_are_not_in_time(service: MemoryService, lxc_pool: Terminal) -> None:
    take_all(service, lxc_pool)
    assert lxc_pool.run("wait", "--timeout", 0.01) == 1
    assert "0 of 2 containers are warm after 0.01 s" in lxc_pool.err
    assert lxc_pool.run("wait", "--timeout", 0, "--json") == 1
    assert lxc_pool.document()["size"] == 0


@pytest.mark.parametrize("argv", [("-n", 3), ("-n", -1), ("--timeout", "nan"), ("--timeout", -1), ("-n", "x")])
def test_wait_for_what_can_not_be_is_wrong_use(
    service: MemoryService, lxc_pool: Terminal, argv: tuple[object, ...]
) -> None:
    assert lxc_pool.run("wait", *argv) == 2
    assert lxc_pool.err
    service.reaches(size=2)


# --- leases -----------------------------------------------------------------------------------------------------------


def test_get_leases_to_a_process_and_release_ends_it(service: MemoryService, lxc_pool: Terminal) -> None:
    with sleeper() as process:
        assert lxc_pool.run("get", "--owner", process.pid, "--id", "x", "--timeout", "inf") == 0
        name = lxc_pool.out.strip()
        assert f"leased to process {process.pid}" in lxc_pool.err
        assert service.state_of(name) is State.LEASED
        assert lxc_pool.run("release", name) == 0
        assert (lxc_pool.out, lxc_pool.err) == ("", "")
        service.reaches(leased=0)
        assert lxc_pool.run("get", "--owner", process.pid, "--json") == 0
        document = lxc_pool.document()
        assert document["id"].startswith("test_get_")
        assert document["owner_pid"] == process.pid
        assert lxc_pool.run("release", document["name"], "--json") == 0
        assert lxc_pool.document() == {"name": document["name"], "released": True}


def test_get_leases_to_the_sessions_leader_unless_told_otherwise(service: MemoryService, lxc_pool: Terminal) -> None:
    assert lxc_pool.run("get", "--ttl", 600) == 0
    assert f"leased to process {os.getsid(0)}" in lxc_pool.err
    (lease,) = [info for info in service.pool.containers(None) if info.state is State.LEASED]
    assert lease.owner_pid == os.getsid(0)


@pytest.mark.parametrize("leader", [os.getpid(), 0, 2**22 + 1], ids=["itself", "elsewhere", "ended"])
def test_get_does_not_lease_to_a_sessions_leader_that_can_not_hold_it(
    service: MemoryService, lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch, leader: int
) -> None:
    monkeypatch.setattr(os, "getsid", lambda _pid: leader)
    assert lxc_pool.run("get") == 2
    assert "--owner PID" in lxc_pool.err
    service.reaches(size=2)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_get_can_tell_nobody_is_given_back(
    service: MemoryService, lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    with open("/dev/full", "w") as full, sleeper() as owner:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert lxc_pool.run("get", *options, "--owner", owner.pid) == 5
        service.reaches(leased=0, reserved=0, reaping=0, size=2)


def test_get_does_not_print_a_lease_that_has_ended_already(
    service: MemoryService, lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PoolServiceProxy, "containers", lambda _pool: ())
    assert lxc_pool.run("get", "--json", "--ttl", 0) == 5
    assert "has ended" in lxc_pool.err
    assert lxc_pool.out == ""
    service.reaches(leased=0, reserved=0, reaping=0, size=2)


def test_get_says_no_if_none_comes_free(service: MemoryService, lxc_pool: Terminal) -> None:
    take_all(service, lxc_pool)
    assert lxc_pool.run("get", "--timeout", 0) == 1
    assert "no container came free in 0 s" in lxc_pool.err
    assert lxc_pool.out == ""
    assert lxc_pool.run("get", "--timeout", 0, "--json") == 1
    assert lxc_pool.document() is None


@pytest.mark.parametrize(
    "argv",
    [("--profile", "nope"), ("--owner", 2**22 + 1), ("--timeout", -1), ("--timeout", "x"), ("--ttl", -1), ("--id", "")],
)
def test_get_with_a_wrong_argument_is_wrong_use(
    service: MemoryService, lxc_pool: Terminal, argv: tuple[object, ...]
) -> None:
    assert lxc_pool.run("get", *argv) == 2
    assert lxc_pool.err
    service.reaches(reserved=0, leased=0, size=2)


def test_releasing_what_is_no_lease_is_a_failure(service: MemoryService, lxc_pool: Terminal) -> None:
    assert lxc_pool.run("release", "nope") == 5
    assert "no lease of 'nope' is yours" in lxc_pool.err
    service.reaches(size=2)


def test_our_own_failure_before_a_command_runs_has_a_status_of_its_own(
    service: MemoryService, lxc_pool: Terminal
) -> None:
    assert lxc_pool.run("exec", "nope", "--", "true") == 125
    assert lxc_pool.run("run", "--profile", "nope", "--", "true") == 125
    take_all(service, lxc_pool)
    assert lxc_pool.run("run", "--timeout", 0, "--", "true") == 125


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (0, 0),
        (7, 7),
        (-9, 137),
        (FileNotFoundError(2, "missing"), 127),
        (PermissionError(13, "not executable"), 126),
        (NotADirectoryError(20, "cwd"), 126),
    ],
)
def test_a_command_ends_as_it_would_in_a_shell(
    service: MemoryService,
    lxc_pool: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    outcome: int | Exception,
    status: int,
) -> None:
    ran: list[list[str]] = []

    def run(_container: object, argv: list[str], **_kwargs: object) -> Any:
        ran.append(argv)
        if isinstance(outcome, Exception):
            raise outcome
        return type("Completed", (), {"returncode": outcome})

    monkeypatch.setattr("lxc_pool.client.container.Container.run", run)
    assert lxc_pool.run("run", "--id", "x", "--", "cmd", "--json", "-x") == status
    service.reaches(leased=0)
    assert lxc_pool.run("get") == 0
    assert lxc_pool.run("exec", lxc_pool.out.strip(), "--", "cmd", "--json", "-x") == status
    assert ran == [["cmd", "--json", "-x"]] * 2


@pytest.mark.parametrize(
    "words",
    [("run", "--json", "--", "cmd"), ("--json", "exec", "x", "--", "cmd"), ("run", "cmd", "--json")],
    ids=" ".join,
)
def test_a_commands_own_output_is_no_document_and_json_is_refused_before_a_lease(
    service: MemoryService, lxc_pool: Terminal, words: tuple[str, ...]
) -> None:
    del service
    assert lxc_pool.run(*words) == 2
    assert "prints what its command does, and no JSON document: leave --json out" in lxc_pool.err
    assert lxc_pool.out == ""


# --- administration ---------------------------------------------------------------------------------------------------


def test_resize_drain_and_resume(service: MemoryService, lxc_pool: Terminal) -> None:
    assert lxc_pool.run("resize", 3) == 0
    assert lxc_pool.out == "the pool keeps 3 containers warm now\n"
    service.reaches(size=3)
    assert lxc_pool.run("drain") == 0
    assert "lxc-pool resume" in lxc_pool.out
    service.reaches(size=0)
    assert lxc_pool.run("get") == 5
    assert "drained" in lxc_pool.err
    assert lxc_pool.run("resume") == 0
    service.reaches(size=3)
    for argv, document in (
        (("resize", 2), {"capacity": 2}),
        (("drain",), {"draining": True}),
        (("resume",), {"draining": False}),
    ):
        assert lxc_pool.run(*argv, "--json") == 0
        assert lxc_pool.document() == document


@pytest.mark.parametrize("size", [0, -1, 1001, "x", 2**70])
def test_a_size_that_no_pool_can_have_is_wrong_use(service: MemoryService, lxc_pool: Terminal, size: object) -> None:
    assert lxc_pool.run("resize", size) == 2
    service.reaches(size=2)


def test_stop_returns_when_the_service_has_ended(
    service: MemoryService, lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "hold_server", lambda _connection: None)  # its process is this one
    assert lxc_pool.run("stop", "--grace", 0) == 0
    assert lxc_pool.out == "stopped\n"
    assert not service.socket_path.exists()
    service.stop()
    service.start()
    assert lxc_pool.run("stop", "--json") == 0
    assert lxc_pool.document() == {"running": False}


def test_stop_with_a_grace_that_is_none_is_wrong_use(service: MemoryService, lxc_pool: Terminal) -> None:
    assert lxc_pool.run("stop", "--grace", -1) == 2
    service.reaches(size=2)


def test_a_service_that_is_ending_says_so(
    service: MemoryService, lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.service, "stopping", True)
    assert lxc_pool.run("status") == 0
    assert lxc_pool.out.startswith("ending")


# --- the host ---------------------------------------------------------------------------------------------------------


def test_check_names_what_the_host_lacks_and_says_no(lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Requirement("kernel", ok=True, detail="6.1", fix="")
    advice = Requirement("limits", ok=False, detail="low", fix="raise them", advice=True)
    bad = Requirement("liblxc", ok=False, detail="missing", fix="apt-get install lxc")
    found = [good, advice]
    monkeypatch.setattr(requirements, "check", lambda _state_dir, _network, _instance: found)
    assert lxc_pool.run("check") == 0
    assert lxc_pool.out.splitlines() == ["ok      kernel: 6.1", "advice  limits: low", "        fix: raise them"]
    found.append(bad)
    assert lxc_pool.run("check") == 1
    assert "LACKS   liblxc: missing\n        fix: apt-get install lxc" in lxc_pool.out
    assert lxc_pool.run("check", "--json") == 1
    assert [each["ok"] for each in lxc_pool.document()] == [True, False, False]


def test_images_are_built_and_listed(lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(rootfs: Path, report: Callable[[str], None]) -> None:
        report("making it")
        (rootfs / "x").touch()

    monkeypatch.setattr(store, "ImageStore", functools.partial(store.ImageStore, builders={"tiny": build}))
    state = ["--state-dir", tmp_path]
    assert lxc_pool.run("image", "build", "tiny", *state) == 0
    assert lxc_pool.out.startswith("tiny:")
    assert "making it" in lxc_pool.err
    assert lxc_pool.run("image", "build", "tiny", *state, "--json") == 0
    assert lxc_pool.err == ""
    version = lxc_pool.document()["version"]
    assert lxc_pool.run("image", "ls", *state) == 0
    assert lxc_pool.out.splitlines()[2].split()[:3] == ["tiny", version, "0.0"]
    assert lxc_pool.run("image", "ls", *state, "--json") == 0
    assert [image["name"] for image in lxc_pool.document()] == ["tiny", "tiny"]
    assert lxc_pool.run("image", "build", "nonesuch", *state) == 5
    assert "no base image 'nonesuch'" in lxc_pool.err


def test_serving_without_liblxcs_binding_says_what_to_install(
    lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert lxc_pool.run("serve") == 2
    assert "pip install lxc-pool[server]" in lxc_pool.err


@pytest.mark.usefixtures("service")
def test_a_clients_installation_has_the_clients_commands_and_names_what_the_others_need() -> None:
    script = "import sys; sys.modules |= dict.fromkeys(('psutil', 'lxc', '_lxc')); from lxc_pool.cli.main import main; "
    script += "sys.exit(main(sys.argv[1:]))"

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=False)

    for command in ("status", "ls", "wait"):
        assert run(command).returncode == 0, command
    for command in ("check", "audit", "cleanup"):
        done = run(command)
        assert done.returncode == 2, command
        assert "pip install lxc-pool[server]" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("lxc") is None, reason="needs liblxc's binding")
def test_serve_prints_where_it_is_ready_and_serves_what_it_was_told_to(
    lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: dict[str, Any] = {}

    def serve(config: Config, _backend: object, **fields: Any) -> None:
        served.update(fields, size=config.profiles[0].size)
        fields["ready"]("/the/socket")

    monkeypatch.setattr(daemon, "serve", serve)
    monkeypatch.setattr(logging, "basicConfig", lambda **_kwargs: None)
    monkeypatch.chdir(tmp_path)
    assert lxc_pool.run("serve", "--size", 3, "--state-dir", "state", "--host-dir", "host") == 0
    assert lxc_pool.out == "ready /the/socket\n"
    assert lxc_pool.run("serve", "--json", "--state-dir", "state", "--host-dir", "host") == 0
    assert lxc_pool.document() == {"running": True, "socket_path": "/the/socket", "pid": os.getpid()}
    assert lxc_pool.out.count("\n") == 1  # a pipe's reader knows that it has all of it
    assert lxc_pool.run("serve", "--size", 3, "--state-dir", "state", "--host-dir", "host") == 0
    assert (served["size"], served["state_dir"], served["host_dir"]) == (3, tmp_path / "state", tmp_path / "host")
    assert lxc_pool.run("serve", "--size", 0, "--state-dir", tmp_path) == 2
    assert lxc_pool.run("serve", "--config", tmp_path / "nope.toml", "--state-dir", tmp_path) == 2
    assert lxc_pool.run("serve", "--state-dir", tmp_path / "a b") == 2


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_no_service_is_a_status_of_its_own(lxc_pool: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = PoolManager.connect
    monkeypatch.setattr(PoolManager, "connect", lambda host_dir, **_timeout: connect(host_dir, timeout=0.01))
    for argv in (
        ["status"],
        ["ls"],
        ["wait"],
        ["get", "--owner", os.getpid()],
        ["resize", 1],
        ["drain"],
        ["resume"],
        ["stop"],
        ["release", "x"],
    ):
        assert lxc_pool.run(*argv, "--host-dir", tmp_path) == 3
        assert "lxc-pool: no service answers" in lxc_pool.err
        assert lxc_pool.out == ""


def test_what_is_no_service_is_a_failure(lxc_pool: Terminal, tmp_path: Path) -> None:
    hostdir.socket_path(tmp_path).touch()
    assert lxc_pool.run("status", "--host-dir", tmp_path) == 5
    assert "is not a socket" in lxc_pool.err


def test_a_wrong_key_is_not_allowed(service: MemoryService, lxc_pool: Terminal) -> None:
    path = hostdir.key_path(service.host_dir)
    path.write_bytes(b"another")
    assert lxc_pool.run("status") == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_whoever_may_not_enter_is_not_allowed(service: MemoryService) -> None:
    assert as_nobody(lambda: main(["status", "--host-dir", str(service.host_dir)])) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
@pytest.mark.parametrize("argv", [["ls"], ["build", "busybox"], ["verify"], ["rm", "busybox"]], ids=" ".join)
def test_what_is_roots_is_refused_to_others_with_the_way_out(
    capfd: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    place = tempfile.TemporaryDirectory(prefix="lxp-test-")  # pytest's own is closed to others as a whole
    with place as path:
        Path(path).chmod(0o755)
        (Path(path) / "images").mkdir(mode=0o700)
        status = as_nobody(lambda: main(["image", *argv, "--state-dir", path]))
    assert status == 4
    assert capfd.readouterr().err.strip().endswith("; root may do it")


@pytest.mark.parametrize("argv", [[], ["nope"], ["status", "--nope"], ["resize"], ["get", "--owner", "x"], ["run"]])
def test_wrong_use_is_explained_on_stderr(lxc_pool: Terminal, argv: list[str]) -> None:
    assert lxc_pool.run(*argv) == 2
    assert "usage: lxc-pool" in lxc_pool.err


def test_help_names_the_commands_and_the_statuses(lxc_pool: Terminal) -> None:
    assert lxc_pool.run("--help") == 0
    for word in ("status", "wait", "get", "release", "serve", "130 interrupted"):
        assert word in lxc_pool.out


def test_the_package_itself_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lxc_pool", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: lxc-pool")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PoolTimeout("x"), 1),
        (ConfigError("x"), 2),
        (ValueError("x"), 2),
        (TypeError("x"), 2),
        (ServiceUnavailable("x"), 3),
        (AccessDenied("x"), 4),
        (AuthenticationFailed("x"), 4),
        (QuotaExceeded("x"), 4),
        (LeaseExpired("x"), 5),
        (HostDirError("x"), 5),
        (InternalError("x"), 5),
        (OSError(28, "No space left on device"), 5),
        (PermissionError(13, "Permission denied"), 4),
        (BrokenPipeError(32, "Broken pipe"), 5),
    ],
)
def test_every_error_has_its_status(error: Exception, status: int) -> None:
    assert status_of(error) == status


def raising(error: BaseException) -> Any:
    def connect(*_arguments: object, **_kwargs: object) -> None:
        raise error

    return connect


def test_an_interrupt_is_a_status_of_its_own(lxc_pool: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoolManager, "connect", raising(KeyboardInterrupt()))
    assert lxc_pool.run("status") == 130


def test_a_reader_that_has_gone_is_no_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(PoolManager, "connect", raising(BrokenPipeError()))
    with (tmp_path / "out").open("w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["status"]) == module.FAILED
        assert os.path.samestat(os.fstat(stdout.fileno()), os.stat(os.devnull))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(["status"]) == module.FAILED


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    ("closed", "status"), [("0<&-", 0), ("1>&-", 5), ("2>&-", 0), ("0<&- 1>&- 2>&-", 5), ("1>/dev/full", 5)]
)
def test_closed_streams_are_no_traceback_and_no_sockets(closed: str, status: int) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m lxc_pool status {closed}', sys.executable],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (status != 0 and "2>" not in closed)
    assert ("running" in done.stdout) == ("1>" not in closed)


def test_a_table_lines_up_and_shows_nothing_as_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "long"), [(1, None), ("wide", "x")])
    assert capsys.readouterr().out == "a     long\n1     -\nwide  x\n"


def test_progress_is_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress()
    progress.end()
    for text in ("1 of 2 long", "2 of 2", "2 of 2"):
        progress.show(text)
    progress.end()
    assert terminal.getvalue() == "\r1 of 2 long\r2 of 2     \n"
    quiet = Progress(quiet=True)
    quiet.show("x")
    quiet.end()
    assert terminal.getvalue().endswith("2 of 2     \n")


@pytest.mark.parametrize(
    ("is_terminal", "shown"),
    [
        (
            True,
            f"\r[{'':24}]   0% one\r[{'#' * 12:24}]  50% two and what ha\r[{'#' * 24}] 100% three{'':10}\n",
        ),
        (False, "one\ntwo and what has no room\nthree\n"),
    ],
)
def test_a_step_has_a_bar_on_a_terminal_and_none_elsewhere(
    monkeypatch: pytest.MonkeyPatch, shown: str, *, is_terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "48")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress()
    for step in (Milestone("one", -1.0), Milestone("two and what has no room", 0.5), Milestone("three", 1.7)):
        progress.show(step)
    progress.end()
    assert stream.getvalue() == shown


def test_waiting_can_be_interrupted(service: MemoryService, lxc_pool: Terminal) -> None:
    take_all(service, lxc_pool)

    def interrupt() -> None:
        while not service.pool._warm_waits:
            threading.Event().wait(0.001)
        os.kill(os.getpid(), 2)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    assert lxc_pool.run("wait", "--timeout", SOON) == 130
    interrupter.join(SOON)
