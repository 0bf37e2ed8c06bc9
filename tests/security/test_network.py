"""Root of a container on the bridge reaches the outside, and nobody else; and is nobody but itself there.

What must not arrive is sent before something that must, and both on the same way: when that has come, the rest is gone.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from lxc_pool import PoolServiceProxy
from lxc_pool.host.bridge import hardware_address
from tests.security.attackers import Attacker
from tests.support import netlab
from tests.support.netlab import FAR, METADATA, PORT, ROUTER, UPLINK, NetLab, Tap
from tests.support.real_service import Service, running

HOST_PORT = 8001
"""Where the host has a service of its own, on every address."""

REACHES = ("containers", "host", "metadata")

CONFIG = f"""\
[pool]
workers = 2
[network]
dns = ["{FAR}"]
[profile.default]
network = "bridge"
size = 2
""" + "".join(f'[profile.{name}]\nnetwork = "bridge"\nsize = 1\nreach = ["{name}"]\n' for name in REACHES)

BROADCAST = "ff:ff:ff:ff:ff:ff"
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD


@pytest.fixture(scope="module")
def networked(lab: NetLab, images: Path) -> Iterator[Service]:
    lab.serve(lab.host, "0.0.0.0", HOST_PORT)  # noqa: S104  # in a namespace of its own
    with running(images, CONFIG, lab.host) as service:
        yield service


@pytest.fixture
def pool(networked: Service) -> Iterator[PoolServiceProxy]:
    with networked.connect() as pool:
        pool.wait_ready()
        yield pool


class Station(Attacker):
    """An attacker with a place on the bridge."""

    @property
    def ip(self) -> str:
        return self.container.wait_for_network(5)[0]

    @property
    def mac(self) -> str:
        return hardware_address(IPv4Address(self.ip))

    @property
    def namespace(self) -> Path:
        return Path(f"/proc/{self.container.init_pid}/ns/net")

    def reached(self, *servers: tuple[str, int]) -> set[str]:
        """Return the addresses of those servers that it gets a word out of; all are asked at once."""
        asking = "".join(
            f"(nc -w 1 {ip} {port} </dev/null 2>/dev/null | grep -q . && echo {ip}) & " for ip, port in servers
        )
        return set(self.shell(f"{asking} wait").split())

    def reaches(self, address: str, port: int) -> bool:
        return self.reached((address, port)) == {address}

    def send(self, *frames: bytes) -> None:
        answers = self.run("frames", "eth0", *(frame.hex() for frame in frames))
        assert set(answers.values()) == {"ok"}

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Have a server on port 80 that answers as the others do."""
        server = self.container.popen(
            ["sh", "-c", "echo up; while nc -l -p 80 -e echo 1.2.3.4; do :; done"], stdout=subprocess.PIPE
        )
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"up\n"
            yield
        finally:
            server.kill_tree()
            server.close()


@pytest.fixture
def leases(pool: PoolServiceProxy, attack_program: bytes) -> Iterator[dict[str, Station]]:
    """A container of each profile, and one more of the default one, its `neighbour`."""
    with contextlib.ExitStack() as stack:
        stations = {}
        for name in ("default", "neighbour", *REACHES):
            profile = "default" if name == "neighbour" else name
            stations[name] = Station(stack.enter_context(pool.lease(name, profile=profile)), attack_program)
        yield stations


@pytest.fixture
def attacker(leases: dict[str, Station]) -> Station:
    return leases["default"]


@pytest.fixture
def neighbour(leases: dict[str, Station]) -> Station:
    return leases["neighbour"]


class Bridge:
    """What a test has to know of the bridge."""

    def __init__(self, lab: NetLab, service: Service) -> None:
        self.name = f"lxp{service.instance}"
        (device,) = netlab.json_of(lab.host.run("ip", "-json", "-4", "address", "show", "dev", self.name))
        self.ip = device["addr_info"][0]["local"]
        self.mac = hardware_address(IPv4Address(self.ip))


@pytest.fixture
def bridge(lab: NetLab, networked: Service) -> Bridge:
    return Bridge(lab, networked)


# --- frames -----------------------------------------------------------------------------------------------------------


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(destination: str, source: str, kind: int, payload: bytes) -> bytes:
    return mac(destination) + mac(source) + struct.pack("!H", kind) + payload.ljust(46, b"\0")


