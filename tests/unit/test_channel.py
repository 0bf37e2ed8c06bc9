"""Frames: those of the standard library, with a cap, a deadline, and descriptors that never leak."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from lxc_pool.wire.channel import MAX_DESCRIPTORS, MAX_MESSAGE, Channel, ProtocolError, credentials
from tests.support.descriptors import few_descriptors
from tests.support.processes import open_descriptors


@contextlib.contextmanager
def pair(*, accept_descriptors: bool = False) -> Iterator[tuple[socket.socket, Channel]]:
    """Yield a raw socket and a channel at the other end; nothing is left of either afterwards."""
    before = open_descriptors()
    raw, sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Channel(sock, accept_descriptors=accept_descriptors)
    try:
        yield raw, channel
    finally:
        raw.close()
        channel.close()
    assert open_descriptors() == before


def frame(body: bytes) -> bytes:
    return struct.pack("!i", len(body)) + body


@pytest.mark.parametrize("body", [b"", b"x", b"y" * 16379, b"z" * 100_000])
def test_speaks_the_standard_librarys_frames_in_both_directions(body: bytes) -> None:
    with pair() as (raw, channel):
        connection = Connection(os.dup(raw.fileno()))
        writer = threading.Thread(target=channel.send_bytes, args=(body,))
        writer.start()
        assert connection.recv_bytes() == body
        writer.join()
        writer = threading.Thread(target=connection.send_bytes, args=(body,))
        writer.start()
        assert channel.recv_bytes() == body
        writer.join()
        connection.close()


def test_messages_that_come_in_one_piece_are_taken_one_by_one() -> None:
    with pair() as (raw, channel):
        raw.sendall(frame(b"one") + frame(b"") + frame(b"three"))
        assert channel.recv_bytes() == b"one"
        assert channel.pending
        assert [channel.recv_bytes(), channel.recv_bytes()] == [b"", b"three"]
        assert not channel.pending


def test_a_message_that_comes_byte_by_byte_is_whole_at_the_end() -> None:
    with pair() as (raw, channel):

        def dribble() -> None:
            for byte in frame(b"slow"):
                raw.send(bytes([byte]))

        writer = threading.Thread(target=dribble)
        writer.start()
        assert channel.recv_bytes() == b"slow"
        writer.join()


def test_a_message_larger_than_allowed_is_not_sent_at_all() -> None:
    with pair() as (raw, channel):
        with pytest.raises(ValueError, match="larger than"):
            channel.send_bytes(bytes(MAX_MESSAGE + 1))
        channel.close()
        assert raw.recv(1) == b""


@pytest.mark.parametrize("length", [MAX_MESSAGE + 1, 2**31 - 1, -1, -(2**31)])
def test_a_claimed_length_out_of_bounds_is_refused_before_anything_is_read(length: int) -> None:
    with pair() as (raw, channel):
        raw.sendall(struct.pack("!i", length))
        with pytest.raises(ProtocolError, match=f"claims {length} bytes"):
            channel.recv_bytes()


def test_the_cap_may_be_lower_and_is_inclusive() -> None:
    with pair() as (raw, channel):
        raw.sendall(frame(b"four") + frame(b"fives"))
        assert channel.recv_bytes(4) == b"four"
        with pytest.raises(ProtocolError, match="at most 4"):
            channel.recv_bytes(4)


def test_the_end_between_messages_is_an_end_and_within_one_a_fault() -> None:
    with pair() as (raw, channel):
        raw.sendall(frame(b"whole"))
        raw.shutdown(socket.SHUT_WR)
        assert channel.recv_bytes() == b"whole"
        with pytest.raises(EOFError):
            channel.recv_bytes()
    for part in (b"\0\0", frame(b"cut off")[:-1]):
        with pair() as (raw, channel):
            raw.sendall(part)
            raw.shutdown(socket.SHUT_WR)
            with pytest.raises(ProtocolError, match="in the middle of a message"):
                channel.recv_bytes()


def test_a_deadline_that_has_passed_stops_both_directions() -> None:
    with pair() as (_raw, channel):
        channel.deadline = time.monotonic() - 1
        with pytest.raises(TimeoutError):
            channel.recv_bytes()
        with pytest.raises(TimeoutError):
            channel.send_bytes(b"x")


def test_a_silent_peer_is_waited_for_until_the_deadline_only() -> None:
    with pair() as (_raw, channel):
        channel.deadline = time.monotonic() + 0.02
        with pytest.raises(TimeoutError):
            channel.recv_bytes()


def test_a_peer_that_does_not_read_is_waited_for_until_the_deadline_only() -> None:
    with pair() as (_raw, channel):
        channel.deadline = time.monotonic() + 0.02
        with pytest.raises(TimeoutError):
            channel.send_bytes(bytes(MAX_MESSAGE))


def test_a_message_that_has_begun_has_its_own_time_however_long_the_first_byte_may_take() -> None:
    with pair() as (raw, channel):
        raw.sendall(frame(b"never all of it")[:7])
        with pytest.raises(TimeoutError):
            channel.recv_bytes(rest_within=0.02)


def test_without_a_deadline_again_there_is_no_limit() -> None:
    with pair() as (raw, channel):
        channel.deadline = time.monotonic() - 1
        raw.sendall(frame(b"a"))
        with pytest.raises(TimeoutError):
            channel.recv_bytes()
        channel.deadline = None
        assert channel.recv_bytes() == b"a"
        channel.send_bytes(b"b")
        assert raw.recv(16) == frame(b"b")


@pytest.mark.parametrize("seconds", [3e6, 1e10, math.inf])
def test_a_deadline_beyond_what_a_socket_can_count_is_as_good_as_one(seconds: float) -> None:
    with pair() as (raw, channel):
        channel.deadline = time.monotonic() + seconds
        channel.send_bytes(b"x")
        raw.sendall(frame(b"y"))
        assert channel.recv_bytes() == b"y"


def test_descriptors_arrive_beside_their_message_and_are_the_takers_to_close() -> None:
    with pair(accept_descriptors=True) as (raw, channel):
        reader, writer = os.pipe()
        sender = Channel(raw.dup())
        sender.send_bytes(b"take it", [writer])
        sender.close()
        os.close(writer)
        assert channel.recv_bytes() == b"take it"
        (taken,) = channel.take_descriptors()
        assert channel.take_descriptors() == []
        os.write(taken, b"through")
        assert os.read(reader, 10) == b"through"
        assert not os.get_inheritable(taken)
        os.close(taken)
        os.close(reader)


def test_descriptors_that_nobody_took_are_closed_with_the_channel() -> None:
    with pair(accept_descriptors=True) as (raw, channel):
        socket.send_fds(raw, [frame(b"x")], [0] * MAX_DESCRIPTORS)
        channel.recv_bytes()


def test_more_descriptors_than_a_message_may_have_are_refused_and_closed() -> None:
    with pair(accept_descriptors=True) as (raw, channel):
        for byte in frame(b"x"):
            socket.send_fds(raw, [bytes([byte])], [0])
        with pytest.raises(ProtocolError, match="more than 4 descriptors"):
            channel.recv_bytes()


@pytest.mark.parametrize("room", [0, 1])
def test_descriptors_that_there_is_no_room_for_are_missed_and_the_others_closed(room: int) -> None:
    with pair(accept_descriptors=True) as (raw, channel):
        socket.send_fds(raw, [frame(b"x")], [0, 1])
        before = open_descriptors()
        with few_descriptors(room):
            assert channel.recv_bytes() == b"x"
        with pytest.raises(OSError, match="Too many open files"):
            channel.take_descriptors()
        assert open_descriptors() == before
        socket.send_fds(raw, [frame(b"y")], [0])
        assert channel.recv_bytes() == b"y"
        assert len(channel._descriptors) == 1


def test_a_flood_of_descriptors_at_once_leaves_none_behind() -> None:
    with pair(accept_descriptors=True) as (raw, channel):
        socket.send_fds(raw, [frame(b"x")], [0] * 200)
        with contextlib.suppress(ProtocolError):
            channel.recv_bytes()
        assert len(channel._descriptors) <= MAX_DESCRIPTORS + 1


def test_descriptors_that_are_not_asked_for_do_not_arrive() -> None:
    with pair() as (raw, channel):
        before = open_descriptors()
        socket.send_fds(raw, [frame(b"x")], [0])
        assert channel.recv_bytes() == b"x"
        assert channel.take_descriptors() == []
        assert open_descriptors() == before


def test_a_frame_that_goes_out_in_parts_is_whole_and_its_descriptors_come_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_byte(sock: socket.socket, buffers: list[bytes], fds: list[int], flags: int) -> int:
        return send(sock, [buffers[0][:1]], fds, flags)

    send = socket.send_fds
    with pair(accept_descriptors=True) as (raw, channel):
        monkeypatch.setattr(socket, "send_fds", one_byte)
        sender = Channel(raw.dup())
        sender.send_bytes(b"in parts", [0])
        sender.close()
        assert channel.recv_bytes() == b"in parts"
        assert len(channel._descriptors) == 1


def test_the_kernel_says_who_is_there() -> None:
    with pair() as (raw, channel):
        assert channel.peer == (os.getpid(), os.getuid(), os.getgid())
        assert credentials(raw) == channel.peer


def test_a_broken_off_connection_wakes_whoever_waits_on_it() -> None:
    with pair() as (_raw, channel):
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                channel.recv_bytes()
            except EOFError as error:
                caught.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        channel.break_off()
        waiter.join(30)
        assert caught


def test_closing_twice_or_breaking_off_what_is_closed_is_no_error() -> None:
    with pair() as (_raw, channel):
        assert not channel.closed
        assert channel.fileno() >= 0
        channel.close()
        channel.close()
        channel.break_off()
        assert channel.closed
