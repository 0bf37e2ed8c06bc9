"""The system calls that Python 3.11 lacks, through ctypes.

`PyDLL` keeps the GIL over the call: the callers are single-threaded, and after `clone3` the child must find the
interpreter in the state the parent left it in. Source of the numbers: include/uapi/linux/ of Linux 6.1.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
from typing import NoReturn

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_CLONE_PIDFD = 0x00001000
_CLONE_INTO_CGROUP = 0x200000000
_SYS_CLONE3 = 435  # one number on every architecture since Linux 5.0's table was unified
_SYS_CLOSE_RANGE = 436
_SYS_OPENAT2 = 437
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280, "armv7l": 311, "i686": 288}
_KEYCTL = _SYS_KEYCTL.get(os.uname().machine)
_KEYCTL_JOIN_SESSION_KEYRING = 1

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

_PTRACE_DETACH = 17
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_PTRACE_SECCOMP_GET_FILTER = 0x420C
_WALL = 0x40000000
_MAX_FD = 2**32 - 1

_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_SYMLINKS = 0x04
_OPEN_HOW = struct.Struct("=QQQ")  # flags, mode, resolve
_STATFS_ROOM = 256  # bytes; struct statfs has 120 at most

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class _CloneArgs(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    ]


def setns(fd: int, flags: int) -> None:
    """Enter the namespaces *flags* of the process behind a pidfd, all or none (Linux 5.8).

    Raises:
        OSError: The kernel refused; ESRCH if the process has ended.
    """
    _check(_libc.setns(fd, flags), "setns")


def clone(cgroup: int | None) -> tuple[int, int]:
    """Fork; the child's v2 cgroup is the directory *cgroup*, with no migration.

    Python's fork hooks don't run: the child may make system calls and exec, no more.

    Returns:
        The child's pid and a pidfd; (0, -1) in the child.

    Raises:
        OSError: EAGAIN if a pids limit is reached, ENOSYS before Linux 5.7 or where a filter hides clone3(2).
    """
    pidfd = ctypes.c_int(-1)
    flags = _CLONE_PIDFD | (_CLONE_INTO_CGROUP if cgroup is not None else 0)
    args = _CloneArgs(flags=flags, pidfd=ctypes.addressof(pidfd), exit_signal=signal.SIGCHLD, cgroup=cgroup or 0)
    pid: int = _libc.syscall(
        ctypes.c_long(_SYS_CLONE3), ctypes.byref(args), ctypes.c_size_t(ctypes.sizeof(args))
    )  # errno is taken below, before anything else is called
    return _check(pid, "clone3"), pidfd.value if pid else -1


def close_all_except(keep: tuple[int, ...]) -> None:
    """Close every descriptor but those in *keep* (close_range(2), Linux 5.9)."""
    low = 0
    for fd in (*sorted(set(keep)), _MAX_FD + 1):
        if fd > low:
            call = (ctypes.c_long(_SYS_CLOSE_RANGE), ctypes.c_uint(low), ctypes.c_uint(fd - 1), ctypes.c_uint(0))
            _check(_libc.syscall(*call), "close_range")
        low = fd + 1


def open_on_same_mount(directory: int, name: bytes, flags: int) -> int:
    """Open *name* in *directory*, but no link, and nothing that is mounted over it (openat2(2), Linux 5.6).

    Raises:
        OSError: The kernel refused; EXDEV: something is mounted over it.
    """
    how = _OPEN_HOW.pack(flags, 0, _RESOLVE_NO_XDEV | _RESOLVE_NO_SYMLINKS)
    call = (ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(directory), name, how, ctypes.c_size_t(len(how)))
    return _check(_libc.syscall(*call), "openat2")


def file_system_type(fd: int) -> int:
    """Return the magic number of the file system that *fd* is on (fstatfs(2))."""
    room = ctypes.create_string_buffer(_STATFS_ROOM)
    _check(_libc.fstatfs(fd, room), "fstatfs")
    kind: int = struct.unpack_from("=I", room)[0]  # a long, of which a magic number takes 32 bits; s390x: those alone
    return kind


def set_undumpable() -> None:
    """Keep other processes without CAP_SYS_PTRACE on the host out of this one, until it executes a program."""
    _prctl(_PR_SET_DUMPABLE, 0)


def set_dumpable() -> None:
    """Undo `set_undumpable`; this process's files in /proc are then its own user's."""
    _prctl(_PR_SET_DUMPABLE, 1)


def die_with_parent(signum: int) -> None:
    """Have the kernel send *signum* to this process when its parent ends; it survives execve(2), not a set-uid one."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def set_no_new_privs() -> None:
    """Let no execve(2) of this process, or of its children, gain privileges."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def missing_capabilities(bounding: int) -> tuple[int, ...]:
    """Return the capabilities that the kernel knows and *bounding* lacks; see CapBnd in proc_pid_status(5)."""
    with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
        count = int(file.read()) + 1
    return tuple(capability for capability in range(count) if not bounding >> capability & 1)


def limit_capabilities(dropped: tuple[int, ...]) -> None:
    """Drop capabilities from the bounding set, and empty the inheritable set, so the ambient one: capabilities(7)."""
    for capability in dropped:
        _prctl(_PR_CAPBSET_DROP, capability)
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of bits 0-31, then of bits 32-63
    _check(_libc.capget(header, data), "capget")
    data[2] = data[5] = 0
    _check(_libc.capset(header, data), "capset")


def new_session_keyring() -> None:
    """Leave the host's session keyring for an empty one (keyctl(2)); a kernel without keys has none to leave."""
    if _KEYCTL is not None:
        _libc.syscall(ctypes.c_long(_KEYCTL), ctypes.c_long(_KEYCTL_JOIN_SESSION_KEYRING), None)


