"""Board comes, stays as the administrator wants it, and goes without a trace."""

from __future__ import annotations

import pytest
from machine import Machine

VERSIONS = ["1.0", "2.0"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_new_installation_runs_at_once(machine: Machine, version: str) -> None:
    """The service answers, and holds no message."""
    machine.install(version)
    assert machine.version() == version
    assert machine.messages() == []


def test_nobody_but_root_can_install(machine: Machine) -> None:
    """Another user is told so, and nothing has changed."""
    install = machine.unpack("2.0") + "/install"
    before = machine.files()
    done = machine.try_sh(install, user="user")
    assert (done.returncode, done.stderr) == (1, "board: only root can install it\n")
    assert machine.files() == before


def test_the_messages_are_for_the_service_alone(board: Machine) -> None:
    """Neither another user reads them, nor may the service write its own programs."""
    assert "Permission denied" in board.try_sh("cat /var/lib/board/messages", user="user").stderr
    assert board.sh("find /srv/board -user board") == ""


def test_installing_again_changes_nothing(board: Machine) -> None:
    """The same release over itself: files as before, messages kept, one daemon."""
    board.post("hello")
    files, messages = board.files(), board.messages()
    board.install(board.version())
    assert board.files() == files
    assert board.messages() == messages
    assert board.daemons() == 1


def test_the_administrators_configuration_survives(board: Machine) -> None:
    """A changed port is the port after the next installation, too."""
    version = board.version()
    board.sh("sed -i s/8080/9090/ /etc/board.conf")
    board.install(version)
    assert board.sh("wget -q -O - http://127.0.0.1:9090/version").strip() == version


@pytest.mark.parametrize("version", VERSIONS)
def test_a_purge_leaves_the_system_as_it_was(machine: Machine, version: str) -> None:
    """Files, modes, owners, users and processes are those of before."""
    before, users = machine.files(), machine.sh("cat /etc/passwd /etc/group")
    machine.install(version)
    machine.post("hello")
    machine.sh("board-remove --purge")
    assert machine.files() == before
    assert machine.sh("cat /etc/passwd /etc/group") == users
    assert machine.daemons() == 0


def test_a_removal_keeps_the_messages_for_the_next_installation(board: Machine) -> None:
    """What was posted before the removal is there after it."""
    board.post("hello")
    version, messages = board.version(), board.messages()
    board.sh("board-remove")
    board.install(version)
    assert board.messages() == messages
