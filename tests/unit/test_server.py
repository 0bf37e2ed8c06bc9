"""The service and whoever connects to it: whatever one client does, the service and every other client go on."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from lxc_pool import PoolManager, hostdir
from lxc_pool.backend.memory import HANG
from lxc_pool.errors import (
    AccessDenied,
    AuthenticationFailed,
    BackendError,
    ConfigError,
    InternalError,
    LeaseExpired,
    PoolClosed,
    PoolDraining,
    UnknownLease,
)
from lxc_pool.execution.protocol import ExecRequest
from lxc_pool.host.processes import identify
from lxc_pool.model import ContainerInfo, PoolStatus, State
from lxc_pool.service import access, server, session
from lxc_pool.service.access import Peer, Policy
from lxc_pool.service.server import PoolServer, SocketListener, listen
from lxc_pool.wire import handshake, messages
from lxc_pool.wire.channel import Channel
from tests.support.memory_service import SOON, MemoryService, memory_service, say
from tests.support.processes import NOBODY, open_descriptors, sleeper


@pytest.fixture
def service() -> Iterator[MemoryService]:
    before = open_descriptors()
    with memory_service(2) as service:
        service.reaches(size=2)
        yield service
    assert open_descriptors() == before


@pytest.fixture
def short_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "HANDSHAKE_TIMEOUT", 0.05)


@contextlib.contextmanager
def others_go_on(service: MemoryService) -> Iterator[None]:
    """Let another client be there before and work afterwards; no connection of the block's is left then."""
    with PoolManager.connect(service.host_dir) as pool:
        assert pool.echo("before") == "before"
        yield
        service.sessions(1)
        assert pool.echo("after") == "after"
        with pool.lease("other", SOON) as container:
            assert container.state is State.LEASED


def ended(sock: socket.socket | Channel) -> bool:
    """Wait until the service has closed a connection."""
    sock = sock if isinstance(sock, socket.socket) else sock._socket
    sock.settimeout(SOON)
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def get(request: str = "r1", timeout: float | None = 0.0, **fields: object) -> messages.Get:
    values: dict[str, object] = {"id": "job", "profile": "default", "owner": None, "ttl": None} | fields
    return messages.Get(request=request, timeout=timeout, **values)  # type: ignore[arg-type]  # as the test has them


def lease(channel: Channel, request: str = "r1", **fields: object) -> ContainerInfo:
    assert isinstance(say(channel, get(request, SOON, **fields)), messages.Offer)
    info = say(channel, messages.Confirm(request))
    assert isinstance(info, ContainerInfo)
    return info


def take_all(service: MemoryService, channel: Channel, size: int = 2) -> list[str]:
    """Lease every container, and let the next ones never come up."""
    service.reaches(size=size, building=0, reaping=0)
    service.backend.script("start", HANG)
    names = [lease(channel, f"take{number}").name for number in range(size)]
    service.reaches(size=0, leased=size, building=1)
    return names


# --- clients that keep to the rules -----------------------------------------------------------------------------------


def test_every_call_is_answered_with_what_it_asks_for(service: MemoryService) -> None:
    channel = service.channel()
    assert say(channel, messages.Echo("ü")) == "ü"
    status = say(channel, messages.GetStatus())
    assert isinstance(status, PoolStatus)
    assert (status.size, status.client_count, status.pid) == (2, 1, os.getpid())
    assert (status.running, status.socket_path) == (True, str(service.socket_path))
    assert say(channel, messages.AwaitWarm(None, SOON)) is not None
    info = lease(channel)
    assert (info.state, info.id, info.owner_pid, info.owner_uid) == (State.LEASED, "job", os.getpid(), os.getuid())
    assert say(channel, messages.Confirm("r1")) is not None
    inspected = say(channel, messages.Inspect(info.name))
    assert isinstance(inspected, ContainerInfo)
    assert inspected.init_pid == info.init_pid
    assert isinstance(say(channel, messages.Addresses(info.name)), tuple)
    service.backend.consoles[info.name] = b"\x1b[1mhello\xff\r\n"
    assert say(channel, messages.ConsoleLog(info.name)) == b"\x1b[1mhello\xff\r\n"
    listed = say(channel, messages.ListContainers())
    assert isinstance(listed, tuple)
    assert info.name in [each.name for each in listed]
    assert say(channel, messages.Renew(info.name, 60.0)) is None
    assert say(channel, messages.Keep(info.name, 60.0)) is None
    assert say(channel, messages.Release(info.name)) is None
    assert say(channel, messages.Release(info.name)) is None
    with pytest.raises(LeaseExpired, match="released"):
        say(channel, messages.Inspect(info.name))
    assert say(channel, messages.Resize(1)) is None
    assert say(channel, messages.Drain()) is None
    with pytest.raises(PoolDraining):
        say(channel, get("r2"))
    assert say(channel, messages.Resume()) is None
    channel.close()


