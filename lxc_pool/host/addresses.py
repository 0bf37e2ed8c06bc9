"""Read the network addresses of another process's network namespace, without entering it."""

from __future__ import annotations

import ipaddress
import re

_MOST = 64 << 10
"""Bytes that are read of a file: of a thousand addresses. A guess; root of a namespace may put millions there, which
would take seconds to be read."""

_UP, _REJECT = 0x1, 0x200
"""Of a route: RTF_UP, RTF_REJECT. Source: Linux include/uapi/linux/route.h."""


def of_process(pid: int) -> tuple[str, ...]:
    """Return the addresses, IPv4 first, that the network namespace of *pid* has beyond loopback and link-local ones.

    Of very many, the first.

    Raises:
        ProcessLookupError: The process has ended.

    Source: /proc/PID/net shows the namespace of PID, proc(5); `fib_trie` lists local addresses as `/32 host LOCAL`.
    """
    try:
        trie = _beginning(f"/proc/{pid}/net/fib_trie").decode("ascii")
    except OSError as error:
        raise ProcessLookupError(f"process {pid} has ended") from error
    try:
        inet6 = _beginning(f"/proc/{pid}/net/if_inet6").decode("ascii")
    except OSError:  # a kernel without IPv6 has no such file
        inet6 = ""
    return parse(trie, inet6)


def default_routes(pid: int) -> set[str]:
    """Return the names of the devices that an IPv4 default route of the network namespace of *pid* leads over.

    Raises:
        ProcessLookupError: The process has ended.
    """
    try:
        return parse_routes(_beginning(f"/proc/{pid}/net/route"))
    except OSError as error:
        raise ProcessLookupError(f"process {pid} has ended") from error


def parse_routes(route: bytes) -> set[str]:
    """Return the same from what /proc/PID/net/route holds.

    Bytes: a device's name may have any in it but ASCII's spaces, and str takes more for spaces. Source: Linux
    net/ipv4/fib_trie.c, fib_route_seq_show; net/core/dev.c, dev_valid_name.
    """
    found = set()
    for line in route.splitlines()[1:]:
        device, destination, _gateway, flags, _references, _use, _metric, mask, *_ = line.split()
        if int(destination, 16) == int(mask, 16) == 0 and int(flags, 16) & (_UP | _REJECT) == _UP:
            found.add(device.decode("ascii", errors="replace"))
    return found


def parse(fib_trie: str, if_inet6: str) -> tuple[str, ...]:
    """Return the addresses in the text of the two files."""
    found: dict[str, None] = {}
    for text in re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", fib_trie):
        found.setdefault(text)
    for line in if_inet6.splitlines():
        if digits := line.split()[:1]:
            found.setdefault(str(ipaddress.IPv6Address(int(digits[0], 16))))
    return tuple(text for text in found if not _is_local(ipaddress.ip_address(text)))


def _beginning(path: str) -> bytes:
    """Return the first whole lines of a file."""
    with open(path, "rb") as file:
        text = file.read(_MOST)
    return text if len(text) < _MOST else text[: text.rfind(b"\n") + 1]


def _is_local(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_loopback or address.is_link_local