class Tracee:
    """A process that is being stopped, for its seccomp filters to be read.

    Source: ptrace(2), PTRACE_SECCOMP_GET_FILTER (Linux 4.4, CONFIG_CHECKPOINT_RESTORE).
    """

    def __init__(self, pid: int) -> None:
        """Tell process *pid* to stand still.

        Raises:
            OSError: It can't be traced; EPERM: somebody else does.
        """
        _check(_libc.ptrace(_PTRACE_SEIZE, pid, None, None), "ptrace(SEIZE)")
        self._pid = pid
        try:
            _check(_libc.ptrace(_PTRACE_INTERRUPT, pid, None, None), "ptrace(INTERRUPT)")
        except OSError:
            self.bury()
            raise

    def seccomp_filters(self) -> tuple[bytes, ...] | None:
        """Return the filters, oldest first, and let go of the process; None as long as it does not stand still.

        Raises:
            OSError: It has ended, or the kernel can't tell (EIO, ENOSYS, EMEDIUMTYPE).
        """
        pid, status = os.waitpid(self._pid, _WALL | os.WNOHANG)
        if not pid:
            return None
        if not os.WIFSTOPPED(status):
            raise ProcessLookupError(errno.ESRCH, "the process has ended")
        try:
            filters: list[bytes] = []
            while (code := _seccomp_filter(self._pid, len(filters))) is not None:
                filters.append(code)
            return tuple(filters)
        finally:
            _libc.ptrace(_PTRACE_DETACH, self._pid, None, None)

    def bury(self) -> None:
        """Take note of the end of the process, which its parent is not told of before."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, _WALL | os.WNOHANG)


def _seccomp_filter(pid: int, index: int) -> bytes | None:
    length = _libc.ptrace(_PTRACE_SECCOMP_GET_FILTER, pid, index, None)
    if length < 0 and ctypes.get_errno() == errno.ENOENT:  # no more of them
        return None
    code = ctypes.create_string_buffer(_check(length, "ptrace(SECCOMP_GET_FILTER)") * 8)
    _check(_libc.ptrace(_PTRACE_SECCOMP_GET_FILTER, pid, index, code), "ptrace(SECCOMP_GET_FILTER)")
    return code.raw


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) < 0:
        _raise(f"prctl({option})")


def _check(result: int, call: str) -> int:
    if result < 0:
        _raise(call)
    return result


def _raise(call: str) -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {os.strerror(number)}")
