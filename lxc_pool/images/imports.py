"""Make an image of something foreign: a directory, a tar archive, an OCI layout, an archive of `docker save`."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import stat
from pathlib import Path

from lxc_pool.errors import ImageError
from lxc_pool.images import archive, program, tree
from lxc_pool.images.builders import Builder, Report
from lxc_pool.images.init import check_bootable
from lxc_pool.images.unpack import Attributes, Unpacker
from lxc_pool.progress import Milestone, Milestones, part

_DOCKER_FIRST = re.compile(
    r"(\./)?([0-9a-f]{64}([/.].*)?|blobs(/.*)?|manifest\.json|repositories|oci-layout|index\.json)"
)
"""What the first member of an archive of `docker save` is called, and none of a root file system's."""

_INFLATED = 3
"""Bytes that come out of one of a layer's: gzip's for what systems consist of, measured with Debian: 2.6."""


def builder(source: str) -> Builder:
    """Return what makes an image of *source*.

    Args:
        source: A path; after that of an OCI layout may come `:` and a tag.

    Raises:
        ImageError: There is nothing of that name, or it is no directory and no archive.
        OSError: It can't be read.
    """
    path, tag = Path(source), ""
    if not path.exists() and ":" in source:
        before, _, tag = source.rpartition(":")
        path = Path(before)
    if not path.exists():
        raise ImageError(f"there is no {source}")
    if path.is_dir():
        if (path / "oci-layout").is_file():
            return functools.partial(_import_oci, "oci", tag, path)
        fill: Builder = functools.partial(_import_directory, path)
    elif _DOCKER_FIRST.fullmatch(archive.first_name(path)):
        return functools.partial(_import_oci, "docker-archive", tag, path)
    else:
        fill = functools.partial(_import_archive, path)
    if tag:
        raise ImageError(f"{path} is no OCI layout and no archive of docker's: it has no tags")
    return fill


def _import_archive(path: Path, rootfs: Path, report: Report) -> None:
    report(f"unpacking {path}")
    with Unpacker(rootfs) as unpacker:
        archive.unpack(path, unpacker, report)
        _tell(unpacker, report)
    check_bootable(rootfs)


def _import_directory(source: Path, rootfs: Path, report: Report) -> None:
    report(f"copying {source}")
    with Unpacker(rootfs) as unpacker:
        _Copy(source, unpacker, report).run()
        _tell(unpacker, report)
    check_bootable(rootfs)


def _import_oci(transport: str, tag: str, source: Path, rootfs: Path, report: Report) -> None:
    """Let skopeo bring any of the formats to one, umoci put the layers on each other, and take the result over."""
    program.need("skopeo", "skopeo umoci", f"importing {source}")
    program.need("umoci", "skopeo umoci", f"importing {source}")
    work = rootfs.with_name("work")
    work.mkdir(mode=0o700)
    try:
        link, layout, unpacked = work / "source", work / "layout", work / "rootfs"
        reading = part(report, 0.0, 0.1)
        reading(f"reading {source}")
        if source.is_file() and archive.is_compressed(source):
            # skopeo 1.9 fails with "unexpected EOF" on compressed ones (measured)
            archive.decompress(source, link, reading)
        else:
            link.symlink_to(source.absolute())  # whose name may have a colon, which means something here
        copying = part(report, 0.1, 0.4)
        copying("copying its layers")
        reference = f"{transport}:{link}{f':{tag}' if tag else ''}"
        program.run(
            ["skopeo", "--insecure-policy", "copy", reference, f"oci:{layout}:image"],
            room=work,
            heard=_silent,
            environment={"TMPDIR": str(work)},  # or it would leave its temporary files if it is killed
            looked=_Growth(layout, _size_of(link.resolve()), "copied {} MiB of its layers", copying).look,
        )
        putting = part(report, 0.4, 0.7)
        putting("putting its layers together")
        # Links to directories stay: a layer may have `bin/x` where an older one has `bin` → `usr/bin`.
        program.run(
            ["umoci", "raw", "unpack", "--keep-dirlinks", "--image", f"{layout}:image", str(unpacked)],
            room=work,
            heard=_silent,
            looked=_Growth(unpacked, _INFLATED * _size_of(layout), "put {} MiB together", putting).look,
        )
        _import_directory(unpacked, rootfs, part(report, 0.7, 1.0))
    finally:
        tree.remove(work)


