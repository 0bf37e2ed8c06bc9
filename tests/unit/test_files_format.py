"""Files as frames: what goes through unchanged, and what is refused."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lxc_pool.execution.frames import (
    CHUNK,
    DATA,
    DIRECTORY,
    DONE,
    END,
    FAILED,
    FILE,
    HOLE,
    LINK,
    SPECIAL,
    Entry,
    FrameError,
    FrameReader,
    FrameWriter,
    StreamEnd,
    read_entry,
    read_failure,
    read_length,
)
from lxc_pool.execution.protocol import ExecRequest, ProtocolError, is_operation


def reader(data: bytes, most: int = 1 << 20) -> FrameReader:
    """Return a reader of *data* that gets at most *most* bytes at once."""
    source = io.BytesIO(data)
    return FrameReader(lambda buffer: source.readinto(buffer[:most]))


def frame(kind: int, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<BI", kind, len(body) if length is None else length) + body


def head(name: bytes = b"", mode: int = 0o644) -> bytes:
    return struct.pack("<Iq", mode, 0) + name


class Written:
    def __init__(self) -> None:
        self.data = b""
        self.writer = FrameWriter(self._write)

    def _write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        self.data += b"".join(buffers)


@given(
    st.lists(st.one_of(st.binary(max_size=300), st.integers(1, 2**62), st.just(b"x" * CHUNK)), max_size=8),
    st.integers(1, 3 * CHUNK),
)
def test_a_file_survives_the_way_however_it_is_cut(parts: list[bytes | int], most: int) -> None:
    written = Written()
    written.writer.entry(Entry(FILE, b"name", 0o1234, 17))
    for part in parts:
        if isinstance(part, int):
            written.writer.hole(part)
        else:
            written.writer.data(memoryview(part))
    written.writer.end()
    written.writer.done(b"/there")
    frames = reader(
        written.data, max(most, 7) if sum(len(p) for p in parts if isinstance(p, bytes)) < 10_000 else CHUNK
    )
    kind, body = frames.next()
    assert read_entry(kind, body, root=False) == Entry(FILE, b"name", 0o1234, 17)
    for part in parts:
        kind, body = frames.next()
        if isinstance(part, int):
            assert (kind, read_length(body)) == (HOLE, part)
        else:
            assert (kind, bytes(body)) == (DATA, part)
    assert frames.next()[0] == END
    kind, body = frames.next()
    assert (kind, bytes(body)) == (DONE, b"/there")
    with pytest.raises(StreamEnd):
        frames.next()


def test_little_frames_are_gathered_and_long_ones_are_not_copied() -> None:
    calls: list[int] = []
    writer = FrameWriter(lambda buffers: calls.append(len(buffers)))
    for _ in range(100):
        writer.entry(Entry(LINK, b"l", 0o777, 0, b"target"))
    assert calls == []
    writer.data(memoryview(bytes(CHUNK)))
    writer.end()
    writer.flush()
    writer.flush()
    assert calls == [3, 1]


@pytest.mark.parametrize("name", [b"", b".", b"..", b"/", b"a/b", b"/etc/passwd", b"../x", b"a\0b", b"x" * 256])
@pytest.mark.parametrize("kind", [FILE, DIRECTORY, SPECIAL])
def test_a_name_that_leads_elsewhere_is_refused(kind: int, name: bytes) -> None:
    with pytest.raises(FrameError):
        read_entry(kind, memoryview(head(name)), root=False)


@pytest.mark.parametrize("name", [b"..", b"x/y", b".", b""])
def test_so_is_that_of_a_link(name: bytes) -> None:
    with pytest.raises(FrameError):
        read_entry(LINK, memoryview(head(name + b"\0target")), root=False)


@pytest.mark.parametrize("target", [b"", b"x" * 4096, b"a\0b"])
def test_a_target_that_no_link_has_is_refused(target: bytes) -> None:
    with pytest.raises(FrameError):
        read_entry(LINK, memoryview(head(b"l\0" + target)), root=False)


def test_the_first_entry_has_no_name() -> None:
    assert read_entry(FILE, memoryview(head()), root=True).name == b""
    with pytest.raises(FrameError):
        read_entry(FILE, memoryview(head(b"x")), root=True)


@pytest.mark.parametrize("name", [b"...", b" ", b"\n", b"\xff\xfe", b"-rf", b"a" * 255, b"\\"])
def test_a_strange_name_is_a_name(name: bytes) -> None:
    assert read_entry(FILE, memoryview(head(name)), root=False).name == name


@pytest.mark.parametrize(
    "data",
    [
        frame(0),
        frame(10),
        frame(255),
        frame(DATA, length=CHUNK + 1),
        frame(FILE, length=2**32 - 1),
        frame(END, length=1 << 20),
    ],
)
def test_a_frame_of_an_unknown_kind_or_an_excessive_length_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        reader(data).next()


def test_other_nonsense_is_refused() -> None:
    with pytest.raises(FrameError):
        read_entry(FILE, memoryview(b"short"), root=True)
    with pytest.raises(FrameError):
        read_entry(FILE, memoryview(head(b"x", 0o10000)), root=False)
    for body in (b"", b"1234567", struct.pack("<q", 0), struct.pack("<q", -1)):
        with pytest.raises(FrameError):
            read_length(memoryview(body))
    with pytest.raises(FrameError):
        read_failure(memoryview(b"x"))


@pytest.mark.parametrize("length", range(1, 30, 7))
def test_a_stream_that_is_cut_off_is_no_end(length: int) -> None:
    data = frame(FILE, head()) + frame(DATA, b"some words")
    frames = reader(data[:length])
    with pytest.raises(StreamEnd):
        _ = [frames.next() for _ in range(3)]


def test_a_failure_becomes_the_error_that_it_was() -> None:
    written = Written()
    written.writer.failed(2, b"/a/\xff", "No such file or directory")
    kind, body = reader(written.data).next()
    error = read_failure(body)
    assert kind == FAILED
    assert isinstance(error, FileNotFoundError)
    assert (error.errno, error.strerror, error.filename) == (2, "No such file or directory", "/a/\udcff")


def test_a_failure_without_a_number_is_a_wrong_value() -> None:
    written = Written()
    written.writer.failed(0, b"", "no user 'x'")
    assert str(read_failure(reader(written.data).next()[1])) == "no user 'x'"


def test_what_a_container_says_does_nothing_to_a_terminal() -> None:
    written = Written()
    written.writer.failed(5, b"/a", "\x1b]0;gotcha\x07\n")
    assert "\x1b" not in str(read_failure(reader(written.data).next()[1]))


@given(st.binary(max_size=400))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    frames = reader(data)
    try:
        while True:
            kind, body = frames.next()
            if kind in (FILE, DIRECTORY, LINK, SPECIAL):
                read_entry(kind, body, root=False)
            elif kind == HOLE:
                read_length(body)
            elif kind == FAILED:
                read_failure(body)
    except (FrameError, StreamEnd):
        pass


def test_an_operation_is_a_request() -> None:
    request = ExecRequest.for_operation("files-out", os.fsencode("/tmp/ä"))
    assert ExecRequest.decode(request.encode()) == request
    assert request.operation
    assert is_operation(request.encode())
    assert not is_operation(ExecRequest.create(["files-out"]).encode())
    assert not ExecRequest.decode(ExecRequest.create(["files-out"]).encode()).operation


def test_an_unknown_operation_is_refused() -> None:
    data = ExecRequest.for_operation("files-out", "/").encode().replace(b"files-out", b"files-rm!")
    with pytest.raises(ProtocolError, match="files-rm!"):
        ExecRequest.decode(data)
