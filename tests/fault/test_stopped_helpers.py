"""What runs commands is stopped (SIGSTOP) while its service goes on: that is noticed, said, and over by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lxc_pool import ExecFailed
from lxc_pool.execution.launcher import SEND_TIMEOUT
from tests.support.faults import FaultyService
from tests.support.oracle import assert_healed
from tests.support.waiting import eventually


def agent_of(service: FaultyService) -> int:
    named = [pid for pid in service.marked() if "execution.agent" in _command_line(pid)]
    (agent,) = [pid for pid in named if _parent(pid) == service.pid]
    return agent


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_stopped_agent_is_killed_and_who_waits_for_it_hears_of_that(service: FaultyService) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as leased:
        leased.run(["true"], check=True)
        running = leased.popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        supervisor, agent = _parent(running.pid), agent_of(service)
        os.kill(agent, signal.SIGSTOP)
        os.kill(supervisor, signal.SIGKILL)  # the next command needs the agent
        with pytest.raises(ExecFailed):
            running.wait(10)
        eventually(lambda: not Path(f"/proc/{supervisor}").exists(), "it is gone, with its connection")
        running.close()
        with pytest.raises(ExecFailed):
            leased.run(["true"])  # without a timeout: it would wait for ever
        assert f"the agent that runs commands, {agent}, hangs" in service.log
        leased.run(["true"], check=True)
        assert agent_of(service) != agent
        assert_healed(service, pool, leased=[leased.name])
    assert_healed(service, pool)


def test_a_stopped_supervisor_keeps_its_own_commands_waiting_and_no_later_ones(service: FaultyService) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as leased:
        running = leased.popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        supervisor = _parent(running.pid)
        os.kill(supervisor, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as threads:
            try:
                waiting = threads.submit(leased.run, ["true"])
                enough = time.monotonic() + SEND_TIMEOUT + 1
                eventually(lambda: time.monotonic() > enough, "it has left that unread for long enough", 30)
                leased.run(["true"], check=True, timeout=30)
                assert "the supervisor of uid 0's commands hangs" in service.log
                assert not waiting.done()
            finally:
                os.kill(supervisor, signal.SIGCONT)
            assert waiting.result(10).returncode == 0
        assert running.communicate(b"on and on", timeout=10)[0] == b"on and on"
        running.close()
        eventually(lambda: supervisor not in service.marked(), "it ends with its last command")
        assert_healed(service, pool, leased=[leased.name])
    assert_healed(service, pool)
