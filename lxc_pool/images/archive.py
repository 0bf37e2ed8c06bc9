"""Read tar archives, which may be hostile, into an `Unpacker`."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import resource
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lxc_pool.errors import ImageError
from lxc_pool.images import program
from lxc_pool.images.builders import Report
from lxc_pool.images.unpack import Attributes, Unpacker
from lxc_pool.progress import Milestone, Milestones

_MAGIC = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""How compressed files begin. Source: RFC 1952, the .xz file format, RFC 8878."""

_CHUNK = 1 << 18

_MEMORY = 1 << 30
"""Bytes that reading an archive may take beside what we have. A guess: xz -9 takes 65 MiB, names and maps little."""

_XZ_MEMORY = 256 << 20
_MOST_HEADER = 1 << 20
"""Bytes of one extended header: longer ones are read into memory as a whole. A guess: paths take 4 KiB."""

_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def is_compressed(path: Path) -> bool:
    """Tell whether a file begins as one that we can decompress.

    Raises:
        OSError: It can't be read.
    """
    with open(path, "rb") as file:
        return file.read(6).startswith(tuple(_MAGIC))


def first_name(path: Path) -> str:
    """Return the name of an archive's first member, empty if there is none.

    Raises:
        ImageError: It is no tar archive, or damaged.
        OSError: It can't be read.
    """
    with _opened(path) as (archive, _read):
        member = archive.next()
        return "" if member is None else member.name


def unpack(path: Path, unpacker: Unpacker, report: Report) -> None:
    """Unpack a tar archive, which may be compressed with gzip, xz or zstd.

    Raises:
        ImageError: It is no tar archive, cut short or damaged, has a member that would end up elsewhere, or the disk is
            too full.
        OSError: It can't be read, or the disk fails.
    """
    count = 0
    milestones = Milestones()
    with _opened(path) as (archive, read):
        while (member := archive.next()) is not None:
            _unpack_member(archive, member, unpacker)
            archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
            count += 1
            if milestones.is_due(done := read()):
                report(Milestone(f"unpacked {count} files", done))
        if not getattr(archive, "lxc_pool_complete", False):
            raise ImageError(f"{path} is cut short or damaged after {count} files")
    unpacker.finish()


def decompress(path: Path, target: Path, report: Report) -> None:
    """Write what a compressed file holds, or a copy of one that is not, to the new file *target*.

    Raises:
        ImageError: It is damaged, or the disk too full.
        OSError: It can't be read or written.
    """
    try:
        milestones = Milestones()
        with _decompressed(path) as (stream, read), open(target, "xb") as file:
            while chunk := stream.read(_CHUNK):
                program.check_room(target.parent)
                file.write(chunk)
                if milestones.is_due(done := read()):
                    report(Milestone(f"decompressed {file.tell() >> 20} MiB", done))
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise ImageError(f"{path} is damaged: {error}") from error


def _unpack_member(archive: tarfile.TarFile, member: tarfile.TarInfo, unpacker: Unpacker) -> None:
    path = _bytes(member.name)
    try:
        attributes = Attributes(int(member.mode), int(member.uid), int(member.gid), float(member.mtime))
    except (ValueError, OverflowError, TypeError) as error:
        raise ImageError(f"{member.name!r} has attributes that are no numbers: {error}") from error
    if member.isdir():
        unpacker.directory(path, attributes)
    elif member.isreg():
        content = archive.extractfile(member)
        if content is None or member.size < 0:
            raise ImageError(f"{member.name!r} has no content")
        with content:
            unpacker.file(path, attributes, cast("BinaryIO", content), member.size)
    elif member.issym():
        unpacker.symlink(path, _bytes(member.linkname), attributes)
    elif member.islnk():
        unpacker.hard_link(path, _bytes(member.linkname))
    elif member.isfifo():
        unpacker.fifo(path, attributes)
    elif member.isdev():
        unpacker.leave_out("device nodes")
    else:
        raise ImageError(f"{member.name!r} is of the unknown kind {member.type!r}")