def udp(source: str, destination: str, payload: bytes, port: int = 9) -> bytes:
    """An IPv4 packet with a datagram in it."""
    body = struct.pack("!HHHH", 1234, port, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, socket.IPPROTO_UDP, 0)
    head += socket.inet_aton(source) + socket.inet_aton(destination)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:] + body


def arp(operation: int, sender: tuple[str, str], target: tuple[str, str]) -> bytes:
    head = struct.pack("!HHBBH", 1, IPV4, 6, 4, operation)
    return head + b"".join(mac(hardware) + socket.inet_aton(address) for hardware, address in (sender, target))


# --- who is reached ---------------------------------------------------------------------------------------------------


def test_each_container_reaches_the_outside_and_of_the_rest_what_its_profile_says(
    leases: dict[str, Station], bridge: Bridge
) -> None:
    servers = ((FAR, PORT), (METADATA, 80), (bridge.ip, HOST_PORT), (UPLINK, HOST_PORT))
    more = {"metadata": {METADATA}, "host": {bridge.ip, UPLINK}}
    with ThreadPoolExecutor() as together:
        found = dict(zip(leases, together.map(lambda station: station.reached(*servers), leases.values()), strict=True))
    assert found == {name: {FAR} | more.get(name, set()) for name in leases}


def test_containers_reach_each_other_only_if_the_profiles_of_both_say_so(
    leases: dict[str, Station], pool: PoolServiceProxy, attack_program: bytes
) -> None:
    with pool.lease("another", profile="containers") as container:
        another = Station(container, attack_program)
        closed, opened = leases["default"], leases["containers"]
        servers = ((closed.ip, 80), (opened.ip, 80))
        with closed.serving(), opened.serving():
            asking = [another, leases["neighbour"], leases["host"], leases["metadata"]]
            with ThreadPoolExecutor() as together:
                found = list(together.map(lambda station: station.reached(*servers), asking))
        assert found == [{opened.ip}, set(), set(), set()]


def test_nobody_outside_reaches_a_container_even_if_it_knows_the_way(
    attacker: Station, lab: NetLab, bridge: Bridge
) -> None:
    lab.outside.run("ip", "route", "replace", f"{attacker.ip}/32", "via", UPLINK)
    with attacker.serving(), Tap(lab.host.path, bridge.name) as tap:

        def greeted(where: netlab.Namespace) -> bool:
            command = where.command("busybox", "nc", "-w", "1", attacker.ip, "80")
            return subprocess.run(command, capture_output=True, check=False).stdout == b"1.2.3.4\n"

        assert not greeted(lab.outside)
        assert greeted(lab.host)
        to_it = [frame for frame in tap.until(b"1.2.3.4") if frame[30:34] == socket.inet_aton(attacker.ip)]
        assert not [frame for frame in to_it if frame[26:30] == socket.inet_aton(ROUTER)]


# --- who it says it is ------------------------------------------------------------------------------------------------


