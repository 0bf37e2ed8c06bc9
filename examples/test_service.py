"""The daemon: its start and end, signals, and what happens to it that nobody asked for."""

from __future__ import annotations

from machine import Machine

RUNS, DEAD, STOPPED = 0, 1, 3
"""Exit statuses of the init script's `status`."""


def test_start_and_stop(board: Machine) -> None:
    """Each is done when it returns, and may be said twice."""
    assert board.service("status") == RUNS
    for _ in range(2):
        assert board.service("stop") == 0
        assert board.service("status") == STOPPED
    for _ in range(2):
        assert board.service("start") == 0
        assert board.service("status") == RUNS
    assert board.daemons() == 1


def test_it_runs_as_a_user_of_its_own(board: Machine) -> None:
    """Root starts it and nothing of root is left in it."""
    assert board.sh("stat -c %U /proc/$(cat /run/board.pid)").strip() == "board"


def test_it_listens_to_this_machine_alone(board: Machine) -> None:
    """No socket is bound to anything but loopback."""
    listening = [line.split()[3] for line in board.sh("netstat -ltn").splitlines() if "LISTEN" in line]
    assert listening == ["127.0.0.1:8080"]


def test_a_killed_daemon_is_seen_and_started_again(board: Machine) -> None:
    """After SIGKILL its pid file is stale: `status` says so, and `start` is not misled."""
    board.post("hello")
    messages = board.messages()
    board.sh("kill -9 $(cat /run/board.pid); while /etc/init.d/board status; do usleep 20000; done")
    assert board.service("status") == DEAD
    assert board.service("start") == 0
    assert board.messages() == messages


def test_sigterm_ends_it(board: Machine) -> None:
    """As it has to, when the machine is shut down."""
    board.sh("kill $(cat /run/board.pid); while /etc/init.d/board status; do usleep 20000; done")
    assert board.service("status") == DEAD


def test_a_port_that_is_taken_is_an_error(board: Machine) -> None:
    """Another program has the port: `start` fails with words, and leaves no pid file."""
    assert board.service("stop") == 0
    with board.start("exec httpd -f -p 127.0.0.1:8080 -h /var") as other:
        board.sh("until wget -q -O /dev/null http://127.0.0.1:8080/run; [ $? -le 1 ]; do usleep 20000; done")
        done = board.try_sh("/etc/init.d/board start")
        assert done.returncode == 1
        assert "does not come up on port 8080" in done.stderr
        assert board.service("status") == STOPPED
        other.terminate()