def _bytes(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ImageError(f"{name!r} is no file name") from error


class _Member(tarfile.TarInfo):
    """A header that is refused when it is unreasonable, and that tells the end of an archive from damage."""

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        """Look at a header before anything behind it is read.

        Source: CPython Lib/tarfile.py: "The entry point is _proc_member() which can be overridden in a subclass". Newer
        releases, Debian's python3.11 3.11.2-6+deb12u9 among them, pass over an override of `frombuf`.
        """
        if self.type in _HEADERS and not 0 <= self.size <= _MOST_HEADER:
            raise ImageError(f"a header claims {self.size} bytes")
        return cast("tarfile.TarInfo", super()._proc_member(tarfile_))  # type: ignore[misc]  # the stubs lack it

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the stubs lack it
            # For tarfile, a header that is cut short or damaged is an end like this one.
            tarfile_.lxc_pool_complete = True  # type: ignore[attr-defined]  # there is no other way to tell the caller
            raise


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[tarfile.TarFile, Callable[[], float]]]:
    """Open an archive as a stream; turn whatever is wrong with it into an ImageError.

    Beside it comes what tells how much of the file has been read, from 0 to 1.
    """
    with contextlib.ExitStack() as stack:
        try:
            stream, read = stack.enter_context(_decompressed(path))
            stack.enter_context(_bounded_memory())
            yield stack.enter_context(tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member, errorlevel=2)), read
        except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, RecursionError) as error:
            raise ImageError(f"{path} is no tar archive, or damaged: {error}") from error
        except MemoryError as error:
            raise ImageError(f"{path} takes more than {_MEMORY >> 20} MiB of memory to read") from error


@contextlib.contextmanager
def _decompressed(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], float]]]:
    # Without a buffer: zstd goes on with the descriptor from where we are.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        start = file.read(6)
        file.seek(0)
        size = os.fstat(file.fileno()).st_size

        def read() -> float:
            # The kernel's position, which zstd moves too: it has this descriptor.
            return os.lseek(file.fileno(), 0, os.SEEK_CUR) / size if size else 0.0

        match next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None):
            case "gzip":
                yield cast("BinaryIO", io.BufferedReader(_Inflated(file, _Gzip), _CHUNK)), read
            case "xz":
                yield cast("BinaryIO", io.BufferedReader(_Inflated(file, _Xz), _CHUNK)), read
            case "zstd":
                with _unzstd(file, path) as stream:
                    yield stream, read
            case _:
                yield file, read


@contextlib.contextmanager
def _unzstd(file: IO[bytes], path: Path) -> Iterator[BinaryIO]:
    """Decompress with the program: Python has no zstd before 3.14."""
    program.need("zstd", "zstd", f"unpacking {path}")
    with subprocess.Popen(["zstd", "-dcq"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as zstd:
        assert zstd.stdout is not None
        assert zstd.stderr is not None
        try:
            yield cast("BinaryIO", zstd.stdout)
            if not zstd.stdout.read(_CHUNK) and (said := zstd.stderr.read(1000)):
                raise ImageError(f"{path} is damaged: {said.decode(errors='replace').strip()}")
        finally:
            zstd.kill()


class _Gzip:
    """zlib's decompressor with the interface of lzma's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, most)


class _Xz:
    """lzma's decompressor, with a limit to the memory that a file may ask for."""

    def __init__(self) -> None:
        self._inner = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return self._inner.needs_input

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._inner.decompress(data, most)


class _Inflated(io.RawIOBase):
    """What a compressed file holds, a bounded piece at a time, across the streams that it may consist of."""

    def __init__(self, file: IO[bytes], kind: type[_Gzip | _Xz]) -> None:
        self._file = file
        self._kind = kind
        self._inner: _Gzip | _Xz = kind()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._inner.eof:
                data = self._inner.unused_data or self._file.read(_CHUNK)
                if not data.strip(b"\0"):
                    return 0  # padding, or the end
                self._inner = self._kind()
            elif self._inner.needs_input:
                data = self._file.read(_CHUNK)
                if not data:
                    raise EOFError("it is cut short")
            piece = self._inner.decompress(data, len(buffer))
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let this process take only so much more memory: no header of an archive shall claim all of the machine's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
