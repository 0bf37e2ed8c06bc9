"""Users of the host: who gets in, what they see of each other, and how much one of them may take."""

from __future__ import annotations

import contextlib
import dataclasses
import grp
import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lxc_pool import PoolManager, PoolServiceProxy, hostdir
from lxc_pool.backend.memory import HANG
from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import (
    AccessDenied,
    HostDirError,
    LxcPoolError,
    PoolTimeout,
    QuotaExceeded,
    UnknownLease,
)
from lxc_pool.host.processes import identify
from lxc_pool.service import access, authkey, directories, fairness, owners, session
from lxc_pool.service.fairness import Pace
from lxc_pool.service.server import SocketListener
from lxc_pool.service.trail import JsonFormatter
from lxc_pool.service.waiters import Ticket, WaitQueue
from lxc_pool.wire import handshake, messages
from lxc_pool.wire.channel import Channel
from tests.security import attackers
from tests.security.attackers import ALICE, BOB, GROUP, STRANGER
from tests.support import memory_service as support
from tests.support.memory_service import SOON, MemoryService, say
from tests.support.processes import open_descriptors, sleeper

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be different users")

_SERVICES: list[MemoryService] = []
"""The service of the test that runs; none if it has none."""

PROFILES = (
    ProfileConfig("default", 4),
    ProfileConfig("rooted", 1, privileged=True),
    ProfileConfig("named", 1, privileged=True, allow=("nobody",)),
    ProfileConfig("grouped", 1, allow=(f"@{grp.getgrgid(GROUP).gr_name}",)),
)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryService]:
    """A service that is open to the group, with narrow quotas."""

    def narrow(**values: Any) -> Config:
        return Config(**values, max_leases=3, max_waiters=2, max_connections=8)

    monkeypatch.setattr(support, "Config", narrow)
    with support.memory_service(profiles=PROFILES, group=grp.getgrgid(GROUP).gr_name) as service:
        service.reaches(size=7)
        _SERVICES.append(service)
        yield service
        _SERVICES.clear()


def as_person(uid: int, action: Callable[[], Any], *, member: bool = False) -> Any:
    """Call *action* as a user; see `attackers`.

    Not while the service starts a process, for it is in this one: the fork would hold on to that one's pipe, and the
    container's start, which the user waits for, would wait for the user.
    """
    for service in _SERVICES:
        if not service.backend._faults["start"] and service.pool.census().total("leased") < PROFILES[0].size:
            service.reaches(building=0, reaping=0)
    return (attackers.as_member if member else attackers.as_person)(uid, action)


def as_member(uid: int, action: Callable[[], Any]) -> Any:
    """As `as_person`, as somebody who may use the service."""
    return as_person(uid, action, member=True)


def errors_of(*actions: Callable[[], object]) -> list[str]:
    """Return what kind of error each action ends with; an empty string for none."""
    kinds = []
    for action in actions:
        try:
            action()
            kinds.append("")
        except (LxcPoolError, ValueError, TypeError, OSError) as error:
            kinds.append(type(error).__name__)
    return kinds


def trail_of(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """Return the trail's lines: what they are of, and their fields."""
    return [(vars(record)["event"], vars(record)["fields"]) for record in caplog.records if hasattr(record, "event")]


# --- who may connect --------------------------------------------------------------------------------------------------


def test_a_member_gets_in_by_a_supplementary_group_and_a_stranger_does_not(service: MemoryService) -> None:
    def echo() -> str:
        with PoolManager.connect(service.host_dir) as pool:
            return pool.echo("in")

    assert echo() == "in"
    assert as_member(ALICE, echo) == "in"
    assert as_person(GROUP, echo) == "in"  # its primary group
    kind, words = as_person(STRANGER, echo)
    assert kind is AccessDenied
    assert "ask the administrator" in words


def test_a_stranger_can_neither_look_into_the_host_dir_nor_read_the_key_nor_reach_the_socket(
    service: MemoryService,
) -> None:
    def attempts() -> list[str]:
        def connect() -> None:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(service.socket_path))

        return errors_of(
            lambda: os.listdir(service.host_dir),
            lambda: hostdir.key_path(service.host_dir).read_bytes(),
            connect,
            (service.host_dir / "mine").touch,
            (service.directory / "state" / "ledger.db").read_bytes,
        )

    assert as_person(STRANGER, attempts) == ["PermissionError"] * 5
    # A member reads, and can change nothing.
    listed, key, connected, planted, ledger = as_member(ALICE, attempts)
    assert (listed, key, connected) == ("", "", "")
    assert (planted, ledger) == ("PermissionError", "PermissionError")


