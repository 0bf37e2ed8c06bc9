"""lxc_pool: fresh, isolated, already started LXC containers for test code, in under a millisecond.

```python
from lxc_pool import PoolManager, ContainerId

pool = PoolManager.connect()
with pool.lease(ContainerId.create("job"), timeout=30) as c:
    c.run(["true"], check=True)
```

Importing this loads the client only: neither the `lxc` binding nor the service.

PYTEST_DONT_REWRITE: pytest, which takes the package for a plugin, would warn where it was imported before.
"""

from lxc_pool.client.container import Container
from lxc_pool.client.files import Copied
from lxc_pool.client.pool import PoolServiceProxy
from lxc_pool.client.process import Process
from lxc_pool.errors import (
    AccessDenied,
    AuthenticationFailed,
    BackendError,
    CloneFailed,
    ConfigError,
    DestroyFailed,
    ExecFailed,
    HostDirError,
    ImageError,
    InternalError,
    LeaseError,
    LeaseExpired,
    LxcPoolError,
    PoolClosed,
    PoolDraining,
    PoolTimeout,
    QuotaExceeded,
    ServiceUnavailable,
    StartFailed,
    UnknownLease,
)
from lxc_pool.manager import PoolManager
from lxc_pool.model import ContainerId, ContainerInfo, PoolStatus, ProfileStatus, State

__all__ = [
    "AccessDenied",
    "AuthenticationFailed",
    "BackendError",
    "CloneFailed",
    "ConfigError",
    "Container",
    "ContainerId",
    "ContainerInfo",
    "Copied",
    "DestroyFailed",
    "ExecFailed",
    "HostDirError",
    "ImageError",
    "InternalError",
    "LeaseError",
    "LeaseExpired",
    "LxcPoolError",
    "PoolClosed",
    "PoolDraining",
    "PoolManager",
    "PoolServiceProxy",
    "PoolStatus",
    "PoolTimeout",
    "Process",
    "ProfileStatus",
    "QuotaExceeded",
    "ServiceUnavailable",
    "StartFailed",
    "State",
    "UnknownLease",
]
