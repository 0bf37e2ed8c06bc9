"""A command takes on the walls of init, its AppArmor profile too; what the kernel says was recorded on Debian 12."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from lxc_pool.execution import confinement, namespaces
from lxc_pool.execution.confinement import Changes, Confinement, Reading
from tests.support.processes import in_child


def read(monkeypatch: pytest.MonkeyPatch, said: str | None) -> Confinement:
    """Read this process's own walls, as if /proc said that of AppArmor; None: it has no such file."""
    genuine = confinement._read

    def answer(path: str) -> str:
        if not path.endswith("/attr/apparmor/current"):
            return genuine(path)
        if said is None:
            raise FileNotFoundError(path)
        return said

    monkeypatch.setattr(confinement, "_read", answer)
    walls = Reading(os.getpid()).result()
    assert walls is not None
    return walls


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("lxc-container-default-cgns (enforce)\n", "lxc-container-default-cgns"),
        ("lxc-container-default-cgns (complain)\n", "lxc-container-default-cgns"),
        ("/usr/bin/a program (of mine) (enforce)\n", "/usr/bin/a program (of mine)"),
        ("unconfined\n", None),
        ("", None),
        (None, None),
    ],
)
def test_a_command_is_executed_under_the_profile_of_init(
    monkeypatch: pytest.MonkeyPatch, said: str | None, label: str | None
) -> None:
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(confinement, "_write", lambda path, text: written.append((path, text)))
    read(monkeypatch, said).apply_outside(Changes((), None))
    assert written == ([] if label is None else [("/proc/self/attr/apparmor/exec", f"exec {label}")])


def test_a_profile_that_can_not_be_put_on_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: str, _text: str) -> None:
        raise FileNotFoundError("no such profile")

    monkeypatch.setattr(confinement, "_write", refuse)
    with pytest.raises(FileNotFoundError):
        read(monkeypatch, "lxc-container-default-cgns (enforce)\n").apply_outside(Changes((), None))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_nothing_that_lends_rights_is_taken_inside() -> None:
    """Neither a session keyring of the host's, nor capabilities that a program has without asking for them."""

    def session_keyring() -> int:
        return int(libc.syscall(ctypes.c_long(namespaces._KEYCTL or -1), *map(ctypes.c_long, (0, -3, 0))))

    def apply() -> tuple[bool, list[str]]:
        namespaces.new_session_keyring()  # the host's
        before = session_keyring()
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capget(header, data)
        data[2] = data[1]
        libc.capset(header, data)
        libc.prctl(47, 2, 0, 0, 0)  # PR_CAP_AMBIENT_RAISE, CAP_CHOWN
        lent = capabilities()[1]
        walls.apply_inside()
        return before < 0 or session_keyring() != before, [lent, *capabilities()]

    def capabilities() -> list[str]:
        status = Path("/proc/self/status").read_text("ascii")
        return [status.partition(f"{name}:\t")[2].split("\n")[0].lstrip("0") for name in ("CapInh", "CapAmb")]

    libc = ctypes.CDLL(None)
    walls = Confinement(0, False, (), False, (), (), "0", None)
    assert in_child(apply) == (True, ["1", "", ""])
