"""The bridge that containers are on: whose addresses it has, and the device itself.

```
 container ── eth0 ╌ port ──┐
 container ── eth0 ╌ port ──┴── bridge (the containers' gateway) ── the host's routing ── the outside
```

Devices of the service's own begin with `lxp` and its instance id: `lxp3fa9c1` is the bridge, `lxp3fa9c1c01f` the port
of the container with the 31st address and a profile that reaches what `c` stands for (see `port_name`). So a rule for
all ports of a kind needs no list of them, and a device tells by its name whose it is, whoever is left to ask.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import ipaddress
import json
import logging
import os
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

from lxc_pool.config import REACHABLE, NetworkConfig
from lxc_pool.errors import BackendError, ConfigError

log = logging.getLogger(__name__)

_POOLS = tuple(map(IPv4Network, ("10.213.0.0/16", "172.29.0.0/16", "192.168.208.0/20")))
"""Where a subnet is looked for that is free on this host. A guess: what Docker, LXD, libvirt and Kubernetes take first
is elsewhere."""

_AUTO_PREFIX = 22
"""Of such a subnet: 1021 containers, nearly as many as a bridge has ports."""

_HALF = 1
"""Routes no longer than this are ways to everywhere, as VPNs make two of, and no clash."""

_RESOLV_FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""Where the host's resolvers are; the second, if the first says that they are to be asked through this host itself.
Source: systemd-resolved(8)."""

_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")

_KINDS = "abcdefgh"
"""Letters for the sets of what containers may reach; see `port_name`."""

_TIMEOUT = 10.0
"""Seconds for a program that takes some milliseconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """What there is to know of the pool's network.

    Attributes:
        instance: The service's.
        bridge: The device.
        own: Whether the service makes and removes it.
        gateway: The host's address on it, with the length of the network's prefix.
        subnet: Whose addresses containers get: the whole network, or a part of it.
        nat: Whether what goes outside comes from the host's address.
        resolvers: What containers are told to ask for names.
    """

    instance: str
    bridge: str
    own: bool
    gateway: IPv4Interface
    subnet: IPv4Network
    nat: bool
    resolvers: tuple[str, ...]

    @property
    def addresses(self) -> tuple[IPv4Address, ...]:
        """What containers may have, in order."""
        network = self.gateway.network
        taken = {self.gateway.ip, network.network_address, network.broadcast_address}
        return tuple(address for address in self.subnet if address not in taken)

    def number(self, address: IPv4Address) -> int:
        """Return which of the subnet's addresses this is: what its port is named by."""
        return int(address) - int(self.subnet.network_address)


def device_prefix(instance: str) -> str:
    """Return what the names of this instance's network devices, and no others, begin with."""
    return f"lxp{instance}"


def port_kind(reach: Iterable[str]) -> str:
    """Return the letter for what a profile reaches: one for each set of what there is."""
    return _KINDS[sum(1 << REACHABLE.index(what) for what in reach)]


def reach_of(port: str) -> tuple[str, ...]:
    """Return what whoever has a port of that name reaches; the inverse of `port_name`."""
    number = _KINDS.index(port[-4])
    return tuple(what for bit, what in enumerate(REACHABLE) if number >> bit & 1)


def port_name(instance: str, reach: Iterable[str], number: int) -> str:
    """Return the name of a container's port: at most 15 characters, which is what Linux allows."""
    return f"{device_prefix(instance)}{port_kind(reach)}{number:03x}"


def hardware_address(address: IPv4Address) -> str:
    """Return the MAC of whoever has *address*: locally administered, and as unique as that."""
    return ":".join(f"{byte:02x}" for byte in b"\x02\x6c" + address.packed)


def plan(config: NetworkConfig, instance: str) -> Network:
    """Decide about the network, and see whether this host has room for it; nothing is changed.

    Raises:
        ConfigError: The configuration does not go with this host; the message says what to change.
        BackendError: The host can't be asked.
    """
    addresses = _ip("-4", "address", "show")
    resolvers = _resolvers(config)
    if config.bridge is not None:
        gateway, subnet = _existing(config, config.bridge, addresses)
        return Network(instance, config.bridge, False, gateway, subnet, bool(config.nat), resolvers)
    bridge = device_prefix(instance)
    present = _addresses_of(bridge, addresses)
    if config.subnet is not None:
        subnet = config.subnet
        if (what := clash(subnet, taken_networks(addresses, _routes()), except_device=bridge)) is not None:
            raise ConfigError(
                f"network.subnet: {subnet} overlaps {what}: choose another one, or leave it out for one that is free"
            )
    elif present:
        subnet = present[0].network  # an earlier service's, whose containers may live
    else:
        subnet = _free_subnet(taken_networks(addresses, _routes()))
    gateway = IPv4Interface((subnet.network_address + 1, subnet.prefixlen))
    return Network(instance, bridge, True, gateway, subnet, config.nat is not False, resolvers)


def taken_networks(
    addresses: Sequence[Mapping[str, Any]], routes: Sequence[Mapping[str, Any]]
) -> list[tuple[IPv4Network, str, str]]:
    """Return every network that the host is in or has a way to, with the device and the words for it.

    Args:
        addresses: As `ip -json address` has them.
        routes: As `ip -json route show table all` has them.
    """
    taken = []
    for device in addresses:
        name = device.get("ifname", "")
        taken += [(one.network, name, f"{one} on {name}") for one in _addresses_of(name, [device])]
    for route in routes:
        with contextlib.suppress(ValueError):  # "default"
            network = IPv4Network(route["dst"])
            if network.prefixlen > _HALF and not network.is_multicast:
                device = route.get("dev", "")
                taken.append((network, device, f"the route to {network}" + (f" through {device}" if device else "")))
    return taken


