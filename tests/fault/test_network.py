"""The network of a service that is killed: the next one takes it over, and without a next one nothing of it is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lxc_pool import Container, PoolServiceProxy, State
from lxc_pool.host import cgroups
from tests.support.faults import FaultyService
from tests.support.netlab import FAR, PORT, UPLINK, NetLab
from tests.support.waiting import eventually

CONFIG = f"""\
[pool]
workers = 2
[network]
dns = ["{FAR}"]
[profile.default]
network = "bridge"
size = 2
"""

WITHOUT = "[pool]\nsize = 1\n"


@pytest.fixture
def service(lab: NetLab, images: Path) -> Iterator[FaultyService]:
    service = FaultyService(images, lab.host)
    try:
        yield service
    finally:
        service.close()


def works(container: Container) -> bool:
    done = container.run(["nc", "-w", "5", FAR, str(PORT)], capture_output=True, text=True, timeout=20)
    return bool(done.stdout == f"{UPLINK}\n")


def start_again(service: FaultyService, config: str = CONFIG) -> None:
    service.launch(config=config)
    service.await_ready()


def netdevs(service: FaultyService) -> set[str]:
    """Return what an audit says of the network."""
    done = service.cli("audit", "--json", "--state-dir", service.state_dir)
    document: dict[str, Any] = json.loads(done.stdout)
    return {finding["name"] for finding in document["findings"] if finding["kind"] == "netdev"}


def everything(service: FaultyService, lab: NetLab) -> set[str]:
    """Return the names of the service's devices and tables, seen with other eyes."""
    tables = {line.split()[-1] for line in lab.host.tables()}
    return {name for name in (*lab.host.devices(), *tables) if service.instance in name}


def port_of(service: FaultyService, container: Container) -> str:
    config = (service.containers / container.name / "config").read_text()
    return next(line.split()[-1] for line in config.splitlines() if line.startswith("lxc.net.0.veth.pair"))


def all_ips(pool: PoolServiceProxy, count: int) -> list[str]:
    """Return the addresses of so many containers at once."""
    containers = [pool.get(number, 30) for number in range(count)]
    try:
        return [ip for container in containers if container is not None for ip in container.ips]
    finally:
        for container in containers:
            if container is not None:
                container.release()


def test_the_next_service_takes_over_bridge_rules_and_addresses(service: FaultyService, lab: NetLab) -> None:
    pool = service.start(config=CONFIG)
    pool.wait_ready()
    bridge = f"lxp{service.instance}"
    with pool.lease("survivor") as survivor:
        address = survivor.ips
        index = lab.host.run("ip", "link", "show", bridge).split(":")[0]
        service.kill()
        start_again(service)
        assert lab.host.run("ip", "link", "show", bridge).split(":")[0] == index
        assert survivor.ips == address
        assert works(survivor)
        ips = all_ips(pool, 4)
        assert len({*ips, *address}) == 5
        with pool.lease("new") as new:
            assert works(new)
        assert netdevs(service) == set()


def test_a_connection_outlives_the_service(service: FaultyService, lab: NetLab) -> None:
    pool = service.start(config=CONFIG)
    with pool.lease("survivor") as survivor:
        listener = lab.outside.inside(lambda: socket.create_server((FAR, 8100)))
        with listener, survivor.popen(["nc", FAR, "8100"], stdout=subprocess.PIPE, text=True) as client:
            connection, _peer = listener.accept()
            with connection:
                service.kill()
                start_again(service)
                connection.sendall(b"still here\n")
            assert client.stdout is not None
            assert client.stdout.read() == "still here\n"


def test_without_a_next_service_an_audit_finds_what_is_nobodys_and_cleanup_removes_it(
    service: FaultyService, lab: NetLab
) -> None:
    pool = service.start(config=CONFIG)
    pool.wait_ready()
    with pool.lease("survivor") as survivor:
        pool.wait_ready()
        assert netdevs(service) == set()
        service.kill()
        mine = {port_of(service, survivor), f"lxp{service.instance}", f"lxp-{service.instance}"}
        assert netdevs(service) == everything(service, lab) - mine
        assert len(netdevs(service)) == 2
        done = service.cli("cleanup", "--execute", "--state-dir", service.state_dir)
        assert done.returncode == 0, done
        assert everything(service, lab) == mine
        start_again(service)
        assert works(survivor)
        service.kill()
        instance = service.instance
        done = service.cli("cleanup", "--all", "--execute", "--state-dir", service.state_dir)
        assert done.returncode == 0, done
        assert not [name for name in (*lab.host.devices(), *lab.host.tables()) if instance in name]
        start_again(service)


