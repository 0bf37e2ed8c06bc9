"""A pool of real containers: what is handed out, what is in it, and that it is gone afterwards."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lxc_pool import ContainerId, PoolDraining, PoolServiceProxy, PoolStatus, PoolTimeout, State
from tests.support.real_service import ROOT, Service
from tests.support.starter import Starter
from tests.support.waiting import ends, eventually, pidfd

KERNEL_FILESYSTEMS = {"tmpfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"}


def counts(status: PoolStatus) -> dict[str, int]:
    return {state: getattr(status, "size" if state is State.WARM else state) for state in State}


def test_the_service_answers(pool: PoolServiceProxy) -> None:
    assert pool.echo("x\0é") == "x\0é"


def test_a_ready_pool_is_full_and_says_so(pool: PoolServiceProxy, shared_service: Service) -> None:
    status = pool.status()
    assert (status.running, status.pid) == (True, shared_service.pid)
    assert status.socket_path == str(shared_service.host_dir / "pool.sock")
    assert counts(status) | {State.REAPING: 0} == dict.fromkeys(State, 0) | {State.WARM: 3}
    assert (status.capacity, status.waiting, status.worker_count) == (3, 0, 2)
    assert status.client_count >= 1
    assert status.profiles["default"].size == 3
    assert status.profiles["default"].image is not None
    assert (status.error_count, status.last_error, status.backoff) == (0, None, 0)


def test_status_and_list_agree_while_containers_come_and_go(pool: PoolServiceProxy) -> None:
    containers = [pool.get(number, 10) for number in range(3)]
    seen = set()
    while (status := pool.status()).size < 3:
        seen.add(status.size)
        assert status.leased == 3
        assert status.size + status.building <= status.capacity
    for container in containers:
        assert container is not None
        assert container.state is State.LEASED
        container.release()
    assert seen  # it was not full at once


def test_waiting_for_more_than_there_is_room_for_is_refused_and_for_nothing_is_answered_at_once(
    pool: PoolServiceProxy,
) -> None:
    pool.wait_ready(0, timeout=0)
    with pytest.raises(ValueError, match="3, not 4"):
        pool.wait_ready(4)


def test_the_readme_opens_with_two_commands_and_lines_that_do_what_they_say(
    pool: PoolServiceProxy, shared_service: Service, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text()
    console, python, *_ = re.findall(r"^```(?:console|python)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert [line.split()[1] for line in console.splitlines()] == ["scripts/demo", "scripts/test"]
    script = tmp_path / "readme.py"
    script.write_text(python)
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        env=os.environ | {"LXC_POOL_HOST_DIR": str(shared_service.host_dir), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    name, hostname, uid = re.sub(r"\(\)", "", done.stdout).split()
    assert (name, uid) == (hostname, "0")
    assert pool.status().leased == 0


def test_a_leased_container_carries_its_lease(pool: PoolServiceProxy) -> None:
    identity = ContainerId.create("job-7")
    with pool.lease(identity) as container:
        assert container.id == identity
        assert container.profile == "default"
        assert container.state is State.LEASED
        assert container.ips == ()
        (info,) = [info for info in pool.containers() if info.name == container.name]
        assert (info.state, info.id, info.owner_pid, info.owner_uid) == (State.LEASED, identity, os.getpid(), 0)
        assert info.init_pid == container.init_pid
        assert info.age > 0


@pytest.mark.parametrize("identity", ["a name", 1717171717171, "../../etc/passwd", "x" * 128])
def test_an_id_is_data(pool: PoolServiceProxy, identity: str | int) -> None:
    with pool.lease(identity) as container:
        assert container.id == identity
        assert str(identity) not in container.name


def test_the_same_id_may_be_leased_twice(pool: PoolServiceProxy) -> None:
    with pool.lease("same") as one, pool.lease("same") as other:
        assert one.name != other.name


def test_the_host_name_inside_is_the_containers_name(pool: PoolServiceProxy) -> None:
    with pool.lease("x") as container:
        assert container.run(["hostname"], capture_output=True, text=True).stdout == f"{container.name}\n"


def test_the_init_is_the_containers_own(pool: PoolServiceProxy) -> None:
    with pool.lease("x") as container:
        assert Path(f"/proc/{container.init_pid}/comm").read_text() == "init\n"
        namespace = container.run(["readlink", "/proc/1/ns/pid"], capture_output=True, text=True).stdout.strip()
        assert namespace == os.readlink(f"/proc/{container.init_pid}/ns/pid") != os.readlink("/proc/self/ns/pid")


def test_the_network_is_nothing_but_a_loopback_that_is_up(pool: PoolServiceProxy) -> None:
    with pool.lease("x") as container:
        assert container.run(["ls", "/sys/class/net"], capture_output=True, text=True).stdout == "lo\n"
        assert "LOOPBACK,UP" in container.run(["ip", "link"], capture_output=True, text=True).stdout
        container.run(["ping", "-c1", "-W1", "127.0.0.1"], capture_output=True, check=True)


def test_nothing_of_the_hosts_file_system_is_mounted(pool: PoolServiceProxy) -> None:
    with pool.lease("x") as container:
        table = container.run(["cat", "/proc/1/mountinfo"], capture_output=True, text=True).stdout
    kinds = {}
    for line in table.splitlines():
        mount, _, filesystem = line.partition(" - ")
        kinds[mount.split(" ")[4]] = filesystem.split(" ")[0]
    assert kinds.pop("/") == "overlay"
    # autodev binds the host's device nodes where it may not make them.
    assert {kind for point, kind in kinds.items() if not point.startswith("/dev/")} <= KERNEL_FILESYSTEMS


def test_nothing_of_the_hosts_files_is_to_be_seen(pool: PoolServiceProxy, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    script = f"test ! -e {secret} && test ! -e /etc/debian_version && ls -A /root && cat /etc/passwd"
    with pool.lease("x") as container:
        seen = container.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert [line.split(":")[0] for line in seen.splitlines()] == ["root", "nobody", "user"]


def test_each_container_is_a_fresh_clone(pool: PoolServiceProxy) -> None:
    names = set()
    for _ in range(4):  # one more than there are warm: each of the first ones is followed by another clone
        with pool.lease("x") as container:
            names.add(container.name)
            container.run(["sh", "-c", "test ! -e /mine && test -e /bin/ls && rm /bin/ls && echo > /mine"], check=True)
    assert len(names) == 4


def test_a_released_container_is_gone_with_all_that_was_in_it(pool: PoolServiceProxy, shared_service: Service) -> None:
    container = pool.get("x", 10)
    assert container is not None
    container.run(["sh", "-c", "sleep 1000 > /dev/null 2>&1 & mkdir -p /deep/tree; mkfifo /deep/tree/pipe"], check=True)
    with pidfd(container.init_pid) as init:
        assert shared_service.cgroups(container.name)
        container.release()
        assert ends(init)
    eventually(lambda: container.name not in {info.name for info in pool.containers()}, "the pool forgets it")
    assert not shared_service.has_traces(container.name)
    container.release()  # twice is as good as once


def test_an_interrupted_block_releases_its_container(pool: PoolServiceProxy) -> None:
    class Interruption(BaseException):
        pass

    with pytest.raises(Interruption), pool.lease("x") as container:
        raise Interruption
    assert container.name not in {info.name for info in pool.containers() if info.state is State.LEASED}


def test_a_pool_with_nothing_warm_answers_at_once_or_waits_as_long_as_it_was_told(
    service: Service, starter: Starter
) -> None:
    with starter.holding():
        pool = service.start(size=1, path=[starter.directory])
        eventually(starter.held, "the first container is being started")
        assert counts(pool.status()) == dict.fromkeys(State, 0) | {State.BUILDING: 1}
        assert pool.get("x", 0) is None
        with pytest.raises(PoolTimeout, match=r"0 of 1 containers are warm after 0(\.0)? s \(1 building"):
            pool.wait_ready(timeout=0)
        with (
            pytest.raises(PoolTimeout, match=r"1 building, 0 warm; capacity 1; place 1 of 1"),
            pool.lease("x", timeout=0.05),
        ):
            pass
    with pool.lease("x", timeout=None) as container:
        assert container.state is State.LEASED


def test_a_drained_pool_is_empty_and_hands_out_nothing_until_it_is_resumed(service: Service) -> None:
    pool = service.start(size=2)
    pool.wait_ready()
    with pool.lease("x") as container:
        pool.drain()
        with pytest.raises(PoolDraining):
            pool.get("x", 10)
        eventually(lambda: len(pool.containers()) == 1, "only the lease is left")
        assert pool.status().draining
        container.run(["true"], check=True)
    eventually(lambda: not pool.containers(), "the lease has ended, too")
    pool.resume()
    pool.wait_ready()


def test_a_larger_pool_fills_up_and_a_smaller_one_lets_go(service: Service) -> None:
    pool = service.start(size=1)
    pool.wait_ready()
    pool.resize(3)
    pool.wait_ready(3)
    pool.resize(2)
    assert pool.status().size == 2
    eventually(lambda: len(pool.containers()) == 2, "the third is removed")


@pytest.mark.usefixtures("images")  # which skips where containers can't be
def test_a_service_without_an_image_builds_one() -> None:
    service = Service()
    try:
        pool = service.start(size=1)
        began = time.monotonic()
        pool.wait_ready(timeout=30)
        assert time.monotonic() - began < 30
        made = pool.status().profiles["default"].image
        assert made is not None
        assert made.startswith("busybox:")
        assert stat.S_IMODE((service.state_dir / "images").stat().st_mode) & 0o022 == 0
    finally:
        service.close()