def test_calls_that_come_in_one_piece_are_answered_one_by_one(service: MemoryService) -> None:
    channel = service.channel()
    bodies = [messages.encode_call(messages.Echo(str(number))) for number in range(10)]
    channel._socket.sendall(b"".join(struct.pack("!i", len(body)) + body for body in bodies))
    answers = [messages.decode_reply(messages.Echo(""), channel.recv_bytes()) for _ in bodies]
    assert answers == [str(number) for number in range(10)]
    channel.close()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (get(""), "1 to 64 characters"),
        (get("x" * 65), "1 to 64 characters"),
        (get(timeout=-1.0), "timeout must be seconds"),
        (get(timeout=float("nan")), "timeout must be seconds"),
        (get(ttl=-1.0), "ttl must be seconds"),
        (get(id=""), "id must be"),
        (get(profile="nope"), "unknown profile 'nope'; the service has: default"),
        (get(owner=2**22 + 1), "living process"),
        (messages.Renew("c", -1.0), "ttl must be seconds"),
        (messages.Keep("c", float("nan")), "ttl must be seconds"),
        (messages.Shutdown(-1.0, False), "grace must be seconds"),
        (messages.Hello(1), "comes first, and once"),
        (messages.Execute("c", b""), "not 0 descriptors"),
    ],
)
def test_a_wrong_argument_is_told_and_the_connection_goes_on(
    service: MemoryService, call: messages.Call, words: str
) -> None:
    channel = service.channel()
    with pytest.raises(ValueError, match=words):
        say(channel, call)
    assert say(channel, messages.Echo("on")) == "on"
    channel.close()


def test_a_size_that_no_pool_can_have_is_told(service: MemoryService) -> None:
    channel = service.channel()
    with pytest.raises(ConfigError, match="1 to 1000"):
        say(channel, messages.Resize(0))
    channel.close()


@pytest.mark.parametrize(
    "call",
    [
        messages.Inspect("nope"),
        messages.Release("../x"),
        messages.Renew("nope", 1.0),
        messages.Keep("nope", 1.0),
        messages.Addresses("nope"),
    ],
)
def test_a_lease_that_never_was_is_unknown(service: MemoryService, call: messages.Call) -> None:
    channel = service.channel()
    with pytest.raises(UnknownLease, match="no lease of"):
        say(channel, call)
    channel.close()


