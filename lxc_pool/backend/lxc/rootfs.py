"""Put a container's root file system together: an overlay of a bounded upper layer over the immutable image.

```
 DIRECTORY/disk    a tmpfs of the profile's `disk` bytes, gone with the container; or DIRECTORY/layer, if there is one
            ├─ delta, work    what the container writes
            ├─ image          the image, seen through the container's ids (an idmapped mount), never copied
            └─ rootfs         the overlay of delta over image
```

They are mounted in each other, so that one umount(2) takes off all three: each would make the kernel wait a while.

All of it is mounted here, by the host's root: an overlay mounted in a user namespace can't mark a directory as
replaced, so that `rm -r /var/log; mkdir /var/log` fails there (measured, EIO). The container's mount namespace keeps
its own copies: once it is up, these have done their work, and nothing is mounted on the host.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lxc_pool.backend.lxc import layers
from lxc_pool.backend.protocol import Blueprint
from lxc_pool.host import mount_calls, mounts

_DISK = "disk"


def path(directory: Path) -> Path:
    """Return where the root file system of the container in *directory* is, while it is `mounted`."""
    return directory / _DISK / "rootfs"


def make_mount_point(directory: Path) -> None:
    """Make what `mounted` mounts on."""
    (directory / _DISK).mkdir(mode=0o755)


@contextlib.contextmanager
def mounted(blueprint: Blueprint, directory: Path, user_namespace: int | None, owner: int) -> Iterator[None]:
    """Have the root file system at its `path` for the time of a `with`.

    Args:
        blueprint: What the container is made of.
        directory: The container's, with the mount point in it.
        user_namespace: Through whose ids the image is seen; None: through the host's.
        owner: The host's id of the container's root.

    Raises:
        OSError: The kernel refused.
    """
    disk, image = directory / _DISK, blueprint.image.rootfs
    with _upper(blueprint, directory):
        for part in ("delta", "work", "image", "rootfs"):
            (disk / part).mkdir(mode=0o755)
        for part in ("delta", "work"):
            os.chown(disk / part, owner, owner)
        if user_namespace is not None:
            image = disk / "image"
            mounts.mount_idmapped(blueprint.image.rootfs, image, user_namespace)
        # Volatile: no layer outlives its container, so nothing a container syncs need be on the disk; and without it,
        # the kernel would write out the whole file system when one stops. Source: Linux filesystems/overlayfs.rst.
        volatile = ",volatile" if layers.path(directory).exists() else ""
        options = f"lowerdir={image},upperdir={disk}/delta,workdir={disk}/work{volatile}"
        # No devices: a node in an imported image would be the host's device. The container can't undo what was so when
        # its user namespace came; liblxc binds its own nodes over /dev.
        mounts.mount("overlay", path(directory), options, mount_calls.NODEV)
        yield


def _upper(blueprint: Blueprint, directory: Path) -> contextlib.AbstractContextManager[None]:
    """Have at the mount point what the container writes to."""
    if (layer := layers.path(directory)).exists():
        return mounts.mounted_again(layer, directory / _DISK)
    return mounts.mounted("tmpfs", directory / _DISK, f"size={blueprint.profile.disk},mode=0755")
