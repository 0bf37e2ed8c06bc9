"""Every declared call, from users without further rights: wrong values, out of turn, about others', in races.

All of it is taken from the declarations, so that a new call is tried as all others are; what of it can't be known by
them alone, fails here until somebody says it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import get_args

import msgspec
import pytest

from lxc_pool import hostdir
from lxc_pool.backend.memory import HANG
from lxc_pool.errors import AccessDenied, InternalError, LeaseError, LxcPoolError, PoolDraining, UnknownLease
from lxc_pool.execution.protocol import ExecRequest
from lxc_pool.service import session
from lxc_pool.wire import handshake, messages
from lxc_pool.wire.channel import MAX_MESSAGE, Channel, ProtocolError
from lxc_pool.wire.messages import Call
from tests.security import fuzz
from tests.security.attackers import ALICE, BOB
from tests.security.fuzz import example
from tests.support.memory_service import SOON, MemoryService, say

CALLS: tuple[type[Call], ...] = get_args(messages.AnyCall)
ADMINISTRATORS: tuple[type[Call], ...] = get_args(messages.AdminCall)

OF_NO_CONTAINER = (messages.Hello, messages.Echo, messages.GetStatus, messages.ListContainers, messages.AwaitWarm)
"""Calls of users that neither name a container nor ask for one."""

DESCRIPTORS = {messages.Execute: ("null", "null", "null", "control"), messages.Mount: ("path", "pipe", "control")}
"""What goes beside a call, for it to get as far as it can."""

WRONG: tuple[object, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**63,
        2**64 - 1,
        -(2**63),
        1.5,
        float("nan"),
        float("inf"),
        -1.0,
        "",
        "x",
        b"",
        b"x",
    ),
    *([], ["x"], [["x"]], {}, {"x": 1}, {1: 2}, msgspec.msgpack.Ext(1, b"x"), msgspec.msgpack.Ext(-1, b"xxxx")),
)
"""Values of all kinds: of each field, some are of a wrong one."""

SIZE = 4


class Stage:
    """A service, and who connects to it.

    Attributes:
        who: Whom the service takes the next connection for.
    """

    def __init__(self) -> None:
        self.who = ALICE
        self.complaints = fuzz.Complaints()
        self.service: MemoryService
        self._names = 0
        self._channels: list[Channel] = []

    def channel(self, who: int = ALICE) -> Channel:
        """Connect as a user; `rest` closes it."""
        self.who = who
        self._channels.append(self.service.channel())
        return self._channels[-1]

    def lease(self, channel: Channel, request: str = "") -> str:
        """Lease a container; return its name."""
        self._names += 1
        request = request or f"lease {self._names}"
        offer = say(channel, messages.Get(request, "mine", SOON, "default", None, None))
        assert isinstance(offer, messages.Offer), offer
        info = say(channel, messages.Confirm(request))
        assert info is not None
        return offer.name

    def send(self, channel: Channel, call: Call) -> None:
        """Send a call with the descriptors that belong to it."""
        kinds = DESCRIPTORS.get(type(call), ())
        with contextlib.ExitStack() as stack:
            channel.send_bytes(messages.encode_call(call), [self._descriptor(kind, stack) for kind in kinds])

    def answer(self, channel: Channel, call: Call) -> object:
        """Make a call; return its result, or the error that it ended with; none is the service's own fault."""
        self.send(channel, call)
        return result(channel, call)

    def rest(self) -> None:
        """Close all connections; wait until nobody has anything, and all is warm again."""
        while self._channels:
            self._channels.pop().close()
        for info in self.service.pool.containers(None):
            if info.state in ("leased", "reserved"):
                with contextlib.suppress(LxcPoolError):
                    self.service.pool.release(info.name, None)
        self.service.sessions(0)
        self.service.reaches(size=SIZE, reserved=0, leased=0, reaping=0, building=0, waiting=0)
        assert not self.complaints.found

    @staticmethod
    def _descriptor(kind: str, stack: contextlib.ExitStack) -> int:
        if kind == "control":
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(ours.close)
            stack.callback(theirs.close)
            return theirs.fileno()
        if kind == "pipe":
            descriptors = os.pipe()
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            return descriptors[1]
        descriptor = os.open("/dev/null", os.O_RDWR) if kind == "null" else os.open("/tmp", os.O_PATH)
        stack.callback(os.close, descriptor)
        return descriptor


