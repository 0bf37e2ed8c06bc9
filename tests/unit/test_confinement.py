"""A command takes on the AppArmor profile of the container's init; what the kernel says was recorded on Debian 12."""

from __future__ import annotations

import os

import pytest

from lxc_pool.execution import confinement
from lxc_pool.execution.confinement import Changes, Confinement, Reading


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
