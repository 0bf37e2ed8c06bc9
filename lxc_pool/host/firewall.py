"""The rules that stand between containers on a bridge and all others, as tables of nftables that are the service's own.

```
 port ─► bridge table: prerouting ──► another port?  forward ─────────────────► postrouting ─► port
         is it who it says it is       only if both profiles say so
                    │
                    └──► the bridge itself: input ─► inet table: prerouting ──► a service of the host?  no, but …
                                                     forward, postrouting ────► the outside: counted, translated
```

Who a container is, its port says: each port may send with one MAC and one IPv4 address, both of which follow from its
number, and the set of all of them is written down once. So nothing is to be added or removed when a container comes or
goes, and nothing can be forgotten. IPv6, and whatever else is neither IPv4 nor ARP, passes in no direction.

What the bridge table knows of a packet (its port) and the inet table needs, goes along as a mark, which is taken off
before anybody routes by it.

Source: nft(8); Linux net/bridge/br_input.c for which frames pass which hooks.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import logging
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence

from lxc_pool.config import REACHABLE
from lxc_pool.errors import BackendError, ConfigError
from lxc_pool.host.bridge import Network, device_prefix, hardware_address, port_kind, port_name

log = logging.getLogger(__name__)

_METADATA = ("100.100.100.200", "168.63.129.16", "169.254.0.0/16")
"""Where clouds tell a machine its credentials. Source: the metadata services of AWS, Google, Azure, Oracle, OpenStack
(169.254.169.254 and neighbours), Alibaba (100.100.100.200), Azure's WireServer (168.63.129.16)."""

_HOST_MARK = 0x6C787068
"""On packets of containers that may reach the host, from the bridge to the inet table."""

_MOST_CONNECTIONS = 4000
"""Connections of one container to the outside at once: the kernel tracks 65 536 or 262 144 for the whole machine. A
guess. Source: Linux Documentation/networking/nf_conntrack-sysctl.rst."""

_TIMEOUT = 10.0
"""Seconds for a program that takes some milliseconds."""


def table(network: Network) -> str:
    """Return the name of the network's tables; that of a bridge which is not the service's own tells which it is."""
    name = f"lxp-{network.instance}"
    return name if network.own else f"{name}-{network.bridge}"


def tables(instance: str = "[0-9a-f]{6}") -> tuple[str, ...]:
    """Return the names of the tables of a service (default: of all) that are there; none on a host without nftables."""
    if shutil.which("nft") is None:
        return ()
    try:
        answer = json.loads(_run(["nft", "-json", "list", "tables"]))
    except BackendError as error:
        log.debug("no tables: %s", error)  # a kernel without nftables, or a user without rights
        return ()
    names = {entry["table"]["name"] for entry in answer["nftables"] if "table" in entry}
    return tuple(sorted(name for name in names if re.fullmatch(rf"lxp-{instance}(-.+)?", name)))


def close_off(network: Network, reaches: Iterable[Sequence[str]]) -> None:
    """Put the rules in force, all at once, in the place of those that were there.

    Args:
        network: The pool's.
        reaches: What each profile on it reaches.

    Raises:
        ConfigError: There is no nft, or another service has the bridge.
        BackendError: The kernel or another firewall refused.
    """
    if shutil.which("nft") is None:
        raise ConfigError(
            'a profile has network = "bridge", which takes nft to keep its containers apart: apt-get install nftables'
        )
    own = table(network)
    for name in tables():
        if not network.own and name != own and name.endswith(f"-{network.bridge}"):
            raise ConfigError(
                f"network.bridge: {network.bridge} is in use by another service, or is left by one (nft table {name}, "
                "see `lxc-pool audit --state-dir …` of that one): two would give out the same addresses"
            )
    _run(["nft", "-f", "-"], rules(network, reaches))
    for name in tables(network.instance):
        if name != own:
            remove_table(name)  # that of another bridge, before the configuration changed
    _pass_other_firewall(network)


