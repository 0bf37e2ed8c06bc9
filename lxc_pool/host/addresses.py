"""Read the network addresses of another process's network namespace, without entering it."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path


def of_process(pid: int) -> tuple[str, ...]:
    """Return the addresses, IPv4 first, that the network namespace of *pid* has beyond loopback and link-local ones.

    Raises:
        ProcessLookupError: The process has ended.

    Source: /proc/PID/net shows the namespace of PID, proc(5); `fib_trie` lists local addresses as `/32 host LOCAL`.
    """
    try:
        trie = Path(f"/proc/{pid}/net/fib_trie").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError, OSError) as error:
        raise ProcessLookupError(f"process {pid} has ended") from error
    try:
        inet6 = Path(f"/proc/{pid}/net/if_inet6").read_text(encoding="ascii")
    except OSError:  # a kernel without IPv6 has no such file
        inet6 = ""
    return parse(trie, inet6)


def parse(fib_trie: str, if_inet6: str) -> tuple[str, ...]:
    """Return the addresses in the text of the two files."""
    found: dict[str, None] = {}
    for text in re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", fib_trie):
        found.setdefault(text)
    for line in if_inet6.splitlines():
        if digits := line.split()[:1]:
            found.setdefault(str(ipaddress.IPv6Address(int(digits[0], 16))))
    return tuple(text for text in found if not _is_local(ipaddress.ip_address(text)))


def _is_local(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_loopback or address.is_link_local
