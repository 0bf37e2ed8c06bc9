"""Filters of system calls, which a process and all that it starts have for good; and that of containers.

Workers put it on, and their containers begin with it: liblxc would compile and load it anew in each start, which is
0.4 ms of that (measured). libseccomp compiles it, as it does for liblxc. Supervisors of commands can't have it on: who
is filtered may not read the filters of others.


Source: seccomp(2), seccomp_init(3), seccomp_rule_add(3), libseccomp 2.5.4, include/seccomp.h.in.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from lxc_pool.errors import BackendError

REFUSED: Final = (
    *("kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module"),
    "open_by_handle_at",
    *("add_key", "request_key", "keyctl"),
)
"""As a kernel refuses what it was built without (ENOSYS); an umount2(2) by force is refused, too (EACCES)."""

_UMOUNT, _FLAGS, _MNT_FORCE = "umount2", 1, 1
"""That call, which of its arguments are its flags, and the flag."""

_LIBRARY = "libseccomp.so.2"

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVS_FIRST = 3  # SCMP_FLTATR_CTL_NNP
_MASKED_EQUAL = 7  # SCMP_CMP_MASKED_EQ
_UNKNOWN = -1  # __NR_SCMP_ERROR

_COMPATIBLE = {"x86_64": (0x40000003, 0x4000003E), "aarch64": (0x40000028,)}
"""AUDIT_ARCH_* of the other system calls that programs of an architecture's kernel can make: i386 and x32; arm. Who
makes those of another one is killed."""

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
"""Source: Linux include/uapi/linux/{prctl,seccomp}.h."""

_libc = ctypes.PyDLL(None, use_errno=True)  # it keeps the GIL: forks of a process with one thread call it
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def compiled() -> bytes:
    """Return the filter, as `install` takes it.

    Raises:
        BackendError: libseccomp is not there, or refuses.
    """
    library = _library()
    context = library.seccomp_init(_ALLOW)
    if not context:
        raise BackendError(f"{_LIBRARY} can't begin a filter")
    descriptor = os.memfd_create("filter", os.MFD_CLOEXEC)
    try:
        _check(library.seccomp_attr_set(context, _NO_NEW_PRIVS_FIRST, 0), "seccomp_attr_set")
        for architecture in _COMPATIBLE.get(os.uname().machine, ()):
            _check(library.seccomp_arch_add(context, architecture), "seccomp_arch_add")
        by_force = _Comparison(_FLAGS, _MASKED_EQUAL, _MNT_FORCE, _MNT_FORCE)
        _refuse(library, context, _UMOUNT, errno.EACCES, by_force)
        for call in REFUSED:
            _refuse(library, context, call, errno.ENOSYS)
        _check(library.seccomp_export_bpf(context, descriptor), "seccomp_export_bpf")
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        library.seccomp_release(context)
        os.close(descriptor)


def install(code: bytes) -> None:
    """Filter the system calls of this process, and of all that it starts, from now on.

    It takes CAP_SYS_ADMIN in this process's user namespace, or no_new_privs.

    Args:
        code: Instructions of classic BPF, over struct seccomp_data.

    Raises:
        OSError: The kernel refused.
    """
    program = _Program(len(code) // 8, code)
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_SECCOMP): {os.strerror(number)}")


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise BackendError(f"{error} (Debian: `apt-get install libseccomp2`)") from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
    library.seccomp_arch_add.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    library.seccomp_rule_add_array.argtypes = (
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint),
        ctypes.POINTER(_Comparison),
    )
    library.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    library.seccomp_release.restype = None
    library.seccomp_release.argtypes = (ctypes.c_void_p,)
    return library


def _refuse(library: ctypes.CDLL, context: int, call: str, number: int, *conditions: _Comparison) -> None:
    """Have a system call end with an error, where all conditions hold."""
    known = library.seccomp_syscall_resolve_name(call.encode())
    if known == _UNKNOWN:
        raise BackendError(f"{_LIBRARY} does not know {call}: it is older than 2.4")
    array = (_Comparison * len(conditions))(*conditions)
    _check(library.seccomp_rule_add_array(context, _ERRNO | number, known, len(conditions), array), call)


def _check(result: int, call: str) -> None:
    if result < 0:
        raise BackendError(f"{_LIBRARY}, {call}: {os.strerror(-result)}")