def test_the_addresses_of_a_container_whose_init_has_just_ended_are_those_of_no_lease(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = service.channel()
    info = lease(channel)
    monkeypatch.setattr(service.pool, "_init_died", lambda _name: None)
    monkeypatch.setattr("lxc_pool.host.addresses.of_process", lambda _pid: identify(2**22 + 1))
    with pytest.raises(LeaseExpired, match="just ended"):
        say(channel, messages.Addresses(info.name))
    channel.close()


def test_a_lease_ends_by_its_ttl_and_says_so(service: MemoryService) -> None:
    channel = service.channel()
    name = lease(channel, ttl=0.0).name
    service.reaches(leased=0)
    with pytest.raises(LeaseExpired, match="lease expired"):
        say(channel, messages.Inspect(name))
    channel.close()


def test_a_container_that_goes_down_is_reaped_and_replaced(service: MemoryService) -> None:
    channel = service.channel()
    name = lease(channel).name
    service.backend.kill_init(name)
    service.reaches(leased=0)
    with pytest.raises(LeaseExpired, match="init died"):
        say(channel, messages.Inspect(name))
    service.reaches(size=2, reaping=0)
    channel.close()


def test_a_lease_ends_with_the_process_that_was_named_its_owner(service: MemoryService) -> None:
    channel = service.channel()
    with sleeper() as process:
        name = lease(channel, owner=process.pid).name
    service.reaches(leased=0)
    with pytest.raises(LeaseExpired, match="owner died"):
        say(channel, messages.Inspect(name))
    channel.close()


def test_a_lease_that_lost_its_owner_outlives_it(service: MemoryService) -> None:
    channel = service.channel()
    with sleeper() as process:
        name = lease(channel, owner=process.pid).name
        say(channel, messages.Keep(name, 600.0))
    assert say(channel, messages.Echo("x")) == "x"
    assert service.state_of(name) is State.LEASED
    channel.close()


def test_a_wish_that_is_abandoned_gives_back_whatever_it_got(service: MemoryService) -> None:
    channel = service.channel()
    assert isinstance(say(channel, get("r1")), messages.Offer)
    service.reaches(size=1, reserved=1)
    say(channel, messages.Abandon("r1"))
    service.reaches(size=2, reserved=0)
    name = lease(channel, "r2").name
    say(channel, messages.Abandon("r2"))
    say(channel, messages.Abandon("never"))
    service.reaches(leased=0)
    with pytest.raises(LeaseExpired):
        say(channel, messages.Inspect(name))
    channel.close()


def test_waiting_for_more_containers_ends_when_they_are_warm_or_the_time_is_up(service: MemoryService) -> None:
    channel = service.channel()
    names = take_all(service, channel)
    status = say(channel, messages.AwaitWarm(None, 0.01))
    assert isinstance(status, PoolStatus)
    assert status.size == 0
    service.backend.go_on()
    for name in names:
        say(channel, messages.Release(name))
    status = say(channel, messages.AwaitWarm(2, None))
    assert isinstance(status, PoolStatus)
    assert status.size == 2
    channel.close()


class RecordingLauncher:
    """A `Launcher` that starts nothing, and says who it was asked for."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, ExecRequest, int]] = []

    def launch(
        self, uid: int, request: ExecRequest, _descriptors: tuple[int, int, int, int], init: tuple[int, int]
    ) -> None:
        init_pidfd, init_pid = init
        assert f"Pid:\t{init_pid}\n" in Path(f"/proc/self/fdinfo/{init_pidfd}").read_text()
        self.launched.append((uid, request, init_pid))

    def prepare(self, uid: int, init: tuple[int, int]) -> None:
        assert uid == os.geteuid()
        assert f"Pid:\t{init[1]}\n" in Path(f"/proc/self/fdinfo/{init[0]}").read_text()


def test_a_command_is_handed_on_with_its_descriptors_and_the_containers_init(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = RecordingLauncher()
    monkeypatch.setattr(service.service, "_launcher", launcher)
    channel = service.channel()
    info = lease(channel)
    request = ExecRequest.create(["true"])
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        descriptors = [null, null, null, theirs.fileno()]

        def execute(call: messages.Execute, descriptors: list[int]) -> None:
            channel.send_bytes(messages.encode_call(call), descriptors)
            assert messages.decode_reply(call, channel.recv_bytes()) is None

        execute(messages.Execute(info.name, request.encode()), descriptors)
        assert launcher.launched == [(os.geteuid(), request, info.init_pid)]
        with pytest.raises(ValueError, match="not a command"):
            execute(messages.Execute(info.name, b"nonsense"), descriptors)
        with pytest.raises(UnknownLease):
            execute(messages.Execute("nope", request.encode()), descriptors)
        with pytest.raises(TypeError, match="only a pipe or /dev/null"):
            execute(messages.Execute(info.name, request.encode()), [theirs.fileno(), *descriptors[1:]])
    os.close(null)
    channel.close()


# --- who may do what --------------------------------------------------------------------------------------------------


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let connections be those of another uid from now on."""

    def become(uid: int) -> None:
        someone = Peer(identify(os.getpid()), uid, 0, frozenset({0}), "somebody", uid == 0)
        monkeypatch.setattr(Policy, "peer_of", lambda _policy, _sock: someone)
        monkeypatch.setattr(Policy, "require_user", lambda _policy, _peer: None)

    return become


@pytest.mark.parametrize(
    "call",
    [messages.Resize(3), messages.Drain(), messages.Resume(), messages.LookForImages(), messages.Shutdown(0.0, False)],
)
def test_only_administrators_change_the_pool(
    service: MemoryService, as_user: Callable[[int], None], call: messages.Call
) -> None:
    as_user(NOBODY)
    channel = service.channel()
    with pytest.raises(AccessDenied, match=f"only an administrator .*you are uid {NOBODY}"):
        say(channel, call)
    assert say(channel, messages.Echo("on")) == "on"
    channel.close()


def test_another_users_lease_is_neither_seen_nor_touched(
    service: MemoryService, as_user: Callable[[int], None]
) -> None:
    as_user(NOBODY)
    mine = service.channel()
    name = lease(mine, id="secret").name
    as_user(NOBODY - 1)
    theirs = service.channel()
    for call in (messages.Inspect(name), messages.Release(name), messages.Renew(name, 1.0), messages.Keep(name, 1.0)):
        with pytest.raises(UnknownLease):
            say(theirs, call)
    say(theirs, messages.Abandon("r1"))
    listed = say(theirs, messages.ListContainers())
    assert isinstance(listed, tuple)
    (found,) = [info for info in listed if info.name == name]
    assert (found.state, found.id, found.owner_pid, found.owner_uid) == (State.LEASED, None, None, None)
    assert isinstance(say(mine, messages.Inspect(name)), ContainerInfo)
    mine.close()
    theirs.close()


def test_whoever_has_no_pid_here_is_told_why(service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "credentials", lambda _sock: (0, 0, 0))
    with pytest.raises(AccessDenied, match="no pid here"):
        service.channel()


def test_a_client_of_another_version_is_told_which_one_this_is(service: MemoryService) -> None:
    channel = Channel(service.raw())
    handshake.prove_to_service(channel, hostdir.read_key(service.host_dir))
    with pytest.raises(AccessDenied, match="version 1 of the protocol, the client 999"):
        say(channel, messages.Hello(999))
    assert ended(channel)
    channel.close()


def test_the_socket_is_for_the_services_user_and_group_alone(service: MemoryService) -> None:
    assert stat.S_IMODE(service.socket_path.stat().st_mode) == 0o660
    assert service.socket_path.stat().st_uid == os.geteuid()


# --- clients that do not keep to the rules ----------------------------------------------------------------------------


def test_a_wrong_key_ends_that_connection(service: MemoryService) -> None:
    with others_go_on(service), contextlib.closing(Channel(service.raw())) as channel:
        with pytest.raises(AuthenticationFailed):
            handshake.prove_to_service(channel, b"wrong")
        assert ended(channel)


@pytest.mark.parametrize(
    "noise",
    [
        struct.pack("!i", -1),
        struct.pack("!i", 2**31 - 1),
        struct.pack("!i", 257) + b"x" * 257,
        struct.pack("!i", 0),
        struct.pack("!i", 20) + b"x" * 20,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0" * 5000,
        bytes(range(256)) * 20,
    ],
    ids=range(8),
)
def test_noise_before_the_handshake_ends_that_connection(service: MemoryService, noise: bytes) -> None:
    with others_go_on(service), service.raw() as sock:
        with contextlib.suppress(BrokenPipeError):
            sock.sendall(noise)
        assert ended(sock)


def stock(*request: object) -> bytes:
    return pickle.dumps(request)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        stock(None, "shutdown", (), {}),
        stock("0", "create", ("PoolService",), {}),
        stock(None, "create", ("PoolService",), {}),
        stock(None, "debug_info", (), {}),
        stock(None, "number_of_objects", (), {}),
        stock("pool", "#GETVALUE", (), {}),
        msgspec.msgpack.encode([None, "shutdown", [], {}]),
        msgspec.msgpack.encode(["nope"]),
        msgspec.msgpack.encode(["__class__", "x"]),
        msgspec.msgpack.encode(["get", "r"]),
        msgspec.msgpack.encode(["echo", 5]),
    ],
    ids=range(14),
)
def test_what_is_no_call_of_ours_ends_that_connection(
    service: MemoryService, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, session.__name__)
    with others_go_on(service), contextlib.closing(service.channel()) as channel:
        channel.send_bytes(body)
        assert ended(channel)
    assert "not a call of this protocol" in caplog.text
    assert f"pid={os.getpid()}" in caplog.text


