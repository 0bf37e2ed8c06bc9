"""Put a container's root file system together: an overlay of a small tmpfs over the immutable image.

```
 rootfs  overlay ─┬─ upper   a tmpfs of the profile's `disk` bytes: what the container writes, gone with it
                  └─ lower   the image, seen through the container's ids (an idmapped mount), never copied
```

All of it is mounted here, by the host's root: an overlay mounted in a user namespace can't mark a directory as
replaced, so that `rm -r /var/log; mkdir /var/log` fails there (measured, EIO). The container's mount namespace keeps
its own copies: once it is up, these have done their work, and nothing is mounted on the host.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lxc_pool.backend.protocol import Blueprint
from lxc_pool.host import mounts


@contextlib.contextmanager
def mounted(blueprint: Blueprint, directory: Path, user_namespace: int | None, owner: int) -> Iterator[None]:
    """Have the root file system at *directory*/rootfs for the time of a `with`.

    Args:
        blueprint: What the container is made of.
        directory: The container's, with `rootfs`, `lower` and `upper` in it.
        user_namespace: Through whose ids the image is seen; None: through the host's.
        owner: The host's id of the container's root.

    Raises:
        OSError: The kernel refused.
    """
    upper, lower = directory / "upper", blueprint.image.rootfs
    with contextlib.ExitStack() as stack:
        stack.enter_context(mounts.mounted("tmpfs", upper, f"size={blueprint.profile.disk},mode=0755"))
        for part in ("delta", "work"):
            (upper / part).mkdir(mode=0o755)
            os.chown(upper / part, owner, owner)
        if user_namespace is not None:
            lower = directory / "lower"
            stack.enter_context(mounts.idmapped(blueprint.image.rootfs, lower, user_namespace))
        options = f"lowerdir={lower},upperdir={upper}/delta,workdir={upper}/work"
        # No devices: a node in an imported image would be the host's device. The container can't undo what was so when
        # its user namespace came; liblxc binds its own nodes over /dev.
        stack.enter_context(mounts.mounted("overlay", directory / "rootfs", options, mounts.MS_NODEV))
        yield
