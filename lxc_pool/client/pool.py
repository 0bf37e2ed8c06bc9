"""The proxy of the service's `PoolService`: what `PoolManager.connect` returns."""

from __future__ import annotations

import contextlib
import math
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import managers
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from lxc_pool import hostdir
from lxc_pool.client.connection import SERIALIZER, AnswerLost, Connection
from lxc_pool.client.container import Container
from lxc_pool.errors import LxcPoolError, PoolTimeout, ServiceUnavailable
from lxc_pool.model import ContainerInfo, LeaseId, PoolStatus, check_id
from lxc_pool.wire import messages
from lxc_pool.wire.channel import ProtocolError

CALL_TIMEOUT: Final = 30.0
"""Seconds that a call may take which has no timeout of its own. Origin: the public contract."""

GRACE: Final = 5.0
"""Seconds that the service has, beyond the caller's timeout, to say that nothing came free. Origin: the ancestor."""

_LOST = (EOFError, OSError, ProtocolError)


class PoolServiceProxy(managers.BaseProxy):
    """The pool, as test code sees it.

    Thread-safe: each call takes a connection of its own out of `_idle`, or makes one. After a fork the child makes new ones.
    A call whose connection is lost is made again on a new one, with a newly read key, within its timeout.
    """

    def __init__(self, host_dir: Path) -> None:
        """Name the service; nothing happens yet. Use `PoolManager.connect`."""
        token = managers.Token("PoolService", str(hostdir.socket_path(host_dir)), "pool")
        super().__init__(token, SERIALIZER, authkey=b"", incref=False)
        self.host_dir = host_dir
        # A deque, since its append and pop are atomic: a lock could be asked for again by a finalizer of ours.
        self._idle: deque[Connection] = deque()

    @classmethod
    def connect(cls, host_dir: Path, timeout: float) -> Self:
        """See `PoolManager.connect`."""
        check_timeout("timeout", timeout)
        pool = cls(host_dir)
        pool._idle.append(Connection.open(host_dir, time.monotonic() + timeout))
        return pool

    # --- the pool -----------------------------------------------------------------------------------------------------

    def echo(self, text: str) -> str:
        """Return *text*, by way of the service: is it alive?"""
        if not isinstance(text, str):
            raise TypeError(f"echo takes a str, not {text!r}")
        return str(self._ask(messages.Echo(text)))

    def status(self) -> PoolStatus:
        """Return what the service says of itself."""
        status: PoolStatus = self._ask(messages.GetStatus())
        return status

    def containers(self) -> tuple[ContainerInfo, ...]:
        """Return every container of the pool, in any state."""
        infos: tuple[ContainerInfo, ...] = self._ask(messages.ListContainers())
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
        check_timeout("timeout", timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        status = self.status()
        wanted = status.capacity if n is None else n
        if not 0 <= wanted <= status.capacity:
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
            status = self._ask(messages.AwaitWarm(step, remaining), remaining)

    def get(
        self,
        id: LeaseId,
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
        id: LeaseId,
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
        return Container(self, self._ask(messages.Inspect(name)), owned=False)

    def resize(self, n: int) -> None:
        """Change the number of warm containers; administrators only.

        Raises:
            AccessDenied: The caller is not an administrator.
            ConfigError: *n* is not 1 to 1000.
        """
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"n must be an int, not {n!r}")
        self._ask(messages.Resize(n))

    def drain(self) -> None:
        """Discard warm containers and hand out nothing until `resume`; returns at once; administrators only."""
        self._ask(messages.Drain())

    def resume(self) -> None:
        """Hand out containers again; administrators only."""
        self._ask(messages.Resume())

    def shutdown(self, grace: float = 10.0, *, keep_leases: bool = False) -> None:
        """End the service; return once it has really stopped. Administrators only.

        Args:
            grace: Seconds that leases have to end before their containers are reaped.
            keep_leases: Leave them to the next service instead.

        Raises:
            AccessDenied: The caller is not an administrator.
            ServiceUnavailable: It is not known whether it has stopped.
        """
        check_timeout("grace", grace)
        # Removing everything may take a while beyond the grace; it has a deadline of its own in the service.
        deadline = time.monotonic() + grace + 120
        connection = self._borrow(deadline, again=False)
        try:
            connection.call(messages.Shutdown(grace, keep_leases), deadline)
            connection.await_end(deadline)
        except _LOST as error:
            raise ServiceUnavailable(f"the service went away before it said that all is closed: {error}") from error
        finally:
            connection.close()
        self.close()

    def close(self) -> None:
        """Close the connections; leases live on with their owner. Later calls make new ones."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return
            connection.close()

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

    def _callmethod(self, methodname: str, args: Sequence[Any] = (), kwds: Mapping[str, Any] | None = None) -> Any:
        """Call a method of the service by name, as a stock proxy does."""
        if methodname.startswith("_") or not callable(getattr(type(self), methodname, None)):
            raise AttributeError(f"the pool has no method {methodname!r}")
        return getattr(self, methodname)(*args, **(kwds or {}))

    def _ask(self, call: messages.Call, timeout: float | None = CALL_TIMEOUT, descriptors: Sequence[int] = ()) -> Any:
        """Make a call; on a lost connection, make it again on a new one.

        Twice is as good as once for every call but a command's start, which is told by its descriptors. A command whose
        start is in doubt is left to its control socket: it says that the command runs, or is closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout + (0 if timeout is CALL_TIMEOUT else GRACE)
        again = False
        while True:
            connection = self._borrow(deadline, again=again)
            try:
                result = connection.call(call, deadline, descriptors)
            except _LOST as error:
                connection.close()
                if descriptors and isinstance(error, AnswerLost):
                    return None
                if deadline is not None and time.monotonic() >= deadline:
                    raise ServiceUnavailable(
                        f"the service in {self.host_dir} did not answer within {timeout:g} s"
                    ) from error
                again = True
            except (LxcPoolError, TypeError, ValueError):
                self._idle.append(connection)
                raise
            except BaseException:
                connection.close()  # an answer may still be on its way
                raise
            else:
                self._idle.append(connection)
                return result

    def _borrow(self, deadline: float | None, *, again: bool) -> Connection:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                until = time.monotonic() + CALL_TIMEOUT if deadline is None else deadline
                return Connection.open(self.host_dir, until, again=again)
            if connection.usable:
                return connection
            connection.close()

    def _lease(
        self, id: LeaseId, timeout: float | None, profile: str, owner: int | None, ttl: float | None
    ) -> Container | str:
        """Return a container, or the words for why there is none."""
        check_id(id)
        check_timeout("timeout", timeout)
        check_timeout("ttl", ttl)
        if not isinstance(profile, str):
            raise TypeError(f"profile must be a str, not {profile!r}")
        if owner is not None and (isinstance(owner, bool) or not isinstance(owner, int)):
            raise TypeError(f"owner must be a pid or None, not {owner!r}")
        wish = messages.Get(uuid.uuid4().hex, id, timeout, profile, owner, ttl)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            return self._get_and_confirm(wish, deadline)
        except (LxcPoolError, TypeError, ValueError):
            raise
        except BaseException:
            # Ctrl-C or a test's timeout: in whichever step it came, the container goes back.
            with contextlib.suppress(LxcPoolError):
                self._ask(messages.Abandon(wish.request), 2.0)
            raise

    def _get_and_confirm(self, wish: messages.Get, deadline: float | None) -> Container | str:
        again = False
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            patience = None if remaining is None else time.monotonic() + remaining + GRACE
            connection = self._borrow(patience, again=again)
            try:
                offer = connection.call(
                    messages.Get(wish.request, wish.id, remaining, wish.profile, wish.owner, wish.ttl), patience
                )
                if isinstance(offer, str):
                    self._idle.append(connection)
                    return offer
                info = connection.call(messages.Confirm(wish.request), time.monotonic() + CALL_TIMEOUT)
                container = None if info is None else Container(self, info, owned=wish.owner in (None, os.getpid()))
                self._idle.append(connection)
                if container is not None:
                    return container
                # Too late: the service has taken it back. Queue again for the time that remains.
            except _LOST as error:
                connection.close()
                if patience is not None and time.monotonic() >= patience:
                    raise ServiceUnavailable(f"the service in {self.host_dir} did not answer in time") from error
                again = True
            except (LxcPoolError, TypeError, ValueError):
                self._idle.append(connection)
                raise
            except BaseException:
                connection.close()
                raise


def check_timeout(name: str, value: object) -> None:
    """Check a number of seconds, or None.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative or not a number of seconds.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or None, not {value!r}")
    if math.isnan(value) or value < 0:
        raise ValueError(f"{name} must be 0 or more seconds, not {value!r}")


def _not_ready(status: PoolStatus, wanted: int, timeout: float | None) -> str:
    words = f"{status.size} of {wanted} containers are warm after {timeout} s ({status.building} building"
    if status.draining:
        words += "; the pool is drained"
    if not status.running:
        words += "; the service is ending"
    return words + (f"; last error: {status.last_error}" if status.last_error else "") + ")"
