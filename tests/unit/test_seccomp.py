"""The seccomp policy of containers, as the kernel would run it; `security/test_inside.py` shows what comes of it."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from lxc_pool.backend.lxc.engine import LxcBackend
from lxc_pool.backend.protocol import Blueprint
from lxc_pool.config import ProfileConfig
from lxc_pool.errors import BackendError, StartFailed
from lxc_pool.host import seccomp
from lxc_pool.images.store import Image

X86_64, I386, ARM = 0xC000003E, 0x40000003, 0x40000028
X32 = 0x40000000
ALLOW, KILL = 0x7FFF0000, 0x00000000
ENOSYS, EACCES = 0x00050000 | errno.ENOSYS, 0x00050000 | errno.EACCES

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
"""Source: Linux include/uapi/linux/bpf_common.h."""


def verdict(code: bytes, architecture: int, number: int, *arguments: int) -> int:
    """Run a filter of the kinds of instructions that libseccomp makes; return what it says to a system call."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("<HBBI", code))
    counter = accumulator = 0
    while True:
        kind, if_true, if_false, operand = instructions[counter]
        counter += 1
        if kind == LOAD:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif kind == AND:
            accumulator &= operand
        elif kind == EQUAL:
            counter += if_true if accumulator == operand else if_false
        elif kind == AT_LEAST:
            counter += if_true if accumulator >= operand else if_false
        else:
            assert kind == RETURN, hex(kind)
            return int(operand)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
@pytest.mark.parametrize(
    ("architecture", "number", "arguments", "expected"),
    [
        *((X86_64, number, (), ENOSYS) for number in (246, 320, 175, 313, 176, 304, 248, 249, 250)),
        *((X86_64, X32 | number, (), ENOSYS) for number in (175, 176, 248, 249, 250, 304, 313, 320, 528)),
        *((I386, number, (), ENOSYS) for number in (283, 128, 350, 129, 342, 286, 287, 288)),
        (X86_64, 166, (0, 1), EACCES),
        (X86_64, 166, (0, 3), EACCES),
        (X86_64, 166, (0, 2), ALLOW),
        (X86_64, X32 | 166, (0, 1), EACCES),
        (I386, 52, (0, 1), EACCES),
        (I386, 52, (0, 2), ALLOW),
        (X86_64, 165, (), ALLOW),
        (X86_64, 0, (), ALLOW),
        (I386, 3, (), ALLOW),
        (ARM, 3, (), KILL),
    ],
)
def test_what_nothing_in_a_container_may_call_is_refused_however_it_is_called(
    architecture: int, number: int, arguments: tuple[int, ...], expected: int
) -> None:
    assert verdict(seccomp.compiled(), architecture, number, *arguments) == expected


def test_without_libseccomp_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_LIBRARY", "libnothing.so.2")
    with pytest.raises(BackendError, match="apt-get install libseccomp2"):
        seccomp.compiled()


def test_a_call_that_libseccomp_does_not_know_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "REFUSED", ("kexec_load", "launch_rockets"))
    with pytest.raises(BackendError, match="does not know launch_rockets"):
        seccomp.compiled()


def test_a_process_that_is_not_filtered_makes_no_container(tmp_path: Path) -> None:
    image = Image("busybox", "20240101-000000-000000-000000", tmp_path, 0, 0.0, "sha256:")
    with pytest.raises(StartFailed, match="no seccomp policy"):
        LxcBackend(tmp_path).create(Blueprint("c1", ProfileConfig("default", 1), image, 0.0))
    assert list(tmp_path.iterdir()) == []