@pytest.fixture(scope="module")
def running() -> Iterator[Stage]:
    stage = Stage()
    with fuzz.served(SIZE, lambda: stage.who, stage.complaints) as stage.service:
        yield stage


@pytest.fixture
def stage(running: Stage) -> Iterator[Stage]:
    yield running
    running.rest()


def tag_of(kind: type[Call]) -> str:
    return str(kind.__struct_config__.tag)


def about(kind: type[Call], name: str, request: str) -> Call:
    """Return a call about that container, or that wish; one that waits does not."""
    known: dict[str, object] = {
        "name": name,
        "profile": "default",
        "timeout": 0.0,
        "owner": None,
        "count": 0,
        "ttl": 60.0,
    }
    known["request"] = ExecRequest.create(["true"]).encode() if kind is messages.Execute else request
    return example(kind, **known)


def result(channel: Channel, call: Call) -> object:
    """Return what the answer to *call* brings: its result, or an error that says whose fault it is."""
    body = channel.recv_bytes()
    assert len(body) < 100_000 or isinstance(call, messages.Echo)
    try:
        return messages.decode_reply(call, body)
    except InternalError as error:
        pytest.fail(f"{call}: {error}")
    except (LxcPoolError, TypeError, ValueError) as error:
        return error


def ended(channel: Channel) -> bool:
    """Wait for the end of a connection; return whether it came soon, and nothing was said before."""
    if not channel._readable.poll(session.MESSAGE_TIMEOUT * 1000 / 2):
        return False  # only at the deadline of a message that is not all here
    with contextlib.suppress(ConnectionResetError):
        return not channel._socket.recv(1)
    return True


def touches(kind: type[Call]) -> str:
    """Return what a call is about: a container's "name", a wish's "request", or nothing."""
    fields = {field.name for field in msgspec.structs.fields(kind)}
    found = fields & {"name", "request"} - ({"request"} if kind is messages.Execute else set())
    assert len(found) == 1 or kind in (*OF_NO_CONTAINER, *ADMINISTRATORS), f"say what {kind.__name__} is about"
    return found.pop() if found else ""


every_call = pytest.mark.parametrize("kind", CALLS, ids=tag_of)


# --- wrong values -----------------------------------------------------------------------------------------------------


@every_call
def test_a_value_of_a_wrong_kind_ends_the_connection_and_any_other_has_an_answer(
    stage: Stage, kind: type[Call]
) -> None:
    values = msgspec.structs.astuple(about(kind, "x", "r"))
    bodies = [[*values[:place], value, *values[place + 1 :]] for place in range(len(values)) for value in WRONG]
    bodies += [[*values, value] for value in (None, "x", 1)]
    if values:
        bodies += [list(values[:-1]), []]
    refused = 0
    for fields in bodies:
        body = msgspec.msgpack.encode([tag_of(kind), *fields])
        channel = stage.channel()
        channel.send_bytes(body)
        try:
            call = messages.decode_call(body)
        except ProtocolError:
            assert ended(channel), fields
            refused += 1
        else:
            channel._socket.shutdown(socket.SHUT_WR)  # should it wait
            with contextlib.suppress(EOFError):
                result(channel, call)
        channel.close()  # they are too many for one user to have at once
    assert refused >= 3  # one field too many, at least


