"""The declared messages survive the way, and nothing else does."""

from __future__ import annotations

import pickle
import struct
from typing import Any, get_args

import msgspec
import pytest

from lxc_pool import errors
from lxc_pool.model import ContainerId, ContainerInfo, PoolStatus, ProfileStatus, State
from lxc_pool.wire import messages
from lxc_pool.wire.channel import MAX_MESSAGE, ProtocolError
from lxc_pool.wire.messages import (
    Abandon,
    Addresses,
    AwaitNetwork,
    AwaitWarm,
    Call,
    Confirm,
    ConsoleLog,
    Drain,
    Echo,
    Execute,
    Get,
    GetStatus,
    Hello,
    Inspect,
    Keep,
    ListContainers,
    LookForImages,
    Mount,
    Offer,
    Release,
    Renew,
    Resize,
    Resume,
    Shutdown,
    decode_call,
    decode_reply,
    encode_call,
    encode_failure,
    encode_result,
)

COUNTS: dict[str, Any] = dict.fromkeys(PoolStatus.__dataclass_fields__, 0)
PROFILE: dict[str, Any] = dict.fromkeys(ProfileStatus.__dataclass_fields__, 0) | {
    "image": "busybox:1",
    "last_error": None,
}
STATUS = PoolStatus(
    **COUNTS
    | {"running": True, "socket_path": "/s", "uptime": 0.5, "last_error": "words", "backoff": 0.25, "draining": False}
    | {
        "ledger": None,
        "configuration": "words",
        "disk_bound": "tmpfs",
        "profiles": {"default": ProfileStatus(**PROFILE)},
    }
)
INFO = ContainerInfo("c1", "default", State.LEASED, ContainerId("job", 1, 2), 3, 0, 1.5, 4, None)

EXCHANGES: list[tuple[Call, Any]] = [
    (Hello(1), 1),
    (Echo("x\0ü"), "x\0ü"),
    (GetStatus(), STATUS),
    (ListContainers(), (INFO, ContainerInfo("c2", "a", State.STUCK, None, None, None, 0.0, None, "why"))),
    (ListContainers(), ()),
    (AwaitWarm(3, 1.5), STATUS),
    (AwaitWarm(None, None), STATUS),
    (Get("r", ContainerId("job", 1, 2), 30.0, "default", None, None), Offer("c1", "default")),
    (Get("r", "job", None, "default", 5, 1.0), "none came free"),
    (Get("r", -5, 0.0, "default", None, None), Offer("c1", "default")),
    (Confirm("r"), INFO),
    (Confirm("r"), None),
    (Abandon("r"), None),
    (Release("c1"), None),
    (Inspect("c1"), INFO),
    (Addresses("c1"), ("10.0.3.5", "fd00::1")),
    (AwaitNetwork("c1", 2.5), ("10.0.3.5",)),
    (AwaitNetwork("c1", None), "it has no address"),
    (ConsoleLog("c1"), b"\x1b[0m\xff\0\r\n"),
    (Renew("c1", 5.0), None),
    (Keep("c1", 5.0), None),
    (Execute("c1", b"\x00\xff"), None),
    (Mount("c1", b"/mnt/\xff", True), None),
    (Resize(5), None),
    (Drain(), None),
    (Resume(), None),
    (LookForImages(), None),
    (Shutdown(1.0, True), None),
]


def flat(union: Any) -> set[type]:
    return {kind for part in get_args(union) for kind in ((part,) if isinstance(part, type) else flat(part))}


def test_every_call_is_tried_below() -> None:
    assert {type(call) for call, _ in EXCHANGES} == flat(messages.AnyCall)


@pytest.mark.parametrize(("call", "result"), EXCHANGES, ids=lambda value: type(value).__name__)
def test_a_call_and_its_result_arrive_as_they_were_sent(call: Call, result: object) -> None:
    assert decode_call(encode_call(call)) == call
    again = decode_reply(call, encode_result(result))
    assert again == result
    assert type(again) is type(result)


def test_an_id_keeps_its_type_on_the_way() -> None:
    for identity in (ContainerId("job", 1, 2), "7", 7, 2**64 - 1, -(2**63)):
        call = decode_call(encode_call(Get("r", identity, None, "p", None, None)))
        assert isinstance(call, Get)
        assert type(call.id) is type(identity)


