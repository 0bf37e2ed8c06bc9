"""Containers on the pool's bridge: an address of their own when they are handed out, names, the outside, and no more.

Services run in a network namespace of the tests' own, with an outside beside it: see `tests/support/netlab.py`.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from lxc_pool import Container, LeaseError, LeaseExpired, PoolServiceProxy, PoolTimeout
from tests.support import debian, netlab
from tests.support.netlab import ANSWER, FAR, PORT, UPLINK, NetLab
from tests.support.real_service import Service, running
from tests.support.waiting import eventually

pytestmark = pytest.mark.host

CONFIG = f"""\
[pool]
workers = 2
[network]
dns = ["{FAR}"]
[profile.default]
network = "bridge"
size = 2
[profile.privileged]
network = "bridge"
privileged = true
size = 1
"""

PROFILES = ["default", "privileged"]


@pytest.fixture(scope="module")
def networked(lab: NetLab, images: Path) -> Iterator[Service]:
    """A service with a bridge, for the tests of this module that neither configure nor end it."""
    with running(images, CONFIG, lab.host) as service:
        yield service


@pytest.fixture
def pool(networked: Service) -> Iterator[PoolServiceProxy]:
    with networked.connect() as pool:
        pool.wait_ready()
        yield pool


@pytest.fixture
def service(lab: NetLab, images: Path) -> Iterator[Service]:
    """A service of the test's own beside that one; when the test is over, nothing of it may be left."""
    service = Service(images, lab.host)
    try:
        yield service
    finally:
        service.close()


def say(container: Container, *command: str) -> str:
    """Run a command inside; return what it says."""
    done = container.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20)
    assert done.returncode == 0, (command, done.stdout)
    return str(done.stdout).strip()


def configured(subnet: str, *lines: str, size: int = 1, profile: str = "") -> str:
    network = "\n".join(["[network]", f'subnet = "{subnet}"', *lines])
    return f'[pool]\nworkers = 2\n{network}\n[profile.default]\nsize = {size}\nnetwork = "bridge"\n{profile}'


def refusal(service: Service, config: str) -> str:
    """Start a service that refuses; return its last word."""
    service.launch(config=config)
    finished = service.wait()
    assert finished.status == 2, finished.log
    return finished.log.strip().splitlines()[-1]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_container_has_its_address_when_it_is_handed_out(
    pool: PoolServiceProxy, networked: Service, lab: NetLab, profile: str
) -> None:
    with pool.lease("job", profile=profile) as container:
        (address,) = container.ips
        bridge = f"lxp{networked.instance}"
        (device,) = netlab.json_of(lab.host.run("ip", "-json", "-4", "address", "show", "dev", bridge))
        gateway = device["addr_info"][0]
        assert IPv4Address(address) in IPv4Network(f"{gateway['local']}/{gateway['prefixlen']}", strict=False)
        assert say(container, "ip", "route").splitlines()[0].split()[:3] == ["default", "via", gateway["local"]]
        assert f"inet {address}/22 brd {gateway['broadcast']} " in say(container, "ip", "-4", "address", "show", "eth0")


@pytest.mark.parametrize("profile", PROFILES)
def test_it_resolves_names_and_reaches_the_outside_by_the_hosts_address(pool: PoolServiceProxy, profile: str) -> None:
    with pool.lease("job", profile=profile) as container:
        assert say(container, "cat", "/etc/resolv.conf") == f"nameserver {FAR}"
        assert f"Address: {ANSWER}" in say(container, "nslookup", "somewhere.example")
        assert say(container, "nc", "-w", "5", FAR, str(PORT)) == UPLINK


def test_the_image_knows_nothing_of_it(pool: PoolServiceProxy, networked: Service) -> None:
    with pool.lease("job") as container:
        say(container, "sh", "-c", "echo mine >>/etc/resolv.conf")
    with pool.lease("job") as container:
        assert say(container, "cat", "/etc/resolv.conf") == f"nameserver {FAR}"
    (file,) = (networked.state_dir / "images").rglob("resolv.conf")
    assert FAR not in file.read_text()


def test_the_host_reaches_a_server_in_it(pool: PoolServiceProxy, lab: NetLab) -> None:
    with pool.lease("job") as container:
        server = container.popen(["nc", "-l", "-p", "80", "-e", "echo", "hello"])
        address = container.ips[0]

        eventually(lambda: netlab.greeted(lab.host, address, 80), "an answer of the container's server")
        assert server.wait(10) == 0


def test_it_has_no_ipv6(pool: PoolServiceProxy) -> None:
    with pool.lease("job") as container:
        assert "inet6" not in say(container, "ip", "address")


def test_an_address_rests_for_as_long_as_there_are_others(pool: PoolServiceProxy) -> None:
    seen: list[str] = []
    for _ in range(6):
        with pool.lease("job") as container:
            seen += container.ips
    assert len(set(seen)) == 6