@every_call
def test_what_is_as_long_as_it_can_be_has_an_answer_and_what_is_longer_ends_the_connection(
    stage: Stage, kind: type[Call]
) -> None:
    call = about(kind, "x", "r")
    for field in msgspec.structs.fields(kind):
        value = getattr(call, field.name)
        if not isinstance(value, (str, bytes)):
            continue
        room = MAX_MESSAGE - len(messages.encode_call(call)) - 8
        channel = stage.channel()
        for long in (value[:1] * room, value[:1] * 100_000):
            full = msgspec.structs.replace(call, **{field.name: long})
            answer = stage.answer(channel, full)
            assert isinstance(answer, Exception) or kind in (messages.Echo, messages.Confirm, messages.Abandon), answer
            if isinstance(answer, Exception):
                assert len(str(answer)) <= 10_000
        body = messages.encode_call(msgspec.structs.replace(call, **{field.name: value[:1] * (MAX_MESSAGE + 1)}))
        channel._socket.sendall(len(body).to_bytes(4, "big") + body[:1000])
        assert ended(channel)
        if isinstance(value, str):
            channel = stage.channel()
            marked = messages.encode_call(msgspec.structs.replace(call, **{field.name: "@@@@"}))
            channel.send_bytes(marked.replace(b"@@@@", b"\xff\xfe\xed\xa0"))
            assert ended(channel)


# --- out of turn ------------------------------------------------------------------------------------------------------


@every_call
def test_before_its_client_is_let_in_it_has_no_answer(stage: Stage, kind: type[Call]) -> None:
    body = messages.encode_call(about(kind, "x", "r"))
    key = hostdir.read_key(stage.service.host_dir)
    for proved in (False, True):
        with stage.service.raw() as sock:
            channel = Channel(sock)
            channel.deadline = time.monotonic() + SOON
            if proved:
                handshake.prove_to_service(channel, key)
            else:
                channel.recv_bytes()  # the challenge
            channel.send_bytes(body)
            if proved and kind is messages.Hello:
                assert messages.decode_reply(messages.Hello(1), channel.recv_bytes()) == messages.PROTOCOL
                continue
            said = b""
            with contextlib.suppress(ConnectionResetError):
                while more := sock.recv(4096):
                    said += more
            assert said in (b"", b"\0\0\0\x09#FAILURE#")


@every_call
def test_after_an_offer_it_is_answered_and_the_offer_goes_back(stage: Stage, kind: type[Call]) -> None:
    channel = stage.channel()
    offer = say(channel, messages.Get("r", "x", SOON, "default", None, None))
    assert isinstance(offer, messages.Offer)
    answer = stage.answer(channel, about(kind, offer.name, "another"))
    if touches(kind) == "name":
        assert isinstance(answer, UnknownLease)  # it is not theirs yet
    stage.service.reaches(reserved=1 if kind is messages.Get else 0, leased=0)
    assert say(channel, messages.Confirm("r")) is None


@every_call
def test_of_a_container_that_is_in_no_lease_nothing_is_to_be_had(stage: Stage, kind: type[Call]) -> None:
    if touches(kind) != "name":
        return
    mine, other = stage.channel(), stage.channel()
    ended_name = stage.lease(mine)
    say(mine, messages.Release(ended_name))
    assert isinstance(say(other, messages.Get("r", "x", SOON, "default", None, None)), messages.Offer)
    members = {info.name: info.state for info in stage.service.pool.containers(None)}
    assert {"warm", "reserved"} <= set(members.values())
    for name, state in {**members, ended_name: "over", "none": "never"}.items():
        answer = stage.answer(mine, about(kind, name, "r"))
        assert isinstance(answer, LeaseError) or (kind is messages.Release and state in ("over", "reaping")), state


def test_a_call_while_another_is_being_answered_ends_the_connection() -> None:
    stage = Stage()
    with fuzz.served(1, lambda: stage.who, stage.complaints) as stage.service:
        stage.service.backend.script("start", HANG)
        holder = stage.channel(BOB)
        stage.lease(holder)
        for kind in CALLS:
            channel = stage.channel()
            channel.send_bytes(messages.encode_call(messages.Get("w", "x", None, "default", None, None)))
            stage.service.reaches(waiting=1)
            stage.send(channel, about(kind, "x", "w"))
            assert ended(channel), kind
            stage.service.reaches(waiting=0)
            channel.close()
        holder.close()
        stage.service.backend.go_on()


