"""A package with a systemd service: what administrators rely on, from its installation to its end."""

from __future__ import annotations

import re

import pytest
from server import Server

pytestmark = pytest.mark.lxc(profile="debian", timeout=60)


def test_it_runs_once_it_is_installed_and_from_then_on(tally: Server) -> None:
    """Nothing else has to be said: it is up, and will be after a boot."""
    assert tally.state() == "active"
    assert tally.sh("systemctl is-enabled tally") == "enabled\n"
    assert [tally.visit() for _ in range(3)] == [1, 2, 3]


def test_it_is_no_user_of_the_system_and_may_write_its_count_alone(tally: Server) -> None:
    """It has a user of the moment, and a file system that is read-only but for its state."""
    pid = tally.main_pid()
    assert tally.sh(f"stat -c %u /proc/{pid}") != "0\n"
    assert tally.sh("grep -c tally /etc/passwd || true") == "0\n"
    inside = f"nsenter --target {pid} --mount"
    assert "Read-only file system" in tally.try_sh(f"{inside} touch /etc/x /usr/x /var/x").stderr
    assert tally.sh(f"{inside} touch /var/lib/tally/x && ls /var/lib/tally") == "x\n"


@pytest.mark.parametrize("signal", ["TERM", "KILL", "SEGV"])
def test_whatever_ends_it_it_comes_back_and_counts_on(tally: Server, signal: str) -> None:
    """It is started again by systemd; no visitor is forgotten."""
    before = tally.main_pid()
    assert tally.visit() == 1
    tally.sh(f"kill -{signal} {before}")
    # Its pid first: until systemd has noticed, it takes the dead one for active, and in between there is none.
    again = (
        f"pid=$(systemctl show -P MainPID tally); [ $pid != 0 ] && [ $pid != {before} ] && systemctl is-active tally"
    )
    tally.sh(f"until {again}; do sleep 0.05; done")
    assert tally.visit() == 2


def test_stopped_means_stopped(tally: Server) -> None:
    """Nobody listens, and nobody starts it again."""
    tally.sh("systemctl stop tally")
    assert (tally.state(), tally.main_pid()) == ("inactive", 0)
    assert "Connection refused" in tally.try_sh("bash -c 'exec 3<>/dev/tcp/127.0.0.1/7070'").stderr


def test_a_port_that_it_may_not_have_is_said_in_the_journal(tally: Server) -> None:
    """The administrator's command fails, and the reason is where administrators look."""
    tally.sh("echo 'port = 80' >/etc/tally.conf")
    assert tally.try_sh("systemctl restart tally").returncode == 1
    tally.sh("journalctl --sync")
    assert re.search("tally: port 80: .*Permission denied", tally.sh("journalctl --unit tally --output cat"))
    tally.sh("echo 'port = 8080' >/etc/tally.conf; systemctl restart tally")
    assert tally.visit(8080) == 1


def test_an_upgrade_keeps_the_count_and_the_administrators_configuration(tally: Server) -> None:
    """The new release runs, on the port that the administrator chose."""
    tally.sh("echo 'port = 9090' >/etc/tally.conf; systemctl restart tally")
    assert tally.visit(9090) == 1
    before = tally.main_pid()
    tally.dpkg(f"--install {tally.package('1.1', conf='port = 7171')}")
    assert tally.sh("dpkg-query --show --showformat '${Version} ${db:Status-Status}' tally") == "1.1 installed"
    assert tally.main_pid() != before
    assert tally.visit(9090) == 2


def test_a_removal_keeps_the_count_and_a_purge_leaves_nothing(tally: Server) -> None:
    """What was counted is there for the next installation, until it is purged."""
    assert tally.visit() == 1
    tally.dpkg("--remove tally")
    assert tally.state() == "inactive"
    tally.dpkg("--install /root/1.0.deb")
    assert tally.visit() == 2
    tally.dpkg("--purge tally")
    assert tally.sh("find / -xdev -name '*tally*'") == ""
    assert tally.sh("systemctl --failed --plain --no-legend; dpkg --audit") == ""