class _Growth:
    """What another program has made so far, told as milestones: how much it is going to be, is a guess."""

    def __init__(self, directory: Path, expected: int, words: str, report: Report) -> None:
        """Make it.

        Args:
            directory: Where the program writes, once it has made that.
            expected: Bytes that are going to be there, about.
            words: What to say, with a place for the MiB that are there.
            report: Takes the milestones.
        """
        self._directory = directory
        self._expected = max(1, expected)
        self._words = words
        self._report = report
        self._milestones = Milestones()

    def look(self) -> None:
        """Look, and tell if there is more than when it was last told."""
        size = _size_of(self._directory)
        if self._milestones.is_due(min(1.0, size / self._expected)):
            self._report(Milestone(self._words.format(size >> 20), size / self._expected))


def _size_of(path: Path) -> int:
    """Return the bytes in a file, or in those of a directory that may change meanwhile; 0 if there is none."""
    if path.is_file():
        return path.stat().st_size
    size = 0
    for directory, _names, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):  # it has just been renamed
                size += os.lstat(os.path.join(directory, name)).st_size
    return size


class _Copy:
    """Copy the tree of a directory: the file system that it is on, and nothing that links in it lead to."""

    def __init__(self, source: Path, unpacker: Unpacker, report: Report) -> None:
        self._source = source
        self._unpacker = unpacker
        self._report = report
        self._names: dict[tuple[int, int], bytes] = {}

    def run(self) -> None:
        device = self._source.stat().st_dev
        pending = [b""]
        everything = sum(len(names) + len(files) for _, names, files in os.walk(self._source))
        milestones, count = Milestones(), 0
        while pending:
            relative = pending.pop()
            directory = _open_below(self._source, relative)
            try:
                for entry in sorted(os.listdir(directory)):
                    name = os.fsencode(entry)
                    path = relative + b"/" + name if relative else name
                    status = os.lstat(name, dir_fd=directory)
                    if self._one(directory, name, path, status) and status.st_dev == device:
                        pending.append(path)
                    count += 1
                    if milestones.is_due(done := count / max(count, everything)):
                        self._report(Milestone(f"copied {count} files", done))
            finally:
                os.close(directory)
        self._unpacker.finish()

    def _one(self, directory: int, name: bytes, path: bytes, status: os.stat_result) -> bool:
        """Copy one file; return whether it is a directory, which is still to be filled."""
        attributes = Attributes(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime)
        kind = stat.S_IFMT(status.st_mode)
        same = (status.st_dev, status.st_ino)
        if kind == stat.S_IFDIR:
            self._unpacker.directory(path, attributes)
        elif same in self._names:
            self._unpacker.hard_link(path, self._names[same])
        elif kind == stat.S_IFREG:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
            with open(descriptor, "rb", buffering=0) as file:
                now = os.fstat(descriptor)
                if not stat.S_ISREG(now.st_mode):
                    raise ImageError(f"{os.fsdecode(path)!r} was replaced while it was copied")
                self._unpacker.file(path, attributes, file, now.st_size)
            if status.st_nlink > 1:
                self._names[same] = path
        elif kind == stat.S_IFLNK:
            self._unpacker.symlink(path, os.readlink(name, dir_fd=directory), attributes)
        elif kind == stat.S_IFIFO:
            self._unpacker.fifo(path, attributes)
        else:
            self._unpacker.leave_out("sockets" if kind == stat.S_IFSOCK else "device nodes")
        return kind == stat.S_IFDIR


def _open_below(source: Path, relative: bytes) -> int:
    """Open a directory of the tree without following a link that has taken its place meanwhile."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(source, flags)
    for name in relative.split(b"/") if relative else ():
        try:
            inner = os.open(name, flags | os.O_NOFOLLOW, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def _tell(unpacker: Unpacker, report: Report) -> None:
    for what, count in unpacker.notes.items():
        report(f"left out {count} {what}")


def _silent(_line: str) -> None:
    """Take what skopeo and umoci say: it goes into the error if they fail."""
