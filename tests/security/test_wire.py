"""Whatever bytes come over the socket: nothing of them is executed, and everybody else is served as before."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import pickle
import resource
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import managers
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from lxc_pool import PoolManager, hostdir
from lxc_pool.errors import AuthenticationFailed, HostDirError, ServiceUnavailable
from lxc_pool.execution.protocol import ExecRequest, Terminal
from lxc_pool.service import server, session
from lxc_pool.wire import messages
from lxc_pool.wire.channel import MAX_MESSAGE, Channel
from tests.security.attackers import ALICE, BOB, GROUP
from tests.support.memory_service import SOON, MemoryService, memory_service, say
from tests.support.processes import open_descriptors
from tests.support.waiting import eventually


@pytest.fixture
def service() -> Iterator[MemoryService]:
    before = open_descriptors()
    with memory_service(2) as service:
        service.reaches(size=2)
        yield service
    assert open_descriptors() <= before  # what an earlier test has left to the collector may be closed meanwhile


@contextlib.contextmanager
def others_go_on(service: MemoryService) -> Iterator[None]:
    """Have another client before and afterwards; no connection of the block's is left then."""
    threads = threading.active_count()
    with PoolManager.connect(service.host_dir) as pool:
        yield
        service.sessions(1)
        with pool.lease("other", timeout=SOON) as container:
            assert container.state == "leased"
        service.reaches(size=2, reaping=0)
    service.sessions(0)
    assert threading.active_count() <= threads


