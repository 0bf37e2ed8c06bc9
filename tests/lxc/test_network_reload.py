"""The network of a service that reads another configuration: made, changed and removed while containers run."""

from __future__ import annotations

import functools
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool import Container, PoolServiceProxy, State
from tests.support.netlab import ANSWER, FAR, PORT, UPLINK, NetLab
from tests.support.real_service import Service
from tests.support.waiting import eventually

pytestmark = pytest.mark.host

PLAIN = "[pool]\nworkers = 2\n[profile.default]\nsize = 1\n"
NET = '[profile.net]\nnetwork = "bridge"\nsize = 1\n'
OPEN = '[profile.open]\nnetwork = "bridge"\nreach = ["host"]\nsize = 1\n'
DNS = f'[network]\ndns = ["{FAR}"]\n'


@pytest.fixture(scope="module", autouse=True)
def service_of_the_host(lab: NetLab) -> None:
    lab.serve(lab.host, UPLINK, PORT)


@pytest.fixture
def service(lab: NetLab, images: Path) -> Iterator[Service]:
    """A service in a network namespace of its own; when the test is over, nothing of it may be left."""
    service = Service(images, lab.host)
    try:
        yield service
    finally:
        service.close()


def reload(service: Service, config: str) -> None:
    """Give a running service another configuration."""
    service.config_path.write_text(config)
    assert service.process is not None
    service.process.send_signal(signal.SIGHUP)


def lease(pool: PoolServiceProxy, profile: str) -> Container:
    eventually(lambda: profile in pool.status().profiles, f"there is a profile {profile}")
    container = pool.get("x", 20, profile=profile)
    assert container is not None
    return container


def greeting(container: Container, address: str) -> str:
    """Return what a server says that the container tries to reach; nothing if it does not get there."""
    done = container.run(["nc", "-w", "2", address, str(PORT)], capture_output=True, text=True, timeout=20)
    return str(done.stdout).strip()


def refused(pool: PoolServiceProxy) -> str:
    return pool.status().configuration or ""


def made(service: Service, lab: NetLab) -> tuple[bool, bool]:
    """Return whether the service's bridge and its rules are there."""
    rules = {line.split()[-1] for line in lab.host.tables()}
    return f"lxp{service.instance}" in lab.host.devices(), f"lxp-{service.instance}" in rules


def warm(pool: PoolServiceProxy, profile: str) -> list[str]:
    return [info.name for info in pool.containers() if info.profile == profile and info.state is State.WARM]


def test_the_first_profile_on_a_bridge_and_the_last_one_come_and_go_without_a_restart(
    service: Service, lab: NetLab
) -> None:
    before = lab.host.devices(), lab.host.tables()
    pool = service.start(config=DNS + PLAIN)
    pool.wait_ready()
    kept = warm(pool, "default")
    assert made(service, lab) == (False, False)
    reload(service, DNS + PLAIN + NET)
    with lease(pool, "net") as container:
        assert warm(pool, "default") == kept
        assert greeting(container, FAR) == UPLINK
        assert f"Address: {ANSWER}" in container.run(["nslookup", "a.b"], capture_output=True, text=True).stdout
        reload(service, DNS + PLAIN)
        eventually(lambda: not warm(pool, "net") and pool.status().reaping == 0, "the warm ones are gone")
        assert refused(pool) == ""
        assert made(service, lab) == (True, True)
        assert greeting(container, FAR) == UPLINK
    eventually(lambda: (lab.host.devices(), lab.host.tables()) == before, "the network is gone with the last container")
    assert warm(pool, "default") == kept
    reload(service, DNS + PLAIN + NET)  # and again
    with lease(pool, "net") as container:
        assert greeting(container, FAR) == UPLINK


def test_profiles_that_reach_something_else_come_and_go_and_others_notice_nothing(
    service: Service, lab: NetLab
) -> None:
    pool = service.start(config=DNS + PLAIN + NET)
    pool.wait_ready()
    listener = lab.outside.inside(lambda: socket.create_server((FAR, 8200)))
    with lease(pool, "net") as leased, listener:
        pool.wait_ready()
        kept = warm(pool, "net")
        with leased.popen(["nc", FAR, "8200"], stdout=subprocess.PIPE, text=True) as client:
            connection, _peer = listener.accept()
            with connection:
                reload(service, DNS + PLAIN + NET + OPEN)
                with lease(pool, "open") as far:
                    assert greeting(far, UPLINK)  # the host's own server
                    assert greeting(leased, UPLINK) == ""
                    reload(service, DNS + PLAIN + NET + OPEN.replace('reach = ["host"]\n', ""))
                    eventually(lambda: pool.status().profiles["open"].outdated == 0 and warm(pool, "open"), "renewed")
                    assert greeting(far, UPLINK)  # leased before: it keeps what it has
                with lease(pool, "open") as near:
                    assert greeting(near, UPLINK) == ""
                    assert greeting(near, FAR) == UPLINK
                connection.sendall(b"still here\n")
            assert client.stdout is not None
            assert client.stdout.read() == "still here\n"
        assert warm(pool, "net") == kept


