"""Which container has which address of the pool's network: each has one until it is gone, and no two have the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface

from lxc_pool.backend.protocol import Endpoint
from lxc_pool.config import ProfileConfig
from lxc_pool.errors import BackendError
from lxc_pool.host.bridge import Network, hardware_address, port_name
from lxc_pool.service.ledger import Entry


class AddressBook:
    """The addresses of one network. Guarded by the pool's lock; what is taken is in the ledger, with its container.

    Invariants: an address is free or has one holder; the free ones are in the order in which they became free.
    """

    def __init__(self, network: Network | None, entries: Iterable[Entry] = ()) -> None:
        """Begin with those addresses taken that containers of an earlier service have.

        Args:
            network: The pool's; None: no profile wants one, and there are no addresses.
            entries: What is in the ledger.
        """
        self._network = network
        self._free = OrderedDict.fromkeys(() if network is None else network.addresses)
        self._taken: dict[str, IPv4Address] = {}
        self._take_over(entries)

    def take(self, holder: str, profile: ProfileConfig) -> Endpoint | None:
        """Give the address that has been free for longest to a new container; None if its profile wants none.

        Raises:
            BackendError: All are taken.
        """
        if profile.network != "bridge" or self._network is None:
            return None
        if not self._free:
            raise BackendError(
                f"all {len(self._taken)} addresses of {self._network.subnet} are taken: make network.subnet larger, "
                "or the pool smaller"
            )
        address, _ = self._free.popitem(last=False)
        self._taken[holder] = address
        return self._endpoint(self._network, address, profile)

    def give_back(self, holder: str) -> None:
        """Free the address of a container that is gone, if it had one."""
        address = self._taken.pop(holder, None)
        if address is not None:
            self._free[address] = None

    def _take_over(self, entries: Iterable[Entry]) -> None:
        """Let containers hold what they have. It was given out in order: the next one is the one after the newest."""
        newest = None
        for entry in sorted(entries, key=lambda entry: entry.since):
            if entry.endpoint is not None and (address := _address(entry.endpoint)) in self._free:
                del self._free[address]
                self._taken[entry.name] = newest = address
        if newest is not None:
            for address in [address for address in self._free if address < newest]:
                self._free.move_to_end(address)

    def fits(self, endpoint: Endpoint | None, profile: ProfileConfig) -> bool:
        """Return whether a container with that endpoint is as one that would be made now."""
        if profile.network != "bridge" or self._network is None:
            return endpoint is None
        if endpoint is None:
            return False
        address = _address(endpoint)
        return address in self._network.subnet and endpoint == self._endpoint(self._network, address, profile)

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


def _address(endpoint: Endpoint) -> IPv4Address:
    return IPv4Interface(endpoint.address).ip
