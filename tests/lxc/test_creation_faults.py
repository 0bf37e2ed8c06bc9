"""What the service does when a real container's making goes wrong: nobody gets it, nothing stays, others go on."""

from __future__ import annotations

import time

import psutil
import pytest

from lxc_pool import PoolServiceProxy, PoolTimeout, State
from tests.support.real_service import Service
from tests.support.starter import Starter
from tests.support.waiting import eventually

pytestmark = pytest.mark.host


def assert_nothing_is_half_made(service: Service, pool: PoolServiceProxy) -> None:
    """Assert that the host has the pool's containers, and no part of any other."""
    names = {info.name for info in pool.containers()}
    assert {info.state for info in pool.containers()} <= {State.WARM, State.LEASED}
    assert {path.name for path in service.containers.iterdir()} == names
    assert not [path for path in service.cgroups() if not any(name in path for name in names)]


def settled(pool: PoolServiceProxy) -> bool:
    status = pool.status()
    return status.size == status.capacity and not (status.building or status.reaping or status.stuck)


def test_a_worker_that_is_killed_at_work_is_replaced(service: Service, starter: Starter) -> None:
    with starter.holding():
        pool = service.start(size=3, path=[starter.directory])
        eventually(lambda: starter.held() == 2, "both lanes are at it")
        begun = {info.name for info in pool.containers()}
        children = psutil.Process(service.pid).children(recursive=True)
        worker = next(child for child in children if child.name() == "lxc-start").parent()
        assert worker is not None
        worker.kill()
        eventually(lambda: pool.status().error_count == 1, "it is noticed")
        assert "died" in (pool.status().last_error or "")
    pool.wait_ready()
    eventually(lambda: settled(pool), "what the killed one had begun is removed")
    assert_nothing_is_half_made(service, pool)
    assert len(begun & {info.name for info in pool.containers()}) == 1


def test_a_lane_that_hangs_is_killed_and_replaced_while_the_others_go_on(service: Service, starter: Starter) -> None:
    starter.hang_once()
    pool = service.start(config="[pool]\nsize = 3\nworkers = 2\ncreate_timeout = 2\n", path=[starter.directory])
    pool.wait_ready(2)
    assert starter.has_hung()
    assert (pool.status().building, pool.status().error_count) == (1, 0)
    with pool.lease("x") as container:
        container.run(["true"], check=True)
    eventually(lambda: settled(pool), "the hung one is removed and replaced")
    assert pool.status().error_count == 1, service.log
    assert "longer than allowed" in (pool.status().last_error or "")
    assert_nothing_is_half_made(service, pool)


def test_a_container_that_does_not_start_is_told_in_liblxcs_words_and_never_handed_out(service: Service) -> None:
    pool = service.start(size=2)
    pool.wait_ready()  # then the image has been compared with its checksum
    (init,) = (service.state_dir / "images").glob("busybox/*/rootfs/sbin/init")
    away = init.with_name("away")
    init.rename(away)
    pool.drain()
    pool.resume()
    eventually(lambda: pool.status().error_count >= 3, "it was tried again")
    assert pool.get("x", 0.1) is None
    status = pool.status()
    assert "did not start" in (status.last_error or "")
    assert "exec" in (status.last_error or "")
    assert status.size == status.leased == 0
    with pytest.raises(PoolTimeout, match=r"last error: .*did not start"), pool.lease("x", timeout=0):
        pass
    away.rename(init)
    began = time.monotonic()
    pool.wait_ready(timeout=30)
    assert time.monotonic() - began < 10
    assert pool.status().backoff == 0
    with pool.lease("x") as container:
        container.run(["true"], check=True)
    eventually(lambda: settled(pool), "what did not start is removed")
    assert_nothing_is_half_made(service, pool)


def test_a_starter_that_fails_without_a_word_is_told_with_its_status(service: Service, starter: Starter) -> None:
    with starter.failing():
        pool = service.start(size=1, path=[starter.directory])
        eventually(lambda: pool.status().error_count, "it has failed")
        assert "lxc-start ended with 1" in (pool.status().last_error or "")
    pool.wait_ready()


def test_an_image_that_can_not_be_built_is_an_error_and_not_the_end(service: Service) -> None:
    config = '[profile.default]\nimage = "no-such-image"\nsize = 1\n'
    pool = service.start(config=config)
    eventually(lambda: pool.status().error_count, "it has failed")
    assert "no base image 'no-such-image'" in (pool.status().last_error or "")
    assert pool.get("x", 0) is None


def parent(pid: int) -> psutil.Process:
    process = psutil.Process(pid).parent()
    assert process is not None
    return process


@pytest.mark.parametrize("which", ["init", "monitor"])
def test_a_warm_container_that_dies_is_replaced_before_anybody_gets_it(
    pool: PoolServiceProxy, shared_service: Service, which: str
) -> None:
    doomed = next(info for info in pool.containers() if info.state is State.WARM)
    assert doomed.init_pid is not None
    process = psutil.Process(doomed.init_pid) if which == "init" else parent(doomed.init_pid)
    assert which == "init" or "monitor" in " ".join(process.cmdline())
    process.kill()
    eventually(lambda: doomed.name not in {info.name for info in pool.containers()}, "it is removed")
    pool.wait_ready()
    assert not shared_service.has_traces(doomed.name)
    with pool.lease("x") as container:
        assert container.name != doomed.name


def test_a_leased_container_whose_monitor_is_killed_is_reaped(pool: PoolServiceProxy, shared_service: Service) -> None:
    with pool.lease("x") as container:
        parent(container.init_pid).kill()
        eventually(lambda: container.name not in {info.name for info in pool.containers()}, "it is removed")
        assert not shared_service.has_traces(container.name)
