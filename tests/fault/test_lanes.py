"""A lane's worker is killed, or hangs, at each step of its work: nobody gets what it made, and nothing of it stays."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lxc_pool import PoolServiceProxy
from tests.support.faults import CREATION_STEPS, REMOVAL_STEPS, FaultyService, Kind
from tests.support.oracle import Footprint, assert_healed, assert_no_larger
from tests.support.waiting import eventually

CREATE_TIMEOUT = 2.0
CONFIG = f"[pool]\nsize = 2\nworkers = 2\ncreate_timeout = {CREATE_TIMEOUT}\n"


@pytest.fixture(scope="module")
def shared(images: Path) -> Iterator[tuple[FaultyService, PoolServiceProxy]]:
    service = FaultyService(images)
    try:
        pool = service.start(config=CONFIG)
        with pool.lease("first") as container:
            container.run(["true"], check=True)
        assert_healed(service, pool)
        before = Footprint.of(service.pid)
        yield service, pool
        assert_healed(service, pool)
        assert_no_larger(service.pid, before)
    finally:
        service.close()


@pytest.mark.parametrize("kind", ["kill", "hang"])
@pytest.mark.parametrize("step", [*CREATION_STEPS[1:], *REMOVAL_STEPS])
def test_a_lane_that_ends_or_hangs_in_the_middle_of_its_work(
    shared: tuple[FaultyService, PoolServiceProxy], step: str, kind: Kind
) -> None:
    service, pool = shared
    errors = pool.status().error_count
    service.faults.plan(step, kind)
    with pool.lease("x") as container:
        container.run(["true"], check=True)
    eventually(lambda: service.faults.has_happened(step, kind), "a worker comes to that step")
    with pool.lease("y", 10) as container:  # others go on
        container.run(["true"], check=True)
    eventually(lambda: pool.status().error_count > errors, "it is noticed", CREATE_TIMEOUT + 10)
    assert_healed(service, pool)
    assert ("longer than allowed" if kind == "hang" else "died") in str(pool.status().last_error)
    if kind == "hang":  # what it hung on is in the log
        diagnosis = [line for line in service.log.splitlines() if "a lane hangs in" in line][-1]
        assert re.search(r"process \d+: cmdline \S+python.*, wchan \S.*, stack \S.*, status State: S ", diagnosis)
        assert "engine's log: " in diagnosis


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_a_lane_that_ends_or_hangs_over_the_image(service: FaultyService, kind: Kind) -> None:
    service.faults.plan("preparing", kind)
    pool = service.start(config=CONFIG + "image_timeout = 1\n")
    eventually(lambda: pool.status().error_count, "it is noticed")
    pool.wait_ready(timeout=20)
    assert_healed(service, pool)


def test_the_fork_server_is_killed(shared: tuple[FaultyService, PoolServiceProxy]) -> None:
    service, pool = shared
    for child in psutil.Process(service.pid).children():
        if "forkserver" in " ".join(child.cmdline()):
            child.kill()
    with contextlib.ExitStack() as stack:
        for number in range(4):
            container = stack.enter_context(pool.lease(number, 20))
            container.run(["true"], check=True)
    assert_healed(service, pool)


def test_the_agent_that_runs_commands_is_killed(shared: tuple[FaultyService, PoolServiceProxy]) -> None:
    service, pool = shared
    with pool.lease("x") as container:
        container.run(["true"], check=True)
        process = container.popen(["sh", "-c", "read line; echo $line"], stdin=-1, stdout=-1, text=True)
        agents = [
            child for child in psutil.Process(service.pid).children() if "lxc_pool" in " ".join(child.cmdline()[-1:])
        ]
        assert agents
        for agent in agents:
            agent.kill()
        assert process.communicate("still here\n", timeout=10)[0] == "still here\n"
        container.run(["true"], check=True)
    assert_healed(service, pool)


def test_all_lanes_hang_at_once(shared: tuple[FaultyService, PoolServiceProxy]) -> None:
    service, pool = shared
    service.faults.plan("starting", "hang")
    service.faults.plan("cloning", "hang")
    containers = [pool.get(number, 10) for number in range(2)]
    eventually(lambda: service.faults.has_happened("cloning", "hang"), "one hangs")
    eventually(lambda: service.faults.has_happened("starting", "hang"), "and the other")
    with pool.lease("x", 20) as container:
        container.run(["true"], check=True)
    for leased in containers:
        assert leased is not None
        leased.release()
    assert_healed(service, pool)
