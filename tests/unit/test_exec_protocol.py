"""The messages about commands, and what is checked before a request leaves the client."""

from __future__ import annotations

import os
import pickle
import signal
import struct
from pathlib import PurePosixPath
from typing import Any

import pytest

from lxc_pool.execution import packets
from lxc_pool.execution.protocol import (
    MAX_EVENT,
    MAX_REQUEST,
    ExecRequest,
    Exited,
    Failed,
    KillTree,
    ProtocolError,
    Signal,
    Started,
    decode_event,
    decode_order,
)


@pytest.mark.parametrize(
    "request_",
    [
        ExecRequest.create(["true"]),
        ExecRequest.create(["sh", "-c", "", "ä", "\n"], {"A": "", "B": "=ü"}, "/tmp", "root:wheel"),
        ExecRequest.create([b"\xff\xfe", PurePosixPath("x")], {b"K": b"\xff"}, b"/\xff", 1000),
        ExecRequest.create("program"),
        ExecRequest.create(["x"] * 5000, {str(n): "v" * 100 for n in range(3000)}),
    ],
)
def test_a_request_survives_the_way(request_: ExecRequest) -> None:
    assert ExecRequest.decode(request_.encode()) == request_
    assert pickle.loads(pickle.dumps(request_)) == request_  # noqa: S301 - our own


def test_defaults() -> None:
    assert ExecRequest.create(["a"]) == (("a",), {}, "/", None, False, None)
    assert ExecRequest.create(iter(["a", "b"])).argv == ("a", "b")
    assert ExecRequest.create(PurePosixPath("/bin/x")).argv == ("/bin/x",)
    assert ExecRequest.create(["a"], user=0).user == "0"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([],), ValueError),
        ((["a\0"],), ValueError),
        ((["\ud800"],), ValueError),
        (([1],), TypeError),
        (([None],), TypeError),
        ((3,), TypeError),
        ((None,), TypeError),
        ((["a"], {"A": 1}), TypeError),
        ((["a"], {"A\0": "x"}), ValueError),
        ((["a"], {"A=": "x"}), ValueError),
        ((["a"], {"": "x"}), ValueError),
        ((["a"], [("A", "b")]), TypeError),
        ((["a"], None, 3), TypeError),
        ((["a"], None, "/a\0b"), ValueError),
        ((["a"], None, None, True), TypeError),
        ((["a"], None, None, 1.5), TypeError),
        ((["a"], None, None, b"root"), TypeError),
        ((["a"], None, None, ""), ValueError),
        ((["a"], None, None, ":x"), ValueError),
        ((["a"], None, None, "x:"), ValueError),
        ((["a"], None, None, "a:b:c"), ValueError),
        ((["a"], None, None, "a\nb"), ValueError),
        ((["a"], None, None, -1), ValueError),
        ((["a"], None, None, 2**32 - 1), ValueError),
        ((["a"], None, None, f"0:{2**32}"), ValueError),
        ((["a", "x" * MAX_REQUEST],), ValueError),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_sent(
    arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        ExecRequest.create(*arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 100,
        b"y" * (MAX_REQUEST + 1),
        struct.pack("<4sIII", b"lxe1", 0, 0, 0) + b"/\0",
        struct.pack("<4sIII", b"lxe1", 2**32 - 1, 2**32 - 1, 0) + b"/\0\0a",
        struct.pack("<4sIII", b"lxe1", 1, 0, 2) + b"/\0\0a",
        struct.pack("<4sIII", b"lxe1", 1, 1, 0) + b"/\0\0a\0\0x",
        struct.pack("<4sIII", b"lxe1", 1, 1, 0) + b"/\0\0a\0A=B\0x",
        struct.pack("<4sIII", b"lxe1", 1, 0, 1) + b"/\0a:b:c\0a",
    ],
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ExecRequest.decode(data)


@pytest.mark.parametrize(
    "event", [Started(2**31 - 1), Failed(2, "exec", "ä"), Failed(0, "kill", ""), Exited(255), Exited(-signal.SIGKILL)]
)
def test_events(event: Started | Failed | Exited) -> None:
    assert decode_event(event.encode()) == event
    assert type(decode_event(event.encode())) is type(event)


def test_a_long_text_is_cut() -> None:
    assert len(Failed(1, "enter", "x" * 10_000).encode()) == MAX_EVENT


@pytest.mark.parametrize("order", [Signal(15), Signal(0), KillTree()])
def test_orders(order: Signal | KillTree) -> None:
    assert type(decode_order(order.encode())) is type(order)
    assert decode_order(order.encode()) == order


@pytest.mark.parametrize("data", [b"", b"\1", b"\2", b"\2\0\0\0\0\x63", b"\7\0\0\0\0", b"\4\0\0\0\0", b"\3" * 9])
def test_what_is_no_event_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_event(data)


@pytest.mark.parametrize("data", [b"", b"\4", Signal(65).encode(), Signal(-1).encode(), Started(1).encode()])
def test_what_is_no_order_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_order(data)


@pytest.mark.parametrize("size", [0, 1, packets.INLINE, packets.INLINE + 1, MAX_REQUEST])
def test_a_packet_carries_any_payload_and_descriptors(size: int) -> None:
    ours, theirs = packets.pair()
    read, write = os.pipe()
    with ours, theirs, open(read, "rb"), open(write, "wb"):
        payload = os.urandom(size)
        packets.send(ours, payload, [read, write])
        packet = packets.receive(theirs)
        assert packet is not None
        assert packet[0] == payload
        assert [os.fstat(fd).st_ino for fd in packet[1]] == [os.fstat(read).st_ino, os.fstat(write).st_ino]
        assert not any(os.get_inheritable(fd) for fd in packet[1])
        for fd in packet[1]:
            os.close(fd)
        ours.close()
        assert packets.receive(theirs) is None


def test_a_bad_packet_leaves_no_descriptor() -> None:
    ours, theirs = packets.pair()
    read, write = os.pipe()
    with ours, theirs, open(read, "rb") as reader:
        for junk in (b"?", b"m?", b"i" * (packets.INLINE + 10)):
            packets._send(ours, junk, [write])
            with pytest.raises(ProtocolError):
                packets.receive(theirs)
        packets._send(ours, b"m", [])
        with pytest.raises(ProtocolError):
            packets.receive(theirs)
        packets._send(ours, b"i", [write] * 30)
        with pytest.raises(ProtocolError):
            packets.receive(theirs)
        os.close(write)
        assert reader.read() == b""
