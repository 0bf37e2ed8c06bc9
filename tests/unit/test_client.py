"""The real client against the real service, and against whatever else may be where a service should be."""

from __future__ import annotations

import contextlib
import functools
import gc
import grp
import importlib.metadata
import logging
import math
import multiprocessing
import multiprocessing.managers
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import lxc_pool
from lxc_pool import Container, ContainerId, PoolManager, PoolServiceProxy, hostdir
from lxc_pool.backend.memory import HANG, Fault
from lxc_pool.client import caller as caller_module
from lxc_pool.client import connection as connection_module
from lxc_pool.client import container as container_module
from lxc_pool.client import pool as pool_module
from lxc_pool.client.connection import Connection
from lxc_pool.errors import (
    AccessDenied,
    AuthenticationFailed,
    ConfigError,
    DestroyFailed,
    HostDirError,
    InternalError,
    LeaseExpired,
    LxcPoolError,
    PoolClosed,
    PoolDraining,
    PoolTimeout,
    ServiceUnavailable,
    UnknownLease,
)
from lxc_pool.model import State
from lxc_pool.service import daemon, session
from lxc_pool.wire import messages
from tests.support.memory_service import SOON, MemoryService, memory_service
from tests.support.processes import NOBODY, as_nobody, in_child, open_descriptors, sleeper

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")


@pytest.fixture
def service() -> Iterator[MemoryService]:
    before = open_descriptors()
    with memory_service(2) as service:
        service.reaches(size=2)
        yield service
        gc.collect()
    assert open_descriptors() == before


@pytest.fixture
def pool(service: MemoryService) -> Iterator[PoolServiceProxy]:
    with PoolManager.connect(service.host_dir) as pool:
        yield pool


def take_all(service: MemoryService, pool: PoolServiceProxy, size: int = 2) -> list[Container]:
    """Lease every container, and let the next ones never come up."""
    service.reaches(size=size, building=0, reaping=0)
    service.backend.script("start", HANG)
    taken = [container for _ in range(size) if (container := pool.get("taken", SOON)) is not None]
    service.reaches(size=0, leased=size, building=1)
    return taken


def crash(service: MemoryService) -> None:
    """Let the service be gone, as after SIGKILL: connections end, and the socket is left behind."""
    server = service.server
    server._closing = True
    with contextlib.suppress(OSError):
        server.socket_listener._socket.shutdown(socket.SHUT_RDWR)
    server.socket_listener._socket.close()
    server.close_sessions(SOON)


def drop(handles: list[Any]) -> None:
    """Let the garbage collector have what is in a list."""
    handles.clear()
    gc.collect()


# --- a service that is there ------------------------------------------------------------------------------------------


def test_the_ten_lines_that_a_user_writes(service: MemoryService) -> None:
    pool = PoolManager.connect(service.host_dir)
    assert pool.echo("x") == "x"
    with pool.lease(ContainerId.create("job"), timeout=30) as c:
        assert c.state is State.LEASED
        assert isinstance(c.id, ContainerId)
        assert c.profile == "default"
        assert os.path.exists(f"/proc/{c.init_pid}")
        assert isinstance(c.ips, tuple)
        assert c.name in repr(c)
        assert "test_job_" in repr(c)
        assert pool.status().leased == 1
    with pytest.raises(LeaseExpired):
        _ = c.state
    pool.close()


