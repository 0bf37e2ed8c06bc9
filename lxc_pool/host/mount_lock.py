"""Lock what can be changed about a mount: whether it can be written to, `nosuid`, `nodev`.

It is locked when a mount namespace is copied into one of another user namespace, and stays so in copies of that copy:
nobody, root of the host included, then makes it writable, or takes nosuid or nodev off it. Taking it away stays
possible. Source: Linux fs/namespace.c, lock_mnt_tree and can_change_locked_flags.

```
 in a mount namespace of one's own          in a user namespace
 put_in_scratch(tree) ────────────────────► take_locked_copy() ─► another tree
```

What is mounted here is in namespaces of these processes, and ends with them.
"""

from __future__ import annotations

import os

from lxc_pool.host import mount_calls

_SCRATCH = b"/dev"
"""A directory that every host has. It is covered in a mount namespace where nothing of it is needed."""

_PLACE = b"mount"


def leave_hosts_mounts() -> None:
    """Give this process a copy of the host's mounts, from which nothing gets back to the host.

    Raises:
        OSError: The kernel refused.
    """
    mount_calls.unshare(mount_calls.CLONE_NEWNS)
    mount_calls.mount("none", b"/", flags=mount_calls.REC | mount_calls.PRIVATE)


def put_in_scratch(tree: int, *, directory: bool) -> None:
    """Mount *tree*, of a *directory* or file, where `take_locked_copy` looks for it.

    Raises:
        OSError: The kernel refused.
    """
    mount_calls.mount("tmpfs", _SCRATCH, "mode=0755,size=4096")
    place = os.path.join(_SCRATCH, _PLACE)
    if directory:
        os.mkdir(place)
    else:
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    mount_calls.attach_tree(tree, place)


def take_locked_copy() -> int:
    """Return a locked copy of what is in scratch; this process's user namespace must not be its mount namespace's.

    Raises:
        OSError: The kernel refused.
    """
    os.chdir(_SCRATCH)
    mount_calls.unshare(mount_calls.CLONE_NEWNS)  # which takes the working directory along, into the copy
    return mount_calls.clone_tree(_PLACE)
