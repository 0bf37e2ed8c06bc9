"""Files and trees as a stream of frames: the format in which they go through a pipe, in either direction.

 FILE name, DATA…, HOLE…, END                 a file; a hole is a length without bytes
 DIRECTORY name, (entries), END               a directory
 LINK name target · SPECIAL name              a symbolic link · what is not sent: a device, fifo or socket
 DONE | FAILED errno path text                how it ended; without one of them the stream was cut off

Names are single components, and the root's is empty: no frame can name anything outside the directory it stands in.
A reader believes nothing: the writer may be under the control of a hostile root. Why not tar: its names are paths, its
types are many, and each reader of it has had to unlearn both.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

FILE, DIRECTORY, LINK, SPECIAL, DATA, HOLE, END, DONE, FAILED = range(1, 10)
"""Kinds of frames."""

CHUNK = 256 * 1024
"""Bytes of a DATA frame at most. Origin: 64 KiB and 1 MiB were no quicker (measured, on a busy machine)."""

MAX_NAME = 255
"""Bytes of a name. Source: NAME_MAX of limits.h, which no Linux file system exceeds."""

MAX_TARGET = 4095
"""Bytes of a link's target. Source: PATH_MAX of limits.h, less the final NUL."""

_MAX_SMALL = 16 * 1024  # bytes of any other frame: two paths and a text
_BUFFERED = 64 * 1024  # bytes that are gathered before they are written
_HEADER = struct.Struct("<BI")
_ATTRIBUTES = struct.Struct("<Iq")  # permissions; time of modification in ns
_LENGTH = struct.Struct("<q")
_NUMBER = struct.Struct("<iI")  # errno, length of the path

Write = Callable[[Sequence[bytes | bytearray | memoryview]], object]
"""Writes all of the buffers."""

Read = Callable[[memoryview], int]
"""Fills a buffer from its beginning, as much as there is; returns 0 at the stream's end only."""


class FrameError(ValueError):
    """The stream is not one of frames, or has them in an order that makes no tree."""


class StreamEnd(EOFError):
    """The stream ended in the midst."""


class Entry(NamedTuple):
    """The head of a file, directory, link or special file.

    Attributes:
        kind: FILE, DIRECTORY, LINK or SPECIAL.
        name: Its name in the directory that it is in; empty for the root.
        mode: Permission bits, set-id and sticky included: 0 to 0o7777.
        mtime: Nanoseconds since the epoch.
        target: A link's.
    """

    kind: int
    name: bytes
    mode: int
    mtime: int
    target: bytes = b""


class FrameWriter:
    """Write frames; what is small is gathered until `flush`."""

    def __init__(self, write: Write) -> None:
        """Write by means of *write*."""
        self._write = write
        self._gathered = bytearray()

    def entry(self, entry: Entry) -> None:
        """Write the head of something."""
        body = _ATTRIBUTES.pack(entry.mode & 0o7777, entry.mtime) + entry.name
        if entry.kind == LINK:
            body += b"\0" + entry.target
        self._put(entry.kind, body)

    def data(self, data: memoryview) -> None:
        """Write at most `CHUNK` bytes of a file."""
        header = _HEADER.pack(DATA, len(data))
        if len(self._gathered) + len(data) < _BUFFERED:
            self._gathered += header
            self._gathered += data
        else:
            gathered, self._gathered = self._gathered, bytearray()
            self._write((gathered, header, data))

    def hole(self, length: int) -> None:
        """Write that *length* bytes of a file are zero, and need no space."""
        self._put(HOLE, _LENGTH.pack(length))

    def end(self) -> None:
        """Write that a file or directory is complete."""
        self._put(END, b"")

    def done(self, path: bytes = b"") -> None:
        """Write that all is well, and where it is, and flush."""
        self._put(DONE, path)
        self.flush()

    def failed(self, number: int, path: bytes, text: str) -> None:
        """Write what went wrong, and flush.

        Args:
            number: The errno, 0 if there is none.
            path: Of what.
            text: For people.
        """
        path = path[:MAX_TARGET]
        self._put(FAILED, _NUMBER.pack(number, len(path)) + path + text.encode("utf-8", "replace")[:MAX_TARGET])
        self.flush()

    def flush(self) -> None:
        """Write what has been gathered."""
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._write((gathered,))

    def _put(self, kind: int, body: bytes) -> None:
        self._gathered += _HEADER.pack(kind, len(body))
        self._gathered += body
        if len(self._gathered) >= _BUFFERED:
            self.flush()


