"""Who is there, by the kernel's word, and for whom they may speak."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lxc_pool import config
from lxc_pool.errors import AccessDenied, ConfigError
from lxc_pool.host.processes import ProcessIdentity, identify
from lxc_pool.service import access
from lxc_pool.service.access import Peer, Policy, owner_of
from tests.support.processes import NOBODY, in_child, sleeper


def peer(uid: int | None = None, *groups: int) -> Peer:
    uid = os.geteuid() if uid is None else uid
    return Peer(identify(os.getpid()), uid, 0, frozenset(groups), "pytest", uid in (0, os.geteuid()))


def policy(text: str = "") -> Policy:
    return Policy(config.parse(text, origin="test"))


@pytest.fixture
def someone() -> pwd.struct_passwd:
    return pwd.getpwnam("nobody")


def test_the_peer_is_the_process_that_connected_with_all_its_groups() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = policy().peer_of(ours)
    assert (found.process, found.uid) == (identify(os.getpid()), os.geteuid())
    assert found.groups == {os.getegid(), *os.getgroups()}
    assert found.program in str(found)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be in groups")
@pytest.mark.parametrize("groups", [[], [7], list(range(1, 256)), list(range(1, 258)), list(range(1, 3000))])
def test_every_supplementary_group_counts(groups: list[int]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0lxp-groups-{os.getpid()}")
        listener.listen()

        def connect() -> None:
            os.setgroups(groups)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(listener.getsockname())

        in_child(connect)
        connection, _address = listener.accept()
        with connection:
            assert set(access._peer_groups(connection)) == set(groups)


@pytest.mark.parametrize(("pid", "words"), [(0, "no pid here"), (2**22 + 1, "has ended")])
def test_a_peer_without_a_pid_here_is_refused(monkeypatch: pytest.MonkeyPatch, pid: int, words: str) -> None:
    monkeypatch.setattr(access, "credentials", lambda _sock: (pid, 0, 0))
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(AccessDenied, match=words):
        policy().peer_of(ours)


def test_an_old_kernel_knows_the_primary_group_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_SO_PEERGROUPS", 0xFFFF)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert policy().peer_of(ours).groups == {os.getegid()}


def test_root_the_services_own_user_and_those_configured_are_administrators(
    monkeypatch: pytest.MonkeyPatch, someone: pwd.struct_passwd
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for uid, text, expected in (
            (0, "", True),
            (os.geteuid(), "", True),
            (someone.pw_uid, "", False),
            (someone.pw_uid, f'[access]\nadmins = ["{someone.pw_name}"]', True),
        ):
            monkeypatch.setattr(access, "credentials", lambda _sock, uid=uid: (os.getpid(), uid, 0))
            found = policy(text).peer_of(ours)
            assert found.is_admin is expected
            assert found.lease_scope == (None if expected else uid)


def test_the_group_lets_in_and_users_narrow_it() -> None:
    group = grp.getgrall()[-1]
    open_to_group = policy(f'[access]\ngroup = "{group.gr_name}"')
    assert open_to_group.group == group.gr_gid
    open_to_group.require_user(peer(NOBODY, 1, group.gr_gid))
    open_to_group.require_user(peer(0))
    with pytest.raises(AccessDenied, match="not in the service's group"):
        open_to_group.require_user(peer(NOBODY, 1))
    narrowed = policy(f'[access]\ngroup = "{group.gr_name}"\nusers = ["daemon"]')
    narrowed.require_user(peer(pwd.getpwnam("daemon").pw_uid, group.gr_gid))
    with pytest.raises(AccessDenied, match="not among the service's users"):
        narrowed.require_user(peer(NOBODY, group.gr_gid))


def test_without_the_group_root_alone_is_let_in() -> None:
    closed = policy('[access]\ngroup = "no-such-group"')
    assert closed.group == 0
    closed.require_user(peer(0))
    with pytest.raises(AccessDenied):
        closed.require_user(peer(NOBODY, 0))


@pytest.mark.parametrize(
    "text",
    [
        '[access]\nusers = ["no-such-user"]',
        '[access]\nadmins = ["no-such-user"]',
        '[profile.p]\nallow = ["@no-such-group"]',
    ],
)
def test_a_name_that_the_host_does_not_have_is_a_wrong_configuration(text: str) -> None:
    with pytest.raises(ConfigError, match="no-such-"):
        policy(text)


def test_a_privileged_profile_is_for_administrators_unless_it_names_others(someone: pwd.struct_passwd) -> None:
    group = grp.getgrall()[-1]
    rules = policy(
        f"""
        [profile.plain]
        [profile.root]
        privileged = true
        [profile.shared]
        privileged = true
        allow = ["{someone.pw_name}", "@{group.gr_name}"]
        """
    )
    rules.require_profile(peer(1), "plain")
    rules.require_profile(peer(0), "root")
    rules.require_profile(peer(someone.pw_uid), "shared")
    rules.require_profile(peer(1, group.gr_gid), "shared")
    with pytest.raises(AccessDenied, match="privileged"):
        rules.require_profile(peer(1), "root")
    with pytest.raises(AccessDenied, match="not among those"):
        rules.require_profile(peer(1), "shared")


def test_the_owner_is_the_peer_unless_another_is_named() -> None:
    assert owner_of(peer(), None) == identify(os.getpid())
    with sleeper() as process:
        assert owner_of(peer(), process.pid) == identify(process.pid)


def test_another_users_process_can_not_be_made_owner() -> None:
    with pytest.raises(AccessDenied, match=f"process {os.getpid()} is not yours"):
        owner_of(peer(NOBODY), os.getpid())


def test_a_process_of_ones_own_can_be_made_owner_without_being_administrator(monkeypatch: pytest.MonkeyPatch) -> None:
    someone = peer(os.getuid())
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    if os.getuid() != 0:
        assert not someone.is_admin
    assert owner_of(someone, os.getpid()) == identify(os.getpid())


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**63])
def test_an_owner_that_is_no_process_is_a_wrong_argument(pid: int) -> None:
    with pytest.raises(ValueError, match=f"owner must be the pid of a living process, not {pid}"):
        owner_of(peer(), pid)


def test_an_owner_that_has_ended_is_a_wrong_argument() -> None:
    with sleeper() as process:
        pass
    with pytest.raises(ValueError, match="living process"):
        owner_of(peer(), process.pid)


def test_a_thread_is_no_owner_though_it_has_an_id() -> None:
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait)
    thread.start()
    try:
        with pytest.raises(ValueError, match="living process"):
            owner_of(peer(), thread.native_id)
    finally:
        go_on.set()
        thread.join()


def test_identities_of_other_boots_are_other_processes() -> None:
    assert identify(os.getpid()) != ProcessIdentity("other boot", os.getpid(), identify(os.getpid()).start_ticks)


def test_a_pid_that_has_become_anothers_since_is_not_taken_for_the_peers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, sleeper() as other:
        listener.bind(path)
        listener.listen()
        script = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        subprocess.run([sys.executable, "-c", script, path], check=True)
        connection, _address = listener.accept()
        with connection:
            monkeypatch.setattr(access, "credentials", lambda _sock: (other.pid, 0, 0))
            with pytest.raises(AccessDenied, match="has ended"):
                policy().peer_of(connection)
            # A kernel that can't tell, does not.
            monkeypatch.setattr(access, "_SO_PEERPIDFD", 0xFFFF)
            assert policy().peer_of(connection).process.pid == other.pid


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a pid namespace")
def test_a_peer_with_pids_of_its_own_may_name_none() -> None:
    with subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "sleep", "infinity"]) as parent:
        try:
            while not (children := psutil.Process(parent.pid).children()):
                time.sleep(0.001)  # it has to fork first
            confined = Peer(identify(children[0].pid), 0, 0, frozenset(), "sleep", is_admin=True)
            with pytest.raises(AccessDenied, match="pid namespace of its own"):
                owner_of(confined, os.getpid())
            assert owner_of(confined, None) == confined.process
        finally:
            parent.kill()