def clash(
    subnet: IPv4Network, taken: Iterable[tuple[IPv4Network, str, str]], *, except_device: str | None = None
) -> str | None:
    """Return the words for what overlaps *subnet*; None: nothing does."""
    for network, device, words in taken:
        if device != except_device and network.overlaps(subnet):
            return words
    return None


@contextlib.contextmanager
def namespace_lock() -> Iterator[None]:
    """Be the only service that chooses or makes a network in this network namespace."""
    # The namespace's own file: nothing is left behind, and who has another namespace is not in the way.
    descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make(network: Network) -> None:
    """Make the bridge if it is the service's own and not there, and let the host forward for it.

    Raises:
        BackendError: The host refused.
    """
    if network.own:
        if network.bridge not in devices():
            mac = hardware_address(network.gateway.ip)  # its own, not that of whichever port is first: that one goes
            _run("link", "add", "name", network.bridge, "address", mac, "type", "bridge", "mcast_snooping", "0")
        for interface in _addresses_of(network.bridge, _ip("-4", "address", "show", "dev", network.bridge)):
            if interface != network.gateway:
                _run("address", "delete", str(interface), "dev", network.bridge)
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            _write(Path(f"/proc/sys/net/ipv6/conf/{network.bridge}/disable_ipv6"), "1")
        _run("address", "replace", str(network.gateway), "broadcast", "+", "dev", network.bridge)
        _run("link", "set", "dev", network.bridge, "up")
    if network.nat and _FORWARDING.read_text(encoding="ascii").strip() == "0":
        log.warning("net.ipv4.ip_forward was 0: it is set to 1 for the containers' sake, and stays so")
        _write(_FORWARDING, "1")


def devices() -> tuple[str, ...]:
    """Return the names of all network devices of this process's network namespace."""
    return tuple(name for _index, name in socket.if_nameindex())


def remove_device(name: str) -> None:
    """Remove a bridge or port; not an error if there is none.

    Raises:
        BackendError: It is still there.
    """
    if name not in devices():
        return
    try:
        _run("link", "delete", "dev", name)
    except BackendError:
        if name in devices():
            raise


def _existing(
    config: NetworkConfig, bridge: str, addresses: Sequence[Mapping[str, Any]]
) -> tuple[IPv4Interface, IPv4Network]:
    """Return the host's address on a bridge that it has, and what of that network is the pool's."""
    kind = {link["ifname"]: link.get("linkinfo", {}).get("info_kind") for link in _ip("-details", "link", "show")}
    if kind.get(bridge) != "bridge":
        raise ConfigError(
            f"network.bridge: this host has no bridge {bridge!r}: make it, or leave the key out, for the service's own"
        )
    present = _addresses_of(bridge, addresses)
    if not present:
        raise ConfigError(f"network.bridge: {bridge} has no IPv4 address, which would be the containers' gateway")
    if config.subnet is None:
        raise ConfigError(
            f"network.subnet: say which part of {present[0].network} on {bridge} is the pool's own; "
            "nobody else may give out addresses of it"
        )
    for interface in present:
        if config.subnet.subnet_of(interface.network):
            return interface, config.subnet
    raise ConfigError(
        f"network.subnet: {config.subnet} is no part of what {bridge} has: {', '.join(map(str, present))}"
    )


def _free_subnet(taken: list[tuple[IPv4Network, str, str]]) -> IPv4Network:
    for pool in _POOLS:
        for subnet in pool.subnets(new_prefix=_AUTO_PREFIX):
            if clash(subnet, taken) is None:
                return subnet
    raise ConfigError(
        f"network.subnet: this host has ways to all of {', '.join(map(str, _POOLS))}: name a subnet that is free"
    )


def _resolvers(config: NetworkConfig) -> tuple[str, ...]:
    """Return the configured resolvers, or the first three of the host's that are reached over IPv4."""
    if config.dns is not None:
        return config.dns
    said: list[str] = []
    for file in _RESOLV_FILES:
        with contextlib.suppress(OSError):
            said += nameservers(file.read_text(encoding="utf-8", errors="replace"))
        if usable := [text for text in said if not ipaddress.ip_address(text).is_loopback]:
            return tuple(usable[:3])
    found = f"those of this host are {', '.join(said)}, itself" if said else "this host names none"
    raise ConfigError(
        f'network.dns: say which resolvers containers have, such as dns = ["192.0.2.53"], or dns = [] for none: {found}'
    )


def nameservers(text: str) -> list[str]:
    """Return the IPv4 addresses that a resolv.conf(5) names."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):
                found.append(str(IPv4Address(words[1])))
    return found


def _addresses_of(name: str, devices: Sequence[Mapping[str, Any]]) -> list[IPv4Interface]:
    return [
        IPv4Interface(f"{entry['local']}/{entry['prefixlen']}")
        for device in devices
        if device.get("ifname") == name
        for entry in device.get("addr_info", ())
    ]


def _routes() -> list[dict[str, Any]]:
    return _ip("-4", "route", "show", "table", "all")


def _ip(*arguments: str) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = json.loads(_run("-json", *arguments) or "[]")
    return [entry for entry in answer if entry]


def _run(*arguments: str) -> str:
    command = ["ip", *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except FileNotFoundError as error:
        raise BackendError("ip is not installed (Debian: `apt-get install iproute2`)") from error
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"`{' '.join(command)}` did not end within {_TIMEOUT:g} s") from error
    if done.returncode != 0:
        raise BackendError(f"`{' '.join(command)}`: {done.stderr.strip()}")
    return done.stdout


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="ascii")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BackendError(f"{path} can't be set to {text}: {error.strerror}") from error
