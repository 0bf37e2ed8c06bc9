"""A command's terminal: a pseudo-terminal of the container's own, whose master goes to the client.

 client's terminal ◄─ client ─► master ═══ slave ◄─► the command, whose controlling terminal it is
                      outside │                 inside

The caller's terminal never enters: what holds it can type into it (TIOCSTI). The pair is made by the process that
becomes the command, once it is inside, and with the rights of the container's root. The container decides what is at
/dev/pts; so what is opened there has to be devpts' own, and the supervisor looks at the master again, on the host,
before the client gets it. The slave is opened by its master (TIOCGPTPEER), not by a path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import termios

from lxc_pool.execution import namespaces

_DEVPTS = "/dev/pts"
_DEVPTS_MAGIC = 0x1CD1  # include/uapi/linux/magic.h
_MASTER_DEVICE = os.makedev(5, 2)  # Documentation/admin-guide/devices.txt: /dev/ptmx

# include/uapi/asm-generic/ioctls.h; powerpc encodes the direction otherwise.
_POWERPC = os.uname().machine.startswith("ppc")
_TIOCGPTN = 0x40045430 if _POWERPC else 0x80045430
_TIOCSPTLCK = 0x80045431 if _POWERPC else 0x40045431
_TIOCGPTPEER = 0x20005441 if _POWERPC else 0x5441
_IUTF8 = 0x4000  # include/uapi/asm-generic/termbits.h, and powerpc's
_INPUT_FLAGS = 0  # where tcgetattr has them


def open_pair() -> tuple[int, int]:
    """Open a new pseudo-terminal of the devpts at /dev/pts; return master and slave, not inheritable.

    Raises:
        OSError: There is none, something else is in its place, or it has no more of them.
    """
    directory = _open_devpts()
    try:
        master = namespaces.open_on_same_mount(
            directory, b"ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        )
    except OSError as exc:
        reason = "something is mounted over it" if exc.errno == errno.EXDEV else os.strerror(exc.errno or 0)
        raise OSError(exc.errno or errno.EIO, f"the container's {_DEVPTS}/ptmx: {reason}") from exc
    finally:
        os.close(directory)
    try:
        check_master(master)
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except BaseException:
        os.close(master)
        raise
    return master, slave


def check_master(fd: int) -> None:
    """Refuse what is not the master of a pseudo-terminal.

    Raises:
        OSError: It is not; strerror says so.
    """
    try:
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _MASTER_DEVICE:
            fcntl.ioctl(fd, _TIOCGPTN, bytes(4))  # a master alone has an answer
            return
    except OSError:
        pass
    raise OSError(errno.ENOTTY, "what the container has at /dev/pts/ptmx is no pseudo-terminal")


def prepare(slave: int, rows: int, columns: int, owner: int) -> None:
    """Make the terminal this process's own, of a size, and the device *owner*'s, in UTF-8 mode.

    The process has to lead a session that has no terminal. LANG is C.UTF-8: without IUTF8 the line discipline would
    rub out bytes, not characters.

    Raises:
        OSError: The kernel refused.
    """
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    termios.tcsetwinsize(slave, (rows, columns))
    modes = termios.tcgetattr(slave)
    modes[_INPUT_FLAGS] |= _IUTF8
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    if os.fstat(slave).st_uid != owner:
        os.fchown(slave, owner, -1)


def _open_devpts() -> int:
    """Open the container's /dev/pts, if it is a devpts: of anything else one can't know what opening it does."""
    try:
        directory = os.open(_DEVPTS, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise OSError(exc.errno or errno.EIO, f"the container's {_DEVPTS}: {exc.strerror}") from exc
    try:
        if namespaces.file_system_type(directory) != _DEVPTS_MAGIC:
            raise OSError(errno.ENODEV, f"the container has no devpts at {_DEVPTS}")
    except BaseException:
        os.close(directory)
        raise
    return directory