def test_the_key_alone_lets_nobody_in_who_is_not_in_the_group(
    service: MemoryService, caplog: pytest.LogCaptureFixture
) -> None:
    """Were socket and key to become known: the kernel's word counts too."""
    key = hostdir.read_key(service.host_dir)
    service.host_dir.chmod(0o755)
    service.socket_path.chmod(0o666)
    hostdir.key_path(service.host_dir).chmod(0o644)

    def connect() -> bytes:
        PoolManager.connect(service.host_dir)
        return key

    kind, words = as_person(STRANGER, connect)
    assert kind is AccessDenied
    assert f"uid {STRANGER} is not in the service's group" in words
    service.sessions(0)
    ((event, fields),) = trail_of(caplog)
    assert (event, fields["uid"], fields["kind"]) == ("refusal", STRANGER, "AccessDenied")


def test_the_key_is_never_readable_by_others_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    real = os.fchmod

    def watch(descriptor: int, mode: int) -> None:
        modes.append(os.fstat(descriptor).st_mode & 0o777)
        real(descriptor, mode)
        modes.append(os.fstat(descriptor).st_mode & 0o777)

    monkeypatch.setattr(os, "fchmod", watch)
    before = os.umask(0)
    try:
        with directories.host_dir(tmp_path / "host", GROUP, authkey.new()):
            status = hostdir.key_path(tmp_path / "host").stat()
            assert (status.st_size, status.st_mode & 0o777, status.st_uid, status.st_gid) == (32, 0o640, 0, GROUP)
    finally:
        os.umask(before)
    assert modes == [0o600, 0o640]


# --- what they see and touch of each other ----------------------------------------------------------------------------


def test_another_users_lease_is_neither_seen_nor_touched_whatever_it_is_called_by(service: MemoryService) -> None:
    with PoolManager.connect(service.host_dir) as pool, pool.lease("secret of root", timeout=SOON) as theirs:

        def pry() -> tuple[list[str], list[object], list[str]]:
            with PoolManager.connect(service.host_dir) as mine:
                caller = mine._caller
                guesses = [theirs.name, "secret of root", theirs.name[:-1], "", "../" + theirs.name, theirs.name + "\0"]
                errors = [
                    kind
                    for name in guesses
                    for kind in errors_of(
                        lambda name=name: caller.ask(messages.Inspect(name)),  # type: ignore[misc]  # a default
                        lambda name=name: caller.ask(messages.Release(name)),  # type: ignore[misc]  # as above
                        lambda name=name: caller.ask(messages.Renew(name, 1.0)),  # type: ignore[misc]  # as above
                        lambda name=name: caller.ask(messages.Keep(name, 1.0)),  # type: ignore[misc]  # as above
                        lambda name=name: caller.ask(messages.Addresses(name)),  # type: ignore[misc]  # as above
                        lambda name=name: caller.ask(messages.AwaitNetwork(name, 0)),  # type: ignore[misc]  # as above
                        lambda name=name: caller.ask(messages.ConsoleLog(name)),  # type: ignore[misc]  # as above
                    )
                ]
                seen = [info for info in mine.containers() if info.name == theirs.name]
                # The wish's name is a secret of its client's; guessing it is of no use to another user either.
                lost = errors_of(
                    *(lambda request=request: caller.ask(messages.Abandon(request)) for request in requests)
                )
                return errors, [(info.id, info.owner_pid, info.owner_uid) for info in seen], lost

        requests = [request for _uid, request in service.pool._leases._by_request]
        errors, seen, lost = as_member(ALICE, pry)
        assert set(errors) == {UnknownLease.__name__}
        assert seen == [(None, None, None)]
        assert lost == [""] * len(requests)
        assert theirs.state == "leased"


