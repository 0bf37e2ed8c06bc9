"""A container's monitor or init is killed, or its removal fails: it is replaced, and its owner is told."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lxc_pool import LeaseExpired, LxcPoolError, PoolServiceProxy, State
from tests.support.faults import FaultyService
from tests.support.oracle import Footprint, assert_healed, assert_no_larger
from tests.support.waiting import eventually

CONFIG = "[pool]\nsize = 2\nworkers = 2\ncreate_timeout = 3\n"


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


def kill(which: str, init_pid: int | None, number: signal.Signals = signal.SIGKILL) -> None:
    assert init_pid is not None
    process = psutil.Process(init_pid)
    if which == "monitor":
        process = process.parent() or process
        assert "[lxc monitor]" in " ".join(process.cmdline())
    process.send_signal(number)


@pytest.mark.parametrize("which", ["monitor", "init"])
def test_a_warm_one_is_replaced_before_anybody_gets_it(
    shared: tuple[FaultyService, PoolServiceProxy], which: str
) -> None:
    service, pool = shared
    doomed = next(info for info in pool.containers() if info.state is State.WARM)
    kill(which, doomed.init_pid)
    assert_gone(pool, doomed.name)
    assert_healed(service, pool)


@pytest.mark.parametrize("which", ["monitor", "init"])
def test_a_leased_one_is_lost_to_its_owner_who_is_told(
    shared: tuple[FaultyService, PoolServiceProxy], which: str
) -> None:
    service, pool = shared
    with pool.lease("x") as container:
        process = container.popen(["sleep", "1000"])
        kill(which, container.init_pid)
        with contextlib.suppress(LxcPoolError):
            assert process.wait(timeout=10) != 0
        eventually(lambda: container.name not in leased(pool), "the lease ends")
        with pytest.raises(LeaseExpired, match="init died"):
            container.run(["true"])
    assert_gone(pool, container.name)
    assert_healed(service, pool)


@pytest.mark.parametrize("which", ["monitor", "init"])
def test_one_that_is_stopped_is_removed_all_the_same(
    shared: tuple[FaultyService, PoolServiceProxy], which: str
) -> None:
    service, pool = shared
    with pool.lease("x") as container:
        kill(which, container.init_pid, signal.SIGSTOP)
    assert_gone(pool, container.name)  # liblxc waits for its monitor for ever, and its lane until `create_timeout`
    assert_healed(service, pool)


def leased(pool: PoolServiceProxy) -> set[str]:
    return {info.name for info in pool.containers() if info.state is State.LEASED}


def assert_gone(pool: PoolServiceProxy, name: str) -> None:
    eventually(lambda: name not in {info.name for info in pool.containers()}, f"{name} is removed")


def test_one_that_can_not_be_removed_is_stuck_for_all_to_see_until_the_cause_is_gone(
    shared: tuple[FaultyService, PoolServiceProxy],
) -> None:
    service, pool = shared
    with pool.lease("x") as container:
        file = service.containers / container.name / "keep"
        file.touch()
        try:
            subprocess.run(["chattr", "+i", file], check=True)
        except subprocess.CalledProcessError:
            pytest.skip("this file system has no immutable files")
    try:
        eventually(lambda: pool.status().stuck == 1, "it is stuck")
        (stuck,) = [info for info in pool.containers() if info.state is State.STUCK]
        assert stuck.name == container.name
        words = f"keep, below {file.parent}"
        assert words in str(stuck.reason)
        assert words in str(pool.status().last_error)
        assert f"removing {container.name} failed" in service.log
        listed = json.loads(service.cli("ls", "--json").stdout)
        assert [(entry["name"], words in entry["reason"]) for entry in listed if entry["state"] == "stuck"] == [
            (container.name, True)
        ]
        pool.wait_ready()  # it does not count as capacity
        assert service.cli("audit").returncode == 0  # it is known, and being seen to
    finally:
        subprocess.run(["chattr", "-i", file], check=True)
    assert_gone(pool, container.name)
    assert_healed(service, pool, within=20)


def test_a_removal_that_fails_is_tried_again_after_a_restart(service: FaultyService) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as container:
        service.faults.plan("destroying", "fail")
    eventually(lambda: service.faults.has_happened("destroying", "fail"), "it fails")
    service.kill()
    service.start(size=1)
    assert_gone(pool, container.name)
    assert_healed(service, pool)


@pytest.mark.parametrize("when", ["before the service", "beside it"])
def test_what_is_mounted_in_a_containers_directory_does_not_hold_up_its_removal_and_keeps_its_files(
    service: FaultyService, when: str
) -> None:
    precious = service.directory / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    pool = service.start(size=1)
    with pool.lease("x") as container:
        target = service.containers / container.name / "disk"
        subprocess.run(["mount", "--bind", precious, target], check=True)
        try:
            if when == "before the service":  # so that its lanes have the mount in their own namespaces
                service.kill()
                service.start(size=1)
            with (target / "file").open():  # busy
                container.release()
                assert_gone(pool, container.name)
        finally:
            subprocess.run(["umount", "--lazy", target], check=False, stderr=subprocess.DEVNULL)
    assert (precious / "file").read_text() == "mine"
    assert_healed(service, pool)
