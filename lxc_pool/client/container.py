"""A leased container, as test code holds it."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from lxc_pool.client import process
from lxc_pool.client.caller import Caller, check_seconds
from lxc_pool.errors import LxcPoolError, UnknownLease
from lxc_pool.execution.protocol import ExecRequest
from lxc_pool.model import ContainerInfo, LeaseId, State
from lxc_pool.wire import messages

if TYPE_CHECKING:
    import subprocess

_FINALIZER_TIMEOUT = 2.0
"""Seconds that the release by a finalizer may take. A guess; the service reaps it anyhow when this process ends."""


class Container:
    """A container that is this process's alone until it is released; then it is destroyed.

    `with` releases it at the end. It may be pickled to a child process of its owner and used there, but only the handle
    that `get` returned, in the process that called it, releases it when it is garbage-collected, with a
    `ResourceWarning`.
    """

    def __init__(self, caller: Caller, info: ContainerInfo, *, owned: bool) -> None:
        """Make a handle. Use `get` or `lease` of the pool.

        Args:
            caller: The connection to the service.
            info: What the service says of the container.
            owned: Whether the handle releases the container when it is garbage-collected.
        """
        self._caller = caller
        self._info = info
        self._released = False
        self._owner_pid = os.getpid() if owned else None

    @property
    def name(self) -> str:
        """The container's name, of the service's making."""
        return self._info.name

    @property
    def id(self) -> LeaseId:
        """What the lease was named when it was asked for."""
        assert self._info.id is not None, "the service tells the holder of a lease its id"
        return self._info.id

    @property
    def profile(self) -> str:
        """The kind of container."""
        return self._info.profile

    @property
    def init_pid(self) -> int:
        """The pid, on the host, of the container's init."""
        assert self._info.init_pid is not None, "a leased container has an init"
        return self._info.init_pid

    @property
    def state(self) -> State:
        """What the container is doing now, by the service's word.

        Raises:
            UnknownLease, LeaseExpired: The lease has ended.
        """
        info: ContainerInfo = self._caller.ask(messages.Inspect(self.name))
        return info.state

    @property
    def ips(self) -> tuple[str, ...]:
        """The container's network addresses now, beyond loopback; none with network "empty".

        Raises:
            UnknownLease, LeaseExpired: The lease has ended.
        """
        addresses: tuple[str, ...] = self._caller.ask(messages.Addresses(self.name))
        return addresses

    def run(
        self,
        args: list[str] | tuple[str, ...],
        *,
        input: str | bytes | None = None,  # noqa: A002  # as subprocess.run names it
        capture_output: bool = False,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        env: dict[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        check: bool = False,
        timeout: float | None = None,
        user: str | int | None = None,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command inside and wait for it; keywords, result and errors are those of `subprocess.run`.

        The caller's environment does not enter: the command starts in `/` with PATH, HOME, USER, LANG=C.UTF-8 and
        *env*.

        Args:
            args: The command and its arguments.
            user: Who runs it: a name or uid of the container; None: root.
            timeout: Seconds; past it, no process of the command is left alive in the container.

        Raises:
            subprocess.CalledProcessError: With *check*, the command did not end with 0.
            subprocess.TimeoutExpired: The command took longer than *timeout*.
            FileNotFoundError, PermissionError, NotADirectoryError: As subprocess has them, for the command and *cwd*.
            UnknownLease, LeaseExpired: The lease has ended.
            ExecFailed: The command could not be started for a reason that is not its own.
            TypeError, ValueError: An argument is wrong.
        """
        return process.run(
            self._launch,
            args,
            input=input,
            capture_output=capture_output,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            encoding=encoding,
            errors=errors,
            env=env,
            cwd=cwd,
            check=check,
            timeout=timeout,
            user=user,
        )

    def popen(
        self,
        args: list[str] | tuple[str, ...],
        *,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        env: dict[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
    ) -> process.Process:
        """Start a command inside; the result is used like `subprocess.Popen`. Arguments and errors as for `run`."""
        return process.Process.start(
            self._launch,
            args,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            encoding=encoding,
            errors=errors,
            env=env,
            cwd=cwd,
            user=user,
        )

    def renew(self, ttl: float) -> None:
        """Let the lease end *ttl* seconds from now.

        Raises:
            UnknownLease, LeaseExpired: It has ended.
            TypeError, ValueError: *ttl* is no number of seconds.
        """
        self._caller.ask(messages.Renew(self.name, check_seconds("ttl", ttl)))

    def keep(self, ttl: float) -> None:
        """Let the lease lose its owner: it outlives this process and ends after *ttl* seconds, or by `release`.

        Raises:
            UnknownLease, LeaseExpired: It has ended.
            TypeError, ValueError: *ttl* is no number of seconds.
        """
        self._caller.ask(messages.Keep(self.name, check_seconds("ttl", ttl)))
        self._owner_pid = None

    def release(self) -> None:
        """End the lease; the container is destroyed in the background. Releasing twice is as good as once.

        Raises:
            ServiceUnavailable: The service can't be reached.
        """
        if self._released:
            return
        self._released = True
        with contextlib.suppress(UnknownLease):  # it has ended already
            self._caller.ask(messages.Release(self.name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self._caller, self._info)

    def __repr__(self) -> str:
        return f"<container {self.name} of profile {self.profile!r}, leased as {str(self.id)!r}>"

    def __del__(self) -> None:
        # Half-made objects and the end of the interpreter come here too; when this process ends the service reaps it.
        if getattr(self, "_released", True) or self._owner_pid != os.getpid() or sys.is_finalizing():
            return
        self._released = True
        warnings.warn(f"{self!r} was never released", ResourceWarning, stacklevel=2, source=self)
        with contextlib.suppress(LxcPoolError):
            self._caller.ask(messages.Release(self.name), _FINALIZER_TIMEOUT)

    def _launch(self, request: ExecRequest, descriptors: tuple[int, int, int, int]) -> None:
        """Hand a command and its descriptors to the service."""
        self._caller.ask(messages.Execute(self.name, request.encode()), descriptors=descriptors)


def _unpickle(caller: Caller, info: ContainerInfo) -> Container:
    return Container(caller, info, owned=False)
