"""Have the pool's network on this host for as long as the service runs, or containers of it that it leaves behind."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from lxc_pool.backend.protocol import Endpoint
from lxc_pool.config import Config
from lxc_pool.errors import BackendError, LxcPoolError
from lxc_pool.host import bridge, firewall, netlink
from lxc_pool.host.bridge import Network
from lxc_pool.service.ledger import Entry

log = logging.getLogger(__name__)


class PoolNetwork:
    """The network while the service runs. `_lock` guards whether it does, so that nothing comes back after its end.

    Attributes:
        network: What there is to know of it; None: no profile wants one.
    """

    def __init__(self, network: Network | None, reaches: Collection[Sequence[str]]) -> None:
        """Take note of a network that has been made; *reaches*: what each profile on it reaches."""
        self.network = network
        self._reaches = reaches
        self._lock = threading.Lock()
        self._closed = False

    def obstacle(self) -> str | None:
        """Return why no container can be created now, if that is so.

        Somebody may flush all rules of the host, as a firewall does when it is started again. They are put back as soon
        as the service has anything to do.
        """
        if self.network is None:
            return None
        try:
            with self._lock:
                if not self._closed and not netlink.has_table(firewall.table(self.network)):
                    log.warning("somebody has removed the rules of bridge %s: they are put back", self.network.bridge)
                    firewall.close_off(self.network, self._reaches)
        except (LxcPoolError, OSError) as error:
            return f"the rules of bridge {self.network.bridge} are not in force: {error}"
        return None

    def close(self) -> None:
        """Leave the rules to whoever removes them."""
        with self._lock:
            self._closed = True


@contextlib.contextmanager
def pool_network(config: Config, instance: str, entries: Callable[[], Iterable[Entry]]) -> Iterator[PoolNetwork]:
    """Have the network that the configuration asks for, or an earlier service's, for the time of a `with`.

    At its end everything is removed, unless there are still containers on it.

    Args:
        config: The service's.
        instance: The service's.
        entries: Returns what is in the ledger.

    Raises:
        ConfigError: The host has no room for it, or lacks a program.
        BackendError: The host refused.
    """
    endpoints = [entry.endpoint for entry in entries() if entry.endpoint is not None]
    reaches = [profile.reach for profile in config.profiles if profile.network == "bridge"]
    try:
        with contextlib.closing(PoolNetwork(_open(config, instance, reaches, endpoints), reaches)) as network:
            yield network
    finally:
        # Before the ledger is closed, after the containers are gone: what it still has, goes on without us.
        if not any(entry.endpoint for entry in entries()):
            remove_network(instance)


def _open(
    config: Config, instance: str, reaches: Collection[Sequence[str]], endpoints: Collection[Endpoint]
) -> Network | None:
    """Make the network, or take it over; None if the configuration asks for none.

    Rules come before the bridge, and the bridge before containers: none is ever on it without them.
    """
    network = None
    if config.wants_bridge:
        with bridge.namespace_lock():
            network = bridge.plan(config.network, instance)
            firewall.close_off(network, reaches)
            bridge.make(network)
        log.info("bridge %s: %s, resolvers %s", network.bridge, network.subnet, ", ".join(network.resolvers) or "none")
    elif not endpoints:
        remove_network(instance)
    kept = {endpoint.port for endpoint in endpoints} | {endpoint.bridge for endpoint in endpoints}
    for device in bridge.devices():
        # Whoever is behind a port that the ledger does not know: its address is about to be given out.
        if device.startswith(bridge.device_prefix(instance)) and device not in kept | {network and network.bridge}:
            bridge.remove_device(device)
    return network


def remove_network(instance: str) -> None:
    """Remove every device and rule that the service has made, if there is any.

    Devices first: rules stand for as long as there is anything that they are for.
    """
    try:
        for device in bridge.devices():
            if device.startswith(bridge.device_prefix(instance)):
                bridge.remove_device(device)
        for table in firewall.tables(instance):
            firewall.remove_table(table)
    except BackendError as error:
        log.error("something of the network is left, see `lxc-pool audit`: %s", error)  # noqa: TRY400  # it says all