def test_a_port_that_nobody_knows_is_gone_before_its_address_is_given_out(service: FaultyService, lab: NetLab) -> None:
    pool = service.start(config=CONFIG)
    pool.wait_ready()
    bridge, stray = f"lxp{service.instance}", f"lxp{service.instance}a006"
    service.kill()
    # As a starter leaves it that is killed before it has moved the other end.
    lab.host.run("ip", "link", "add", stray, "type", "veth", "peer", "name", "vethlab0")
    lab.host.run("ip", "link", "set", stray, "master", bridge)
    assert stray in netdevs(service)
    start_again(service)
    assert stray not in lab.host.devices()
    assert "vethlab0" not in lab.host.devices()
    assert len(set(all_ips(pool, 8))) == 8


def test_with_the_ledger_lost_no_address_has_two_holders(service: FaultyService, lab: NetLab) -> None:
    pool = service.start(config=CONFIG)
    pool.wait_ready()
    before = set(everything(service, lab))
    with pool.lease("x") as leased:
        mine = leased.ips
        assert len(mine) == 1
        service.kill()
        for path in service.state_dir.glob("ledger.db*"):
            path.unlink()
        start_again(service)
        pool.wait_ready()
        ips = all_ips(pool, 2)
        assert len({*ips, *mine}) == 3
        assert leased.ips == mine
        assert mine[0] in leased.run(["ip", "addr"], capture_output=True, text=True, check=True).stdout
        eventually(lambda: netdevs(service) == set(), "the containers that nobody knows are gone")
        assert len(everything(service, lab)) <= len(before) + 3


@pytest.mark.parametrize("step", ["starting", "started", "probing"])
def test_a_lane_that_dies_in_a_start_leaves_no_port(service: FaultyService, lab: NetLab, step: str) -> None:
    service.faults.plan(step, "kill")
    pool = service.start(config=CONFIG)
    pool.wait_ready()
    assert service.faults.has_happened(step, "kill")
    eventually(lambda: pool.status().reaping == 0, "what was begun is removed")
    ports = everything(service, lab) - {f"lxp{service.instance}", f"lxp-{service.instance}"}
    assert len(ports) == 2
    assert len(set(all_ips(pool, 2))) == 2


def test_neither_a_release_nor_the_next_get_waits_for_a_teardown(service: FaultyService, lab: NetLab) -> None:
    pool = service.start(config=CONFIG)
    pool.wait_ready()
    service.faults.plan("stopping", "hang")
    container = pool.lease("x", timeout=30).__enter__()
    port = port_of(service, container)
    container.release()
    eventually(lambda: service.faults.hanging("stopping"), "a lane is at it, for ever")
    with pool.lease("next", timeout=10) as other:
        assert works(other)
        assert port in everything(service, lab)
        other.release()
    assert container.name in {info.name for info in pool.containers() if info.state is State.REAPING}
    (worker,) = service.faults.hanging("stopping")
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: port not in everything(service, lab), "another lane has done it")


def test_a_container_whose_monitor_is_killed_leaves_no_port(service: FaultyService, lab: NetLab) -> None:
    pool = service.start(config=CONFIG)
    pool.wait_ready()
    with pool.lease("x") as container:
        port = port_of(service, container)
        monitors = [path for path in service.cgroups(container.name) if "lxc.monitor" in path]
        for pid in {pid for path in monitors for pid in cgroups.pids(Path(path))}:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: container.name not in {info.name for info in pool.containers()}, "it is removed")
        assert port not in lab.host.devices()


def test_a_configuration_without_a_bridge_waits_for_the_leases_on_it(service: FaultyService, lab: NetLab) -> None:
    pool = service.start(config=CONFIG)
    with pool.lease("survivor") as survivor:
        service.kill()
        start_again(service, WITHOUT)
        assert works(survivor)
    eventually(lambda: not [i for i in pool.containers() if i.state is State.REAPING], "it is removed")
    service.stop()
    assert service.network_traces() == []
    assert everything(service, lab) == set()


def test_leases_that_are_kept_keep_their_network(service: FaultyService, lab: NetLab) -> None:
    pool = service.start(config=CONFIG)
    with pool.lease("survivor") as survivor:
        assert service.cli("stop", "--keep-leases").returncode == 0
        service.wait()
        assert everything(service, lab) == {
            *(port_of(service, survivor), f"lxp{service.instance}", f"lxp-{service.instance}")
        }
        start_again(service)
        assert works(survivor)


def test_rules_that_somebody_flushes_are_back_with_the_next_container(service: FaultyService, lab: NetLab) -> None:
    pool = service.start(config=CONFIG)
    pool.wait_ready()
    table = f"lxp-{service.instance}"
    assert table in everything(service, lab)
    lab.host.run("nft", "flush", "ruleset")
    assert table not in everything(service, lab)
    with pool.lease("x") as container:
        eventually(lambda: table in everything(service, lab), "the rules are back")
        assert works(container)
    assert "somebody has removed the rules" in service.log