def test_an_owner_is_a_living_process_of_ones_own(service: MemoryService) -> None:
    def lease_to(pid: int) -> Callable[[], object]:
        def action() -> None:
            with PoolManager.connect(service.host_dir) as pool, pool.lease("x", timeout=SOON, owner=pid):
                pass

        return action

    with sleeper() as foreign:
        dead = os.fork()
        if dead == 0:
            os._exit(0)
        os.waitpid(dead, 0)

        def attempts() -> list[str]:
            # This process has changed its uid: it is undumpable, and its /proc is root's; it is still its own.
            return errors_of(*map(lease_to, (os.getpid(), foreign.pid, 1, dead, 0, -1, 2**40)))

        mine, other, init, *wrong = as_member(ALICE, attempts)
    assert mine == ""
    assert (other, init) == ("AccessDenied", "AccessDenied")
    assert set(wrong) == {"ValueError"}


def test_a_pid_that_is_given_to_another_process_while_it_is_looked_at_is_no_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = identify(os.getpid())
    before = dataclasses.replace(ours, start_ticks=ours.start_ticks - 1)
    looks = iter([before, ours])
    monkeypatch.setattr(access, "identify", lambda _pid: next(looks))
    peer = access.Peer(ours, os.getuid(), os.getgid(), frozenset(), "x", is_admin=False)
    with pytest.raises(ValueError, match="living process"):
        access.owner_of(peer, os.getpid())


def test_what_administrators_alone_may_ask_is_refused_to_others(service: MemoryService) -> None:
    def attempts() -> list[str]:
        with PoolManager.connect(service.host_dir) as pool:
            return errors_of(
                lambda: pool.resize(1), pool.drain, pool.resume, pool.shutdown, lambda: pool.shutdown(grace=0)
            )

    assert as_member(ALICE, attempts) == ["AccessDenied"] * 5
    assert service.pool.census().draining is False


def test_a_privileged_profile_is_for_administrators_and_those_it_names(service: MemoryService) -> None:
    def attempts() -> list[str]:
        with PoolManager.connect(service.host_dir) as pool:
            return errors_of(
                *(
                    lambda name=name: pool.get("x", SOON, profile=name).release()  # type: ignore[union-attr]  # it is there
                    for name in ("default", "rooted", "named", "grouped", "no such")
                )
            )

    assert attempts() == ["", "", "", "", "ValueError"]
    assert as_member(ALICE, attempts) == ["", "AccessDenied", "AccessDenied", "", "ValueError"]
    assert as_member(GROUP, attempts) == ["", "AccessDenied", "", "", "ValueError"]  # nobody, by name


# --- how much one may take --------------------------------------------------------------------------------------------


def test_quotas_bound_leases_waiters_and_connections_of_one_user_only(service: MemoryService) -> None:
    def greedy() -> tuple[list[str], list[str]]:
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(PoolManager.connect(service.host_dir))
            taken = []

            def take() -> None:
                container = pool.get("x", SOON)
                assert container is not None
                taken.append(container)

            leases = errors_of(*[take] * 4)
            for container in taken:
                container.release()
            connections = errors_of(
                *[lambda: stack.enter_context(PoolManager.connect(service.host_dir, timeout=0.5))] * 9
            )
            return leases, connections

    leases, connections = as_member(ALICE, greedy)
    assert leases == ["", "", "", "QuotaExceeded"]
    assert connections.count("") == 7
    assert set(connections[7:]) == {"QuotaExceeded"}
    service.sessions(0)
    service.reaches(reaping=0, leased=0)
    assert as_member(BOB, greedy)[0] == leases


