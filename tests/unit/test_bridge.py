"""Where the pool's network may be, and how its devices are called: recorded tables, no host is asked."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

import pytest

from lxc_pool.config import REACHABLE
from lxc_pool.host.bridge import (
    Network,
    clash,
    hardware_address,
    nameservers,
    port_kind,
    port_name,
    taken_networks,
)

ADDRESSES: list[dict[str, Any]] = [
    {"ifname": "lo", "addr_info": [{"local": "127.0.0.1", "prefixlen": 8}]},
    {"ifname": "eth0", "addr_info": [{"local": "192.0.2.2", "prefixlen": 24}]},
    {"ifname": "lxp0a0b0c", "addr_info": [{"local": "10.213.0.1", "prefixlen": 22}]},
    {"ifname": "eth1"},
]
ROUTES: list[dict[str, Any]] = [
    {"dst": "default", "gateway": "192.0.2.1", "dev": "eth0"},
    {"dst": "0.0.0.0/1", "dev": "tun0"},
    {"dst": "10.8.0.0/16", "dev": "tun0", "table": "51820"},
    {"dst": "172.17.3.4", "dev": "tun0"},
    {"type": "unreachable", "dst": "10.99.0.0/24"},
    {"dst": "10.213.0.0/22", "dev": "lxp0a0b0c"},
    {"type": "multicast", "dst": "224.0.0.0/4", "dev": "eth0"},
]


@pytest.mark.parametrize(
    ("subnet", "words"),
    [
        ("10.9.0.0/24", None),
        ("192.0.2.128/25", "192.0.2.2/24 on eth0"),
        ("10.8.255.0/24", "the route to 10.8.0.0/16 through tun0"),
        ("172.17.0.0/22", "the route to 172.17.3.4/32 through tun0"),
        ("10.99.0.0/29", "the route to 10.99.0.0/24"),
        ("10.213.0.0/24", "10.213.0.1/22 on lxp0a0b0c"),
    ],
)
def test_a_subnet_clashes_with_what_the_host_is_in_or_has_a_way_to(subnet: str, words: str | None) -> None:
    assert clash(IPv4Network(subnet), taken_networks(ADDRESSES, ROUTES)) == words


def test_a_bridge_does_not_clash_with_itself() -> None:
    taken = taken_networks(ADDRESSES, ROUTES)
    assert clash(IPv4Network("10.213.0.0/22"), taken, except_device="lxp0a0b0c") is None


def test_every_name_of_a_port_fits_and_tells_what_its_container_reaches() -> None:
    reaches = [reach for count in range(4) for reach in itertools.combinations(REACHABLE, count)]
    assert len({port_kind(reach) for reach in reaches}) == 8
    names = {port_name("0a0b0c", reach, number) for reach in reaches for number in (1, 17, 1022)}
    assert len(names) == 24
    assert max(map(len, names)) <= 15
    assert all(name.startswith("lxp0a0b0c") for name in names)


def test_a_hardware_address_is_local_and_no_group() -> None:
    first = int(hardware_address(IPv4Address("10.213.0.7")).split(":")[0], 16)
    assert (first & 2, first & 1) == (2, 0)


def test_containers_get_neither_the_gateways_address_nor_the_networks_own() -> None:
    own = Network("0a0b0c", "lxp0a0b0c", True, IPv4Interface("10.1.1.1/29"), IPv4Network("10.1.1.0/29"), True, ())
    assert [str(address) for address in own.addresses] == [f"10.1.1.{number}" for number in range(2, 7)]
    part = Network("0a0b0c", "br0", False, IPv4Interface("10.1.1.1/24"), IPv4Network("10.1.1.8/29"), False, ())
    assert [str(address) for address in part.addresses] == [f"10.1.1.{number}" for number in range(8, 16)]
    assert part.number(IPv4Address("10.1.1.8")) == 0


def test_resolvers_are_read_of_a_file_as_people_write_it() -> None:
    text = "# none\nsearch example.org\nnameserver 192.0.2.53\nnameserver fd00::53\n"
    text += " nameserver\t127.0.0.53 # itself\nnameserver\n"
    assert nameservers(text) == ["192.0.2.53", "127.0.0.53"]