def test_what_a_container_sends_in_anothers_name_goes_nowhere(
    attacker: Station, neighbour: Station, lab: NetLab, bridge: Bridge
) -> None:
    me, other = attacker.mac, neighbour.mac
    theirs, mine = (bridge.mac, bridge.ip), (me, attacker.ip)

    def ip(source: str, address: str, marker: bytes) -> bytes:
        return ethernet(bridge.mac, source, IPV4, udp(address, FAR, marker))

    def is_at(source: str, sender: tuple[str, str], marker: bytes, destination: str = bridge.mac) -> bytes:
        return ethernet(destination, source, ARP, arp(2, sender, theirs) + marker)

    own = udp(attacker.ip, FAR, b"tagged")
    bad = {
        b"foreign-address": ip(me, neighbour.ip, b"foreign-address"),
        b"gateways-address": ip(me, bridge.ip, b"gateways-address"),
        b"outside-address": ip(me, ROUTER, b"outside-address"),
        b"no-address": ethernet(BROADCAST, me, IPV4, udp("0.0.0.0", "255.255.255.255", b"no-address")),  # noqa: S104
        b"foreign-mac": ip(other, attacker.ip, b"foreign-mac"),
        b"both-foreign": ip(other, neighbour.ip, b"both-foreign"),
        b"invented-mac": ip("02:00:00:00:00:99", attacker.ip, b"invented-mac"),
        b"version-6": ethernet("33:33:00:00:00:01", me, IPV6, b"\x60" + bytes(39) + b"version-6"),
        b"tagged": ethernet(bridge.mac, me, 0x8100, b"\0\0\x08\0" + own),
        b"twice": ethernet(bridge.mac, me, 0x88A8, b"\0\1\x81\0\0\1\x08\0" + own + b"twice"),
        b"neither": ethernet(bridge.mac, me, 0x88B5, b"neither"),
        b"arp-gateway": is_at(me, (me, bridge.ip), b"arp-gateway", BROADCAST),
        b"arp-neighbour": is_at(me, (me, neighbour.ip), b"arp-neighbour"),
        b"arp-mac": is_at(me, (other, attacker.ip), b"arp-mac"),
        b"arp-from": is_at(other, mine, b"arp-from"),
    }
    good = ethernet(bridge.mac, me, IPV4, udp(attacker.ip, FAR, b"its-own-name"))
    with (
        Tap(lab.host.path, bridge.name) as at_bridge,
        Tap(lab.host.path, "up0") as at_uplink,
        Tap(neighbour.namespace, "eth0") as at_neighbour,
    ):
        attacker.send(*bad.values(), good)
        seen = [*at_bridge.until(b"its-own-name"), *at_uplink.until(b"its-own-name")]
        greet(lab, neighbour.ip, b"from-the-host")
        seen += at_neighbour.until(b"from-the-host")
    arrived = {marker for marker in bad for frame in seen if marker in frame}
    assert arrived == set()


def test_no_frame_reaches_a_neighbour_on_any_way(
    attacker: Station, neighbour: Station, lab: NetLab, bridge: Bridge
) -> None:
    me = attacker.mac
    bad = {
        b"straight": ethernet(neighbour.mac, me, IPV4, udp(attacker.ip, neighbour.ip, b"straight")),
        b"to-all": ethernet(BROADCAST, me, IPV4, udp(attacker.ip, neighbour.ip, b"to-all")),
        b"to-a-group": ethernet("01:00:5e:00:00:01", me, IPV4, udp(attacker.ip, "224.0.0.1", b"to-a-group")),
        b"by-the-host": ethernet(bridge.mac, me, IPV4, udp(attacker.ip, neighbour.ip, b"by-the-host")),
        b"who-has": ethernet(BROADCAST, me, ARP, arp(1, (me, attacker.ip), (BROADCAST, neighbour.ip)) + b"who-has"),
    }
    with Tap(neighbour.namespace, "eth0") as at_neighbour, Tap(lab.host.path, bridge.name) as at_bridge:
        attacker.send(*bad.values(), ethernet(bridge.mac, me, IPV4, udp(attacker.ip, FAR, b"the-last")))
        at_bridge.until(b"the-last")
        greet(lab, neighbour.ip, b"from-the-host")
        seen = at_neighbour.until(b"from-the-host")
    assert not [marker for marker in bad for frame in seen if marker in frame]


def test_a_neighbour_does_not_hear_what_the_host_says_to_one_that_has_ended(
    neighbour: Station, lab: NetLab, bridge: Bridge
) -> None:
    gone = "02:6c:0a:00:00:fe"
    address = str(IPv4Address(bridge.ip) + 900)
    lab.host.run("ip", "neigh", "replace", address, "lladdr", gone, "dev", bridge.name)
    with Tap(neighbour.namespace, "eth0") as at_neighbour, Tap(lab.host.path, bridge.name) as at_bridge:
        greet(lab, address, b"secret")
        at_bridge.until(b"secret")
        greet(lab, neighbour.ip, b"from-the-host")
        seen = at_neighbour.until(b"from-the-host")
    assert not [frame for frame in seen if b"secret" in frame]