def test_with_all_addresses_taken_nobody_gets_one_twice_and_the_reason_is_said(service: Service) -> None:
    pool = service.start(config=configured("10.77.1.0/29", "dns = []", size=2))
    leases = [pool.get(number, 30) for number in range(5)]
    assert all(leases)
    assert {ip for lease in leases if lease for ip in lease.ips} == {f"10.77.1.{number}" for number in range(2, 7)}
    with pytest.raises(PoolTimeout, match=r"all 5 addresses of 10\.77\.1\.0/29 are taken"), pool.lease("x", timeout=2):
        pass
    assert leases[3] is not None
    before = leases[3].ips
    leases[3].release()
    with pool.lease("after", timeout=30) as container:
        assert container.ips == before
    for lease in leases:
        if lease is not None:
            lease.release()


def test_two_services_side_by_side_have_subnets_of_their_own(
    pool: PoolServiceProxy, networked: Service, service: Service, lab: NetLab
) -> None:
    other = service.start(config=CONFIG)
    with pool.lease("one") as one, other.lease("other") as two:
        assert IPv4Network(f"{one.ips[0]}/22", strict=False) != IPv4Network(f"{two.ips[0]}/22", strict=False)
        assert say(one, "nc", "-w", "5", FAR, str(PORT)) == UPLINK
        assert say(two, "nc", "-w", "5", FAR, str(PORT)) == UPLINK
    service.stop()
    assert f"lxp{networked.instance}" in lab.host.devices()
    with pool.lease("one") as one:
        assert say(one, "nc", "-w", "5", FAR, str(PORT)) == UPLINK


def test_a_service_leaves_no_device_and_no_rule(networked: Service, service: Service, lab: NetLab) -> None:
    def devices() -> list[str]:
        """All but those of the other service's containers, which come and go as it refills."""
        return [device for device in lab.host.devices() if not device.startswith(f"lxp{networked.instance}a")]

    before = devices(), lab.host.tables()
    service.start(config=CONFIG).wait_ready()
    assert set(devices()) > set(before[0])
    assert set(lab.host.tables()) > set(before[1])
    service.stop()
    assert (devices(), lab.host.tables()) == before


@pytest.mark.parametrize("subnet", ["198.51.100.0/24", "10.55.0.0/24"])
def test_a_subnet_that_the_host_has_a_way_to_is_refused(service: Service, lab: NetLab, subnet: str) -> None:
    lab.host.run("ip", "route", "replace", "10.55.0.128/25", "via", netlab.ROUTER)
    words = refusal(service, configured(subnet, "dns = []"))
    assert f"network.subnet: {subnet} overlaps " in words
    assert "choose another one" in words
    assert service.network_traces() == []


def test_a_bridge_that_is_none_is_refused(service: Service) -> None:
    words = refusal(service, configured("10.77.2.0/24", 'bridge = "up0"', "dns = []"))
    assert "network.bridge: this host has no bridge 'up0'" in words


def test_without_a_resolver_that_containers_could_reach_one_is_asked_for(service: Service) -> None:
    # The machine's own /etc/resolv.conf is not the test's; what is said of another one, tests/unit/test_bridge tells.
    pool = service.start(config=configured("10.77.3.0/24", "dns = []"))
    with pool.lease("job") as container:
        assert say(container, "cat", "/etc/resolv.conf") == ""


def test_a_bridge_of_the_hosts_own_is_used_and_left(service: Service, lab: NetLab) -> None:
    lab.host.run("ip", "link", "add", "br-lab", "type", "bridge")
    lab.host.run("ip", "address", "add", "10.88.0.1/24", "dev", "br-lab")
    lab.host.run("ip", "link", "set", "br-lab", "up")
    try:
        config = configured("10.88.0.128/26", 'bridge = "br-lab"', "nat = true", f'dns = ["{FAR}"]')
        pool = service.start(config=config)
        with pool.lease("job") as container:
            assert container.ips == ("10.88.0.128",)
            assert say(container, "nc", "-w", "5", FAR, str(PORT)) == UPLINK
            assert "10.88.0.128/24" in say(container, "ip", "-4", "address", "show", "eth0")
        service.stop()
        assert "br-lab" in lab.host.devices()
        assert "10.88.0.1/24" in lab.host.run("ip", "address", "show", "dev", "br-lab")
    finally:
        lab.host.run("ip", "link", "delete", "br-lab")


def test_two_services_never_share_a_bridge(service: Service, lab: NetLab, images: Path) -> None:
    lab.host.run("ip", "link", "add", "br-two", "type", "bridge")
    lab.host.run("ip", "address", "add", "10.89.0.1/24", "dev", "br-two")
    config = configured("10.89.0.128/26", 'bridge = "br-two"', "dns = []")
    other = Service(images, lab.host)
    try:
        other.start(config=config)
        words = refusal(service, config)
        assert f"br-two is in use by another service, or is left by one (nft table lxp-{other.instance}-br-two" in words
    finally:
        other.close()
        lab.host.run("ip", "link", "delete", "br-two")