def rehearse(network: Network) -> None:
    """See whether this host's nft and kernel know all that the rules need; nothing is changed.

    Raises:
        BackendError: They do not.
    """
    _run(["nft", "--check", "-f", "-"], rules(network, [(), REACHABLE]))


def remove_table(name: str) -> None:
    """Remove a network's tables, and what was put into another firewall for it; not an error if there are none.

    Raises:
        BackendError: They are still there.
    """
    for rule in _foreign_rules(name):
        _run(["iptables", "-w", "-D", *rule])
    if name in tables():
        # Each is made first: the other one alone may be there.
        lines = [f"table {family} {name}\ndelete table {family} {name}\n" for family in ("bridge", "inet")]
        _run(["nft", "-f", "-"], "".join(lines))


def rules(network: Network, reaches: Iterable[Sequence[str]]) -> str:
    """Return the tables in nft's language, which replace those of that name."""
    kinds = {port_kind(reach): tuple(reach) for reach in reaches}
    prefix = device_prefix(network.instance)
    stations = [
        (port_name(network.instance, reach, network.number(address)), hardware_address(address), str(address))
        for reach in kinds.values()
        for address in network.addresses
    ]
    name = table(network)
    meeting = [kind for kind, reach in kinds.items() if "containers" in reach]
    arrivals = "".join(f'\t\tiifname "{prefix}{kind}*" goto from_{kind}\n' for kind in kinds)
    bridge = f"""\
table bridge {name}
delete table bridge {name}
table bridge {name} {{
	set stations {{
		type ifname . ether_addr . ipv4_addr
		elements = {{ {_joined(f'"{port}" . {mac} . {address}' for port, mac, address in stations)} }}
	}}
	set macs {{
		type ifname . ether_addr
		elements = {{ {_joined(f'"{port}" . {mac}' for port, mac, _address in stations)} }}
	}}
{_set_of_resolvers(network)}
	set metadata {{
		type ipv4_addr
		flags interval
		elements = {{ {", ".join(_METADATA)} }}
	}}
	chain prerouting {{
		type filter hook prerouting priority -300; policy accept;
{arrivals}		iifname "{prefix}*" drop
	}}
{"".join(_from_kind(kind, reach) for kind, reach in kinds.items())}
	chain identity {{
		ether type arp iifname . ether saddr . arp saddr ip != @stations drop
		ether type arp iifname . arp saddr ether . arp saddr ip @stations return
		ether type ip iifname . ether saddr . ip saddr @stations return
		drop
	}}
	chain forward {{
		type filter hook forward priority -200; policy accept;
{
        "".join(
            f'''		iifname "{prefix}{one}*" oifname "{prefix}{other}*" accept
'''
            for one in meeting
            for other in meeting
        )
    }\
		iifname "{prefix}*" oifname "{prefix}*" drop
	}}
	chain input {{
		type filter hook input priority -200; policy accept;
		# Routed back to a neighbour by the host.
		iifname "{prefix}*" ip daddr {network.subnet} ip daddr != {network.gateway.ip} drop
	}}
	chain postrouting {{
		type filter hook postrouting priority 300; policy accept;
		oifname "{prefix}*" ether type != {{ ip, arp }} drop
		# What the bridge floods, for it does not know whose it is: a neighbour's that has just ended.
		oifname "{prefix}*" ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00 oifname . ether daddr != @macs drop
	}}
}}
"""
    ours = f'iifname "{network.bridge}" ip saddr {network.subnet}'
    inet = f"""\
table inet {name}
delete table inet {name}
table inet {name} {{
{_set_of_resolvers(network)}
	set connections {{
		type ipv4_addr
		size 4096
		flags dynamic
	}}
	chain strays {{
		type filter hook prerouting priority -300; policy accept;
		# What goes to 01:80:c2:00:00:0X comes up as the port's own, and past the bridge table if X is 0 or e.
		iifname "{prefix}*" iifname != "{network.bridge}" drop
	}}
	chain prerouting {{
		type filter hook prerouting priority -150; policy accept;
		{ours} jump arriving
	}}
	chain arriving {{
		meta mark {_HOST_MARK:#x} meta mark set 0 return
		ct state established,related return
		ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 return
		fib daddr type {{ local, broadcast, anycast, multicast }} drop
	}}
	chain forward {{
		type filter hook forward priority 0; policy accept;
		# Between containers, where br_netfilter shows bridged packets here: the bridge table has decided.
		iifname "{network.bridge}" oifname "{network.bridge}" accept
		{ours} ct state new add @connections {{ ip saddr ct count over {_MOST_CONNECTIONS} }} drop
		oifname "{network.bridge}" ip daddr {network.subnet} ct state != {{ established, related }} drop
	}}
"""
    if network.nat:
        inet += f"""\
	chain postrouting {{
		type nat hook postrouting priority 100; policy accept;
		ip saddr {network.subnet} oifname != "{network.bridge}" masquerade
	}}
"""
    return bridge + inet + "}\n"


