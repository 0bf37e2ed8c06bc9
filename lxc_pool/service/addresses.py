"""Which container has which address of the pool's network: each has one until it is gone, and no two have the same."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface

from lxc_pool.backend.protocol import Endpoint
from lxc_pool.config import ProfileConfig
from lxc_pool.errors import BackendError
from lxc_pool.host.bridge import Network, hardware_address, port_name
from lxc_pool.service.ledger import Entry


class AddressBook:
    """The addresses of the pool's network. What is taken is in the ledger, too, with its container.

    Shared by all threads of the service; `_lock` guards everything. Whoever holds it waits for nothing else.

    Invariants: an address of the network is free or has one holder; the free ones are in the order in which they
    became free. What containers hold, they hold until they are gone, whatever the network is by then.
    """

    def __init__(self, network: Network | None, entries: Iterable[Entry] = ()) -> None:
        """Begin with those addresses taken that containers of an earlier service have.

        Args:
            network: The pool's; None: no profile wants one, and there are no addresses.
            entries: What is in the ledger.
        """
        self._lock = threading.Lock()
        self._network = network
        self._addresses = frozenset(network.addresses if network else ())
        self._open = True
        self._taken: dict[str, Endpoint] = {}
        newest = None
        for entry in sorted(entries, key=lambda entry: entry.since):
            if entry.endpoint is not None:
                self._taken[entry.name] = entry.endpoint
                address = _address(entry.endpoint)
                newest = address if address in self._addresses else newest
        self._free = self._rest(newest)

    @property
    def held(self) -> tuple[Endpoint, ...]:
        """What containers have, of whatever network."""
        with self._lock:
            return tuple(self._taken.values())

    def take(self, holder: str, profile: ProfileConfig) -> Endpoint | None:
        """Give the address that has been free for longest to a new container; None if its profile wants none.

        Raises:
            BackendError: All are taken, or the network is being changed.
        """
        if profile.network != "bridge":
            return None
        with self._lock:
            if self._network is None or not self._open:
                raise BackendError("the pool's network is being changed")
            if not self._free:
                raise BackendError(
                    f"all {len(self._addresses)} addresses of {self._network.subnet} are taken: make network.subnet "
                    "larger, or the pool smaller"
                )
            address, _ = self._free.popitem(last=False)
            self._taken[holder] = endpoint = self._endpoint(self._network, address, profile)
            return endpoint

    def give_back(self, holder: str) -> None:
        """Free the address of a container that is gone, if it had one."""
        with self._lock:
            endpoint = self._taken.pop(holder, None)
            if endpoint is not None and (address := _address(endpoint)) in self._addresses:
                self._free[address] = None

    def close_for(self, network: Network | None) -> tuple[str, ...]:
        """Give out nothing until `change`, unless there are containers that are not of *network*.

        Returns:
            Their names; none: it is closed.
        """
        with self._lock:
            strangers = tuple(
                name for name, endpoint in self._taken.items() if network is None or not _belongs(endpoint, network)
            )
            self._open = self._open and bool(strangers)
            return strangers

    def change(self, network: Network | None) -> None:
        """Give out the addresses of *network* from now on."""
        with self._lock:
            before, self._addresses = self._addresses, frozenset(network.addresses if network else ())
            self._network, self._open = network, True
            if before != self._addresses:
                self._free = self._rest(None)

    def fits(self, endpoint: Endpoint | None, profile: ProfileConfig) -> bool:
        """Return whether a container with that endpoint is as one that would be made now."""
        with self._lock:
            network = self._network
        if profile.network != "bridge" or network is None:
            return endpoint is None
        if endpoint is None:
            return False
        address = _address(endpoint)
        return address in network.subnet and endpoint == self._endpoint(network, address, profile)

    def _rest(self, newest: IPv4Address | None) -> OrderedDict[IPv4Address, None]:
        """Return what nobody has. It was given out in order: the next one is the one after the *newest*."""
        taken = set(map(_address, self._taken.values()))
        free = sorted(self._addresses - taken)
        if newest is not None:
            free.sort(key=lambda address: address < newest)
        return OrderedDict.fromkeys(free)

    @staticmethod
    def _endpoint(network: Network, address: IPv4Address, profile: ProfileConfig) -> Endpoint:
        return Endpoint(
            bridge=network.bridge,
            port=port_name(network.instance, profile.reach, network.number(address)),
            mac=hardware_address(address),
            address=f"{address}/{network.gateway.network.prefixlen}",
            gateway=str(network.gateway.ip),
            resolvers=network.resolvers,
            isolated="containers" not in profile.reach,
        )


def _belongs(endpoint: Endpoint, network: Network) -> bool:
    """Return whether a container goes on working where the network is this one."""
    mine = IPv4Interface(endpoint.address)
    return (
        (endpoint.bridge, endpoint.gateway) == (network.bridge, str(network.gateway.ip))
        and mine.network == network.gateway.network
        and mine.ip in network.subnet
        and endpoint.port.endswith(f"{network.number(mine.ip):03x}")
    )


def _address(endpoint: Endpoint) -> IPv4Address:
    return IPv4Interface(endpoint.address).ip