def test_it_works_where_a_container_runtime_drops_what_is_forwarded(service: Service, lab: NetLab) -> None:
    lab.host.run("iptables", "-P", "FORWARD", "DROP")
    try:
        pool = service.start(config=CONFIG)
        with pool.lease("job") as container:
            assert say(container, "nc", "-w", "5", FAR, str(PORT)) == UPLINK
        service.stop()
        assert lab.host.run("iptables", "-S", "FORWARD").splitlines() == ["-P FORWARD DROP"]
    finally:
        lab.host.run("iptables", "-P", "FORWARD", "ACCEPT")


def test_the_network_is_there_when_the_container_is(pool: PoolServiceProxy) -> None:
    with pool.lease("job") as container:
        assert container.wait_for_network(0) == container.ips


@pytest.mark.parametrize(
    ("undone", "done_again", "missing"),
    [
        ("ip link set eth0 down", "ip link set eth0 up; ip route add default via $gateway", "eth0"),
        ("ip address flush dev eth0", "ip address add $address dev eth0; ip route add default via $gateway", "address"),
        ("ip route delete default", "ip route add default via $gateway", "default route"),
    ],
)
def test_waiting_for_the_network_ends_when_the_image_has_brought_it_up(
    pool: PoolServiceProxy, undone: str, done_again: str, missing: str
) -> None:
    with pool.lease("job") as container:
        (address,) = container.ips
        setting = f"address={address}/22; gateway=$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'); "
        again = f"{setting}{undone}; echo undone; read go; {done_again}"
        process = container.popen(["sh", "-ec", again], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "undone\n"
        with pytest.raises(PoolTimeout, match=missing):
            container.wait_for_network(0.2)
        found: list[tuple[str, ...]] = []
        waiter = threading.Thread(target=lambda: found.append(container.wait_for_network(20)))
        waiter.start()
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        waiter.join(20)
        assert found == [(address,)]
        assert process.wait(10) == 0
        process.close()


def test_waiting_for_the_network_ends_with_the_container(pool: PoolServiceProxy) -> None:
    with pool.lease("job") as container:
        say(container, "ip", "route", "delete", "default")
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                container.wait_for_network(None)
            except LeaseError as error:
                errors.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        container.release()
        waiter.join(10)
        assert [type(error) for error in errors] == [LeaseExpired]


def test_there_is_no_waiting_for_a_network_that_will_never_be(service: Service) -> None:
    with service.start(size=1).lease("job") as container, pytest.raises(ValueError, match='network = "bridge"'):
        container.wait_for_network(None)


def test_containers_of_two_services_do_not_reach_each_other(
    pool: PoolServiceProxy, service: Service, lab: NetLab
) -> None:
    other = service.start(config=CONFIG)
    with pool.lease("one") as one, other.lease("two") as two:
        server = two.popen(["sh", "-c", "while nc -l -p 80 -e echo hello; do :; done"])
        address = two.ips[0]
        eventually(lambda: netlab.greeted(lab.host, address, 80), "the host reaches it")
        done = one.run(["nc", "-w", "1", address, "80"], capture_output=True, timeout=20)
        assert done.stdout == b""
        server.kill_tree()
        server.close()


def test_a_resolver_that_the_host_is_itself_is_reached_and_nothing_else_of_the_host(
    service: Service, lab: NetLab
) -> None:
    lab.resolve(lab.host, UPLINK)
    lab.serve(lab.host, UPLINK, PORT)
    pool = service.start(config=configured("10.77.4.0/24", f'dns = ["{UPLINK}"]'))
    with pool.lease("job") as container:
        assert f"Address: {ANSWER}" in say(container, "nslookup", "somewhere.example")
        assert container.run(["nc", "-w", "1", UPLINK, str(PORT)], capture_output=True, timeout=20).stdout == b""


@pytest.fixture(scope="module")
def debian_pool(lab: NetLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolServiceProxy]:
    images = tmp_path_factory.mktemp("debian") / "images"
    debian.lend_images(images)
    service = Service(images, lab.host)
    try:
        lines = CONFIG.replace("size = 2", "size = 1").splitlines()
        config = "\n".join(line + '\nimage = "debian"' * line.startswith("network = ") for line in lines)
        pool = service.start(config=config)
        pool.wait_ready(timeout=90)
        yield pool
    finally:
        service.close()


@pytest.mark.timeout(600)  # seconds: the first one builds the image, which takes 20 on an idle machine
@pytest.mark.parametrize("profile", PROFILES)
def test_a_booted_debian_has_the_same(debian_pool: PoolServiceProxy, profile: str) -> None:
    with debian_pool.lease("job", timeout=90, profile=profile) as container:
        assert container.wait_for_network(0) == container.ips
        assert say(container, "cat", "/etc/resolv.conf") == f"nameserver {FAR}"
        assert say(container, "getent", "ahostsv4", "somewhere.example").split()[0] == ANSWER
        assert say(container, "bash", "-c", f"cat </dev/tcp/{FAR}/{PORT}") == UPLINK
        assert say(container, "cat", "/proc/net/if_inet6") == ""
