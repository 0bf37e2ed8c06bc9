"""The proxy of the service's `PoolService`: what `PoolManager.connect` returns."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import managers
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from lxc_pool import hostdir
from lxc_pool.client import requests
from lxc_pool.client.caller import CALL_TIMEOUT, GRACE, LOST, Caller, check_seconds, check_timeout
from lxc_pool.client.connection import SERIALIZER
from lxc_pool.client.container import Container
from lxc_pool.errors import DestroyFailed, LxcPoolError, PoolTimeout, ServiceUnavailable
from lxc_pool.model import ContainerInfo, LeaseId, PoolStatus, check_id
from lxc_pool.wire import messages

_ONE_TRY = 0.1
"""Seconds that connecting may take even if the caller gives it none. A guess: a service that is there takes 2 ms."""


class PoolServiceProxy(managers.BaseProxy):
    """The pool, as test code sees it.

    Thread-safe. A call whose connection is lost is made again on a new one, with a newly read key, within its timeout.
    """

    def __init__(self, host_dir: Path) -> None:
        """Name the service; nothing happens yet. Use `PoolManager.connect`."""
        token = managers.Token("PoolService", str(hostdir.socket_path(host_dir)), "pool")
        super().__init__(token, SERIALIZER, authkey=b"", incref=False)
        self.host_dir = host_dir
        self._caller = Caller(host_dir)

    @classmethod
    def connect(cls, host_dir: Path, timeout: float) -> Self:
        """See `PoolManager.connect`."""
        deadline = time.monotonic() + max(check_seconds("timeout", timeout), _ONE_TRY)
        pool = cls(host_dir)
        pool._caller.give_back(pool._caller.borrow(deadline, again=False))
        return pool

    # --- the pool -----------------------------------------------------------------------------------------------------

    def echo(self, text: str) -> str:
        """Return *text*, by way of the service: is it alive?"""
        if not isinstance(text, str):
            raise TypeError(f"echo takes a str, not {text!r}")
        return str(self._caller.ask(messages.Echo(text)))

    def status(self) -> PoolStatus:
        """Return what the service says of itself."""
        status: PoolStatus = self._caller.ask(messages.GetStatus())
        return status

    def containers(self) -> tuple[ContainerInfo, ...]:
        """Return every container of the pool, in any state."""
        infos: tuple[ContainerInfo, ...] = self._caller.ask(messages.ListContainers())
        return infos

    def wait_ready(
        self, n: int | None = None, timeout: float | None = 30, *, progress: Callable[[PoolStatus], None] | None = None
    ) -> None:
        """Wait until containers are warm.

        Args:
            n: How many; None: as many as the pool keeps.
            timeout: Seconds; 0: answer at once; None: wait for ever.
            progress: Called with the counts at the beginning, and each time that one more container is warm.

        Raises:
            PoolTimeout: They were not, within *timeout*; the message has the counts and the last error.
            ValueError: *n* is negative or more than the pool keeps; *timeout* is negative or not a number.
        """
        if n is not None and (isinstance(n, bool) or not isinstance(n, int)):
            raise TypeError(f"n must be an int or None, not {n!r}")
        if n is not None and n < 0:
            raise ValueError(f"n must be 0 to the pool's capacity, not {n}")
        timeout = check_timeout("timeout", timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        status: PoolStatus = self._caller.ask(
            messages.GetStatus(), CALL_TIMEOUT if timeout is None else min(timeout, CALL_TIMEOUT), grace=GRACE
        )
        wanted = status.capacity if n is None else n
        if wanted > status.capacity:
            raise ValueError(f"n must be 0 to the pool's capacity, {status.capacity}, not {n}")
        while True:
            if progress is not None:
                progress(status)
            if status.size >= wanted:
                return
            remaining = None if deadline is None else deadline - time.monotonic()
            if (remaining is not None and remaining <= 0) or not status.running:
                raise PoolTimeout(_not_ready(status, wanted, timeout))
            step = wanted if progress is None else status.size + 1
            status = self._caller.ask_within(functools.partial(messages.AwaitWarm, step), remaining)

    def get(
        self,
        id: LeaseId,  # noqa: A002  # the public contract's name
        timeout: float | None,
        *,
        profile: str = "default",
        owner: int | None = None,
        ttl: float | None = None,
    ) -> Container | None:
        """Lease a container.

        Args:
            id: What to call the lease: data, need not be unique.
            timeout: Seconds to wait; 0: answer at once; None: wait for ever.
            profile: The kind of container.
            owner: The pid of the process whose end ends the lease; None: the calling process.
            ttl: Seconds after which the lease ends by itself; None: it does not.

        Returns:
            The container; None if none came free in time.

        Raises:
            PoolClosed, PoolDraining, QuotaExceeded, AccessDenied: The service hands out none, or none to this caller.
            ServiceUnavailable: The service went away and did not come back in time.
            TypeError, ValueError: An argument is wrong, the profile unknown, or the owner dead.
        """
        got = self._lease(id, timeout, profile, owner, ttl)
        return got if isinstance(got, Container) else None

    @contextlib.contextmanager
    def lease(
        self,
        id: LeaseId,  # noqa: A002  # the public contract's name
        timeout: float | None = 30,
        *,
        profile: str = "default",
        owner: int | None = None,
        ttl: float | None = None,
    ) -> Iterator[Container]:
        """Lease a container for the time of a `with` block. Arguments and errors as for `get`.

        Raises:
            PoolTimeout: None came free in time; the message says why.
        """
        got = self._lease(id, timeout, profile, owner, ttl)
        if not isinstance(got, Container):
            raise PoolTimeout(f"after {timeout} s: {got}")
        with got:
            yield got

    def container(self, name: str) -> Container:
        """Return a handle on a container that is leased already, by this user; it does not end the lease by itself.

        Raises:
            UnknownLease, LeaseExpired: No such lease is the caller's.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        return Container(self._caller, self._caller.ask(messages.Inspect(name)), owned=False)

    def resize(self, n: int) -> None:
        """Change the number of warm containers of the default profile; administrators only.

        Raises:
            AccessDenied: The caller is not an administrator.
            ConfigError: *n* is not 1 to 1000, or more than the pool's `max` has room for.
        """
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"n must be an int, not {n!r}")
        self._caller.ask(messages.Resize(n))

    def drain(self) -> None:
        """Discard warm containers and hand out nothing until `resume`; returns at once; administrators only."""
        self._caller.ask(messages.Drain())

    def resume(self) -> None:
        """Hand out containers again; administrators only."""
        self._caller.ask(messages.Resume())

    def look_for_images(self) -> None:
        """Let the service see whether its images have newer versions, which `lxc-pool image` tells it by itself.

        Warm containers of older versions are then replaced, a few at a time. Administrators only.
        """
        self._caller.ask(messages.LookForImages())

    def shutdown(self, grace: float = 10.0, *, keep_leases: bool = False) -> None:
        """End the service; return once it has really stopped. Administrators only.

        Args:
            grace: Seconds that leases have to end before their containers are reaped.
            keep_leases: Leave them to the next service instead.

        Raises:
            AccessDenied: The caller is not an administrator.
            DestroyFailed: It has stopped, and could not remove all containers; the message names them.
            ServiceUnavailable: It is not known whether it has stopped.
        """
        grace = check_seconds("grace", grace)
        # Removing everything may take a while beyond the grace; it has a deadline of its own in the service.
        deadline = time.monotonic() + grace + 120
        connection = self._caller.borrow(deadline, again=False)
        server = connection.hold_server()
        failure: DestroyFailed | None = None
        try:
            try:
                connection.call(messages.Shutdown(grace, keep_leases), deadline)
            except DestroyFailed as error:
                failure = error  # it ends all the same
            if server is not None:
                _await_exit(server, deadline)
        except LxcPoolError:  # first: AccessDenied is an OSError, too
            raise
        except LOST as error:
            raise ServiceUnavailable(f"the service went away before it said that all is closed: {error}") from error
        finally:
            connection.close()
            if server is not None:
                os.close(server)
        self.close()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Close the connections; leases live on with their owner. Later calls make new ones."""
        self._caller.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return PoolServiceProxy, (self.host_dir,)

    def __repr__(self) -> str:
        return f"<pool of {self.host_dir}>"

    __str__ = __repr__

    # --- calls --------------------------------------------------------------------------------------------------------

    def _incref(self) -> None:
        """Count nothing: a stock proxy would connect, without a deadline, in each child that multiprocessing forks."""

    def _callmethod(self, methodname: str, args: Sequence[Any] = (), kwds: Mapping[str, Any] | None = None) -> Any:
        """Call a method of the service by name, as a stock proxy does."""
        if methodname.startswith("_") or not callable(getattr(type(self), methodname, None)):
            raise AttributeError(f"the pool has no method {methodname!r}")
        return getattr(self, methodname)(*args, **(kwds or {}))

    def _lease(
        self, identity: LeaseId, timeout: float | None, profile: str, owner: int | None, ttl: float | None
    ) -> Container | str:
        """Return a container, or the words for why there is none."""
        check_id(identity)
        timeout, ttl = check_timeout("timeout", timeout), check_timeout("ttl", ttl)
        if not isinstance(profile, str):
            raise TypeError(f"profile must be a str, not {profile!r}")
        if owner is not None and (isinstance(owner, bool) or not isinstance(owner, int)):
            raise TypeError(f"owner must be a pid or None, not {owner!r}")
        wish = messages.Get(requests.new_name(), identity, timeout, profile, owner, ttl)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            return self._get_and_confirm(wish, deadline)
        except ServiceUnavailable:
            self._caller.forsake(wish.request)
            raise
        except (LxcPoolError, TypeError, ValueError):
            raise
        except BaseException:
            # Ctrl-C or a test's timeout: in whichever step it came, the container goes back.
            with contextlib.suppress(LxcPoolError):
                self._caller.ask(messages.Abandon(wish.request), 2.0)
            raise

    def _get_and_confirm(self, wish: messages.Get, deadline: float | None) -> Container | str:
        again = False
        while True:
            patience = None if wish.timeout is None else time.monotonic() + wish.timeout + GRACE
            connection = self._caller.borrow(deadline, again=again, grace=GRACE)
            try:
                offer = connection.call(wish, patience)
                if isinstance(offer, str):
                    self._caller.give_back(connection)
                    return offer
                remaining = math.inf if deadline is None else max(0.0, deadline - time.monotonic())
                info = connection.call(
                    messages.Confirm(wish.request), time.monotonic() + min(CALL_TIMEOUT, remaining + GRACE)
                )
                container = (
                    None if info is None else Container(self._caller, info, owned=wish.owner in (None, os.getpid()))
                )
                self._caller.give_back(connection)
                if container is not None:
                    return container
                # Too late: the service has taken it back. Queue again.
            except (LxcPoolError, TypeError, ValueError):  # first: AccessDenied is an OSError, too
                self._caller.give_back(connection)
                raise
            except LOST as error:
                connection.close()
                if patience is not None and time.monotonic() >= patience:
                    raise ServiceUnavailable(f"the service in {self.host_dir} did not answer in time") from error
                again = True
            except BaseException:
                connection.close()
                raise
            if deadline is not None:
                wish = msgspec.structs.replace(wish, timeout=max(0.0, deadline - time.monotonic()))


def _await_exit(pidfd: int, deadline: float) -> None:
    """Wait until a process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    # A day at most: poll(2) counts milliseconds in 32 bits.
    if not poll.poll(min(86400.0, max(0.0, deadline - time.monotonic())) * 1000):
        raise ServiceUnavailable("the service has closed everything but its process does not end")


def _not_ready(status: PoolStatus, wanted: int, timeout: float | None) -> str:
    words = f"{status.size} of {wanted} containers are warm after {timeout} s ({status.building} building"
    if status.draining:
        words += "; the pool is drained"
    if not status.running:
        words += "; the service is ending"
    errors = [f"{name}: {profile.last_error}" for name, profile in status.profiles.items() if profile.last_error]
    return words + (f"; last error: {'; '.join(errors) or status.last_error}" if status.last_error else "") + ")"
