"""Have the pool's network on this host for as long as there are profiles or containers that it is for.

```
 main thread ── prepare: a new configuration is about to be in force, settle: it is ──┐
 lanes, dispatcher ── obstacle: before containers are made, after one is gone ────────┴─► PoolNetwork ─► bridge, rules
```
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Iterator

from lxc_pool.config import Config, NetworkConfig
from lxc_pool.errors import BackendError, ConfigError, LxcPoolError
from lxc_pool.host import bridge, firewall, netlink
from lxc_pool.host.bridge import Network
from lxc_pool.service.addresses import AddressBook
from lxc_pool.service.ledger import Entry

log = logging.getLogger(__name__)


class PoolNetwork:
    """The network while the service runs.

    Shared by all threads of the service; `_lock` guards everything, and is held while the host is changed. The pool's
    lock is never taken under it.

    Invariants: containers are only ever on a bridge whose rules are in force; what those let through holds for as long
    as a container is there that was made for it, whatever the configuration says by then.

    Attributes:
        addresses: Who has which; it knows of the network by `prepare` and `obstacle` alone.
    """

    def __init__(self, instance: str, entries: Iterable[Entry]) -> None:
        """Make it; nothing is changed on the host.

        Args:
            instance: The service's.
            entries: What is in the ledger.
        """
        self.addresses = AddressBook(None, entries)
        self._instance = instance
        self._lock = threading.Lock()
        self._made_by: NetworkConfig | None = None
        self._network: Network | None = None
        self._reaches: frozenset[tuple[str, ...]] = frozenset()
        self._wanted = False
        self._present = bool(self.addresses.held)
        self._closed = False

    def open(self, config: Config) -> None:
        """Begin: make the network that *config* asks for, or take over an earlier service's.

        Raises:
            ConfigError: The host has no room for it, or lacks a program.
            BackendError: The host refused.
        """
        with self._lock:
            if config.wants_bridge:
                try:
                    self._prepare(config)
                except ConfigError as error:
                    raise ConfigError(_placed(config, str(error))) from error
            elif self._present:
                self._remove_other_devices(None)
            else:
                remove_network(self._instance)

    def prepare(self, config: Config) -> None:
        """Make what the profiles of *config* need, beside all that there is already; the pool may use it at once.

        Raises:
            ConfigError: The host has no room for it, lacks a program or refused; or there are containers that would
                lose their network by it. All is as it was.
        """
        if not config.wants_bridge:
            return
        with self._lock:
            try:
                self._prepare(config, spare=True)
            except (ConfigError, BackendError, OSError) as error:  # the last: no process or file can be had now
                raise ConfigError(_placed(config, str(error))) from error

    def settle(self, config: Config) -> None:
        """Take note that no container is made by an older configuration than *config* any more."""
        with self._lock:
            self._wanted = config.wants_bridge
            self._remove_unused()

    def obstacle(self) -> str | None:
        """Return why no container can be created now, if that is so.

        Somebody may flush all rules of the host, as a firewall does when it is started again. They are put back as soon
        as the service has anything to do. And the last container on a bridge that no profile wants may have gone.
        """
        if not self._present:
            return None
        try:
            with self._lock:
                self._remove_unused()
                network = self._network
                if network is not None and not self._closed and not netlink.has_table(firewall.table(network)):
                    log.warning("somebody has removed the rules of bridge %s: they are put back", network.bridge)
                    self._close_off(network)
        except (LxcPoolError, OSError) as error:
            return f"the rules of bridge {bridge.device_prefix(self._instance)} are not in force: {error}"
        return None

    def close(self) -> None:
        """Leave the rules to whoever removes them."""
        with self._lock:
            self._closed = True

    def _prepare(self, config: Config, *, spare: bool = False) -> None:
        """See `prepare`; with *spare*, no container may lose its network by it."""
        before, reaches = self._network, self._reaches
        wanted = frozenset(profile.reach for profile in config.profiles if profile.network == "bridge")
        held = frozenset(bridge.reach_of(endpoint.port) for endpoint in self.addresses.held)
        if before is not None and self._made_by == config.network:
            if not wanted <= reaches:
                self._let_reach(before, reaches | wanted)
            self._wanted = True
            return
        with bridge.namespace_lock():
            network = bridge.plan(config.network, self._instance)
            if spare and (before is None or _place(before) != _place(network)):
                self._require_no_strangers(network)
            try:
                # Rules come before the bridge, and the bridge before containers: none is ever on it without them.
                self._reaches = reaches | wanted | held
                self._close_off(network)
                bridge.make(network)
                self._remove_other_devices(network)
            except BaseException:
                self._reaches = reaches
                self._undo(before)
                raise
        self._network, self._made_by, self._wanted, self._present = network, config.network, True, True
        self.addresses.change(network)
        log.info("bridge %s: %s, resolvers %s", network.bridge, network.subnet, ", ".join(network.resolvers) or "none")

    def _let_reach(self, network: Network, reaches: frozenset[tuple[str, ...]]) -> None:
        """Put rules in force for profiles that reach something else; those of the others are the same as before."""
        before, self._reaches = self._reaches, reaches
        try:
            self._close_off(network)
        except BaseException:
            self._reaches = before
            raise

    def _require_no_strangers(self, network: Network) -> None:
        """Refuse a network by which containers would lose theirs; let no new ones come until it is made.

        Raises:
            ConfigError: There are such.
        """
        if strangers := self.addresses.close_for(network):
            key = "subnet" if network.bridge in {endpoint.bridge for endpoint in self.addresses.held} else "bridge"
            shown = ", ".join(strangers[:3]) + (", …" if len(strangers) > 3 else "")
            raise ConfigError(
                f"network.{key}: {len(strangers)} containers would lose their network ({shown}): take the profiles on "
                "the bridge out, and put them in again, with the new value, once their containers are gone; or start "
                "the service anew"
            )

    def _close_off(self, network: Network) -> None:
        """Put the rules in force; those who have a container may go on asking the resolvers that it was told."""
        told = {resolver for endpoint in self.addresses.held for resolver in endpoint.resolvers}
        everybodys = tuple(dict.fromkeys([*network.resolvers, *sorted(told)]))
        firewall.close_off(dataclasses.replace(network, resolvers=everybodys), sorted(self._reaches))

    def _undo(self, before: Network | None) -> None:
        """Bring back what there was before a change that failed halfway."""
        try:
            if before is not None:
                self._close_off(before)
                bridge.make(before)
            elif not self._present:
                remove_network(self._instance)
        except (LxcPoolError, OSError) as error:
            log.error("the network can't be brought back: %s", error)  # noqa: TRY400  # the words say it all
        self.addresses.change(before)

    def _remove_other_devices(self, network: Network | None) -> None:
        """Remove what no container has: a bridge of before, a port whose address is about to be given out."""
        held = self.addresses.held
        kept = {endpoint.port for endpoint in held} | {endpoint.bridge for endpoint in held}
        if network is not None:
            kept.add(network.bridge)
        for device in bridge.devices():
            if device.startswith(bridge.device_prefix(self._instance)) and device not in kept:
                bridge.remove_device(device)

    def _remove_unused(self) -> None:
        """Remove the network if nobody wants it any more and nobody has it."""
        if self._wanted or self._closed or not self._present or self.addresses.close_for(None):
            return
        log.info("no profile and no container is on a bridge any more: it is removed")
        remove_network(self._instance)
        self._network, self._made_by, self._reaches, self._present = None, None, frozenset(), False
        self.addresses.change(None)


@contextlib.contextmanager
def pool_network(config: Config, instance: str, entries: Callable[[], Iterable[Entry]]) -> Iterator[PoolNetwork]:
    """Have the network that the configuration asks for, or an earlier service's, for the time of a `with`.

    At its end everything is removed, unless there are still containers on it.

    Args:
        config: The service's, as it begins.
        instance: The service's.
        entries: Returns what is in the ledger.

    Raises:
        ConfigError: The host has no room for it, lacks a program, or refused.
        BackendError: The host refused.
    """
    try:
        with contextlib.closing(PoolNetwork(instance, entries())) as network:
            network.open(config)
            yield network
    finally:
        # Before the ledger is closed, after the containers are gone: what it still has, goes on without us.
        if not any(entry.endpoint for entry in entries()):
            remove_network(instance)


def _place(network: Network) -> tuple[object, ...]:
    """Return what a container can't be moved out of while it runs."""
    return network.bridge, network.gateway, network.subnet


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
    except (BackendError, OSError) as error:
        log.error("something of the network is left, see `lxc-pool audit`: %s", error)  # noqa: TRY400  # it says all


def _placed(config: Config, problem: str) -> str:
    """Return what is wrong, and where: the key that it begins with, or else the first profile that is on a bridge."""
    words, _, rest = problem.partition(": ")
    if words in ("network.bridge", "network.subnet", "network.dns"):
        return f"{config.source.place(*words.split('.'))}: {rest}"
    profile = next(profile.name for profile in config.profiles if profile.network == "bridge")
    return f"{config.source.place(f'profile.{profile}', 'network')}: {problem}"
