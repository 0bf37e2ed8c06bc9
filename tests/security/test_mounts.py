"""Mounts into a container give its code the caller's rights and no others, and can't be loosened from inside."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lxc_pool import Container, PoolManager, PoolServiceProxy
from lxc_pool.client import mounts
from lxc_pool.errors import UnknownLease
from lxc_pool.execution.protocol import ExecRequest
from lxc_pool.wire import messages
from tests.security.attackers import ALICE, BOB, as_member, as_person
from tests.support.real_service import Service, running

CONFIG = """\
[pool]
workers = 2
[access]
group = "nogroup"
[profile.default]
size = 2
[profile.root]
size = 1
privileged = true
allow = ["@nogroup"]
[profile.lent]
size = 1
{mounts}
[profile.lent-root]
size = 1
privileged = true
{mounts}
"""
MOUNTS = """\
mounts = [
    {{ host_path = "{0}/read", dst = "/mnt/read" }},
    {{ host_path = "{0}/written", dst = "/mnt/written", readonly = false }},
]
"""
PROFILES = ["default", "root"]
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432
"""System calls, on all architectures."""


@pytest.fixture(scope="module")
def real(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that members of a group may use, privileged containers included."""
    directory = tmp_path_factory.mktemp("lent")
    for name in ("read", "written"):
        (directory / name).mkdir()
    os.chown(directory / "written", ALICE, ALICE)
    with running(images, CONFIG.format(mounts=MOUNTS.format(directory))) as service:
        yield service


@pytest.fixture(params=PROFILES)
def container(pool: PoolServiceProxy, request: pytest.FixtureRequest) -> Iterator[Container]:
    with pool.lease("mounts", timeout=30, profile=request.param) as container:
        yield container


@pytest.fixture
def plain(pool: PoolServiceProxy) -> Iterator[Container]:
    with pool.lease("mounts", timeout=30) as container:
        yield container


@pytest.fixture
def host(open_path: Path) -> Path:
    """Directories of several users, each with a file that all may read and one that its owner may.

    `root/` is open, and everybody may write to `root/drop/`; `alice/` and `bob/` are their owners' alone.
    """
    for name, uid, mode in (("root", 0, 0o755), ("alice", ALICE, 0o700), ("bob", BOB, 0o700)):
        directory = open_path / name
        directory.mkdir()
        for file, file_mode in (("public", 0o644), ("private", 0o600)):
            (directory / file).write_text(f"{name}'s {file}\n")
            (directory / file).chmod(file_mode)
        (directory / "below").mkdir()
        for place in (directory, *directory.iterdir()):
            os.chown(place, uid, uid)
        directory.chmod(mode)
    (open_path / "root/drop").mkdir()
    (open_path / "root/drop").chmod(0o1777)
    return open_path


def sh(container: Container, script: str, user: int | None = None) -> str:
    done = container.run(["sh", "-c", f"exec 2>&1; {script}"], stdout=subprocess.PIPE, text=True, timeout=30, user=user)
    return str(done.stdout)


def as_alice(service: Service, profile: str, action: Callable[[Container], Any]) -> Any:
    """Call *action* with a container of Alice's, as Alice, in a process of hers."""

    def act() -> Any:
        with PoolManager.connect(service.host_dir) as pool, pool.lease("alice", timeout=30, profile=profile) as held:
            return action(held)

    return as_member(ALICE, act)


# --- whose rights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_the_containers_root_reads_what_the_caller_may(real: Service, host: Path, profile: str) -> None:
    def act(container: Container) -> list[str]:
        for name in ("root", "alice", "bob"):
            container.mount(host / name, f"/mnt/{name}")
        return [
            sh(container, "stat -c %u:%g /mnt/alice /mnt/alice/private /mnt/root /mnt/bob"),
            sh(container, "cat /mnt/root/public /mnt/alice/private /mnt/alice/public"),
            sh(container, "cat /mnt/root/private; ls /mnt/bob; cat /mnt/bob/public"),
            sh(container, "cat /mnt/alice/private; ls /mnt/bob", user=1000),
        ]

    owners, readable, unreadable, of_another = as_alice(real, profile, act)
    assert owners.split() == ["0:0", "0:0", "65534:65534", "65534:65534"]
    assert readable == "root's public\nalice's private\nalice's public\n"
    for said, count in ((unreadable, 3), (of_another, 2)):
        assert said.count("Permission denied") == count
        assert "'s" not in said


