"""Build the smallest base image: Debian's static busybox and a handful of files, nothing of the host bound in."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from lxc_pool.errors import ImageError

CANDIDATES = (Path("/bin/busybox"), Path("/usr/bin/busybox"), Path("/bin/busybox.static"))
"""Where distributions install it. Source: busybox-static of Debian 12 and of Alpine 3.18."""

_FIX = "install Debian's static one: apt-get install busybox-static"
_LIST_TIMEOUT = 10.0
"""Seconds for `busybox --list-full`, which takes 1 ms (measured)."""

_PT_INTERP = 3
"""The program header that names a dynamic loader. Source: elf(5)."""

_DIRECTORIES = {
    "": 0o755,
    "bin": 0o755,
    "dev": 0o755,
    "etc": 0o755,
    "home": 0o755,
    "mnt": 0o755,
    "proc": 0o555,
    "root": 0o700,
    "run": 0o755,
    "run/lock": 0o1777,
    "sbin": 0o755,
    "sys": 0o555,
    "tmp": 0o1777,
    "usr": 0o755,
    "usr/bin": 0o755,
    "usr/sbin": 0o755,
    "var": 0o755,
    "var/cache": 0o755,
    "var/lib": 0o755,
    "var/log": 0o755,
    "var/tmp": 0o1777,
}

_LINKS = {"etc/mtab": "../proc/self/mounts", "var/run": "../run", "var/lock": "../run/lock"}

_INITTAB = """\
# Nothing to start, nothing to respawn: the container is up as soon as init is, and idle until it is used.
# No shutdown entry: `sync` or `umount` would wait for the host's disks.
::restart:/sbin/init
::ctrlaltdel:/sbin/reboot
"""

_USERS = """\
root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
user:x:1000:1000:user:/home/user:/bin/sh
"""

_FILES: dict[str, tuple[int, str]] = {
    "etc/passwd": (0o644, _USERS),
    "etc/group": (0o644, "root:x:0:\ntty:x:5:\nnogroup:x:65534:\nuser:x:1000:\n"),
    "etc/shadow": (0o600, "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\nuser:*:19000:0:99999:7:::\n"),
    "etc/hosts": (0o644, "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
    "etc/nsswitch.conf": (0o644, "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"),
    "etc/profile": (0o644, "export PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin\n"),
    "etc/shells": (0o644, "/bin/sh\n/bin/ash\n"),
    "etc/inittab": (0o644, _INITTAB),
    "etc/resolv.conf": (0o644, ""),
}

_HOMES = {"home/user": (1000, 1000, 0o750)}


def build(rootfs: Path, report: Callable[[str], None], candidates: Sequence[Path] = CANDIDATES) -> None:
    """Fill the directory *rootfs* with a system that boots: busybox as every program, and as init.

    Args:
        rootfs: An existing, empty directory.
        report: Takes one line for each step.
        candidates: Where to look for the static busybox.

    Raises:
        ImageError: There is no static busybox, or it does not run.
        OSError: The directory can't be filled; building needs root, for the owner of `/home/user`.
    """
    source = find(candidates)
    report(f"copying {source}")
    content = source.read_bytes()
    for name, mode in _DIRECTORIES.items():
        directory = rootfs / name
        directory.mkdir(exist_ok=True)
        directory.chmod(mode)  # mkdir's mode would be cut by the umask
    _write(rootfs / "bin/busybox", 0o755, content)
    applets = _applets(source)
    for applet in applets:
        _link(rootfs, applet)
    for name, (mode, text) in _FILES.items():
        _write(rootfs / name, mode, text.encode())
    _write(rootfs / "etc/os-release", 0o644, _os_release(content).encode())
    for name, target in _LINKS.items():
        (rootfs / name).symlink_to(target)
    for name, (uid, gid, mode) in _HOMES.items():
        (rootfs / name).mkdir()
        (rootfs / name).chmod(mode)
        os.chown(rootfs / name, uid, gid)
    report(f"linked {len(applets)} programs")


def find(candidates: Sequence[Path] = CANDIDATES) -> Path:
    """Return the first of *candidates* that is a statically linked ELF program.

    Raises:
        ImageError: None is; the message says what each is instead, and what to install.
    """
    reasons = []
    for path in candidates:
        try:
            if is_static(path.read_bytes()):
                return path
            reasons.append(f"{path} is dynamically linked")
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
        except ValueError as error:
            reasons.append(f"{path}: {error}")
    raise ImageError(f"no static busybox ({'; '.join(reasons)}); {_FIX}")


def is_static(elf: bytes) -> bool:
    """Tell whether the program *elf* needs no dynamic loader: it has no PT_INTERP header.

    Raises:
        ValueError: These bytes are not an ELF program.

    Source: elf(5).
    """
    if elf[:4] != b"\x7fELF" or elf[4:5] not in (b"\1", b"\2") or elf[5:6] not in (b"\1", b"\2"):
        raise ValueError("not an ELF program")
    wide, order = elf[4] == 2, "<" if elf[5] == 1 else ">"
    try:
        (offset,) = struct.unpack_from(order + ("Q" if wide else "I"), elf, 32 if wide else 28)
        size, count = struct.unpack_from(order + "HH", elf, 54 if wide else 42)
        types = [struct.unpack_from(order + "I", elf, offset + index * size)[0] for index in range(count)]
    except struct.error as error:
        raise ValueError("a truncated ELF program") from error
    return _PT_INTERP not in types


def _applets(busybox: Path) -> tuple[PurePosixPath, ...]:
    """Ask *busybox* where it wants each of its names, relative to the root."""
    try:
        listing = subprocess.run(
            [busybox, "--list-full"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            env={},
            timeout=_LIST_TIMEOUT,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ImageError(f"{busybox} --list-full: {error}; {_FIX}") from error
    applets = tuple(PurePosixPath(line) for line in listing.splitlines() if line)
    if not {PurePosixPath("sbin/init"), PurePosixPath("bin/sh")} <= set(applets):
        raise ImageError(f"{busybox} has no init or no sh among its {len(applets)} programs; {_FIX}")
    return applets


def _link(rootfs: Path, applet: PurePosixPath) -> None:
    """Make *applet* a relative link to busybox, so that it also resolves inside *rootfs* from the host."""
    if applet.is_absolute() or ".." in applet.parts:
        raise ImageError(f"busybox names a program outside of the root: {applet}")
    link = rootfs / applet
    if link == rootfs / "bin/busybox":
        return
    if not link.parent.is_dir():
        link.parent.mkdir(parents=True)
        link.parent.chmod(0o755)
    link.symlink_to(os.path.relpath("bin/busybox", applet.parent))


def _os_release(content: bytes) -> str:
    found = re.search(rb"BusyBox v([0-9.]+)", content)
    version = found[1].decode() if found else "unknown"
    return f'NAME="BusyBox"\nID=busybox\nVERSION_ID={version}\nPRETTY_NAME="BusyBox {version}"\n'


def _write(path: Path, mode: int, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(mode)