def ended(sock: socket.socket) -> bool:
    """Wait until the service has closed a connection; return whether it said nothing but its challenge before."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while more := sock.recv(4096):
            said += more
    return b"WELCOME" not in said


def silent_connections(service: MemoryService, count: int) -> list[socket.socket]:
    """Connect so many times, and say nothing; a full backlog is waited for."""
    connections: list[socket.socket] = []
    while len(connections) < count:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(service.socket_path))  # blocking: it waits while the backlog is full
        connections.append(sock)
    return connections


def turned_away(connections: list[socket.socket]) -> int:
    """Return how many of these connections the service has closed."""
    poll = select.poll()
    for sock in connections:
        poll.register(sock, select.POLLRDHUP)
    return len(poll.poll(0))


def frame(body: bytes) -> bytes:
    return struct.pack("!i", len(body)) + body


# --- the key ----------------------------------------------------------------------------------------------------------


def proof(key: bytes, challenge: bytes, digest: str = "sha256") -> bytes:
    return b"{%b}" % digest.encode() + hmac.digest(key, challenge.removeprefix(b"#CHALLENGE#"), digest)


WRONG_PROOFS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "another key": lambda _key, challenge: proof(b"x" * 32, challenge),
    "an empty key": lambda _key, challenge: proof(b"", challenge),
    "a truncated key": lambda key, challenge: proof(key[:-1], challenge),
    "a longer key": lambda key, challenge: proof(key + b"x", challenge),
    "nothing": lambda _key, _challenge: b"",
    "the key itself": lambda key, _challenge: key,
    "the challenge itself": lambda _key, challenge: challenge,
    "half a proof": lambda key, challenge: proof(key, challenge)[:24],
    "a proof and more": lambda key, challenge: proof(key, challenge) + b"\0",
    "a bare digest": lambda key, challenge: proof(key, challenge)[8:],
    "a digest of no key": lambda _key, challenge: b"{sha256}" + hashlib.sha256(challenge).digest(),
    "MD5": lambda key, challenge: proof(key, challenge, "md5"),
    "MD5, as of old": lambda key, challenge: hmac.digest(key, challenge.removeprefix(b"#CHALLENGE#"), "md5"),
    "welcome": lambda _key, _challenge: b"#WELCOME#",
}


@pytest.mark.parametrize("what", WRONG_PROOFS)
def test_no_proof_but_the_keys_own_lets_in(service: MemoryService, what: str) -> None:
    with others_go_on(service), service.raw() as sock:
        channel = Channel(sock)
        channel.deadline = time.monotonic() + SOON
        challenge = channel.recv_bytes(256)
        channel.send_bytes(WRONG_PROOFS[what](hostdir.read_key(service.host_dir), challenge))
        assert ended(sock)


def test_a_proof_that_was_overheard_is_of_no_use_again(service: MemoryService) -> None:
    key = hostdir.read_key(service.host_dir)
    with others_go_on(service), service.raw() as first, service.raw() as second:
        one, two = Channel(first), Channel(second)
        one.deadline = two.deadline = time.monotonic() + SOON
        answer = proof(key, one.recv_bytes(256))
        assert one.recv_bytes is not None
        two.recv_bytes(256)
        two.send_bytes(answer)
        assert ended(second)
        one.send_bytes(answer)
        assert one.recv_bytes(256) == b"#WELCOME#"


def test_a_key_of_before_a_restart_is_of_no_use(service: MemoryService) -> None:
    old = hostdir.read_key(service.host_dir)
    service.restart()
    key = hostdir.key_path(service.host_dir)
    assert key.read_bytes() != old
    key.write_bytes(old)
    with pytest.raises(AuthenticationFailed):
        PoolManager.connect(service.host_dir)


@pytest.mark.parametrize("content", [b"", b"x" * 5000])
def test_a_key_file_that_holds_none_is_refused_by_the_client(service: MemoryService, content: bytes) -> None:
    hostdir.key_path(service.host_dir).write_bytes(content)
    with pytest.raises(HostDirError, match="does not hold a key"):
        PoolManager.connect(service.host_dir)


# --- code -------------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.trace),)


STOCK = sorted({*managers.Server.public, "incref", "decref", "dummy", "#GETVALUE", "accept_connection", "__reduce__"})


def stock_calls(bomb: Bomb) -> dict[str, bytes]:
    """Return what a stock client would send, and what an attacker would make of it."""
    calls = {
        f"stock {name}": pickle.dumps((None, name, (), {}))
        for name in (*STOCK, "shutdown", "create", "debug_info", "number_of_objects", "get_methods", "serve_client")
    }
    calls |= {
        "create os.system": pickle.dumps((None, "create", ("PoolService", os.system, "id"), {})),
        "a bomb": pickle.dumps(bomb),
        "a bomb as ident": pickle.dumps((bomb, "echo", (), {})),
        "a bomb as method": pickle.dumps((None, bomb, (), {})),
        "a bomb as argument": pickle.dumps((None, "echo", (bomb,), {})),
        "a bomb as keyword": pickle.dumps((None, "echo", (), {"x": bomb})),
        "an old bomb": pickle.dumps(bomb, protocol=0),
    }
    return calls


@pytest.mark.parametrize("when", ["before the handshake", "as the proof", "as hello", "as a call"])
def test_nothing_is_unpickled_whenever_it_comes(service: MemoryService, tmp_path: Path, when: str) -> None:
    trace = tmp_path / "executed"
    for body in stock_calls(Bomb(trace)).values():
        if when == "as a call":
            channel = service.channel()
        else:
            channel = Channel(service.raw())
            channel.deadline = time.monotonic() + SOON
            challenge = channel.recv_bytes(256) if when != "before the handshake" else b""
            if when == "as hello":
                channel.send_bytes(proof(hostdir.read_key(service.host_dir), challenge))
                assert channel.recv_bytes(256) == b"#WELCOME#"
                channel.send_bytes(b"#CHALLENGE#{sha256}" + b"n" * 40)
                channel.recv_bytes(256)
                channel.send_bytes(b"#WELCOME#")
        with contextlib.suppress(OSError):
            channel.send_bytes(body)
        with contextlib.suppress(ConnectionResetError):
            while channel._socket.recv(4096):
                pass
        channel.close()
    service.sessions(0)
    assert not trace.exists()


def every_call() -> dict[str, list[object]]:
    """Return each declared call as an array, as it goes over the wire."""
    return {
        "hello": [1],
        "echo": ["x"],
        "status": [],
        "containers": [],
        "await_warm": [0, 0.0],
        "get": ["r", "id", 0.0, "default", None, None],
        "confirm": ["r"],
        "abandon": ["r"],
        "release": ["x"],
        "inspect": ["x"],
        "addresses": ["x"],
        "renew": ["x", 1.0],
        "keep": ["x", 1.0],
        "execute": ["x", b""],
        "console_log": ["x"],
        "mount": ["x", b"/x", True],
        "await_network": ["x", 0.0],
        "resize": [1],
        "drain": [],
        "resume": [],
        "look_for_images": [],
        "shutdown": [0.0, False],
    }


def test_every_declared_call_is_tried_below() -> None:
    declared = get_args(messages.AnyCall)
    assert {call.__struct_config__.tag for call in declared} == set(every_call())


@pytest.mark.parametrize("name", every_call())
def test_a_bomb_in_any_place_of_any_call_is_data_or_refused(service: MemoryService, tmp_path: Path, name: str) -> None:
    trace = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(trace))
    text = pickle.dumps(Bomb(trace), protocol=0).decode("ascii")
    arguments = every_call()[name]
    for place in range(len(arguments) + 1):
        for value in (
            bomb,
            text,
            {"__class__": "os.system", "args": ["id"]},
            msgspec.msgpack.Ext(1, bomb),
            "os:system",
        ):
            changed = [*arguments[:place], value, *arguments[place + 1 :]]
            if name in ("shutdown", "await_warm", "get") and isinstance(value, str) and place == 0:
                continue  # a name like any other
            channel = service.channel()
            with contextlib.suppress(OSError):
                channel.send_bytes(msgspec.msgpack.encode([name, *changed]))
                channel._socket.settimeout(SOON)
                channel._socket.recv(4096)
            channel.close()
    for method in ("__init__", "_get", "answer", "policy", "stop", "__class__", "status.__func__", "exec"):
        channel = service.channel()
        channel.send_bytes(msgspec.msgpack.encode([method, *arguments]))
        assert ended(channel._socket)
        channel.close()
    service.sessions(0)
    assert not trace.exists()
    assert not service.service.stopping


def test_a_commands_bytes_are_a_request_or_refused(service: MemoryService, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    channel = service.channel()
    assert isinstance(say(channel, messages.Get("r", "x", SOON, "default", None, None)), messages.Offer)
    info = say(channel, messages.Confirm("r"))
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = os.open("/dev/null", os.O_RDWR)
    descriptors = [null, null, null, ends[1].fileno()]
    for body in (pickle.dumps(Bomb(trace)), b"lxe1", b"lxe1" + b"\xff" * 100, ExecRequest.create(["x"]).encode()[:-3]):
        channel.send_bytes(messages.encode_call(messages.Execute(info.name, body)), descriptors)  # type: ignore[attr-defined]  # it is one
        with pytest.raises(ValueError, match="not a command"):
            messages.decode_reply(messages.Execute("", b""), channel.recv_bytes())
    channel.close()
    for end in ends:
        end.close()
    os.close(null)
    assert not trace.exists()


@pytest.mark.parametrize("asks_for_terminal", [False, True])
def test_nothing_but_pipes_and_the_null_device_is_taken_for_a_commands_stream(
    service: MemoryService, open_path: Path, asks_for_terminal: bool
) -> None:
    channel = service.channel()
    assert isinstance(say(channel, messages.Get("r", "x", SOON, "default", None, None)), messages.Offer)
    info = say(channel, messages.Confirm("r"))
    terminal = Terminal(24, 80) if asks_for_terminal else None
    request = messages.Execute(info.name, ExecRequest.create(["x"], terminal=terminal).encode())  # type: ignore[attr-defined]  # it is one
    os.mkfifo(open_path / "fifo")
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(ours)
        stack.enter_context(theirs)
        null = os.open("/dev/null", os.O_RDWR)
        bad: tuple[int, ...] = (
            *(os.open(path, os.O_RDWR) for path in ("/dev/zero", open_path / "fifo")),
            *(os.open(path, os.O_RDONLY) for path in (open_path, __file__)),
            *(os.open(path, os.O_PATH) for path in ("/", "/dev/null")),
            *os.openpty(),
            os.dup(ours.fileno()),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach(),
            os.memfd_create("x"),
            os.eventfd(0),
            os.pidfd_open(os.getpid()),
        )
        for descriptor in (null, *bad):
            stack.callback(os.close, descriptor)
        for descriptor in bad:
            for place in range(3):
                streams = [null, null, null, theirs.fileno()]
                streams[place] = descriptor
                channel.send_bytes(messages.encode_call(request), streams)
                with pytest.raises(TypeError, match="only a pipe or /dev/null"):
                    messages.decode_reply(request, channel.recv_bytes())
    channel.close()


def test_a_control_socket_with_somebody_behind_it_is_refused(service: MemoryService, open_path: Path) -> None:
    """A service that trusts root would hear from the supervisor, which is root's."""
    channel = service.channel()
    assert isinstance(say(channel, messages.Get("r", "x", SOON, "default", None, None)), messages.Offer)
    info = say(channel, messages.Confirm("r"))
    null = os.open("/dev/null", os.O_RDWR)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control,
    ):
        daemon.bind(str(open_path / "daemon"))
        daemon.listen()
        control.connect(str(open_path / "daemon"))
        request = messages.Execute(info.name, ExecRequest.create(["x"]).encode())  # type: ignore[attr-defined]  # it is one
        channel.send_bytes(messages.encode_call(request), [null, null, null, control.fileno()])
        with pytest.raises(ValueError, match="no end of a pair"):
            messages.decode_reply(request, channel.recv_bytes())
        connection, _address = daemon.accept()
        with connection:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
    channel.close()
    os.close(null)