def test_in_a_drained_pool_and_one_that_ends_each_is_answered() -> None:
    stage = Stage()
    with fuzz.served(1, lambda: stage.who, stage.complaints) as stage.service:
        channel = stage.channel()
        for make_so in (stage.service.pool.drain, stage.service.pool.close_to_new):
            make_so()
            for kind in CALLS:
                answer = stage.answer(channel, about(kind, "x", "r"))
                assert kind is not messages.Get or isinstance(answer, LxcPoolError)
                assert kind is not messages.Hello or isinstance(answer, ValueError)
        stage.service.pool._stock.closed = False
        assert isinstance(stage.answer(channel, about(messages.Get, "x", "r")), PoolDraining)
        stage.service.pool.resume()
        channel.close()


# --- others' ----------------------------------------------------------------------------------------------------------


@every_call
def test_anothers_container_is_not_touched_whoever_names_it_or_its_wish(stage: Stage, kind: type[Call]) -> None:
    hers, his = stage.channel(ALICE), stage.channel(BOB)
    leased = stage.lease(hers, "her wish")
    offer = say(hers, messages.Get("her next", "x", SOON, "default", None, None))
    assert isinstance(offer, messages.Offer)

    def what_she_has() -> list[object]:
        infos = stage.service.pool.containers(None)
        ours = sorted((info for info in infos if info.owner_uid == ALICE), key=lambda info: info.name)
        wishes = {(uid, request) for uid, request in stage.service.pool._leases._by_request if uid == ALICE}
        expiries = [lease.expires for _member, lease in stage.service.pool._leases if lease.uid == ALICE]
        return [[(info.name, info.state, info.id, info.owner_pid) for info in ours], wishes, expiries]

    before = what_she_has()
    assert len(before[0]) == 2  # type: ignore[arg-type]  # a list
    for name, wish in ((leased, "her wish"), (offer.name, "her next")):
        answer = stage.answer(his, about(kind, name, wish))
        about_what = touches(kind)
        if about_what == "name":
            assert isinstance(answer, UnknownLease)
        elif kind in ADMINISTRATORS:
            assert isinstance(answer, AccessDenied)
        elif kind is messages.Get:
            assert isinstance(answer, messages.Offer)
            assert answer.name not in (leased, offer.name)
        elif about_what == "request":
            assert answer is None
        assert what_she_has() == before
    seen = say(his, messages.ListContainers())
    assert all(info.id is info.owner_pid is info.owner_uid is None for info in seen if info.name == leased)  # type: ignore[attr-defined]  # they are


# --- races ------------------------------------------------------------------------------------------------------------


@every_call
def test_whatever_races_with_it_on_another_connection_both_are_answered_and_nothing_is_left(
    stage: Stage, kind: type[Call]
) -> None:
    """Its own kind, the end of the lease, the abandonment of the wish, and the same wish again."""
    rivals = (kind, messages.Release, messages.Abandon, messages.Confirm, messages.Get)
    channels = [stage.channel(), stage.channel(), stage.channel()]
    for turn, rival in enumerate([each for each in rivals if each not in ADMINISTRATORS] * 5):
        wish = f"race {turn}"
        if turn % 2:
            name = stage.lease(channels[0], wish)
        else:
            offer = say(channels[0], messages.Get(wish, "x", SOON, "default", None, None))
            assert isinstance(offer, messages.Offer)
            name = offer.name
        calls = [about(kind, name, wish), about(rival, name, wish)]
        barrier = threading.Barrier(len(calls))
        answers: list[object] = []

        def ask(channel: Channel, call: Call) -> None:
            barrier.wait(SOON)  # noqa: B023  # the threads end within the turn
            answers.append(stage.answer(channel, call))  # noqa: B023  # as above

        threads = [threading.Thread(target=ask, args=pair) for pair in zip(channels[1:], calls, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert len(answers) == len(calls), (kind, rival)
        for channel in channels:
            say(channel, messages.Abandon(wish))
        stage.service.reaches(leased=0, reserved=0, waiting=0)
