"""`PoolManager`: where test code begins."""

from __future__ import annotations

import os
from multiprocessing import managers
from pathlib import Path
from typing import NoReturn

from lxc_pool import hostdir
from lxc_pool.client.connection import SERIALIZER, connect_channel
from lxc_pool.client.pool import PoolServiceProxy

__all__ = ["SERIALIZER", "PoolManager", "connect_channel"]


class PoolManager(managers.BaseManager):
    """The manager whose one registered object is the `PoolService`.

    Test code calls `PoolManager.connect` and uses the proxy that it returns; nothing else of a `BaseManager` is of use
    to
    it: the service is started by `lxc-pool serve`, as a rule by root, and not by its clients.
    """

    def __init__(self, host_dir: str | os.PathLike[str] | None = None, authkey: bytes | None = None) -> None:
        """Name the host dir; nothing happens yet."""
        # Absolute: connections are made again later, wherever the process or its child is then.
        self.host_dir = (hostdir.default_host_dir() if host_dir is None else Path(host_dir)).absolute()
        super().__init__(str(hostdir.socket_path(self.host_dir)), authkey, SERIALIZER)

    @classmethod
    def connect(  # type: ignore[override]  # the stock one is an instance method that returns nothing
        cls, host_dir: str | os.PathLike[str] | None = None, timeout: float = 5.0
    ) -> PoolServiceProxy:
        """Connect to the service of *host_dir*.

        Args:
            host_dir: Default: `$LXC_POOL_HOST_DIR`, else `/run/lxc-pool`.
            timeout: Seconds to wait for a service that is not there yet.

        Returns:
            The pool. `with` closes the connection at the end; leases live on with their owner.

        Raises:
            ServiceUnavailable: No service answered within *timeout*.
            AccessDenied: The caller may not use the service.
            AuthenticationFailed: The key in the host dir is not the service's.
            HostDirError: What is there is no service of lxc_pool.
            ValueError: The timeout is negative or not a number.
        """
        return PoolServiceProxy.connect(cls(host_dir).host_dir, timeout)

    def start(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuse: a client does not start the service.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a PoolManager does not start the service; run `lxc-pool serve`")


PoolManager.register("PoolService", proxytype=PoolServiceProxy, create_method=False)
