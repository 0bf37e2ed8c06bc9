"""Users and groups, from files that a container may have written as it likes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lxc_pool.execution import identity
from lxc_pool.execution.entry import environment, execute
from lxc_pool.execution.identity import Identity, UnknownUser, read_capped, resolve

PASSWD = b"""\
# a comment
root:x:0:0:root:/root:/bin/sh
broken:x:zero:0::/:
short:x:1
alice:x:1000:1000:Alice:/home/alice:/bin/sh
alice:x:1001:1001:a second one:/home/other:/bin/sh
nohome:x:1002:50:::
huge:x:99999999999:0::/:
\xff\xfe:x:1003:1003::/\xff:
2000:x:1004:1004::/digits:
"""
GROUP = b"""\
root:x:0:
audio:x:29:alice,bob
alice:x:1000:
video:x:44:bob,alice
again:x:44:alice
broken:x:many:alice
"""


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (None, Identity(0, 0, (0,), "root", "/root")),
        ("root", Identity(0, 0, (0,), "root", "/root")),
        ("alice", Identity(1000, 1000, (1000, 29, 44), "alice", "/home/alice")),
        ("1000", Identity(1000, 1000, (1000, 29, 44), "alice", "/home/alice")),
        ("1000:1000", Identity(1000, 1000, (1000,), "alice", "/home/alice")),
        ("alice:video", Identity(1000, 44, (44,), "alice", "/home/alice")),
        ("nohome", Identity(1002, 50, (50,), "nohome", "/")),
        ("4242", Identity(4242, 4242, (4242,), "4242", "/")),
        ("4242:7", Identity(4242, 7, (7,), "4242", "/")),
        ("2000", Identity(1004, 1004, (1004,), "2000", "/digits")),
        ("\udcff\udcfe", Identity(1003, 1003, (1003,), "\udcff\udcfe", "/\udcff")),
    ],
)
def test_resolve(user: str | None, expected: Identity) -> None:
    assert resolve(user, PASSWD, GROUP) == expected


@pytest.mark.parametrize("user", ["nobody", "broken", "short", "huge", "alice:none", "alice:broken"])
def test_unknown_names(user: str) -> None:
    with pytest.raises(UnknownUser, match="the container has no"):
        resolve(user, PASSWD, GROUP)


def test_a_container_without_files_has_root() -> None:
    assert resolve(None, b"", b"") == Identity(0, 0, (0,), "root", "/root")


def test_only_the_beginning_of_a_regular_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MAX_FILE", 10)
    (tmp_path / "long").write_bytes(b"0123456789abc")
    assert read_capped(str(tmp_path / "long")) == b"0123456789"
    os.mkfifo(tmp_path / "fifo")
    for other in ("fifo", "missing", "."):
        assert read_capped(str(tmp_path / other)) == b""


def test_the_environment_is_the_defaults_and_what_was_asked_for() -> None:
    user = resolve("alice", PASSWD, GROUP)
    assert environment({"HOME": "/x", "Ä": "ö"}, user) == {
        b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        b"HOME": b"/x",
        b"USER": b"alice",
        b"LANG": b"C.UTF-8",
        "Ä".encode(): "ö".encode(),
    }


def test_a_program_is_looked_for_as_execvpe_does(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tool").write_text("not executable")
    env = {b"PATH": f"/nowhere:{tmp_path}/a:{tmp_path}/a/tool:".encode()}
    with pytest.raises(PermissionError):
        execute(("tool",), env)
    for name in ("missing", "", "/no/such"):
        with pytest.raises(FileNotFoundError):
            execute((name,), env)
    with pytest.raises(FileNotFoundError):
        execute(("tool",), {})