def test_the_containers_root_writes_where_the_caller_owns(real: Service, host: Path) -> None:
    """In an unprivileged container; the root of a privileged one may take what is nobody's there (docs/security.md)."""

    def act(container: Container) -> list[str]:
        for name in ("root", "alice", "bob"):
            container.mount(host / name, f"/mnt/{name}", readonly=False)
        return [
            sh(container, "umask 022; echo hers >/mnt/alice/new; mkdir /mnt/alice/made; rm /mnt/alice/public"),
            sh(container, "echo x >>/mnt/root/public; touch /mnt/root/new; rm -f /mnt/root/public; mkdir /mnt/bob/x"),
            sh(container, "touch /mnt/root/drop/new; ln /mnt/root/public /mnt/alice/link; echo x >>/mnt/root/open"),
            sh(container, "for f in root root/private bob alice/given; do chmod 777 /mnt/$f; chown 0:0 /mnt/$f; done"),
            sh(container, "chown 1000 /mnt/alice/new; chgrp 1000 /mnt/alice/new; chown 0:0 /mnt/root/drop/sticky"),
            sh(container, "touch /mnt/root/drop/other /mnt/alice/other", user=1000),
        ]

    (host / "root/open").write_text("everybody's\n")
    (host / "root/open").chmod(0o666)
    (host / "root/drop/sticky").touch()
    (host / "alice/given").touch()
    os.chown(host / "alice/given", 0, 0)
    before = {path: (path.stat(), path.read_bytes()) for path in host.rglob("*") if path.is_file()}
    made, *refused = as_alice(real, "default", act)
    assert made == ""
    assert [len(said.splitlines()) for said in refused] == [4, 3, 8, 3, 2]

    for path in (host / "alice/new", host / "alice/made"):
        assert (path.stat().st_uid, path.stat().st_gid) == (ALICE, ALICE)
    assert not (host / "alice/public").exists()
    assert {path.name for path in (host / "root/drop").iterdir()} == {"sticky"}
    for path, (status, content) in before.items():
        if path != host / "alice/public":
            now = path.stat()
            assert (now.st_uid, now.st_gid, now.st_mode) == (status.st_uid, status.st_gid, status.st_mode), path
            assert path.read_bytes() == content, path
    assert not (host / "alice/link").exists()


def test_nobody_mounts_what_he_can_not_reach(real: Service, host: Path) -> None:
    def act(container: Container) -> list[str]:
        said = []
        for path in (host / "bob/below", host / "bob/public", real.state_dir / "images/busybox", "/root/.ssh"):
            try:
                container.mount(path, "/mnt/x")
                said.append("mounted")
            except PermissionError as error:
                said.append(str(error.filename))
        return said

    said = as_alice(real, "default", act)
    assert said == [str(host / "bob/below"), str(host / "bob/public"), f"{real.state_dir}/images/busybox", "/root/.ssh"]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_services_secrets_stay_its_own(real: Service, profile: str) -> None:
    def act(container: Container) -> list[str]:
        container.mount(real.state_dir, "/mnt/state", readonly=False)
        container.mount(real.host_dir, "/mnt/host", readonly=False)
        container.mount("/etc", "/mnt/etc", readonly=False)
        return [
            sh(container, "ls /mnt/state/images; ls /mnt/state/containers/*; cat /mnt/state/ledger.db"),
            sh(container, "ls /mnt/host; cat /mnt/host/authkey; echo x >/mnt/host/x; rm /mnt/host/pool.sock"),
            sh(container, "cat /mnt/etc/shadow; echo x >>/mnt/etc/passwd; touch /mnt/etc/x"),
            sh(container, "cat /mnt/etc/hostname /mnt/etc/debian_version >/dev/null && echo readable"),
        ]

    state, host, etc, public = as_alice(real, profile, act)
    assert "rootfs" not in state
    assert "SQLite" not in state
    assert state.count("denied") >= 2
    # She is in the group, but not by her primary one: that alone is mapped.
    assert host.count("denied") == 4
    assert etc.count("denied") == 3
    assert public == "readable\n"


def test_a_primary_group_counts_and_a_supplementary_one_does_not(real: Service, host: Path) -> None:
    shared = host / "shared"
    shared.write_text("the group's\n")
    os.chown(shared, 0, 65534)
    shared.chmod(0o640)

    def act() -> str:
        with PoolManager.connect(real.host_dir) as pool, pool.lease("x", timeout=30) as container:
            container.mount(shared, "/mnt/shared")
            return sh(container, "cat /mnt/shared")

    assert "denied" in as_member(ALICE, act)
    assert as_person(65534, act) == "the group's\n"


def test_an_administrator_lends_his_own_rights_to_anothers_container(real: Service, host: Path) -> None:
    script = f"""
        import os
        os.setgroups([65534]); os.setresgid({ALICE}, {ALICE}, {ALICE}); os.setresuid({ALICE}, {ALICE}, {ALICE})
        pool = PoolManager.connect({str(real.host_dir)!r})
        with pool.lease("hers", timeout=30) as container:
            print(container.name)
            sys.stdin.readline()
            print(container.run(["cat", "/mnt/root/private"], capture_output=True, text=True).stdout, end="")
        """
    with real.client(script) as client, real.connect() as pool:
        assert client.stdin is not None
        assert client.stdout is not None
        pool.container(client.stdout.readline().strip()).mount(host / "root", "/mnt/root")
        client.stdin.write("go\n")
        client.stdin.flush()
        assert client.stdout.readline() == "root's private\n"