def test_a_user_who_names_ever_more_processes_as_owners_takes_no_descriptor_for_each(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.pool._owners, "_crowd", 16)
    monkeypatch.setattr(owners, "_CROWD", 16)
    service.pool.drain()  # so that none of them has anything
    service.reaches(reaping=0)
    before = len(open_descriptors())

    def name_many() -> tuple[set[str], list[int]]:
        pids = [subprocess.Popen(["sleep", "infinity"], stdin=subprocess.DEVNULL).pid for _ in range(80)]
        with PoolManager.connect(service.host_dir) as pool:
            answers = errors_of(*(lambda pid=pid: pool.get("x", 0, owner=pid) for pid in pids))
        return set(answers), pids

    answers, pids = as_member(ALICE, name_many)
    try:
        assert answers == {"PoolDraining"}
        service.sessions(0)
        assert len(open_descriptors()) <= before + 2 * 16
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def nothing_warm(service: MemoryService) -> Iterator[PoolServiceProxy]:
    """Root has all containers of the default profile, and the next one hangs in its start until `go_on`."""
    with PoolManager.connect(service.host_dir) as pool, contextlib.ExitStack() as stack:
        service.backend.script("start", HANG)
        for _ in range(PROFILES[0].size):
            stack.enter_context(pool.lease("root's", timeout=SOON))
        service.reaches(building=1)
        yield pool
        service.backend.go_on()


def test_waiters_of_one_user_are_bounded(service: MemoryService, nothing_warm: PoolServiceProxy) -> None:
    def wait() -> list[str]:
        kinds: list[str] = []

        def one() -> None:
            with PoolManager.connect(service.host_dir) as mine:
                kinds.extend(errors_of(lambda: mine.lease("x", timeout=0.5).__enter__()))

        threads = [threading.Thread(target=one) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(kinds)

    assert as_member(ALICE, wait) == [PoolTimeout.__name__] * 2 + [QuotaExceeded.__name__]
    assert nothing_warm.get("root's quota is none", 0) is None


def test_when_several_users_wait_they_take_turns(
    service: MemoryService, nothing_warm: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nothing_warm.get("root's", 0) is None
    served: list[int] = []
    pop = WaitQueue.pop

    def watch(queue: WaitQueue) -> Ticket:
        ticket = pop(queue)
        served.append(ticket.uid)
        return ticket

    monkeypatch.setattr(WaitQueue, "pop", watch)

    def wait() -> None:
        with PoolManager.connect(service.host_dir) as mine, mine.lease("turn", timeout=SOON):
            pass

    waiters = []
    for place, uid in enumerate([ALICE, ALICE, BOB], 1):
        waiters.append(threading.Thread(target=as_member, args=(uid, wait)))
        waiters[-1].start()
        service.reaches(waiting=place)
    service.backend.go_on()
    for waiter in waiters:
        waiter.join(SOON)
    assert served == [ALICE, BOB, ALICE]


# --- the client's side, and the host dir ------------------------------------------------------------------------------


def test_a_client_refuses_a_server_of_another_user(service: MemoryService) -> None:
    """Somebody with the right to write there has put a socket of their own in its place."""
    service.host_dir.chmod(0o777)
    read_end, write_end = os.pipe()

    def plant() -> str:
        path = service.socket_path
        path.unlink()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
            path.chmod(0o666)
            sock.listen()
            os.write(write_end, b"!")
            connection, _address = sock.accept()
            with connection:
                connection.settimeout(SOON)
                # Nothing may be said to it: a challenge of its own would be answered by a proof.
                return connection.recv(100).decode()

    said: list[object] = []
    thread = threading.Thread(target=lambda: said.append(as_person(STRANGER, plant)))
    thread.start()
    try:
        assert os.read(read_end, 1)
        with pytest.raises(HostDirError, match=f"runs as uid {STRANGER}, not as root: not using it"):
            PoolManager.connect(service.host_dir)
    finally:
        thread.join(SOON)
        os.close(read_end)
        os.close(write_end)
    assert said == [""]


@pytest.mark.parametrize("what", ["a socket", "a link to a socket", "a file", "a link to nowhere", "a directory"])
def test_what_is_planted_in_the_sockets_place_is_replaced_or_refused_never_followed(open_path: Path, what: str) -> None:
    target = open_path / "target"
    place = hostdir.socket_path(open_path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(target))
        target.chmod(0o600)
        before = target.stat()
        if what == "a socket":
            target.rename(place)
            target.touch(0o600)
            before = target.stat()
        elif what == "a file":
            place.write_text("mine")
        elif what == "a directory":
            place.mkdir()
        else:
            place.symlink_to(target if "socket" in what else open_path / "nothing")
        try:
            listener = SocketListener(str(place))
            listener.open_to(GROUP)
            assert place.is_socket()
            assert not place.is_symlink()
            listener.close()
        except OSError:
            assert what != "a socket"
            assert not place.is_socket() or place.is_symlink()
    assert (target.stat().st_mode, target.stat().st_gid) == (before.st_mode, before.st_gid)
    assert not (open_path / "nothing").exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("owner", f"belongs to uid {STRANGER}.*chown 0"),
        ("mode", "others may write to .*chmod 0750"),
        ("link", "not a directory .a link is not followed"),
        ("lock", "can't open the lock file"),
    ],
)
def test_a_host_dir_that_others_could_have_prepared_is_refused_with_the_remedy(
    open_path: Path, wrong: str, words: str
) -> None:
    path = open_path / "host"
    real = open_path / "real"
    real.mkdir(0o750)
    if wrong == "link":
        path.symlink_to(real)
    else:
        path.mkdir(0o750)
    if wrong == "owner":
        os.chown(path, STRANGER, STRANGER)
    elif wrong == "mode":
        path.chmod(0o770)
    elif wrong == "lock":
        (path / "service.lock").symlink_to(open_path / "elsewhere")
    with pytest.raises(HostDirError, match=words), directories.host_dir(path, GROUP, authkey.new()):
        pass
    assert not (open_path / "elsewhere").exists()