def _from_kind(kind: str, reach: Sequence[str]) -> str:
    """Return the chain for what comes from the ports of one kind."""
    lines = ["jump identity"]
    if "metadata" not in reach:
        # A cloud's resolver may be where its credentials are.
        lines.append("ip daddr @resolvers meta l4proto { tcp, udp } th dport 53 accept")
        lines.append("ip daddr @metadata drop")
    if "host" in reach:
        lines.append(f"meta mark set {_HOST_MARK:#x}")
    body = "".join(f"\t\t{line}\n" for line in [*lines, "accept"])
    return f"\tchain from_{kind} {{\n{body}\t}}\n"


def _set_of_resolvers(network: Network) -> str:
    addresses = ", ".join(map(str, sorted(map(ipaddress.IPv4Address, network.resolvers))))
    elements = f"\n\t\telements = {{ {addresses} }}" if addresses else ""
    return f"\tset resolvers {{\n\t\ttype ipv4_addr{elements}\n\t}}"


def _joined(elements: Iterable[str]) -> str:
    return ", ".join(elements)


def _pass_other_firewall(network: Network) -> None:
    """Let containers through where a container runtime, or another firewall, drops what it does not know.

    Another table's `accept` is not the last word in nftables, so it has to be said in the table that drops. It is only
    said where there is such a policy: a host without iptables' rules should stay one.
    """
    name = table(network)
    for rule in _foreign_rules(name):
        _run(["iptables", "-w", "-D", *rule])
    if not network.nat or "-P FORWARD DROP" not in _foreign_chain():
        return
    for match in (
        ["-i", network.bridge, "-s", str(network.subnet)],
        ["-o", network.bridge, "-d", str(network.subnet), "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"],
    ):
        _run(["iptables", "-w", "-I", "FORWARD", *match, "-m", "comment", "--comment", name, "-j", "ACCEPT"])
    log.info("another firewall drops what is forwarded: iptables' FORWARD has rules for %s now", network.bridge)


def _foreign_rules(name: str) -> list[list[str]]:
    """Return the rules, as iptables is told to delete them, that are in its FORWARD for a table of ours."""
    rules = [shlex.split(line) for line in _foreign_chain()]
    return [rule[1:] for rule in rules if rule[0] == "-A" and ("--comment", name) in itertools.pairwise(rule)]


def _foreign_chain() -> list[str]:
    """Return what iptables says of its FORWARD; nothing where it is not installed, or the kernel does not have it."""
    if shutil.which("iptables") is None:
        return []
    try:
        return _run(["iptables", "-w", "-S", "FORWARD"]).splitlines()
    except BackendError as error:
        log.debug("no iptables: %s", error)
        return []


def _run(command: list[str], text: str = "") -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"`{' '.join(command)}` did not end within {_TIMEOUT:g} s") from error
    if done.returncode != 0:
        raise BackendError(f"`{' '.join(command)}`: {' '.join(done.stderr.split())[:1000]}")
    return done.stdout
