"""Addresses out of /proc: recorded tables, and this process's own."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from lxc_pool.host import addresses
from lxc_pool.host.addresses import default_routes, of_process, parse, parse_routes
from tests.support.processes import sleeper

TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.0.3.0/24 2 0 2
        +-- 10.0.3.0/26 2 0 2
           |-- 10.0.3.0
              /24 link UNICAST
           |-- 10.0.3.17
              /32 host LOCAL
        |-- 10.0.3.255
           /32 link BROADCAST
     +-- 127.0.0.0/8 2 0 2
        +-- 127.0.0.0/31 1 0 0
           |-- 127.0.0.0
              /8 host LOCAL
           |-- 127.0.0.1
              /32 host LOCAL
        |-- 127.255.255.255
           /32 link BROADCAST
     |-- 169.254.7.7
        /32 host LOCAL
     |-- 192.168.1.2
        /32 host LOCAL
Local:
  +-- 0.0.0.0/0 3 0 5
     +-- 10.0.3.0/24 2 0 2
           |-- 10.0.3.17
              /32 host LOCAL
     |-- 127.0.0.1
        /32 host LOCAL
"""
"""Recorded in a container with a veth on lxcbr0, and a second address. Linux 6.1."""

INET6 = """\
00000000000000000000000000000001 01 80 10 80       lo
fe80000000000000021a4afffe160164 02 40 20 80     eth0
fd420000000000000000000000000017 02 40 00 80     eth0
"""


def test_finds_each_address_once_in_order_without_loopback_and_link_local_ones() -> None:
    assert parse(TRIE, INET6) == ("10.0.3.17", "192.168.1.2", "fd42::17")


def test_an_empty_network_has_none() -> None:
    assert parse("", "") == ()
    assert parse("Main:\n  |-- 127.0.0.1\n     /32 host LOCAL\n", INET6.splitlines()[0] + "\n\n") == ()


def test_reads_the_tables_of_a_process() -> None:
    found = of_process(os.getpid())
    with sleeper() as process:
        assert of_process(process.pid) == found


def test_a_process_that_has_ended_has_no_network() -> None:
    with sleeper() as process:
        pass
    with pytest.raises(ProcessLookupError, match="has ended"):
        of_process(process.pid)


def test_a_kernel_without_ipv6_has_the_other_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_ipv6(path: str) -> bytes:
        if path.endswith("if_inet6"):
            raise FileNotFoundError(path)
        return TRIE.encode()

    monkeypatch.setattr(addresses, "_beginning", without_ipv6)
    assert of_process(os.getpid()) == ("10.0.3.17", "192.168.1.2")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip")
def test_of_as_many_addresses_as_a_hostile_root_may_make_only_the_first_are_read() -> None:
    batch = "".join(f"address add 10.{number >> 8}.{number & 255}.1/32 dev lo\n" for number in range(5000))
    batch += "link set lo up\n" + "".join(
        f"route add 11.{number >> 8}.{number & 255}.0/24 dev lo\n" for number in range(5000)
    )
    command = ["unshare", "--net", "sh", "-c", "ip -batch - && echo ready && exec sleep infinity"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(batch.encode())
            process.stdin.close()
            assert process.stdout.readline() == b"ready\n"
            assert 100 < len(of_process(process.pid)) < 4000
            assert default_routes(process.pid) == set()
            for file in ("fib_trie", "route"):
                beginning = addresses._beginning(f"/proc/{process.pid}/net/{file}")
                assert len(beginning) <= addresses._MOST
                assert beginning.endswith(b"\n")
        finally:
            process.kill()


ROUTES = b"""\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0100D50A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000D50A\t00000000\t0001\t0\t0\t0\t00FCFFFF\t0\t0\t0
*\t00000000\t00000000\t0200\t0\t0\t0\t00000000\t0\t0\t0
a\x1cb\t00000000\t0100D50A\t0003\t0\t0\t9\t00000000\t0\t0\t0
eth1\t00000000\t0100D50A\t0002\t0\t0\t0\t00000000\t0\t0\t0
"""


def test_a_default_route_is_one_to_everywhere_that_is_up_and_refuses_nothing() -> None:
    assert parse_routes(ROUTES) == {"eth0", "a\x1cb"}


def test_an_ended_process_has_no_routes() -> None:
    with pytest.raises(ProcessLookupError):
        default_routes(2**30)
