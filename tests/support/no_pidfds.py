"""A service for which the kernel has no pidfds: pidfd_open(2) is refused to it, its workers, and all that they start.

As older container engines do it: with a seccomp filter, which nothing below it can take off.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

from tests.support.real_service import Service

_PIDFD_OPEN = 434
"""On every architecture. Source: Linux include/uapi/asm-generic/unistd.h."""

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_LOAD_NUMBER, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
"""Source: Linux include/uapi/linux/{prctl,seccomp,filter,bpf_common}.h."""

_COMMAND = """\
import sys
from lxc_pool.cli.main import main
from tests.support.no_pidfds import refuse
refuse(int(sys.argv.pop(1)))
sys.exit(main())
"""


def refuse(number: int) -> None:
    """Have pidfd_open fail with the error *number* from now on, here and in all children."""
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (_LOAD_NUMBER, 0, 0, 0),
            (_JUMP_IF_EQUAL, 0, 1, _PIDFD_OPEN),
            (_RETURN, 0, 0, _ERRNO | number),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(header), 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class ServiceWithoutPidfds(Service):
    """A real service that gets none, and commands that get none."""

    def __init__(self, images: Path, number: int) -> None:
        super().__init__(images)
        self.number = number

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-c", _COMMAND, str(self.number), *super().command(*arguments)[3:]]