def test_other_resolvers_are_those_of_new_containers_and_leased_ones_keep_theirs(service: Service, lab: NetLab) -> None:
    lab.resolve(lab.host, UPLINK)  # the host's own: the firewall lets through what it has been told of
    config = '[network]\ndns = ["{}"]\n' + PLAIN + NET
    pool = service.start(config=config.format(UPLINK))
    pool.wait_ready()
    look_up = functools.partial(Container.run, args=["nslookup", "a.b"], capture_output=True, text=True, timeout=20)
    with lease(pool, "net") as old:
        reload(service, config.format(FAR))
        eventually(lambda: "read again" in service.log and pool.status().profiles["net"].outdated == 0, "all renewed")
        eventually(lambda: warm(pool, "net"), "there is one")
        with lease(pool, "net") as new:
            assert new.run(["cat", "/etc/resolv.conf"], capture_output=True, text=True).stdout == f"nameserver {FAR}\n"
            assert ANSWER in look_up(new).stdout
            assert ANSWER in look_up(old).stdout


def test_a_network_that_containers_are_on_is_not_taken_from_under_them(service: Service, lab: NetLab) -> None:
    subnet = '[network]\nsubnet = "{}"\ndns = []\n' + PLAIN
    pool = service.start(config=subnet.format("10.76.1.0/28") + NET)
    pool.wait_ready()
    with lease(pool, "net") as container:
        reload(service, subnet.format("10.76.2.0/28") + NET)
        eventually(lambda: "containers would lose their network" in refused(pool), "it is refused")
        assert f"{service.config_path}, line 2: network.subnet: " in refused(pool)
        assert greeting(container, FAR) == UPLINK
        with lease(pool, "net") as another:
            assert another.ips[0].startswith("10.76.1.")
        reload(service, subnet.format("10.76.2.0/28"))  # as it says: first without
        eventually(lambda: refused(pool) == "", "it is in force")
    eventually(lambda: made(service, lab) == (False, False), "the network is gone")
    reload(service, subnet.format("10.76.2.0/28") + NET)
    with lease(pool, "net") as container:
        assert container.ips[0].startswith("10.76.2.")
        assert greeting(container, FAR) == UPLINK


@pytest.mark.parametrize(
    ("network", "why"),
    [
        ('subnet = "198.51.100.0/24"', "line 6: network.subnet: 198.51.100.0/24 overlaps "),
        ('bridge = "nowhere"\nsubnet = "10.76.3.0/24"', "line 6: network.bridge: this host has no bridge 'nowhere'"),
    ],
)
def test_a_network_that_the_host_has_no_room_for_is_refused_with_line_and_reason(
    service: Service, lab: NetLab, network: str, why: str
) -> None:
    pool = service.start(config=PLAIN)
    pool.wait_ready()
    before = lab.host.devices(), lab.host.tables(), warm(pool, "default")
    reload(service, f"{PLAIN}[network]\n{network}\ndns = []\n{NET}")
    eventually(lambda: why in refused(pool), why)
    assert "the one before stays" in refused(pool)
    assert (lab.host.devices(), lab.host.tables(), warm(pool, "default")) == before
    reload(service, PLAIN + "[network]\ndns = []\n" + NET)
    with lease(pool, "net") as container:
        assert greeting(container, FAR) == UPLINK


def test_a_change_that_fails_halfway_leaves_the_network_as_it_was(
    service: Service, lab: NetLab, tmp_path: Path
) -> None:
    """The rules are refused by an nft that stands before the host's."""
    nft = tmp_path / "nft"
    real = subprocess.run(["which", "nft"], capture_output=True, text=True, check=True).stdout.strip()
    nft.write_text(
        f'#!/bin/sh\n[ -e {tmp_path}/fail ] && [ "$1" = -f ] && {{ echo broken >&2; exit 1; }}\nexec {real} "$@"\n'
    )
    nft.chmod(0o755)
    service.launch(config=DNS + PLAIN, path=[tmp_path])
    service.await_ready()
    pool = service.connect()
    pool.wait_ready()
    before = lab.host.devices(), lab.host.tables()
    (tmp_path / "fail").touch()
    reload(service, DNS + PLAIN + NET)
    eventually(lambda: "broken" in refused(pool), "it is refused")
    assert "line 8: profile.net.network: " in refused(pool)
    assert (lab.host.devices(), lab.host.tables()) == before
    (tmp_path / "fail").unlink()
    reload(service, DNS + PLAIN + NET)
    with lease(pool, "net") as container:
        (tmp_path / "fail").touch()
        reload(service, DNS + PLAIN + NET + OPEN)
        eventually(lambda: "broken" in refused(pool), "it is refused again")
        assert greeting(container, FAR) == UPLINK
        assert greeting(container, UPLINK) == ""
    (tmp_path / "fail").unlink()
