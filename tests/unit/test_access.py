"""Who is there, by the kernel's word, and for whom they may speak."""

from __future__ import annotations

import grp
import os
import socket
import threading

import pytest

from lxc_pool.errors import AccessDenied
from lxc_pool.host.processes import ProcessIdentity, identify
from lxc_pool.service import access
from lxc_pool.service.access import Peer, owner_of, peer_of, service_group
from tests.support.processes import NOBODY, sleeper


def peer(uid: int | None = None) -> Peer:
    return Peer(identify(os.getpid()), os.geteuid() if uid is None else uid, os.getegid())


def test_the_peer_is_the_process_that_connected() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours) == Peer(identify(os.getpid()), os.geteuid(), os.getegid())


@pytest.mark.parametrize(("pid", "words"), [(0, "no pid here"), (2**22 + 1, "has ended")])
def test_a_peer_without_a_pid_here_is_refused(monkeypatch: pytest.MonkeyPatch, pid: int, words: str) -> None:
    monkeypatch.setattr(access, "credentials", lambda _sock: (pid, 0, 0))
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(AccessDenied, match=words):
        peer_of(ours)


def test_root_and_the_services_own_user_are_administrators() -> None:
    assert peer(0).is_admin
    assert peer(os.geteuid()).is_admin
    assert peer(0).lease_scope is None
    assert not peer(NOBODY).is_admin
    assert peer(NOBODY).lease_scope == NOBODY


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


def test_the_services_group_is_roots_if_the_host_has_none_of_that_name() -> None:
    group = grp.getgrall()[-1]
    assert service_group(group.gr_name) == group.gr_gid
    assert service_group("no such group") == 0


def test_identities_of_other_boots_are_other_processes() -> None:
    assert identify(os.getpid()) != ProcessIdentity("other boot", os.getpid(), identify(os.getpid()).start_ticks)
