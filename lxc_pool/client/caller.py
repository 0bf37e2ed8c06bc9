"""Make calls: each on a connection of its own, again on a new one if that is lost."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from lxc_pool.client.connection import AnswerLost, Connection
from lxc_pool.errors import LxcPoolError, ServiceUnavailable
from lxc_pool.wire import messages
from lxc_pool.wire.channel import ProtocolError

CALL_TIMEOUT: Final = 30.0
"""Seconds that a call may take which has no timeout of its own. Origin: the public contract."""

GRACE: Final = 5.0
"""Seconds that the service has, beyond the caller's timeout, to say that nothing came free. Origin: the ancestor."""

LOST: Final = (EOFError, OSError, ProtocolError)
"""What says that a connection is of no more use."""


class Caller:
    """The way to one service. Thread-safe; after a fork, the child makes connections of its own."""

    def __init__(self, host_dir: Path) -> None:
        """Name the service; nothing happens yet."""
        self.host_dir = host_dir
        # A deque, since its append and pop are atomic: a lock could be asked for again by a finalizer.
        self._idle: deque[Connection] = deque()
        self._forsaken: deque[str] = deque()

    def ask(
        self,
        call: messages.Call,
        timeout: float | None = CALL_TIMEOUT,
        descriptors: Sequence[int] = (),
        *,
        grace: float = 0.0,
    ) -> Any:
        """Make a call; on a lost connection, make it again on a new one.

        Twice is as good as once for every call but a command's start, which is told by its descriptors. A command whose
        start is in doubt is left to its control socket: it says that the command runs, or is closed.

        Args:
            call: What to ask.
            timeout: Seconds until the service is given up; None: it may take for ever to answer.
            descriptors: Go beside the call.
            grace: Seconds beyond *timeout* that a service has which is there; one that is not has *timeout* to come.

        Raises:
            ServiceUnavailable: No answer within *timeout*.
            LxcPoolError, TypeError, ValueError: The service's answer.
        """
        return self._ask(lambda _remaining: call, timeout, descriptors, grace)

    def ask_within(self, make: Callable[[float | None], messages.Call], timeout: float | None) -> Any:
        """Make a call that the service answers after *timeout* seconds at the latest, by itself; raises as `ask`.

        Args:
            make: Makes the call, given the seconds that remain of *timeout*: fewer if it has to be made again.
            timeout: Seconds; None: for ever.
        """
        return self._ask(make, timeout, (), GRACE)

    def _ask(
        self,
        make: Callable[[float | None], messages.Call],
        timeout: float | None,
        descriptors: Sequence[int],
        grace: float,
    ) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        patience = None if deadline is None else deadline + grace
        again = False
        while True:
            connection = self.borrow(deadline, again=again, grace=grace)
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                result = connection.call(make(remaining), patience, descriptors)
            except (LxcPoolError, TypeError, ValueError):  # first: AccessDenied is an OSError, too
                self.give_back(connection)
                raise
            except LOST as error:
                connection.close()
                if descriptors and isinstance(error, AnswerLost):
                    return None
                if patience is not None and time.monotonic() >= patience:
                    raise ServiceUnavailable(
                        f"the service in {self.host_dir} did not answer within {timeout:g} s"
                    ) from error
                again = True
            except BaseException:
                connection.close()  # an answer may still be on its way
                raise
            else:
                self.give_back(connection)
                return result

    def borrow(self, deadline: float | None, *, again: bool, grace: float = 0.0) -> Connection:
        """Take an idle connection, or make one; see `Connection.open`. It is the caller's to give back or close."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break  # not from here: a caller would read of an empty deque before every error of connecting
            if connection.usable:
                return connection
            connection.close()
        until = time.monotonic() + CALL_TIMEOUT if deadline is None else deadline
        while True:
            connection = Connection.open(self.host_dir, until, again=again, grace=grace)
            if self._abandon_forsaken(connection, until + grace):
                return connection
            connection.close()

    def forsake(self, request: str) -> None:
        """Have what *request* may have got given back by the next connection: the service went away over it."""
        self._forsaken.append(request)

    def _abandon_forsaken(self, connection: Connection, deadline: float) -> bool:
        """Do that; return whether the connection is still of use."""
        with contextlib.suppress(IndexError):
            while True:
                request = self._forsaken.popleft()
                try:
                    connection.call(messages.Abandon(request), deadline)
                except LOST:
                    self._forsaken.append(request)
                    return False
        return True

    def give_back(self, connection: Connection) -> None:
        """Take a connection back that no answer is on its way on."""
        self._idle.append(connection)

    def close(self) -> None:
        """Close all idle connections."""
        while self._idle:
            self._idle.pop().close()

    def __reduce__(self) -> tuple[type[Caller], tuple[Path]]:
        return Caller, (self.host_dir,)


def check_seconds(name: str, value: object) -> float:
    """Return a number of seconds.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative or not a number of seconds.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.copysign(math.inf, value > 0 or -1)
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"{name} must be 0 or more seconds, not {value!r}")
    return seconds


def check_timeout(name: str, value: object) -> float | None:
    """Return a number of seconds, or None; raises as `check_seconds` does."""
    return None if value is None else check_seconds(name, value)


_FOR_EVER = 1e9
"""Seconds, 32 years, from which on a wait has no end: poll(2) can't count so many."""


def check_wait(value: object) -> float | None:
    """Return the seconds that `subprocess` would wait: negative ones are over at once; None: for ever.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not a number of seconds.
    """
    if isinstance(value, (int, float)) and value < 0:
        return -1.0
    seconds = check_timeout("timeout", value)
    return None if seconds is None or seconds > _FOR_EVER else seconds