def test_anothers_container_can_neither_be_mounted_into_nor_entered(
    real: Service, pool: PoolServiceProxy, host: Path
) -> None:
    with pool.lease("root's", timeout=30) as container:

        def ask() -> None:
            with PoolManager.connect(real.host_dir) as hers:
                hers.container(container.name)

        # In her process, what has come to her by the fork asks anew, as her.
        for act in (ask, lambda: container.mount(host / "alice", "/mnt/x"), lambda: container.run(["true"])):
            kind, _words = as_member(ALICE, act)
            assert kind is UnknownLease
        assert "/mnt/x" not in sh(container, "cat /proc/self/mountinfo")


# --- from inside ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readonly", [True, False])
@pytest.mark.parametrize("what", ["alice", "alice/public"])
def test_nothing_loosens_a_mount(
    container: Container, attack_program: bytes, host: Path, what: str, readonly: bool
) -> None:
    container.mount(host / what, "/mnt/x", readonly=readonly)
    loosen(container, attack_program, "/mnt/x", readonly=readonly)


@pytest.mark.parametrize("profile", ["lent", "lent-root"])
def test_nothing_loosens_what_a_profile_mounts(pool: PoolServiceProxy, attack_program: bytes, profile: str) -> None:
    for path, readonly in (("/mnt/read", True), ("/mnt/written", False)):
        with pool.lease("mounts", timeout=30, profile=profile) as container:
            loosen(container, attack_program, path, readonly=readonly)


def loosen(container: Container, program: bytes, path: str, *, readonly: bool) -> None:
    container.run(["sh", "-c", "cat >/attack && chmod 755 /attack"], input=program, check=True)
    done = container.run(["/attack", "loosen", path], capture_output=True, text=True, timeout=30, input="")
    answers = dict(line.split("=", 1) for line in done.stdout.splitlines())
    # To take away what is not there changes nothing.
    tries = {name: answer for name, answer in answers.items() if readonly or not name.endswith("rdonly")}
    assert len(tries) >= 4 * (11 if readonly else 8)
    assert {name for name, answer in tries.items() if answer == "ok"} == set()
    (line,) = [line for line in sh(container, "cat /proc/self/mountinfo").splitlines() if line.split()[4] == path]
    assert {"nosuid", "nodev", "ro" if readonly else "rw"} <= set(line.split()[5].split(","))


