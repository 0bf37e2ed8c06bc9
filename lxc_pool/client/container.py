"""A leased container, as test code holds it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from lxc_pool.client import files, mounts, process
from lxc_pool.client.caller import CALL_TIMEOUT, GRACE, Caller, check_seconds, check_timeout, check_wait
from lxc_pool.errors import ExecFailed, LxcPoolError, PoolTimeout, UnknownLease
from lxc_pool.execution.protocol import ExecRequest
from lxc_pool.model import ContainerInfo, LeaseId, State
from lxc_pool.plaintext import last_lines, plain
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

    def console_log(self, lines: int | None = None) -> str:
        """Return what was last written to the container's console: by its init, mostly; see `lxc-pool logs`.

        It is text to be shown: without escape sequences and control characters, lines ended by newlines, what is not
        UTF-8 replaced. Of a console that says much, the oldest is lost: the service keeps at most 128 KiB, and begins
        anew when they are full.

        Args:
            lines: How many of the last lines; None: all that is there.

        Raises:
            UnknownLease, LeaseExpired: The lease has ended, and the log is gone with the container.
            TypeError, ValueError: *lines* is no number of lines.
        """
        if lines is not None and (isinstance(lines, bool) or not isinstance(lines, int)):
            raise TypeError(f"lines must be an int or None, not {lines!r}")
        if lines is not None and lines < 0:
            raise ValueError(f"lines must be 0 or more, not {lines}")
        content: bytes = self._caller.ask(messages.ConsoleLog(self.name))
        text = plain(content.decode(errors="replace"))
        return text if lines is None else last_lines(text, lines)

    def wait_for_network(self, timeout: float | None = 30) -> tuple[str, ...]:
        """Wait until the container can be reached and reach others; return its addresses.

        That is: a network device that is up and connected, an address, and a default route over such a device. With
        network "bridge" it is so when the container is handed out, unless its image changes it; an image may also bring
        up its network by itself.

        Args:
            timeout: Seconds; 0: look once; None: wait for ever.

        Raises:
            PoolTimeout: It was not so within *timeout*; the message says what was missing.
            ValueError: The container has loopback alone (network "empty"); or *timeout* is negative or not a number.
            UnknownLease, LeaseExpired: The lease has ended.
        """
        timeout = check_timeout("timeout", timeout)
        found: tuple[str, ...] | str = self._caller.ask_within(
            functools.partial(messages.AwaitNetwork, self.name), timeout
        )
        if isinstance(found, str):
            raise PoolTimeout(f"{self.name} has no network after {timeout:g} s: {found}")
        return found

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
            functools.partial(self._launch, timeout=check_wait(timeout)),
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
        tty: bool | os.terminal_size = False,
    ) -> process.Process:
        """Start a command inside; the result is used like `subprocess.Popen`. Arguments and errors as for `run`.

        Args:
            tty: Whether the command has a controlling terminal, made in the container, which is also each stream left
                None; or the terminal's size. Our end of it is the result's `terminal`.
        """
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
            tty=tty,
        )

    def push(
        self,
        src: files.Path,
        dst: files.Path,
        *,
        owner: str | int | None = None,
        parents: bool = False,
        dirs_exist_ok: bool = False,
        timeout: float | None = None,
        progress: files.Progress | None = None,
    ) -> files.Copied:
        """Copy a file or directory into the container.

        Where it goes is as with cp(1): into *dst* if that is a directory, under *src*'s own name; else it becomes
        *dst*, whose parent has to exist. *dst* with a slash at its end has to be a directory. A relative *dst* begins
        at `/`.

        - A file takes the place of a file or link, at once and when it is complete. A directory has to be new, and
          appears when it is complete, unless *dirs_exist_ok*: then it is merged, file by file.
        - Permissions (without set-uid and set-gid bits, which would mean another owner), times, holes and symbolic
          links are kept; hard links become copies; devices, fifos and sockets are left out and reported.
        - *src* itself may be a link; below it none is followed. Nor is one below the directory that is made.

        Args:
            src: A path of this side.
            dst: A path of the container.
            owner: Whom it belongs to: a name or uid of the container, or either with `:group`; None: root.
            parents: Whether missing directories are made, for the same owner.
            dirs_exist_ok: Whether directories may exist; their own permissions stay.
            timeout: Seconds; None: for ever.
            progress: Called with the bytes and the entries sent so far; what it raises ends the copying.

        Raises:
            FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError, OSError: As
                pathlib and shutil have them; `filename` is a path of the side that it was on. On failure nothing is
                left but directories that *parents* made and, with *dirs_exist_ok*, files that were complete.
            TimeoutError: It was not done within *timeout*.
            UnknownLease, LeaseExpired: The lease has ended.
            ExecFailed: The container can't be entered, or has ended meanwhile.
            TypeError, ValueError: An argument is wrong, or the container has no such user.
        """
        with self._lease_required():
            return files.push(
                functools.partial(self._launch, timeout=check_timeout("timeout", timeout)),
                src,
                dst,
                owner=owner,
                parents=parents,
                dirs_exist_ok=dirs_exist_ok,
                timeout=timeout,
                progress=progress,
            )

    def pull(
        self,
        src: files.Path,
        dst: files.Path,
        *,
        max_bytes: int | None = files.MAX_BYTES,
        max_entries: int | None = files.MAX_ENTRIES,
        parents: bool = False,
        dirs_exist_ok: bool = False,
        timeout: float | None = files.PULL_TIMEOUT,
        progress: files.Progress | None = None,
    ) -> files.Copied:
        """Copy a file or directory out of the container; what is inside is not trusted.

        All is as with `push`, with sides changed, but: what is made belongs to this process's user, who may always
        enter directories; what vanishes meanwhile is left out; a file that grows is cut at the length it had. Links
        come as they are and may lead anywhere: do not follow them unseen. A process killed by SIGKILL leaves, of a
        directory, a `.lxc_pool-…` beside *dst*.

        Args:
            src: A path of the container.
            dst: A path of this side.
            max_bytes: Bytes of all files, holes included, that it may be at most; None: any number.
            max_entries: Files, directories and links that it may be at most; None: any number.
            parents: Whether missing directories are made.
            dirs_exist_ok: Whether directories may exist; their own permissions stay.
            timeout: Seconds; None: for ever.
            progress: Called with the bytes and the entries received so far; what it raises ends the copying.

        Raises:
            OSError: As `push`; EFBIG: there is more than *max_bytes* or *max_entries*; EPROTO: what the container sent
                makes no sense.
            TimeoutError, UnknownLease, LeaseExpired, ExecFailed, TypeError, ValueError: As `push`.
        """
        with self._lease_required():
            return files.pull(
                functools.partial(self._launch, timeout=check_timeout("timeout", timeout)),
                src,
                dst,
                max_bytes=max_bytes,
                max_entries=max_entries,
                parents=parents,
                dirs_exist_ok=dirs_exist_ok,
                timeout=timeout,
                progress=progress,
            )

    def mount(self, host_path: files.Path, dst: files.Path, readonly: bool = True) -> None:
        """Mount a file or directory of this side into the running container, until `unmount` or its end.

        This process opens *host_path*, so that nothing can be mounted that its user can't reach, and what is in it
        stays subject to that user's rights. Files of its own uid and primary gid are root's in the container. Other
        users and groups are nobody there: what is theirs can be read if everybody may, and not be written. What the
        container makes belongs to this user. Set-uid bits and device nodes have no effect; what is mounted below
        *host_path* is not seen. The container can take the mount away, but not make it writable.

        *dst* may be mounted on already: it is covered. If it is missing it is made, missing directories too, and stays
        when the mount goes. A relative one begins at `/`; links in it are followed inside the container.

        Args:
            host_path: A directory or regular file, on a file system that can be seen with other owners: ext4, xfs,
                btrfs, tmpfs (Linux 6.3) and others can, overlay and network file systems mostly not.
            dst: Where it will be.
            readonly: Whether the container may only read it. Else code in it writes there as this user: see
                docs/security.md for what not to mount so.

        Raises:
            FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, OSError: One of the paths is not
                as it has to be; `filename` is that. EXDEV: this process is in another mount namespace than the
                service. EOPNOTSUPP: not on that file system.
            TimeoutError: The file system does not answer.
            UnknownLease, LeaseExpired: The lease has ended.
            ExecFailed: The container can't be entered, or has ended meanwhile.
            TypeError, ValueError: An argument is wrong: *host_path* a device, fifo or socket, *dst* the root directory.
        """
        with self._lease_required():
            mounts.mount(self._mount, host_path, dst, readonly=readonly)

    def unmount(self, dst: files.Path) -> None:
        """Take the topmost mount off *dst* that `mount` has put there.

        Raises:
            ValueError: There is none: no mount, one of the container's own or of its profile.
            OSError: EBUSY: a process in the container has a file open there, or works there.
            FileNotFoundError, NotADirectoryError, TimeoutError, UnknownLease, LeaseExpired, ExecFailed, TypeError:
                As `mount`.
        """
        with self._lease_required():
            mounts.unmount(self._launch, dst)

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
            ServiceUnavailable: The service can't be reached: the lease goes on, and may be released again.
        """
        if self._released:
            return
        self._released = True
        try:
            self._caller.ask(messages.Release(self.name))
        except UnknownLease:  # it has ended already
            pass
        except LxcPoolError:
            self._released = False
            raise
        except BaseException:
            # Ctrl-C or a test's timeout: whoever was leaving the lease's block won't come back to it.
            with contextlib.suppress(LxcPoolError):
                self._caller.ask(messages.Release(self.name), _FINALIZER_TIMEOUT)
            raise

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

    @contextlib.contextmanager
    def _lease_required(self) -> Iterator[None]:
        """Let a failure say that the lease has ended, if that is why."""
        try:
            yield
        except ExecFailed:
            self._caller.ask(messages.Inspect(self.name))
            raise

    def _mount(self, destination: bytes, readonly: bool, descriptors: tuple[int, int, int]) -> None:
        """Hand what is to be mounted to the service."""
        self._caller.ask(messages.Mount(self.name, destination, readonly), descriptors=descriptors)

    def _launch(
        self, request: ExecRequest, descriptors: tuple[int, int, int, int], *, timeout: float | None = None
    ) -> None:
        """Hand a command and its descriptors to the service, which has *timeout* seconds to come if it is not there."""
        self._caller.ask(
            messages.Execute(self.name, request.encode()),
            CALL_TIMEOUT if timeout is None else min(max(0.0, timeout), CALL_TIMEOUT),
            descriptors,
            grace=GRACE,
        )


def _unpickle(caller: Caller, info: ContainerInfo) -> Container:
    return Container(caller, info, owned=False)
