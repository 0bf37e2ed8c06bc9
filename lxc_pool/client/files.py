"""Files and trees into a container, and out of it.

 push: tree_source ── frames ──► Inside ──► files-in: tree_sink, in the container
 pull: tree_sink ◄─── frames ─── Inside ◄── files-out: tree_source, in the container

Both halves run the same code (`execution.tree_source`, `execution.tree_sink`); each side opens its own files only. What
comes out of a container is taken for hostile: every frame is checked, and counted before anything is made of it.
"""

from __future__ import annotations

import errno
import os
import posixpath
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lxc_pool.client.caller import check_timeout
from lxc_pool.client.inside import Cut, Inside, Late, Launch
from lxc_pool.execution import trees
from lxc_pool.execution.frames import DONE, FAILED, FrameError, FrameReader, FrameWriter, StreamEnd, read_failure
from lxc_pool.execution.operations import MERGE, PARENTS
from lxc_pool.execution.protocol import ExecRequest, check_user
from lxc_pool.execution.tree_sink import Policy, TreeSink
from lxc_pool.execution.tree_source import send

MAX_BYTES = 1 << 30
"""What `pull` takes at most unless told otherwise. Origin: a container may write half of it by default."""

MAX_ENTRIES = 100_000
"""Files, directories and links that `pull` takes at most. Origin: a guess; a Debian minbase system has 10 000."""

PULL_TIMEOUT = 600.0
"""Seconds that `pull` takes at most. Origin: a guess; `MAX_BYTES` take some seconds."""

MAX_NAMED = 1 << 20
"""Bytes of the paths of what was left out that are kept. Origin: a guess, more than anybody reads."""

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Progress = Callable[[int, int], object]
"""Called with the bytes and the entries copied so far."""


class Copied(NamedTuple):
    """What has been copied.

    Attributes:
        path: Where it is now.
        byte_count: Bytes of all files, holes included.
        entry_count: Files, directories and links.
        skipped: Paths of the devices, fifos and sockets that were left out: of the source if pushed, within it if
            pulled. `MAX_NAMED` bytes of them at most: who makes them may make many.
    """

    path: str
    byte_count: int
    entry_count: int
    skipped: tuple[str, ...] = ()