# --- the trail --------------------------------------------------------------------------------------------------------


def test_who_had_what_and_who_was_refused_what_is_in_the_trail(
    service: MemoryService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def act() -> int:
        with PoolManager.connect(service.host_dir) as pool:
            with pool.lease("my job", timeout=SOON):
                time.sleep(0.05)  # what is told as its length
            errors_of(
                pool.drain, lambda: pool.get("x", 0, profile="rooted"), lambda: pool._caller.ask(messages.Inspect("y"))
            )
        return os.getpid()

    pid = as_member(ALICE, act)
    service.reaches(size=7, reaping=0, leased=0)  # full again, so that one is too many
    service.pool.resize(3)
    trail = trail_of(caplog)
    assert {event for event, _fields in trail} == {"lease", "end", "refusal", "reap"}
    for event, fields in trail:
        if event in ("lease", "refusal"):
            assert (fields["uid"], fields["pid"]) == (ALICE, pid)
            assert fields["program"]
    (end,) = (fields for event, fields in trail if event == "end")
    assert (end["reason"], end["uid"], end["id"]) == ("released", ALICE, "my job")
    assert (end["by"], end["pid"], end["owner"]) == (ALICE, pid, pid)
    assert end["program"]
    assert 0.05 <= end["seconds"] < SOON
    (lease,) = (fields for event, fields in trail if event == "lease")
    assert (lease["id"], lease["owner"], lease["profile"]) == ("my job", pid, "default")
    assert lease["name"] == end["name"]
    refused = [(fields["kind"], fields["why"]) for event, fields in trail if event == "refusal"]
    assert [kind for kind, _why in refused] == ["AccessDenied", "AccessDenied", "UnknownLease"]
    for (_kind, why), words in zip(refused, ("drain", "'rooted' is privileged", "'y'"), strict=True):
        assert words in why
    for record in caplog.records:
        line = JsonFormatter().format(record)
        assert json.loads(line)["message"] == record.getMessage()
        assert "\n" not in line


def test_neither_a_flood_of_refusals_nor_a_long_name_floods_the_log(
    service: MemoryService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def flood() -> None:
        with PoolManager.connect(service.host_dir) as pool:
            for number in range(300):
                errors_of(lambda: pool._caller.ask(messages.Inspect("evil\n\x1b[31m" + "x" * 100_000)))
                assert number >= 0

    as_member(ALICE, flood)
    lines = [record.getMessage() for record in caplog.records if getattr(record, "event", "") == "refusal"]
    assert 1 <= len(lines) <= 25
    assert max(map(len, lines)) < 600
    assert not any("\n" in line or "\x1b" in line for line in lines)


def test_nor_does_whoever_breaks_connections_off_again_and_again(
    service: MemoryService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def vanish() -> None:
        for _ in range(100):
            channel = service.channel()
            channel.send_bytes(messages.encode_call(messages.Echo("x" * 200_000)))
            channel._socket.recv(1)
            channel.close()  # with most of the answer unread

    as_member(ALICE, vanish)
    service.sessions(0)
    lines = [record.getMessage() for record in caplog.records if "broke" in record.getMessage()]
    assert 1 <= len(lines) <= 25
    assert f"of uid {ALICE} broke" in lines[0]


# --- one user's rate --------------------------------------------------------------------------------------------------


def test_one_users_flood_of_calls_is_slowed_down_and_leaves_others_their_speed(service: MemoryService) -> None:
    service.service.pace = Pace(300)
    channel = service.channel()

    def p50() -> float:
        times = []
        for _ in range(100):
            began = time.perf_counter()
            say(channel, messages.Echo("x"))
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    quiet = p50()
    done = threading.Event()
    answered: list[int] = []

    def flood() -> int:
        count = 0
        end = time.monotonic() + 2.5
        with PoolManager.connect(service.host_dir) as pool:
            while time.monotonic() < end:
                pool.echo("y")
                count += 1
        return count

    def run() -> None:
        answered.append(as_member(ALICE, flood))
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    flooded = []
    while not done.wait(0.05):
        flooded.append(p50())
    thread.join()
    channel.close()
    # A second's worth at once, then the rate; never more, however busy this machine is.
    assert 100 < answered[0] <= 300 * (2.5 + 1) + 20
    assert min(flooded) < 20 * quiet


def test_a_call_that_costs_more_counts_as_so_many(service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    service.service.pace = Pace(300)

    def burn(_uid: int | None) -> tuple[()]:
        end = time.thread_time() + 0.02  # 200 calls' worth
        while time.thread_time() < end:
            pass
        return ()

    monkeypatch.setattr(service.pool, "containers", burn)

    def flood() -> int:
        count = 0
        end = time.monotonic() + 2.0
        with PoolManager.connect(service.host_dir) as pool:
            while time.monotonic() < end:
                pool.containers()
                count += 1
        return count

    assert as_member(ALICE, flood) <= 300 * (2.0 + 1) / 200 + 2


def test_so_is_a_flood_of_connections_each_of_which_counts_as_ten_calls(service: MemoryService) -> None:
    service.service.pace = Pace(300)

    def flood() -> int:
        count = 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            service.channel().close()
            count += 1
        return count

    assert 30 < as_member(ALICE, flood) <= 30 * (1.0 + 1) + 5


def test_large_messages_of_one_user_are_taken_a_few_at_a_time(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MESSAGE_TIMEOUT", 0.3)

    def stall() -> tuple[int, str]:
        channels = []
        for _ in range(6):
            channel = Channel(socket.socket(socket.AF_UNIX))
            channel._socket.connect(str(service.socket_path))
            channel.deadline = time.monotonic() + SOON
            handshake.prove_to_service(channel, hostdir.read_key(service.host_dir))
            say(channel, messages.Hello(messages.PROTOCOL))
            channels.append(channel)
        for channel in channels:
            channel._socket.sendall((4 << 20).to_bytes(4, "big") + b"x" * 60_000)  # and no more
        ended = 0
        for channel in channels:
            with contextlib.suppress(OSError):
                ended += not channel._socket.recv(1)
        with PoolManager.connect(service.host_dir) as pool:
            return ended, pool.echo("z" * 1_000_000)[:1]

    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answers.append(as_member(ALICE, stall)))
    thread.start()
    most = 0
    while thread.is_alive():
        most = max(most, service.service.turns._taken.get(ALICE, 0))
        time.sleep(0.002)  # to be seen from outside only
    assert most == fairness.LARGE_AT_A_TIME < 6
    assert answers[0][1] == "z"
    assert service.service.turns._taken == {}