@pytest.mark.parametrize("header", [struct.pack("!i", -5), struct.pack("!i", 2**31 - 1), b"\xff\xff\xff\xff"])
def test_a_claimed_length_out_of_bounds_ends_that_connection(service: MemoryService, header: bytes) -> None:
    with others_go_on(service), contextlib.closing(service.channel()) as channel:
        channel._socket.sendall(header)
        assert ended(channel)


def test_a_first_call_that_is_not_hello_ends_that_connection(service: MemoryService) -> None:
    with others_go_on(service), contextlib.closing(Channel(service.raw())) as channel:
        handshake.prove_to_service(channel, hostdir.read_key(service.host_dir))
        channel.send_bytes(messages.encode_call(messages.GetStatus()))
        assert ended(channel)


def test_descriptors_in_any_number_leave_none_behind(service: MemoryService) -> None:
    with others_go_on(service):
        before = open_descriptors()
        channel = service.channel()
        body = messages.encode_call(messages.Echo("x"))
        frame = struct.pack("!i", len(body)) + body
        socket.send_fds(channel._socket, [frame], [0, 0])
        assert messages.decode_reply(messages.Echo(""), channel.recv_bytes()) == "x"
        socket.send_fds(channel._socket, [b"\0"], [0] * 4)
        with contextlib.suppress(OSError):
            socket.send_fds(channel._socket, [b"\0"], [0] * 4)
        assert ended(channel)
        channel.close()
        service.sessions(1)
        assert open_descriptors() == before