@pytest.mark.parametrize("last", [0x00, 0x02, 0x03, 0x0E])
def test_frames_that_a_bridge_does_not_forward_do_not_slip_past_it_to_the_host(
    attacker: Station, leases: dict[str, Station], lab: NetLab, bridge: Bridge, last: int
) -> None:
    """What goes to 01:80:c2:00:00:0X comes up as the port's own, where no rule for the bridge sees it."""
    group = f"01:80:c2:00:00:{last:02x}"
    with listening(lab, UPLINK, HOST_PORT) as listener:
        attacker.send(ethernet(group, attacker.mac, IPV4, udp(attacker.ip, UPLINK, b"slipped", HOST_PORT)))
        host = leases["host"]
        host.send(ethernet(bridge.mac, host.mac, IPV4, udp(host.ip, UPLINK, b"allowed", HOST_PORT)))
        assert listener.recv(100) == b"allowed"


def test_the_hosts_neighbours_are_not_renamed(
    attacker: Station, neighbour: Station, lab: NetLab, bridge: Bridge
) -> None:
    greet(lab, neighbour.ip, b"hello")
    me = attacker.mac
    lie = ethernet(bridge.mac, me, ARP, arp(2, (me, neighbour.ip), (bridge.mac, bridge.ip)))
    with Tap(lab.host.path, bridge.name) as tap:
        attacker.send(lie, ethernet(bridge.mac, me, IPV4, udp(attacker.ip, FAR, b"the-last")))
        tap.until(b"the-last")
    known = lab.host.run("ip", "neigh", "show", neighbour.ip, "dev", bridge.name)
    assert me not in known
    assert neighbour.mac in known


def test_ipv6_is_off_even_for_root_of_a_container_that_turns_it_on(
    attacker: Station, lab: NetLab, bridge: Bridge
) -> None:
    turned_on = attacker.shell("for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 0 >$f; done; ip -6 address")
    assert "fe80::" in turned_on
    with Tap(lab.host.path, bridge.name) as tap:
        attacker.shell("ping6 -c 1 -W 1 ff02::1%eth0")
        attacker.send(ethernet(bridge.mac, attacker.mac, IPV4, udp(attacker.ip, FAR, b"the-last")))
        seen = tap.until(b"the-last")
    assert not [frame for frame in seen if frame[12:14] == b"\x86\xdd"]
    assert "inet6" not in lab.host.run("ip", "address", "show", "dev", bridge.name)


# --- what is shared ---------------------------------------------------------------------------------------------------


def test_one_container_can_not_use_up_the_hosts_table_of_connections(
    attacker: Station, neighbour: Station, lab: NetLab
) -> None:
    assert attacker.run("datagrams", FAR, "6000")["sent"] == "6000"
    table = subprocess.run(lab.host.command("cat", "/proc/net/nf_conntrack"), capture_output=True, check=True).stdout
    tracked = [line for line in table.decode().splitlines() if f"src={attacker.ip} " in line]
    assert 1000 < len(tracked) <= 4001
    assert neighbour.reaches(FAR, PORT)


def test_containers_stay_apart_when_somebody_flushes_all_rules(images: Path, attack_program: bytes) -> None:
    with NetLab() as lab, contextlib.closing(Service(images, lab.host)) as service:
        lab.serve(lab.host, UPLINK, HOST_PORT)
        pool = service.start(config='[network]\ndns = []\n[profile.default]\nnetwork = "bridge"\nsize = 2\n')
        with pool.lease(1) as one, pool.lease(2) as two:
            pool.wait_ready()
            first, second = Station(one, attack_program), Station(two, attack_program)
            with second.serving():
                reached: set[str] = set()
                for _ in range(10):
                    lab.host.run("nft", "flush", "ruleset")
                    reached = first.reached((second.ip, 80), (UPLINK, HOST_PORT))
                    assert second.ip not in reached
                    if reached:
                        break
                    # The service puts them back with the next thing that it has to do: it has had something.
                assert reached == {UPLINK}


# --- the host ---------------------------------------------------------------------------------------------------------


def greet(lab: NetLab, address: str, words: bytes) -> None:
    """Send a datagram from the host."""

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(words, (address, 9))

    lab.host.inside(send)


@contextlib.contextmanager
def listening(lab: NetLab, address: str, port: int) -> Iterator[socket.socket]:
    def bind() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, port))
        sock.settimeout(10)
        return sock

    with lab.host.inside(bind) as sock:
        yield sock