class FrameReader:
    """Read frames, and check each."""

    def __init__(self, read: Read) -> None:
        """Read by means of *read*."""
        self._read = read
        self._buffer = memoryview(bytearray(_BUFFERED))
        self._start = self._end = 0

    def next(self) -> tuple[int, memoryview]:
        """Return the next frame's kind and body; the body is good until the next call.

        Raises:
            FrameError: It is none.
            StreamEnd: There is none, or not all of it.
        """
        self._need(_HEADER.size)
        kind, length = _HEADER.unpack_from(self._buffer, self._start)
        if not FILE <= kind <= FAILED or length > (CHUNK if kind == DATA else _MAX_SMALL):
            raise FrameError(f"a frame of kind {kind} and {length} bytes")
        self._need(_HEADER.size + length)
        first = self._start + _HEADER.size
        self._start = first + length
        return kind, self._buffer[first : self._start]

    def _need(self, count: int) -> None:
        """Have at least *count* bytes in the buffer."""
        have = self._end - self._start
        if have >= count:
            return
        if count > len(self._buffer):  # the first long frame: for what is small, most of that would be cleared in vain
            longer = memoryview(bytearray(2 * CHUNK))
            longer[:have] = self._buffer[self._start : self._end]
            self._buffer, self._start, self._end = longer, 0, have
        elif self._start + max(count, _BUFFERED) > len(self._buffer):
            self._buffer[:have] = self._buffer[self._start : self._end]
            self._start, self._end = 0, have
        while (have := self._end - self._start) < count:
            # of a long frame no more than is missing: what came beyond would have to be moved
            most = max(count - have, _BUFFERED - have)
            got = self._read(self._buffer[self._end : self._end + most])
            if not got:
                raise StreamEnd("the stream of files ended in the midst")
            self._end += got


def read_entry(kind: int, body: memoryview, *, root: bool) -> Entry:
    """Read the head of something.

    Raises:
        FrameError: It is none, or its name could lead elsewhere.
    """
    if len(body) < _ATTRIBUTES.size:
        raise FrameError("an entry without attributes")
    mode, mtime = _ATTRIBUTES.unpack_from(body)
    name, target = bytes(body[_ATTRIBUTES.size :]), b""
    if kind == LINK:
        name, _, target = name.partition(b"\0")
        if not 0 < len(target) <= MAX_TARGET or b"\0" in target:
            raise FrameError(f"a link {name!r} with the impossible target {target[:80]!r}")
    if root:
        if name:
            raise FrameError(f"the first entry has a name: {name[:80]!r}")
    elif name in (b"", b".", b"..") or b"/" in name or b"\0" in name or len(name) > MAX_NAME:
        raise FrameError(f"an entry with the impossible name {name[:80]!r}")
    if mode > 0o7777:
        raise FrameError(f"an entry with the impossible mode {mode:o}")
    return Entry(kind, name, mode, mtime, target)


def read_length(body: memoryview) -> int:
    """Read how long a hole is.

    Raises:
        FrameError: It is not.
    """
    if len(body) != _LENGTH.size:
        raise FrameError("a hole without a length")
    length: int = _LENGTH.unpack(body)[0]
    if length <= 0:
        raise FrameError(f"a hole of {length} bytes")
    return length


def read_failure(body: memoryview) -> Exception:
    """Read what went wrong, as the exception that says so: OSError with path, or ValueError if it has no errno.

    Raises:
        FrameError: It is not a failure.
    """
    if len(body) < _NUMBER.size:
        raise FrameError("a failure without a number")
    number, length = _NUMBER.unpack_from(body)
    path = bytes(body[_NUMBER.size : _NUMBER.size + length])
    told = bytes(body[_NUMBER.size + length :]).decode("utf-8", "replace")
    text = "".join(letter if letter.isprintable() else "?" for letter in told)  # it may reach a terminal
    if not number:
        return ValueError(text)
    return OSError(number, text or os.strerror(number), path.decode("utf-8", "surrogateescape"))