@pytest.mark.usefixtures("short_handshake")
@pytest.mark.parametrize("part", [b"", b"\0", struct.pack("!i", 20), struct.pack("!i", 20) + b"x" * 19])
def test_silence_before_the_handshake_is_over_ends_that_connection(service: MemoryService, part: bytes) -> None:
    with service.raw() as sock:
        sock.sendall(part)
        assert ended(sock)
    service.sessions(0)


def test_a_client_that_says_nothing_may_stay_and_holds_nobody_up(service: MemoryService) -> None:
    with service.raw(), contextlib.closing(service.channel()), PoolManager.connect(service.host_dir) as pool:
        service.sessions(3)
        with pool.lease("x", SOON):
            assert pool.status().client_count == 3


def test_half_a_message_and_then_silence_ends_that_connection(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MESSAGE_TIMEOUT", 0.2)
    with others_go_on(service), contextlib.closing(service.channel()) as channel:
        channel._socket.sendall(struct.pack("!i", 100) + b"half")
        assert ended(channel)


def test_half_a_message_and_then_the_end_is_the_end(service: MemoryService) -> None:
    with others_go_on(service), contextlib.closing(service.channel()) as channel:
        channel._socket.sendall(struct.pack("!i", 100) + b"half")


def test_a_client_that_does_not_read_its_answers_ends_its_own_connection_only(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MESSAGE_TIMEOUT", 0.2)
    with others_go_on(service), contextlib.closing(service.channel()) as channel:
        channel.send_bytes(messages.encode_call(messages.Echo("x" * 3_000_000)))
        service.sessions(1)


# --- between get, offer and confirm -----------------------------------------------------------------------------------


def test_a_client_that_vanishes_while_it_waits_leaves_the_queue_at_once(service: MemoryService) -> None:
    holder = service.channel()
    names = take_all(service, holder)
    waiter = service.channel()
    waiter.send_bytes(messages.encode_call(get("w", None)))
    service.reaches(waiting=1)
    waiter.close()
    service.reaches(waiting=0)
    service.backend.go_on()
    for name in names:
        say(holder, messages.Release(name))
    service.reaches(size=2, reserved=0, leased=0)
    holder.close()


def test_a_client_that_vanishes_between_offer_and_confirm_leaves_the_container_warm(service: MemoryService) -> None:
    with others_go_on(service):
        channel = service.channel()
        offer = say(channel, get())
        assert isinstance(offer, messages.Offer)
        assert service.state_of(offer.name) is State.RESERVED
        channel.close()
        service.reaches(size=2, reserved=0)
        assert service.state_of(offer.name) is State.WARM


def test_a_client_that_says_something_else_than_confirm_has_no_offer_any_more(service: MemoryService) -> None:
    with others_go_on(service), contextlib.closing(service.channel()) as channel:
        offer = say(channel, get())
        assert isinstance(offer, messages.Offer)
        assert say(channel, messages.Echo("x")) == "x"
        assert service.state_of(offer.name) is State.WARM
        assert say(channel, messages.Confirm("r1")) is None
        assert isinstance(say(channel, messages.Inspect(lease(channel, "r2").name)), ContainerInfo)


def test_a_client_that_does_not_confirm_in_time_has_no_offer_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MESSAGE_TIMEOUT", 0.2)
    with memory_service(1, confirm_timeout=0.05) as service, contextlib.closing(service.channel()) as channel:
        service.reaches(size=1)
        offer = say(channel, get())
        assert isinstance(offer, messages.Offer)
        service.reaches(size=1, reserved=0)
        assert say(channel, messages.Confirm("r1")) is None
        assert say(channel, messages.Echo("on")) == "on"
        # An offer with half a confirmation is no confirmation either, and that connection is of no more use.
        assert isinstance(say(channel, get("r2")), messages.Offer)
        channel._socket.sendall(b"\0\0")
        assert ended(channel)
        service.reaches(size=1, reserved=0)


def test_a_second_wish_before_the_first_is_confirmed_takes_its_place(service: MemoryService) -> None:
    with others_go_on(service), contextlib.closing(service.channel()) as channel:
        first, second = say(channel, get("r1")), say(channel, get("r2"))
        assert isinstance(first, messages.Offer)
        assert isinstance(second, messages.Offer)
        assert say(channel, messages.Confirm("r2")) is not None
        assert say(channel, messages.Confirm("r1")) is None
        service.reaches(leased=1, reserved=0)


def test_bytes_that_come_while_a_call_is_being_answered_end_that_connection(
    service: MemoryService, caplog: pytest.LogCaptureFixture
) -> None:
    holder, waiter = service.channel(), service.channel()
    take_all(service, holder)
    waiter.send_bytes(messages.encode_call(get("w", None)))
    service.reaches(waiting=1)
    with caplog.at_level(logging.WARNING, session.__name__):
        waiter.send_bytes(messages.encode_call(messages.Echo("impatient")))
        assert ended(waiter)
    assert "sent something while it waited" in caplog.text
    service.reaches(waiting=0)
    assert say(holder, messages.Echo("x")) == "x"
    holder.close()
    waiter.close()


def test_a_request_that_comes_again_on_a_new_connection_finds_what_the_first_one_got(service: MemoryService) -> None:
    first, second = service.channel(), service.channel()
    offer = say(first, get("same"))
    assert say(second, get("same")) == offer
    first.close()
    service.sessions(1)
    assert say(second, messages.Confirm("same")) is not None
    second.close()


def test_a_wish_that_is_answered_just_as_its_client_leaves_goes_back(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The offer is made after the client's end has been seen, and before the ticket is withdrawn.
    holder, waiter = service.channel(), service.channel()
    names = take_all(service, holder)
    withdraw = service.pool.withdraw
    leaving, go_on = threading.Event(), threading.Event()

    def late(ticket: object) -> str:
        leaving.set()
        assert go_on.wait(SOON)
        return withdraw(ticket)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(service.pool, "withdraw", late)
    waiter.send_bytes(messages.encode_call(get("w", None)))
    service.reaches(waiting=1)
    waiter.close()
    assert leaving.wait(SOON)
    service.backend.go_on()
    for name in names:
        say(holder, messages.Release(name))
    service.reaches(waiting=0, reserved=1)
    go_on.set()
    service.reaches(size=2, reserved=0, leased=0)
    holder.close()


def test_the_words_for_why_there_is_none_count_what_there_is(service: MemoryService) -> None:
    channel = service.channel()
    take_all(service, channel)
    words = say(channel, get("w", 0.0))
    assert isinstance(words, str)
    assert "2 leased" in words
    assert "place 1 of 1 in the queue" in words
    assert say(channel, get("w", 0.01)) == words
    channel.close()


# --- bugs and the lack of things --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("a bug"), (InternalError, "please report it")),
        (OSError(errno.EBADF, "a bug"), (InternalError, "please report it")),
        (OSError(errno.EMFILE, "a bug of nobody's"), (BackendError, "Too many open files.*lxc-pool check")),
    ],
    ids=["bug", "os", "shortage"],
)
def test_a_bug_of_ours_and_a_shortage_are_told_and_logged_and_the_connection_goes_on(
    service: MemoryService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    told: tuple[type[Exception], str],
) -> None:
    kind, words = told
    channel = service.channel()

    def fail() -> None:
        raise error

    monkeypatch.setattr(service.pool, "census", fail)
    with caplog.at_level(logging.ERROR, session.__name__), pytest.raises(kind, match=words):
        say(channel, messages.GetStatus())
    monkeypatch.undo()
    assert "GetStatus" in caplog.text
    assert "a bug" in caplog.text
    assert isinstance(say(channel, messages.GetStatus()), PoolStatus)
    channel.close()


def test_a_bug_that_comes_with_every_call_does_not_flood_the_log_and_refusals_do_not_hide_it(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    channel = service.channel()
    for _ in range(50):
        with pytest.raises(UnknownLease):
            say(channel, messages.Inspect("none"))

    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(service.pool, "census", fail)
    with caplog.at_level(logging.ERROR, session.__name__):
        for _ in range(50):
            with pytest.raises(InternalError):
                say(channel, messages.GetStatus())
    channel.close()
    bugs = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert 1 <= len(bugs) <= 25


def test_a_bug_before_anybody_is_let_in_ends_that_connection_only(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_policy: object, _sock: object) -> None:
        raise KeyError("a bug")

    with others_go_on(service), monkeypatch.context() as patch, caplog.at_level(logging.ERROR, session.__name__):
        patch.setattr(Policy, "peer_of", fail)
        with service.raw() as sock:
            assert ended(sock)
        patch.undo()
    assert "failed" in caplog.text


def test_a_connection_that_can_not_be_accepted_now_is_accepted_later(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept, failed = SocketListener.accept, threading.Event()

    def once(listener: SocketListener) -> socket.socket:
        sock = accept(listener)
        if not failed.is_set():
            failed.set()
            sock.close()
            raise OSError(errno.EMFILE, "Too many open files")
        return sock

    monkeypatch.setattr(SocketListener, "accept", once)
    with caplog.at_level(logging.WARNING, server.__name__), PoolManager.connect(service.host_dir, SOON) as pool:
        # The accepter is in the real one already; the second connection gets the failure, and is made again.
        pool.echo("first")
        with PoolManager.connect(service.host_dir, SOON) as other:
            assert other.echo("second") == "second"
    assert "Too many open files" in caplog.text


def test_a_connection_that_no_thread_can_be_started_for_is_closed(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, server.__name__):
        patch.setattr(threading.Thread, "start", fail)
        with service.raw() as sock:
            assert ended(sock)
    assert "can't start a thread" in caplog.text
    service.sessions(0)
    with PoolManager.connect(service.host_dir) as pool:
        assert pool.echo("x") == "x"


# --- the end, and the beginning ---------------------------------------------------------------------------------------


def test_waiters_are_told_when_the_service_ends(service: MemoryService) -> None:
    holder, waiter, watcher = service.channel(), service.channel(), service.channel()
    take_all(service, holder)
    waiter.send_bytes(messages.encode_call(get("w", None)))
    service.reaches(waiting=1)
    ender = threading.Thread(target=service.stop)
    ender.start()
    with pytest.raises(PoolClosed, match="ending"):
        messages.decode_reply(get(), waiter.recv_bytes())
    ender.join(SOON)
    for channel in (holder, waiter, watcher):
        assert ended(channel)
        channel.close()
    assert not service.socket_path.exists()
    assert not hostdir.key_path(service.host_dir).exists()


def test_neither_beginning_nor_end_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep, slept = time.sleep, []

    def note(seconds: float) -> None:
        slept.append(sys._getframe(1).f_globals["__name__"])
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", note)
    with memory_service(2) as service:
        service.reaches(size=2)
        with PoolManager.connect(service.host_dir) as pool, pool.lease("x", SOON):
            pass
    assert slept  # the test's own waiting is noted
    assert [name for name in slept if name.startswith("lxc_pool")] == []


def test_whoever_asks_for_the_end_is_answered_when_everything_is_closed(service: MemoryService) -> None:
    channel = service.channel()
    lease(channel)
    assert say(channel, messages.Shutdown(0.0, False)) is None
    assert not service.socket_path.exists()
    assert service.backend.present == set()
    assert ended(channel)
    channel.close()
    service.stop()


@pytest.mark.parametrize("grace", [5.0, float("inf"), 1e10])
def test_leases_have_their_grace_and_the_end_comes_as_soon_as_they_are_released(
    service: MemoryService, grace: float
) -> None:
    holder, ender = service.channel(), service.channel()
    name = lease(holder).name
    ender.send_bytes(messages.encode_call(messages.Shutdown(grace, False)))
    service.reaches(size=0, reaping=0)
    status = say(holder, messages.GetStatus())
    assert isinstance(status, PoolStatus)
    assert not status.running
    with pytest.raises(PoolClosed):
        say(holder, get("late"))
    assert service.state_of(name) is State.LEASED
    say(holder, messages.Release(name))
    messages.decode_reply(messages.Shutdown(0.0, False), ender.recv_bytes())
    assert service.backend.present == set()
    for channel in (holder, ender):
        channel.close()
    service.stop()


def test_leases_live_on_from_one_service_to_the_next_if_that_is_asked_for(service: MemoryService) -> None:
    channel = service.channel()
    name = lease(channel).name
    service.restart()
    assert ended(channel)
    channel.close()
    channel = service.channel()
    info = say(channel, messages.Inspect(name))
    assert isinstance(info, ContainerInfo)
    assert (info.state, info.id, info.owner_pid) == (State.LEASED, "job", os.getpid())
    channel.close()


def test_a_stale_socket_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "pool.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    listener = SocketListener(path)
    with socket.socket(socket.AF_UNIX) as early, pytest.raises(ConnectionRefusedError):
        early.connect(path)  # which a client takes for "not yet", where a refusal would be for good
    listener.open_to(os.getgid())
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    assert os.listdir(tmp_path) == ["pool.sock"]
    listener.close()
    listener.close()
    assert not os.path.exists(path)
    Path(path).write_text("precious", encoding="ascii")
    with pytest.raises(FileExistsError, match="in the way"):
        SocketListener(path)
    assert Path(path).read_text() == "precious"


def test_a_socket_that_can_not_be_made_leaves_nothing_open(tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(OSError, match="too long"):
        SocketListener(str(tmp_path / ("x" * 200)))
    assert open_descriptors() == before


def test_a_server_that_serves_nothing_yet_turns_clients_away(tmp_path: Path) -> None:
    idle = listen(tmp_path, b"key")
    assert isinstance(idle, PoolServer)
    idle.open()
    idle.socket_listener.open_to(os.getgid())
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(idle.path)
        assert ended(sock)
    idle.close()
    os.close(idle._end)


def test_a_connection_that_was_broken_off_before_it_was_known_has_no_peer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        unknown = session.Session(ours, b"", None, None)  # type: ignore[arg-type]  # never used
        with pytest.raises(InternalError, match="nobody has been let in"):
            _ = unknown.peer
