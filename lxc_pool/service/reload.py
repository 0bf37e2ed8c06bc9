"""SIGHUP: read the configuration again, and let it be in force, as far as that goes without a restart."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Final, Protocol

from lxc_pool.config import Config
from lxc_pool.errors import ConfigError
from lxc_pool.service.access import Policy
from lxc_pool.service.pool import Pool
from lxc_pool.service.service import PoolService

log = logging.getLogger(__name__)

_FIXED: Final = {
    "workers": "pool.workers",
    "id_base": "pool.id_base",
    "group": "access.group",
    "key_file": "access.key_file",
}
"""What has been given away at the start: to the lanes, containers that run, files in the host dir."""


class Network(Protocol):
    """What `reload` needs of the pool's network; see `PoolNetwork`."""

    def prepare(self, config: Config) -> None:
        """Make what *config* needs, beside what there is; it raises ConfigError if that can't be."""

    def settle(self, config: Config) -> None:
        """Remove what nobody needs any more, now that *config* is in force."""


def reload(load: Callable[[], Config], pool: Pool, service: PoolService, network: Network) -> None:
    """Let the configuration that *load* returns be in force; if it is refused, all stays as it was.

    What came of it is in the log, and in the status for as long as the service does not do what the file says.

    Args:
        load: Reads it.
        pool: Whose containers are made as it says.
        service: Whose users it is about.
        network: What containers are on.
    """
    before = service.config
    try:
        wanted = load()
        kept = {field: getattr(before, field) for field in _FIXED if getattr(wanted, field) != getattr(before, field)}
        config = dataclasses.replace(wanted, **kept)
        policy = Policy(config)
        network.prepare(config)  # last: what it has done, is done
    except ConfigError as error:
        service.configuration_notice = f"the new configuration is refused, the one before stays: {error}"
        log.error("%s", service.configuration_notice)  # noqa: TRY400  # not our failure: the words say it all
        return
    service.reconfigure(config, policy)  # first: nobody is to have what the new one makes by what the old one allows
    pool.reconfigure(config)
    network.settle(config)
    service.configuration_notice = None
    log.info("the configuration has been read again, and is in force")
    if kept:
        keys = ", ".join(_FIXED[field] for field in kept)
        service.configuration_notice = f"a new value waits for the next start of the service: {keys}"
        log.warning("%s", service.configuration_notice)
