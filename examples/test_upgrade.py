"""From one release to the next, and not back."""

from __future__ import annotations

from machine import Machine


def test_an_upgrade_keeps_the_messages_and_restarts_the_service(machine: Machine) -> None:
    """Messages of 1.0 have no time; those posted after the upgrade do."""
    machine.install("1.0")
    machine.post("old")
    before = machine.sh("cat /run/board.pid")
    machine.install("2.0")
    assert machine.version() == "2.0"
    assert machine.sh("cat /run/board.pid") != before
    machine.post("new")
    (old, new) = (line.split(" ", 1) for line in machine.messages())
    assert old == ["0", "old"]
    assert new[1] == "new"
    assert abs(int(new[0]) - int(machine.sh("date +%s"))) < 60


def test_an_upgrade_of_a_stopped_service(machine: Machine) -> None:
    """It need not run to be upgraded."""
    machine.install("1.0")
    machine.post("old")
    assert machine.service("stop") == 0
    machine.install("2.0")
    assert machine.messages() == ["0 old"]


def test_messages_are_converted_once(machine: Machine) -> None:
    """Installing 2.0 again adds no second time."""
    machine.install("1.0")
    machine.post("old")
    machine.install("2.0")
    machine.install("2.0")
    assert machine.messages() == ["0 old"]


def test_a_downgrade_is_refused_and_the_newer_release_runs_on(machine: Machine) -> None:
    """1.0 does not know the format of 2.0, and says so before it touches anything."""
    machine.install("2.0")
    machine.post("hello")
    files = machine.files()
    done = machine.try_sh(machine.unpack("1.0") + "/install")
    assert done.returncode == 1
    assert "format 2" in done.stderr
    assert machine.files() == files
    assert machine.version() == "2.0"