def test_the_host_dir_is_the_environments_unless_one_is_given(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LXC_POOL_HOST_DIR", str(service.host_dir))
    with PoolManager.connect() as pool:
        assert pool.host_dir == service.host_dir
    with PoolManager.connect(str(service.host_dir)) as pool:
        assert repr(pool) == str(pool) == f"<pool of {service.host_dir}>"


def test_a_relative_host_dir_is_the_same_after_a_change_of_directory(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(service.directory)
    with PoolManager.connect("host") as pool:
        monkeypatch.chdir("/")
        pool.close()
        assert pool.echo("x") == "x"
        assert pool.host_dir == service.host_dir


def test_the_status_and_the_list_are_typed(service: MemoryService, pool: PoolServiceProxy) -> None:
    status = pool.status()
    assert (status.size, status.capacity, status.worker_count, status.client_count) == (2, 2, 1, 1)
    assert status.profiles["default"].image == "busybox:1"
    infos = pool.containers()
    assert [info.state for info in infos] == [State.WARM] * 2
    assert set(service.backend.present) == {info.name for info in infos}


def test_get_returns_none_when_none_comes_free_and_lease_says_why(
    service: MemoryService, pool: PoolServiceProxy
) -> None:
    taken = take_all(service, pool)
    for timeout in (0, 0.01):
        assert pool.get("x", timeout) is None
    with pytest.raises(PoolTimeout) as caught, pool.lease("x", timeout=0.01):
        pass
    for words in ("after 0.01 s", "2 leased", "1 building", "0 warm", "capacity 2", "place 1 of 1"):
        assert words in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    for container in taken:
        container.release()


def test_get_waits_for_ever_if_told_to(service: MemoryService, pool: PoolServiceProxy) -> None:
    for timeout in (None, math.inf, 1e300, 3e6, 10**400):
        container = pool.get("x", timeout)
        assert container is not None
        container.release()
    taken = take_all(service, pool)
    got: list[Container | None] = []
    waiter = threading.Thread(target=lambda: got.append(pool.get("x", None)))
    waiter.start()
    service.reaches(waiting=1)
    service.backend.go_on()
    waiter.join(SOON)
    assert got[0] is not None
    for container in [*taken, got[0]]:
        container.release()


def test_a_lease_ends_with_its_block_even_if_that_fails(service: MemoryService, pool: PoolServiceProxy) -> None:
    with pytest.raises(KeyError), pool.lease("x", SOON):
        raise KeyError
    service.reaches(leased=0)


def test_releasing_twice_or_after_the_end_is_no_error(service: MemoryService, pool: PoolServiceProxy) -> None:
    container = pool.get("x", SOON, ttl=0)
    assert container is not None
    service.reaches(leased=0)
    container.release()
    container.release()
    with container:
        pass


def test_a_lease_can_be_renewed_and_kept(service: MemoryService, pool: PoolServiceProxy) -> None:
    with sleeper() as process:
        container = pool.get("x", SOON, owner=process.pid, ttl=60)
        assert container is not None
        container.renew(120)
        container.keep(3600)
    pool.echo("by now the owner's death has been noticed, if it was watched")
    assert container.state is State.LEASED
    container.renew(math.inf)
    container.renew(0)
    service.reaches(leased=0)
    with pytest.raises(LeaseExpired, match="lease expired"):
        container.renew(5)


def test_a_container_that_is_leased_already_can_be_taken_in_hand_by_name(
    service: MemoryService, pool: PoolServiceProxy
) -> None:
    with pool.lease("x", SOON) as container:
        handle = pool.container(container.name)
        assert (handle.id, handle.init_pid) == ("x", container.init_pid)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del handle
            gc.collect()
        assert container.state is State.LEASED
        pool.container(container.name).release()
        service.reaches(leased=0)
    with pytest.raises(UnknownLease):
        pool.container("nope")


def test_administrators_resize_drain_and_resume(service: MemoryService, pool: PoolServiceProxy) -> None:
    pool.resize(3)
    pool.wait_ready(timeout=SOON)
    assert pool.status().size == 3
    pool.drain()
    with pytest.raises(PoolDraining, match="drained"):
        pool.get("x", 0)
    with pytest.raises(PoolTimeout, match="the pool is drained"):
        pool.wait_ready(1, 0)
    pool.resume()
    pool.resize(1)
    pool.wait_ready(timeout=None)
    service.reaches(size=1, reaping=0)
    with pytest.raises(ConfigError, match="1 to 1000"):
        pool.resize(0)


def test_waiting_until_ready_shows_how_it_comes_on(service: MemoryService, pool: PoolServiceProxy) -> None:
    pool.wait_ready(0, 0)
    pool.wait_ready(2, 0)
    pool.resize(4)
    sizes: list[int] = []
    pool.wait_ready(4, SOON, progress=lambda status: sizes.append(status.size))
    assert sizes == sorted(sizes)
    assert sizes[-1] == 4
    taken = take_all(service, pool, 4)
    with pytest.raises(PoolTimeout, match=r"0 of 4 containers are warm after 0\.01 s"):
        pool.wait_ready(4, 0.01)
    for n in (-1, 5):
        with pytest.raises(ValueError, match=f"0 to the pool's capacity.* not {n}"):
            pool.wait_ready(n)
    for container in taken:
        container.release()


def test_threads_share_one_pool(service: MemoryService, pool: PoolServiceProxy) -> None:
    failures: list[BaseException] = []
    names: list[str] = []

    def work(number: int) -> None:
        try:
            for _ in range(3):
                assert pool.echo(str(number)) == str(number)
                with pool.lease(number, SOON) as container:
                    names.append(container.name)
                    assert container.id == number
        except BaseException as error:  # noqa: BLE001  # the test's thread raises it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert failures == []
    assert len(set(names)) == 18
    assert pool.status().client_count <= 6
    service.reaches(leased=0, reserved=0)


def test_a_closed_pool_opens_itself_again(service: MemoryService, pool: PoolServiceProxy) -> None:
    pool.close()
    service.sessions(0)
    assert pool.echo("x") == "x"
    service.sessions(1)


def test_a_stock_proxys_way_of_calling_works_too(pool: PoolServiceProxy) -> None:
    assert pool._callmethod("echo", ("x",)) == "x"
    pool._callmethod("get", (), {"id": "x", "timeout": SOON}).release()
    for name in ("nope", "_lease", "__reduce__", "host_dir", "#GETVALUE"):
        with pytest.raises(AttributeError, match="the pool has no method"):
            pool._callmethod(name)


def test_the_managers_own_way_of_connecting_proves_the_key(service: MemoryService) -> None:
    connect = multiprocessing.managers.listener_client[connection_module.SERIALIZER][1]  # type: ignore[attr-defined]  # not in typeshed
    channel = connect(str(service.socket_path), hostdir.read_key(service.host_dir))
    service.sessions(1)
    channel.close()
    with pytest.raises(AuthenticationFailed):
        connect(str(service.socket_path), b"wrong")
    service.sessions(0)


def test_a_manager_does_not_start_the_service() -> None:
    with pytest.raises(TypeError, match="lxc-pool serve"):
        PoolManager("/nowhere").start()


# --- wrong arguments --------------------------------------------------------------------------------------------------

WRONG: list[tuple[Callable[[PoolServiceProxy], object], type[Exception], str]] = [
    (lambda pool: pool.echo(5), TypeError, "echo takes a str, not 5"),  # type: ignore[arg-type]
    (lambda pool: pool.get(None, 0), TypeError, "id must be"),  # type: ignore[arg-type]
    (lambda pool: pool.get("", 0), ValueError, "id must be"),
    (lambda pool: pool.get("x" * 129, 0), ValueError, "id must be"),
    (lambda pool: pool.get(ContainerId(5, 1, 1), 0), TypeError, "job_id"),  # type: ignore[arg-type]
    (lambda pool: pool.get("x", -1), ValueError, "timeout must be 0 or more seconds, not -1"),
    (lambda pool: pool.get("x", math.nan), ValueError, "timeout must be"),
    (lambda pool: pool.get("x", -math.inf), ValueError, "timeout must be"),
    (lambda pool: pool.get("x", "5"), TypeError, "timeout must be a number of seconds, not '5'"),  # type: ignore[arg-type]
    (lambda pool: pool.get("x", True), TypeError, "timeout must be"),
    (lambda pool: pool.get("x", 0, ttl=-1), ValueError, "ttl must be"),
    (lambda pool: pool.get("x", 0, profile=5), TypeError, "profile must be a str, not 5"),  # type: ignore[arg-type]
    (lambda pool: pool.get("x", 0, owner="1"), TypeError, "owner must be a pid or None"),  # type: ignore[arg-type]
    (lambda pool: pool.get("x", 0, owner=True), TypeError, "owner must be"),
    (lambda pool: pool.lease("x", -1).__enter__(), ValueError, "timeout must be"),
    (lambda pool: pool.container(5), TypeError, "name must be a str, not 5"),  # type: ignore[arg-type]
    (lambda pool: pool.resize("5"), TypeError, "n must be an int, not '5'"),  # type: ignore[arg-type]
    (lambda pool: pool.resize(True), TypeError, "n must be an int"),
    (lambda pool: pool.wait_ready("5"), TypeError, "n must be an int or None"),  # type: ignore[arg-type]
    (lambda pool: pool.wait_ready(-1), ValueError, "n must be 0 to the pool's capacity, not -1"),
    (lambda pool: pool.wait_ready(1, math.nan), ValueError, "timeout must be"),
    (lambda pool: pool.shutdown(-1), ValueError, "grace must be"),
    (lambda pool: pool.shutdown(None), TypeError, "grace must be a number of seconds, not None"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "kind", "words"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_argument_is_refused_before_anything_is_sent(
    call: Callable[[PoolServiceProxy], object], kind: type[Exception], words: str
) -> None:
    pool = PoolServiceProxy(Path("/nowhere"))  # whatever would be sent would end in ServiceUnavailable
    with pytest.raises(kind, match=words) as caught:
        call(pool)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("timeout", "kind"),
    [(-1, ValueError), (math.nan, ValueError), (None, TypeError), ("5", TypeError), (True, TypeError)],
)
def test_connecting_takes_a_number_of_seconds(timeout: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="timeout must be"):
        PoolManager.connect("/nowhere", timeout=timeout)


@pytest.mark.parametrize("ttl", [-1, math.nan, None, "5"])
def test_a_leases_time_is_a_number_of_seconds(pool: PoolServiceProxy, ttl: Any) -> None:
    with pool.lease("x", SOON) as container:
        for method in (container.renew, container.keep):
            with pytest.raises((TypeError, ValueError), match="ttl must be"):
                method(ttl)


def test_what_only_the_service_can_know_is_told_by_it_and_costs_no_connection(
    service: MemoryService, pool: PoolServiceProxy
) -> None:
    with pytest.raises(ValueError, match="unknown profile 'nope'; the service has: default"):
        pool.get("x", 0, profile="nope")
    with pytest.raises(ValueError, match="living process"):
        pool.get("x", 0, owner=2**22 + 1)
    with pytest.raises(ValueError, match="64 bits"):
        pool.get("x", 0, owner=10**30)
    with pytest.raises(ValueError, match="unknown profile"):
        pool.get("x", 0, profile="x" * 4_000_000)
    assert pool.echo("x") == "x"
    service.sessions(1)


def test_a_message_larger_than_one_may_be_is_a_wrong_argument(pool: PoolServiceProxy) -> None:
    with pytest.raises(ValueError, match="larger than"):
        pool.echo("x" * 5_000_000)
    assert pool.echo("x") == "x"


# --- connecting to what is no service ---------------------------------------------------------------------------------


@pytest.fixture
def host_dir(open_path: Path) -> Path:
    """A host dir with a key, and no service."""
    hostdir.key_path(open_path).write_bytes(b"key")
    return open_path


@contextlib.contextmanager
def impostor(host_dir: Path, act: Callable[[socket.socket], None]) -> Iterator[None]:
    """Listen where the service should, and do something else with whoever connects."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(hostdir.socket_path(host_dir)))
    listener.listen()
    kept: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = listener.accept()[0]
                kept.append(sock)
                act(sock)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(SOON)
        for sock in kept:
            sock.close()


@pytest.mark.parametrize("timeout", [0, 0.1])
def test_no_host_dir_is_no_service_and_says_so_within_the_timeout(tmp_path: Path, timeout: float) -> None:
    began = time.monotonic()
    with pytest.raises(ServiceUnavailable, match=r"there is no .*pool\.sock.*`lxc-pool serve`"):
        PoolManager.connect(tmp_path / "nope", timeout=timeout)
    assert time.monotonic() - began < SOON


def test_an_error_of_connecting_does_not_begin_with_an_empty_deque(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailable) as caught:
        PoolManager.connect(tmp_path / "nope", timeout=0)
    assert caught.value.__context__ is None


def test_a_service_that_comes_up_in_time_is_waited_for(service: MemoryService) -> None:
    service.stop()
    service.backend._go_on.clear()
    pools: list[PoolServiceProxy] = []
    connecting = threading.Thread(target=lambda: pools.append(PoolManager.connect(service.host_dir, SOON)))
    connecting.start()
    service.start()
    connecting.join(SOON)
    assert pools[0].echo("x") == "x"
    pools[0].close()


def test_connecting_with_no_time_at_all_is_one_try(service: MemoryService) -> None:
    with PoolManager.connect(service.host_dir, timeout=0) as pool:
        assert pool.echo("x") == "x"
    with PoolManager.connect(service.host_dir, timeout=math.inf) as pool:
        assert pool.echo("x") == "x"


def test_a_stale_socket_is_no_service(host_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(hostdir.socket_path(host_dir)))
    with pytest.raises(ServiceUnavailable, match=r"the socket is there, but: .*refused"):
        PoolManager.connect(host_dir, timeout=0.05)


def test_a_socket_without_a_key_is_no_service_yet(host_dir: Path) -> None:
    hostdir.key_path(host_dir).unlink()
    with impostor(host_dir, lambda _sock: None), pytest.raises(ServiceUnavailable, match=r"there is no .*authkey"):
        PoolManager.connect(host_dir, timeout=0.05)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo])
def test_what_is_no_socket_is_refused_at_once(host_dir: Path, make: Callable[[Path], None]) -> None:
    make(hostdir.socket_path(host_dir))
    with pytest.raises(HostDirError, match=r"pool\.sock is not a socket.*tampered"):
        PoolManager.connect(host_dir, timeout=SOON)


def test_a_link_to_a_socket_is_refused_too(service: MemoryService, open_path: Path) -> None:
    hostdir.socket_path(open_path).symlink_to(service.socket_path)
    with pytest.raises(HostDirError, match="is not a socket"):
        PoolManager.connect(open_path, timeout=SOON)


def test_a_host_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostDirError, match="is not a directory"):
        PoolManager.connect(tmp_path / "file", timeout=SOON)


def test_a_path_that_no_socket_can_have_is_refused() -> None:
    with pytest.raises(HostDirError, match="choose a shorter host dir"):
        PoolManager.connect("/" + "x" * 200)


@pytest.mark.parametrize(
    "noise",
    [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\5hello", b"\xff" * 300],
    ids=range(4),
)
def test_something_else_that_talks_there_is_refused(host_dir: Path, noise: bytes) -> None:
    with (
        impostor(host_dir, lambda sock: sock.sendall(noise)),
        pytest.raises(HostDirError, match="is no lxc-pool service"),
    ):
        PoolManager.connect(host_dir, timeout=SOON)


def test_something_that_says_nothing_there_is_given_up_in_time(host_dir: Path) -> None:
    with (
        impostor(host_dir, lambda _sock: None),
        pytest.raises(ServiceUnavailable, match=r"the socket is there, but: .*waited"),
    ):
        PoolManager.connect(host_dir, timeout=0.1)


def test_something_that_hangs_up_there_is_given_up_in_time(host_dir: Path) -> None:
    with (
        impostor(host_dir, lambda sock: sock.shutdown(socket.SHUT_RDWR)),
        pytest.raises(ServiceUnavailable, match="the socket is there, but"),
    ):
        PoolManager.connect(host_dir, timeout=0.1)


def test_a_service_whose_queue_is_full_is_too_busy(host_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(hostdir.socket_path(host_dir)))
        listener.listen(0)
        first.connect(str(hostdir.socket_path(host_dir)))
        with pytest.raises(ServiceUnavailable, match="too busy"):
            PoolManager.connect(host_dir, timeout=0.05)


def test_a_key_that_is_not_the_services_is_told_with_the_remedy(service: MemoryService) -> None:
    path = hostdir.key_path(service.host_dir)
    path.chmod(0o600)
    path.write_bytes(b"another")
    with pytest.raises(AuthenticationFailed, match=r"authkey is not the one of the service.*Restart the service"):
        PoolManager.connect(service.host_dir, timeout=SOON)


def test_a_key_that_changes_in_the_middle_is_a_restart_and_tried_again(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = hostdir.read_key(service.host_dir)
    keys = [b"old", right, right]
    monkeypatch.setattr(hostdir, "read_key", lambda _host_dir: keys.pop(0) if keys else right)
    with PoolManager.connect(service.host_dir, timeout=SOON) as pool:
        assert pool.echo("x") == "x"
    assert keys == []


def test_a_server_of_another_user_is_not_trusted(service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "credentials", lambda _sock: (1, NOBODY, NOBODY))
    with pytest.raises(HostDirError, match=f"runs as uid {NOBODY}, not as root: not using it"):
        PoolManager.connect(service.host_dir, timeout=SOON)


def test_a_service_of_another_version_is_refused(service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_HELLO", messages.Hello(999))
    with pytest.raises(AccessDenied, match="version 1 of the protocol, the client 999"):
        PoolManager.connect(service.host_dir, timeout=SOON)
    monkeypatch.undo()
    monkeypatch.setattr(messages, "encode_result", lambda _value: b"\x92\xa6result\x07")
    with pytest.raises(HostDirError, match="speaks version 7 of the protocol, not 1"):
        PoolManager.connect(service.host_dir, timeout=SOON)


@needs_root
def test_whoever_may_not_enter_the_host_dir_is_told_whom_to_ask(service: MemoryService) -> None:
    kind, words = as_nobody(lambda: PoolManager.connect(service.host_dir, timeout=SOON))
    assert kind is AccessDenied
    assert "not allowed to look into" in words
    assert "ask the administrator" in words


@needs_root
def test_whoever_may_not_read_the_key_is_told_which_group_to_be_in(service: MemoryService) -> None:
    service.host_dir.chmod(0o755)
    kind, words = as_nobody(lambda: PoolManager.connect(service.host_dir, timeout=SOON))
    assert kind is AccessDenied
    assert "not allowed to read" in words
    assert "group 0" in words


@needs_root
def test_whoever_may_not_connect_is_told_which_group_to_be_in(service: MemoryService) -> None:
    service.host_dir.chmod(0o755)
    hostdir.key_path(service.host_dir).chmod(0o644)
    kind, words = as_nobody(lambda: PoolManager.connect(service.host_dir, timeout=SOON))
    assert kind is AccessDenied
    assert "not allowed to connect to" in words


@needs_root
def test_whoever_is_in_the_group_is_a_user_but_no_administrator() -> None:
    def act(host_dir: Path) -> tuple[object, ...]:
        with PoolManager.connect(host_dir, timeout=SOON) as pool, pool.lease("x", SOON) as container:
            try:
                pool.drain()
            except AccessDenied as error:
                return container.state, str(error)
            return ()

    with memory_service(1, group=grp.getgrgid(NOBODY).gr_name) as its_service:
        state, words = as_nobody(functools.partial(act, its_service.host_dir))
        assert state is State.LEASED
        assert f"you are uid {NOBODY}" in words
        its_service.reaches(leased=0)


@needs_root
def test_whoever_could_connect_but_is_not_in_the_group_is_refused_by_the_service(service: MemoryService) -> None:
    service.host_dir.chmod(0o755)
    hostdir.key_path(service.host_dir).chmod(0o644)
    service.socket_path.chmod(0o666)
    kind, words = as_nobody(lambda: PoolManager.connect(service.host_dir, timeout=SOON))
    assert kind is AccessDenied
    assert "not in the service's group" in words


# --- a service that goes away -----------------------------------------------------------------------------------------


def test_a_restarted_service_with_a_new_key_is_found_again(service: MemoryService, pool: PoolServiceProxy) -> None:
    with pool.lease("x", SOON) as container:
        key = hostdir.read_key(service.host_dir)
        service.restart()
        assert hostdir.read_key(service.host_dir) != key
        assert pool.echo("x") == "x"
        assert container.state is State.LEASED
    service.reaches(leased=0)


def test_a_lost_connection_is_made_again_in_the_middle_of_a_get(service: MemoryService, pool: PoolServiceProxy) -> None:
    taken = take_all(service, pool)
    got: list[Container | None] = []
    waiter = threading.Thread(target=lambda: got.append(pool.get("x", SOON)))
    waiter.start()
    service.reaches(waiting=1)
    service.server.close_sessions(SOON)
    service.sessions(1)
    service.reaches(waiting=1)
    service.backend.go_on()
    waiter.join(SOON)
    assert got[0] is not None
    assert pool.status().leased == 3
    for container in [*taken, got[0]]:
        container.release()


def test_a_service_that_ends_in_order_tells_those_who_wait(service: MemoryService, pool: PoolServiceProxy) -> None:
    taken = take_all(service, pool)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            pool.get("x", None)
        except LxcPoolError as error:
            caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    service.reaches(waiting=1)
    service.stop()
    waiter.join(SOON)
    assert isinstance(caught[0], PoolClosed)
    began = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="no service answers"):
        pool.echo("x")  # no need to wait for 30 s: it ended in order
    assert time.monotonic() - began < SOON
    for container in taken:
        container._released = True


def test_a_service_that_is_gone_during_a_call_is_given_up_in_time(
    service: MemoryService, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = take_all(service, pool)
    monkeypatch.setattr(pool_module, "GRACE", 0.05)
    monkeypatch.setattr(caller_module, "CALL_TIMEOUT", 0.1)
    caught: list[BaseException] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except LxcPoolError as error:
            caught.append(error)

    calls: list[Callable[[], object]] = [lambda: pool.get("x", 1), lambda: pool.wait_ready(2, 1)]
    threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    service.reaches(waiting=1)
    while not service.pool._warm_waits:
        time.sleep(0.001)
    crash(service)
    for thread in threads:
        thread.join(SOON)
    assert [type(error) for error in caught] == [ServiceUnavailable] * 2
    for container in taken:
        container._released = True


def test_a_service_that_does_not_answer_is_given_up_in_time(
    service: MemoryService, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    answer = service.service.answer
    monkeypatch.setattr(service.service, "answer", lambda *arguments: go_on.wait(SOON) and answer(*arguments))
    with pytest.raises(ServiceUnavailable, match=r"did not answer within 0\.05 s"):
        pool._caller.ask(messages.Echo("x"), 0.05)
    monkeypatch.setattr(pool_module, "GRACE", 0.05)
    with pytest.raises(ServiceUnavailable, match="did not answer in time"):
        pool.get("x", 0)
    go_on.set()
    assert pool.echo("x") == "x"
    service.reaches(leased=0, reserved=0)


@pytest.mark.timeout(20)  # instead of the patience that there is for a service which answers
@pytest.mark.parametrize(
    "call",
    [
        lambda pool, _container: pool.get("x", 0.1),
        lambda pool, _container: pool.get("x", 0),
        lambda pool, _container: pool.wait_ready(1, 0.1),
        lambda _pool, container: container.wait_for_network(0.1),
        lambda _pool, container: container.run(["true"], timeout=0.1),
        lambda _pool, container: container.push("/etc/passwd", "/tmp", timeout=0.1),
    ],
    ids=["get", "get at once", "wait_ready", "wait_for_network", "run", "push"],
)
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "not connected"])
def test_a_service_that_was_killed_has_the_calls_own_time_to_come_back_and_no_more(
    service: MemoryService,
    pool: PoolServiceProxy,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[PoolServiceProxy, Container], object],
    *,
    connected: bool,
) -> None:
    for module in (caller_module, pool_module, container_module):
        monkeypatch.setattr(module, "GRACE", 1000.0)
        monkeypatch.setattr(module, "CALL_TIMEOUT", 1000.0)
    container = pool.get("held", SOON)
    assert container is not None
    crash(service)
    if not connected:
        pool.close()
    with pytest.raises(ServiceUnavailable, match="no service answers"):
        call(pool, container)
    container._released = True


def test_a_wait_that_a_restart_interrupts_is_over_when_it_was_to_be(
    service: MemoryService, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = take_all(service, pool)
    asked: list[float | None] = []
    call = Connection.call

    def lost(connection: Connection, what: messages.Call, *arguments: Any) -> object:
        if isinstance(what, messages.AwaitWarm):
            asked.append(what.timeout)
            if len(asked) == 1:
                time.sleep(0.1)
                raise EOFError
        return call(connection, what, *arguments)

    monkeypatch.setattr(Connection, "call", lost)
    with pytest.raises(PoolTimeout):
        pool.wait_ready(1, 0.3)
    first, second = asked
    assert first is not None
    assert second is not None
    assert second <= first - 0.1
    for container in taken:
        container.release()


def test_releasing_what_the_service_knows_no_more_is_no_error(service: MemoryService, pool: PoolServiceProxy) -> None:
    container = pool.get("x", SOON, ttl=0)
    assert container is not None
    service.reaches(leased=0, reaping=0, size=2)
    service.restart()
    with pytest.raises(UnknownLease):
        _ = container.state
    container.release()


def test_a_release_that_failed_may_be_tried_again(service: MemoryService, pool: PoolServiceProxy) -> None:
    container = pool.get("x", SOON)
    assert container is not None
    answer = service.service.answer

    def refuse(*_arguments: object) -> None:
        raise InternalError("a fault of the test's")

    service.service.answer = refuse  # type: ignore[assignment]  # what a service says that is in trouble
    with pytest.raises(InternalError):
        container.release()
    service.service.answer = answer  # type: ignore[method-assign]
    assert container.state is State.LEASED
    container.release()
    service.reaches(leased=0)


@pytest.mark.parametrize("sent", [False, True], ids=["before it was sent", "after"])
def test_an_interrupt_of_a_release_does_not_keep_the_container(
    service: MemoryService, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch, *, sent: bool
) -> None:
    call = Connection.call
    interrupts = iter([KeyboardInterrupt])

    def interrupted(connection: Connection, what: messages.Call, *arguments: Any) -> object:
        answer = call(connection, what, *arguments) if sent else None
        for interrupt in interrupts:
            raise interrupt
        return answer if sent else call(connection, what, *arguments)

    with pytest.raises(KeyboardInterrupt), pool.lease("x", SOON):
        monkeypatch.setattr(Connection, "call", interrupted)
    monkeypatch.undo()
    service.reaches(leased=0, reaping=0, size=2)


@pytest.mark.parametrize(
    ("timeout", "kind"), [("5", TypeError), (Decimal(5), TypeError), (True, TypeError), (math.nan, ValueError)]
)
def test_a_commands_timeout_is_a_number_of_seconds(
    pool: PoolServiceProxy, timeout: Any, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pool.lease("x", SOON) as container, monkeypatch.context() as patch:
        patch.setattr(Connection, "call", None)  # nothing is sent
        with pytest.raises(kind, match="timeout must be"):
            container.run(["true"], timeout=timeout)


def test_a_command_whose_start_is_in_doubt_is_not_started_twice(
    service: MemoryService, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def lost(_caller: object, call: object, _descriptors: object) -> None:
        calls.append(call)
        raise EOFError

    monkeypatch.setattr(service.service, "answer", lost)
    assert pool._caller.ask(messages.Execute("c", b""), descriptors=[0, 0, 0, 0]) is None
    assert len(calls) == 1


def test_shutting_down_returns_when_the_process_has_ended(
    service: MemoryService, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The service's process is the test's own here; another stands in for it.
    with sleeper() as process:

        def hold(_connection: Connection) -> int:
            process.kill()
            return os.pidfd_open(process.pid)

        monkeypatch.setattr(Connection, "hold_server", hold)
        pool.shutdown(0)
    service.stop()
    assert service.backend.present == set()


def test_shutting_down_says_so_if_the_process_does_not_end(
    service: MemoryService, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    await_exit = pool_module._await_exit
    monkeypatch.setattr(pool_module, "_await_exit", lambda pidfd, _deadline: await_exit(pidfd, 0.0))
    with pytest.raises(ServiceUnavailable, match="its process does not end"):
        pool.shutdown(0)
    service.stop()


def test_shutting_down_names_the_containers_that_could_not_be_removed(
    service: MemoryService, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_REMOVAL_TIMEOUT", 0.2)
    awaited: list[int] = []
    monkeypatch.setattr(pool_module, "_await_exit", lambda pidfd, _deadline: awaited.append(pidfd))
    service.backend.script("destroy", *[Fault(error=DestroyFailed("device busy"))] * 1000)
    names = [info.name for info in pool.containers()]
    with pytest.raises(DestroyFailed, match=rf"(?s)has ended, but.*{names[0]} \(device busy\).*cleanup --execute"):
        pool.shutdown(0)
    assert len(awaited) == 1  # not before its process has ended
    assert not service.socket_path.exists()
    service.stop()
    service.backend._faults.clear()
    for name in names:
        service.backend.destroy(name, force=True)


def test_shutting_down_a_service_that_goes_away_is_no_success(
    service: MemoryService, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_arguments: object) -> None:
        raise EOFError

    monkeypatch.setattr(service.service, "answer", lost)
    with pytest.raises(ServiceUnavailable, match="went away before"):
        pool.shutdown(0)


def test_a_service_in_another_pid_namespace_is_not_waited_for(pool: PoolServiceProxy) -> None:
    connection = pool._caller.borrow(time.monotonic() + SOON, again=False)
    server = connection.hold_server()
    assert server is not None
    os.close(server)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(connection._channel), "peer", (0, 0, 0))
        assert connection.hold_server() is None
    connection.close()


# --- interruptions, garbage and forks ---------------------------------------------------------------------------------


def test_an_interrupt_while_waiting_leaves_the_queue(service: MemoryService, pool: PoolServiceProxy) -> None:
    taken = take_all(service, pool)

    def interrupt() -> None:
        service.reaches(waiting=1)
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        pool.get("x", None)
    interrupter.join(SOON)
    service.reaches(waiting=0)
    for container in taken:
        container.release()


@pytest.mark.parametrize("step", [messages.Get, messages.Confirm])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_in_any_step_gives_the_container_back(
    service: MemoryService,
    pool: PoolServiceProxy,
    monkeypatch: pytest.MonkeyPatch,
    step: type[messages.Call],
    when: str,
) -> None:
    call = Connection.call

    def interrupted(connection: Connection, asked: messages.Call, *arguments: Any) -> object:
        if isinstance(asked, step) and when == "before":
            raise KeyboardInterrupt
        answer = call(connection, asked, *arguments)
        if isinstance(asked, step):
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(Connection, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.get("x", SOON)
    service.reaches(size=2, leased=0, reserved=0, reaping=0)
    monkeypatch.undo()
    assert pool.echo("x") == "x"


def test_an_interrupt_is_not_held_up_by_a_service_that_is_gone(
    service: MemoryService, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> None:
        crash(service)
        raise KeyboardInterrupt

    ask = caller_module.Caller.ask
    monkeypatch.setattr(caller_module.Caller, "ask", lambda caller, call, _timeout: ask(caller, call, 0.05))
    monkeypatch.setattr(Connection, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.get("x", SOON)


def test_a_container_that_nobody_released_is_released_with_a_warning(
    service: MemoryService, pool: PoolServiceProxy
) -> None:
    handles = [pool.get("forgotten", SOON)]
    with pytest.warns(ResourceWarning, match=r"lxp-.*forgotten.*was never released"):
        drop(handles)
    service.reaches(leased=0)


def test_a_release_by_the_collector_is_silent_about_a_service_that_is_gone(
    service: MemoryService, pool: PoolServiceProxy
) -> None:
    handles = [pool.get("forgotten", SOON)]
    service.stop()
    with pytest.warns(ResourceWarning, match="was never released"):
        drop(handles)


def test_a_kept_container_is_not_released_by_the_collector(pool: PoolServiceProxy) -> None:
    container = pool.get("x", SOON)
    assert container is not None
    name = container.name
    container.keep(600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del container
        gc.collect()
    assert pool.container(name).state is State.LEASED
    pool.container(name).release()


def test_a_container_that_was_leased_for_another_process_is_not_released_by_the_collector(
    service: MemoryService, pool: PoolServiceProxy
) -> None:
    with sleeper() as process:
        container = pool.get("x", SOON, owner=process.pid)
        assert container is not None
        name = container.name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del container
            gc.collect()
        assert pool.container(name).state is State.LEASED
    service.reaches(leased=0)


def test_a_copy_that_went_through_pickle_does_not_release(service: MemoryService, pool: PoolServiceProxy) -> None:
    with pool.lease("x", SOON) as container:
        copy = pickle.loads(pickle.dumps(container))  # noqa: S301  # pickled on this line
        assert copy.state is State.LEASED
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del copy
            gc.collect()
        assert container.state is State.LEASED
        service.sessions(1)


def test_a_forked_child_uses_the_container_but_does_not_release_it(
    service: MemoryService, pool: PoolServiceProxy
) -> None:
    with pool.lease("x", SOON) as container:
        handles = [container]

        def use() -> tuple[object, ...]:
            warnings.simplefilter("error")
            state, echo = handles[0].state, pool.echo("child")
            handles.clear()
            gc.collect()
            return state, echo

        assert in_child(use) == (State.LEASED, "child")
        assert container.state is State.LEASED
        assert pool.echo("parent") == "parent"
        service.sessions(1)


def test_a_child_that_multiprocessing_forks_makes_no_connection_that_it_was_not_asked_for(
    service: MemoryService, pool: PoolServiceProxy, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, session.__name__):
        warnings.simplefilter("ignore", DeprecationWarning)  # of 3.12: there are threads; the child uses none
        child = multiprocessing.get_context("fork").Process(target=pool.close)
        child.start()
        child.join(SOON)
    assert child.exitcode == 0
    service.sessions(1)
    assert caplog.records == []
    assert pool.echo("x") == "x"


CHILD = """
import pickle, sys
pool, container = pickle.load(sys.stdin.buffer)
print(pool.echo("child"), container.state, container.name, pool.container(container.name).id)
"""


def test_pool_and_container_can_be_sent_to_a_new_process(pool: PoolServiceProxy) -> None:
    with pool.lease("x", SOON) as container:
        child = subprocess.run(
            [sys.executable, "-W", "error", "-c", CHILD],
            input=pickle.dumps((pool, container)),
            capture_output=True,
            check=True,
        )
        assert child.stderr == b""
        assert child.stdout.decode().split() == ["child", "leased", container.name, "x"]
        assert container.state is State.LEASED


def test_a_connection_that_is_not_closed_is_closed_by_the_collector(service: MemoryService) -> None:
    pool = PoolManager.connect(service.host_dir)
    service.sessions(1)
    del pool
    gc.collect()
    service.sessions(0)


IMPORTS = """
import sys
import lxc_pool, lxc_pool.client.pool
heavy = [name for name in sys.modules if name.split(".")[0] in ("lxc", "_lxc", "psutil")]
print(heavy + [name for name in sys.modules if name.startswith(("lxc_pool.service", "lxc_pool.backend"))])
"""


def test_a_clients_installation_needs_nothing_that_is_compiled_here() -> None:
    always = [line for line in importlib.metadata.requires("lxc-pool") or () if "extra ==" not in line]
    assert [re.split(r"[^\w-]", line)[0] for line in always] == ["msgspec"]  # of which there are wheels


def test_importing_the_package_loads_neither_the_engine_nor_the_service() -> None:
    assert lxc_pool.__all__ == sorted(lxc_pool.__all__)
    child = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"