GARBAGE = [
    b"",
    b"\xc1",
    b"hello",
    b"\xff" * 100,
    pickle.dumps(("0", "create", ("PoolService",), {})),
    msgspec.msgpack.encode(None),
    msgspec.msgpack.encode([]),
    msgspec.msgpack.encode({"type": "echo", "text": "x"}),
    msgspec.msgpack.encode(["__init__", "x"]),
    msgspec.msgpack.encode(["result", "x"]),
    msgspec.msgpack.encode(["echo"]),
    msgspec.msgpack.encode(["echo", 5]),
    msgspec.msgpack.encode(["echo", b"x"]),
    msgspec.msgpack.encode(["echo", "x", "y"]),
    msgspec.msgpack.encode(["resize", "5"]),
    msgspec.msgpack.encode(["resize", 1.5]),
    msgspec.msgpack.encode(["get", "r", ["a", "b", "c"], 1.0, "default", None, None]),
    msgspec.msgpack.encode(["get", "r", {}, 1.0, "default", None, None]),
    msgspec.msgpack.encode(["get", "r", "x", "1", "default", None, None]),
    msgspec.msgpack.encode(["shutdown", 1.0, 1]),
    encode_call(Echo("x"))[:-1],
    encode_call(Echo("x")) + b"x",
    b"\x92\xa4echo\xa2\xff\xfe",  # a string that is not UTF-8
    b"\x92\xa4echo\xdb" + struct.pack("!I", 2**32 - 1),  # a string of 4 GiB that does not come
    b"\xdd" + struct.pack("!I", 2**32 - 1),  # so many elements
]


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_what_is_no_call_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a call of this protocol"):
        decode_call(body)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1x", b"\x92\xa4echo\x91", b"\x97\xa3get\xa1r\x91"])
def test_nesting_as_deep_as_a_message_is_large_is_refused(opening: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_call(opening + b"\x91" * (MAX_MESSAGE - len(opening)))


REPLIES = [
    b"",
    b"\xc1",
    msgspec.msgpack.encode(["result"]),
    msgspec.msgpack.encode(["result", {}]),
    msgspec.msgpack.encode(["failure", "ValueError"]),
    msgspec.msgpack.encode(["failure", 5, "x"]),
    encode_result("no number"),
    encode_result([1, 2]),
    b"\x91" * 100_000,
    msgspec.msgpack.encode(["result"])[:-7] + b"\x92\xa6result" + b"\x91" * 100_000,
]


@pytest.mark.parametrize("body", REPLIES, ids=range(len(REPLIES)))
def test_what_is_no_reply_to_the_call_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a reply of this protocol"):
        decode_reply(Hello(1), body)


DECLARED = [
    TypeError,
    ValueError,
    *(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LxcPoolError)),
]


@pytest.mark.parametrize("kind", DECLARED)
def test_a_declared_error_arrives_with_its_type_and_message(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^words: ü$") as caught:
        decode_reply(Echo("x"), encode_failure(kind("words: ü")))
    assert type(caught.value) is kind


class Imposter(ValueError):
    """Derives from a declared error."""


Undeclared = type("ValueError", (RuntimeError,), {})


@pytest.mark.parametrize("error", [KeyError("k"), OSError(5, "io"), Imposter("k"), Undeclared("k")])
def test_an_undeclared_error_arrives_as_ours_to_answer_for(error: Exception) -> None:
    with pytest.raises(errors.InternalError, match="please report it") as caught:
        decode_reply(Echo("x"), encode_failure(error))
    assert type(error).__name__ in str(caught.value)


def test_an_error_that_this_side_does_not_know_is_an_internal_one() -> None:
    with pytest.raises(errors.InternalError, match="from the future"):
        decode_reply(Echo("x"), msgspec.msgpack.encode(["failure", "NewError", "from the future"]))


def test_an_error_never_names_a_class_that_is_not_declared() -> None:
    for kind in ("SystemExit", "KeyboardInterrupt", "builtins.OSError", "__class__", ""):
        with pytest.raises(errors.InternalError):
            decode_reply(Echo("x"), msgspec.msgpack.encode(["failure", kind, "words"]))


def test_the_words_of_an_error_are_sent_however_long_or_strange_they_are() -> None:
    with pytest.raises(ValueError, match=r"x{1000}") as caught:
        decode_reply(Echo("x"), encode_failure(ValueError("x" * (MAX_MESSAGE + 1))))
    assert len(str(caught.value)) < MAX_MESSAGE // 10
    with pytest.raises(errors.ImageError, match=r"name \\udcff"):
        decode_reply(Echo("x"), encode_failure(errors.ImageError("name \udcff")))


@pytest.mark.parametrize("call", [Resize(2**64), Get("r", "x", 1.0, "p", 10**30, None), Echo("\ud800")])
def test_what_can_not_be_encoded_is_a_wrong_argument(call: Call) -> None:
    with pytest.raises(ValueError, match=r"64 bits|surrogates"):
        encode_call(call)