def test_set_uid_programs_and_devices_do_nothing_there(container: Container, attack_program: bytes, host: Path) -> None:
    directory = host / "root/drop"
    for name, owner in (("roots", 0), ("alices", ALICE)):
        (directory / name).write_bytes(attack_program)
        os.chown(directory / name, owner, owner)
        (directory / name).chmod(0o6755)
    os.mknod(directory / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    container.mount(directory, "/mnt/x", readonly=False)
    said = sh(
        container, "/mnt/x/roots effective; /mnt/x/alices effective; head -c 1 /mnt/x/zero && echo READ", user=1000
    )
    assert said.splitlines()[:2] == ["uid=1000", "uid=1000"]
    assert "READ" not in said
    assert "READ" not in sh(container, "head -c 1 /mnt/x/zero && echo READ")


def test_an_unprivileged_container_makes_no_devices_on_the_host(plain: Container, host: Path) -> None:
    plain.mount(host / "root/drop", "/mnt/x", readonly=False)
    assert "permitted" in sh(plain, "mknod /mnt/x/sda b 8 0")
    assert list((host / "root/drop").iterdir()) == []


def test_no_way_leads_up_from_what_is_mounted(container: Container, host: Path) -> None:
    container.mount(host / "root/below", "/mnt/x", readonly=False)
    assert sh(container, "cat /mnt/x/../public").count("No such file") == 1
    script = "cd /mnt/x/deep; echo there; read line; cat ../public ../../public ../../../public; ls /mnt/x"
    (host / "root/below/deep").mkdir()
    with container.popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "there\n"
        (host / "root/below/deep").rename(host / "root/deep")  # out of the mount, with a process in it
        out, _ = worker.communicate("go\n", timeout=30)
    assert "root's" not in out


# --- over the socket --------------------------------------------------------------------------------------------------


def mount_descriptor(container: Container, descriptor: int, dst: bytes = b"/mnt/x") -> None:
    """Do what the client does, with a descriptor that it would not take."""

    def launch(_request: ExecRequest, fds: tuple[int, int, int, int]) -> None:
        container._mount(dst, True, (descriptor, fds[1], fds[3]))

    mounts._perform(launch, ExecRequest.for_operation("unmount", dst), "x")


def test_no_other_descriptor_is_mounted(plain: Container, host: Path) -> None:
    os.mkfifo(host / "fifo")
    (host / "link").symlink_to("/root")
    read, write = os.pipe()
    made = [
        os.open("/root", os.O_RDONLY),
        os.memfd_create("x"),
        read,
        write,
        socket.socket(socket.AF_UNIX).detach(),
        os.open("/proc/self/ns/net", os.O_RDONLY),
        *(os.open(path, os.O_PATH) for path in ("/dev/null", host / "fifo", "/proc/self/ns/net", "/proc/self/exe")),
        os.open(host / "link", os.O_PATH | os.O_NOFOLLOW),
        os.open(f"/proc/self/fd/{read}", os.O_PATH),
        os.open(f"/proc/{plain.init_pid}/root", os.O_PATH),
    ]
    try:
        answers = []
        for descriptor in made:
            try:
                mount_descriptor(plain, descriptor)
                answers.append("mounted")
            except (OSError, ValueError) as error:
                answers.append(str(error))
    finally:
        for descriptor in made:
            os.close(descriptor)
    # The interpreter itself is a file as any other.
    assert [number for number, answer in enumerate(answers) if answer == "mounted"] == [9]
    assert all("O_PATH" in answer for answer in answers[:6])
    assert all("only directories" in answer for answer in (answers[6], answers[7], answers[10], answers[11]))
    assert "mount namespace" in answers[8] or "file system" in answers[8]
    assert "mount namespace" in answers[12]


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_mount_with_other_than_three_descriptors_is_refused(plain: Container, count: int) -> None:
    call = messages.Mount(plain.name, b"/mnt/x", readonly=True)
    with open("/dev/null", "rb") as null, pytest.raises(ValueError, match=f"not {count} descriptors"):
        plain._caller.ask(call, descriptors=[null.fileno()] * count)


def test_nobody_says_himself_who_he_is(real: Service, host: Path) -> None:
    def act(container: Container) -> str:
        request = ExecRequest.for_operation("mount", "/mnt/x", "w", "0", "0")
        source = os.open(host / "root", os.O_PATH)
        null = os.open("/dev/null", os.O_RDWR)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            said = []
            for stdin in (source, null):
                try:
                    container._launch(request, (stdin, null, null, theirs.fileno()))
                    said.append("mounted")
                except (TypeError, ValueError) as error:
                    said.append(str(error))
        return "|".join(said)

    stream, operation = as_alice(real, "default", act).split("|")
    assert "only a pipe or /dev/null" in stream
    assert "unknown operation" in operation


def test_a_client_elsewhere_is_told_so(real: Service, host: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def act() -> str:
        assert libc.unshare(CLONE_NEWNS) == 0
        assert libc.mount(b"none", b"/", None, 0x44000, None) == 0
        assert libc.mount(b"none", os.fsencode(host), b"tmpfs", 0, None) == 0
        with PoolManager.connect(real.host_dir) as pool, pool.lease("x", timeout=30) as container:
            said = []
            for path in (host, Path("/etc/passwd")):  # a mount of its own, and a copy of the host's
                try:
                    container.mount(path, "/mnt/x")
                    said.append("mounted")
                except OSError as error:
                    said.append(str(error))
            return "|".join(said)

    answers = as_person(0, act).split("|")
    assert len(answers) == 2
    assert all("mount namespace that is not the service's" in answer for answer in answers)


def test_a_file_system_of_the_callers_own_making_is_not_mounted(real: Service) -> None:
    """Who is root of a user namespace of his own can make one, mounted nowhere, and chooses all that is in it."""
    libc = ctypes.CDLL(None, use_errno=True)

    def act() -> str:
        with PoolManager.connect(real.host_dir) as pool, pool.lease("x", timeout=30) as container:
            assert libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0, ctypes.get_errno()
            context = libc.syscall(FSOPEN, b"tmpfs", 0)
            assert libc.syscall(FSCONFIG, context, 6, None, None, 0) == 0, ctypes.get_errno()  # FSCONFIG_CMD_CREATE
            descriptor = libc.syscall(FSMOUNT, context, 0, 0)
            assert descriptor >= 0, ctypes.get_errno()
            try:
                mount_descriptor(container, descriptor)
            except OSError as error:
                return str(error)
            return "mounted"

    answer = as_member(ALICE, act)
    assert "mount namespace that is not the service's" in str(answer)


def test_every_mount_is_in_the_log(real: Service, plain: Container, host: Path) -> None:
    plain.mount(host / "root", "/mnt/in the log\n")
    (line,) = [line for line in real.log.splitlines() if "trail: mount" in line and "in the log" in line]
    assert f'host_path="{host}/root"' in line
    assert "uid=0" in line
    assert 'access="read-only"' in line