@pytest.mark.parametrize("call", [messages.Confirm("another"), messages.Abandon("another")])
def test_an_offer_does_not_stay_reserved_behind_the_confirmation_of_another(
    service: MemoryService, call: messages.Call
) -> None:
    channel = service.channel()
    assert isinstance(say(channel, messages.Get("r", "x", SOON, "default", None, None)), messages.Offer)
    assert say(channel, call) is None
    service.reaches(size=2, reserved=0)
    channel.close()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**31 - 1, MAX_MESSAGE + 1, -1, -(2**31)])
@pytest.mark.parametrize("early", [True, False])
def test_a_length_beyond_all_bounds_is_refused_before_it_is_believed(
    service: MemoryService, length: int, early: bool
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with others_go_on(service):
        channel = Channel(service.raw()) if early else service.channel()
        channel._socket.sendall(struct.pack("!i", length) + b"x" * 100)
        assert ended(channel._socket)
        channel.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1x", b"\xdd\x00\x00\x00\x01", b"\xdf\x00\x00\x00\x01\xc0"])
def test_nesting_as_deep_as_a_message_is_long_is_refused(service: MemoryService, opening: bytes) -> None:
    with others_go_on(service):
        for count in (500, 5000, 1_000_000):
            for prefix in (b"", b"\x92\xa4echo", b"\x97\xa3get\xa1r"):
                channel = service.channel()
                channel.send_bytes(prefix + (opening * count)[: MAX_MESSAGE - 100])
                assert ended(channel._socket)
                channel.close()


@pytest.mark.parametrize(
    "claim", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_a_collection_that_claims_to_be_huge_is_refused(service: MemoryService, claim: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with others_go_on(service):
        for prefix in (b"", b"\x92\xa4echo", b"\x97\xa3get"):
            channel = service.channel()
            channel.send_bytes(prefix + claim)
            assert ended(channel._socket)
            channel.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


# --- time -------------------------------------------------------------------------------------------------------------


def test_whoever_sends_a_byte_now_and_then_is_dropped_at_the_deadline(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "HANDSHAKE_TIMEOUT", 0.3)
    monkeypatch.setattr(session, "MESSAGE_TIMEOUT", 0.3)
    with others_go_on(service):
        strangers = [service.raw() for _ in range(5)]
        friends = [service.channel()._socket for _ in range(5)]
        began = time.monotonic()
        drip = frame(b"x" * 250)
        sent = 0
        alive = [*strangers, *friends]
        while alive:
            for sock in list(alive):
                try:
                    sock.sendall(drip[sent % 250 : sent % 250 + 1])
                except OSError:
                    alive.remove(sock)
                    sock.close()
            sent += 1
            time.sleep(0.02)  # the drip
            assert time.monotonic() - began < SOON
        assert time.monotonic() - began >= 0.3


def test_a_thousand_silent_connections_do_not_slow_down_anothers_get(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They come from two users; the other client's median is that of the quiet rounds between."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard[1], 8192), hard[1]))
    # All are let stay, against the limits: what is shown does not depend on how many are turned away.
    monkeypatch.setattr(server, "_MAX_STRANGERS", 2000)
    monkeypatch.setattr(session, "HANDSHAKE_TIMEOUT", 120.0)
    try:
        with memory_service(40) as service:
            service.reaches(size=40)
            with PoolManager.connect(service.host_dir) as pool:

                def median() -> float:
                    times = []
                    for _ in range(20):
                        began = time.perf_counter()
                        container = pool.get("x", SOON)
                        times.append(time.perf_counter() - began)
                        assert container is not None
                        container.release()
                    service.reaches(size=40, reaping=0, building=0)
                    return statistics.median(times)

                median()  # warms up
                ratios = []
                for _ in range(3):
                    quiet = median()
                    silent = silent_connections(service, 1000)
                    service.sessions(1001)
                    crowded = median()
                    for sock in silent:
                        sock.close()
                    service.sessions(1)
                    ratios.append(crowded / quiet)

        assert min(ratios) < 2.0, ratios
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, hard)


def test_of_silent_connections_only_some_of_each_user_are_kept(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = [ALICE]
    monkeypatch.setattr(server, "credentials", lambda _sock: (os.getpid(), who[0], GROUP))
    monkeypatch.setattr(session, "credentials", lambda _sock: (os.getpid(), who[0], GROUP))
    monkeypatch.setattr(session, "HANDSHAKE_TIMEOUT", 120.0)
    silent: list[socket.socket] = []
    for user in (ALICE, BOB):
        who[0] = user
        mine = silent_connections(service, 200)
        # Then none is in the backlog any more either, where it would come in as the next user's.
        eventually(lambda: turned_away(mine) == 200 - server._MAX_STRANGERS, "the rest is turned away")  # noqa: B023
        silent += mine
    assert len(service.server._sessions) == 2 * server._MAX_STRANGERS
    for sock in silent:
        sock.close()
    service.sessions(0)
    monkeypatch.setattr(server, "_MAX_STRANGERS", 2)
    proved = [service.channel() for _ in range(6)]  # who has proved itself makes room for the next
    service.sessions(6)
    for channel in proved:
        channel.close()


def test_who_has_been_let_in_takes_no_strangers_place(service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_MAX_STRANGERS", 1)
    go_on, send = threading.Event(), session.Session._send

    def send_and_be_slow(self: session.Session, body: bytes) -> None:
        send(self, body)
        assert go_on.wait(SOON)

    monkeypatch.setattr(session.Session, "_send", send_and_be_slow)
    try:
        for _ in range(3):  # each has its answer, though its thread has not gone on
            service.channel().close()
    finally:
        go_on.set()


def test_a_service_whose_backlog_is_full_is_said_to_be_busy(open_path: Path) -> None:
    path = hostdir.socket_path(open_path)
    hostdir.key_path(open_path).write_bytes(b"k" * 32)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(1)
        for _ in range(3):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(str(path))
        began = time.monotonic()
        with pytest.raises(ServiceUnavailable):
            PoolManager.connect(open_path, timeout=0.3)
        assert time.monotonic() - began < 20
