"""The errors that lxc_pool raises, on either side of the socket.

Every class takes one argument, the message, so that it survives pickling and the wire unchanged. A message says what
was wrong, with the value, and what to do about it.
"""

from __future__ import annotations


class LxcPoolError(Exception):
    """Base class of every error that lxc_pool defines."""


class ConfigError(LxcPoolError, ValueError):
    """The configuration is wrong: an unknown key, a value out of range, a file that does not parse."""


class ServiceUnavailable(LxcPoolError, ConnectionError):
    """The service can't be reached, or went away during a call and did not come back in time."""


class AuthenticationFailed(LxcPoolError, PermissionError):
    """The service, or the client, holds a different authkey."""


class AccessDenied(LxcPoolError, PermissionError):
    """The caller may not do this: unreadable key, not an administrator, a foreign owner, a profile not allowed."""


class QuotaExceeded(LxcPoolError):
    """The caller's user already has as many connections, waiters or leases as it may have."""


class PoolTimeout(LxcPoolError, TimeoutError):
    """Nothing came free, or the pool did not get ready, within the caller's timeout."""


class PoolClosed(LxcPoolError):
    """The service is ending: it hands out nothing more."""


class PoolDraining(LxcPoolError):
    """An administrator has drained the pool: it hands out nothing until it is resumed."""


class LeaseError(LxcPoolError):
    """The lease does not allow this."""


class UnknownLease(LeaseError):
    """No lease of that name is the caller's: it never was, has ended, or is another user's."""


class LeaseExpired(LeaseError):
    """The lease has ended by its ttl, or because its container died."""


class BackendError(LxcPoolError):
    """The container engine failed; the message carries the engine's own words."""


class CloneFailed(BackendError):
    """A container could not be made from its base image."""


class StartFailed(BackendError):
    """A container was made but did not come up."""


class DestroyFailed(BackendError):
    """A container, or a trace of it, could not be removed."""


class ExecFailed(BackendError):
    """A command could not be started in a container, for a reason that is not the command's own."""


class ImageError(LxcPoolError):
    """A base image is missing, broken, or could not be built."""


class HostDirError(LxcPoolError):
    """The host dir, or the socket in it, is not what a service of ours would have made."""


class InternalError(LxcPoolError):
    """A bug in lxc_pool; please report it."""
