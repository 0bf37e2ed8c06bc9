"""What the service is short of is no bug of its."""

from __future__ import annotations

import errno
import os

from lxc_pool.errors import BackendError


def as_shortage(error: Exception) -> BackendError | None:
    """Return what to tell people if the host is short of something; None if the error is not that."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return BackendError(
            f"the service can't do it now: {os.strerror(error.errno)}; its administrator may raise its limits, which "
            "`lxc-pool check` names"
        )
    return None