class _CallbackError(Exception):
    """The caller's own callback has raised: not to be taken for a file's error."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class _Count:
    """Count what is copied, tell the caller, and stop what is too much."""

    def __init__(
        self, progress: Progress | None, source: str = "", max_bytes: int | None = None, max_entries: int | None = None
    ) -> None:
        self.byte_count = self.entry_count = 0
        self.skip_count = 0
        self.names: list[str] = []
        self._name_bytes = 0
        self._progress = progress
        self._source = source
        self._max_bytes = max_bytes
        self._max_entries = max_entries

    def moved(self, count: int) -> None:
        """Count bytes."""
        self.byte_count += count
        if self._max_bytes is not None and self.byte_count > self._max_bytes:
            raise OSError(errno.EFBIG, f"more than max_bytes={self._max_bytes} bytes", self._source)
        self._tell()

    def entered(self) -> None:
        """Count an entry."""
        self.entry_count += 1
        if self._max_entries is not None and self.entry_count > self._max_entries:
            raise OSError(errno.EFBIG, f"more than max_entries={self._max_entries} entries", self._source)
        self._tell()

    def skipped(self, path: bytes) -> None:
        """Take note of what is left out."""
        self.skip_count += 1
        self._name_bytes += len(path)
        if self._name_bytes <= MAX_NAMED:
            self.names.append(os.fsdecode(path))

    def _tell(self) -> None:
        if self._progress is not None:
            try:
                self._progress(self.byte_count, self.entry_count)
            except Exception as exc:  # noqa: BLE001 - whatever it is, the caller gets it
                raise _CallbackError(exc) from None


def push(
    launch: Launch,
    src: Path,
    dst: Path,
    *,
    owner: str | int | None = None,
    parents: bool = False,
    dirs_exist_ok: bool = False,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> Copied:
    """Copy *src*, a file or directory of this side, into the container; see `Container.push`."""
    source, destination = os.fsencode(src), _inside(dst)
    wanted = check_user(owner)
    check_timeout("timeout", timeout)
    name = os.path.basename(os.path.abspath(source))
    options = (PARENTS if parents else "") + (MERGE if dirs_exist_ok else "")
    request = ExecRequest.for_operation("files-in", destination, name, options, wanted or "")
    count = _Count(progress)
    with _names_as_text(), _conversation(launch, request, timeout, _text(destination), source) as inside:
        frames = FrameReader(inside.read)
        try:
            writer = FrameWriter(inside.write)
            send(source, writer, count)
            inside.check()  # before the last word, after which it is there
            writer.done()
        except Cut:
            pass  # it says why
        kind, body = frames.next()
        if kind == FAILED:
            raise read_failure(body)
        if kind != DONE:
            raise FrameError(f"a frame of kind {kind} as an answer")
        path = _text(bytes(body))
        inside.finish()
    return Copied(path, count.byte_count, count.entry_count, tuple(count.names))


def pull(
    launch: Launch,
    src: Path,
    dst: Path,
    *,
    max_bytes: int | None = MAX_BYTES,
    max_entries: int | None = MAX_ENTRIES,
    parents: bool = False,
    dirs_exist_ok: bool = False,
    timeout: float | None = PULL_TIMEOUT,
    progress: Progress | None = None,
) -> Copied:
    """Copy *src*, a file or directory of the container, to this side; see `Container.pull`."""
    source, destination = _inside(src), os.fsencode(dst)
    check_timeout("timeout", timeout)
    for what, most in (("max_bytes", max_bytes), ("max_entries", max_entries)):
        check_timeout(what, most)
    name = posixpath.basename(posixpath.normpath(source))
    request = ExecRequest.for_operation("files-out", source)
    count = _Count(progress, _text(source), max_bytes, max_entries)
    with _names_as_text():
        place = trees.find_place(destination, name, parents=parents)
        try:
            with _conversation(launch, request, timeout, _text(source)) as inside:
                policy = Policy(floor=0o700, merge=dirs_exist_ok, anonymous=True)
                TreeSink(place, FrameReader(inside.read), policy, count).receive()
                inside.finish()
        finally:
            os.close(place.directory)
    entries = count.entry_count - count.skip_count
    return Copied(os.fsdecode(place.path), count.byte_count, entries, tuple(count.names))


@contextmanager
def _conversation(
    launch: Launch, request: ExecRequest, timeout: float | None, path: str, local: bytes | None = None
) -> Iterator[Inside]:
    """Have a process inside, and let what ends the conversation be an error that callers know.

    Raises:
        TimeoutError: *timeout* seconds have passed; *path* is named.
        FileNotFoundError: There is no *local*, if that is given.
        ExecFailed: The process could not begin, or was killed.
        OSError: What came makes no sense (EPROTO).
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    inside = None
    if local is not None:
        os.stat(local)  # before anything is begun
    try:
        inside = Inside(launch, request, deadline)
        yield inside
    except Late:
        raise TimeoutError(errno.ETIMEDOUT, f"not copied within {timeout:g} s", path) from None
    except (StreamEnd, Cut):
        if inside is None:
            raise
        raise inside.why_it_ended() from None
    except FrameError as exc:
        raise OSError(errno.EPROTO, f"what the container sent is no tree: {exc}", path) from None
    except _CallbackError as exc:
        raise exc.error from None
    finally:
        if inside is not None:
            inside.close()


@contextmanager
def _names_as_text() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if isinstance(exc.filename, bytes):
            exc.filename = os.fsdecode(exc.filename)
        raise


def _inside(path: Path) -> bytes:
    """Return an absolute path of the container: there, all begins at the root."""
    encoded = os.fsencode(path)
    return b"/" + encoded if encoded and not encoded.startswith(b"/") else encoded


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
