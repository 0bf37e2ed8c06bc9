"""A command in a container, as `subprocess.Popen` has it.

 caller ── Process ──launch()──► service ─► supervisor ─► command in the container
              │ ▲                                │ ▲
              │ └─ control: Started, Failed ─────┘ │      a SOCK_SEQPACKET pair
              │             and Exited             │
              └─── Signal, KillTree, end of file ──┘
           our ends of the pipes ◄────────────────────► the command's streams

What differs from `subprocess`: `pid` is the host's number of the command's process. A command whose client ends, or
whose `Process` is garbage-collected while it runs, is killed with all that came of it. A stream left None is inherited
like a pipe; a file, terminal or socket of the caller is copied to and from by a thread, since it must not enter a
container, and a stdin so copied may be read further than the command read it. With `tty` a stream left None is a
terminal of the container, and `terminal` its master.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import IO, Any, Self

from lxc_pool.client.caller import check_wait
from lxc_pool.client.communication import Communication
from lxc_pool.client.control import Control
from lxc_pool.client.stdio import Streams, Target
from lxc_pool.errors import ExecFailed
from lxc_pool.execution.protocol import ExecRequest, Started, Terminal

Args = str | bytes | os.PathLike[str] | os.PathLike[bytes] | Iterable[object]
Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Launch = Callable[[ExecRequest, tuple[int, int, int, int]], None]
"""Sends a request with stdin, stdout, stderr and the supervisor's control socket; they stay the caller's to close."""

_DEFAULT_SIZE = os.terminal_size((80, 24))


class Process:
    """A command in a container, with the interface of `subprocess.Popen`.

    Threads: any may wait and signal; one at a time communicates, or uses a file. `Control` has the lock.

    Attributes:
        args: As the caller gave them.
        pid: The command's process, as the host numbers it.
        stdin, stdout, stderr: Our ends of the pipes, None where no PIPE was asked for.
        terminal: The master of the command's terminal, non-blocking, ours until `close`; None without one. What the
            command writes there is read from it, what is written to it the command reads, or gets as a signal;
            `termios.tcsetwinsize` changes the size. Read it before `wait`, or a command that writes more than a few
            thousand bytes never ends.
    """

    def __init__(self, args: Any, control: Control, streams: Streams) -> None:
        """Wrap a launched command; `start` is what callers use."""
        self.args = args
        self.pid = 0
        self.stdin: IO[Any] | None = None
        self.stdout: IO[Any] | None = None
        self.stderr: IO[Any] | None = None
        self.terminal: int | None = None
        self._control = control
        self._streams = streams
        self._creator = os.getpid()
        self._communication: Communication | None = None

    @property
    def returncode(self) -> int | None:
        """None while nobody has seen it end; the exit code, or a signal's number negated."""
        return self._control.returncode

    @classmethod
    def start(
        cls,
        launch: Launch,
        args: Args,
        *,
        stdin: Target = None,
        stdout: Target = None,
        stderr: Target = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        bufsize: int = -1,
        env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
        cwd: Path | None = None,
        user: str | int | None = None,
        tty: bool | os.terminal_size = False,
        start_timeout: float | None = None,
    ) -> Process:
        """Start a command and return once it has been executed.

        Args:
            launch: Sends the request.
            args: The program and its arguments.
            stdin: As for `subprocess.Popen`, like all that is not listed here.
            env: Variables beside the default PATH, HOME, USER and LANG; None for those alone.
            cwd: A directory in the container; None for `/`.
            user: A name or uid, or either with `:group`; None for root.
            tty: Whether the command has a controlling terminal, which is also each stream left None; or its size, else
                80 columns and 24 lines.
            start_timeout: Seconds that it may take until the command is executed; None for ever.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: One has a wrong value, or the container has no such user.
            OSError: The program can't be executed (FileNotFoundError, PermissionError, …), or *cwd* not entered.
            TimeoutExpired: *start_timeout* is over; the command has been killed.
            ExecFailed: The container can't be entered, or has ended.
            subprocess.SubprocessError: text and universal_newlines contradict each other.
        """
        deadline = None if start_timeout is None else time.monotonic() + start_timeout
        wanted = _terminal(tty, stdin, stdout, stderr)
        request = ExecRequest.create(args, env, cwd, user, wanted)
        if not isinstance(bufsize, int):
            raise TypeError("bufsize must be an integer")
        if text is not None and universal_newlines is not None and bool(universal_newlines) != bool(text):
            raise subprocess.SubprocessError("text and universal_newlines contradict each other")
        as_text = bool(encoding or errors or text or universal_newlines)
        if wanted is not None:  # what will be the terminal's is sent as what may enter
            stdin, stdout, stderr = (
                subprocess.DEVNULL if stream in wanted.streams else target
                for stream, target in enumerate((stdin, stdout, stderr))
            )
        streams = Streams(stdin, stdout, stderr)
        try:
            ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except BaseException:
            streams.close()
            raise
        shown = args if isinstance(args, (str, bytes, os.PathLike, list, tuple)) else list(request.argv)
        process = cls(shown, Control(ours), streams)
        try:
            with other:
                launch(request, (*streams.theirs, other.fileno()))
            streams.sent()
            process._await_start(request, deadline)
            process._open_files(as_text, encoding, errors, bufsize)
        except BaseException as exc:
            process.abort(wait=process.pid > 0 or isinstance(exc, subprocess.TimeoutExpired))
            raise
        return process

    def fileno(self) -> int:
        """Return a descriptor that can be read once `poll` may have news; -1 when there will be none."""
        return self._control.fileno()

    def poll(self) -> int | None:
        """Return the command's returncode if it has ended, else None.

        Raises:
            ExecFailed: Its supervisor was killed: nobody knows.
        """
        return self._control.await_exit(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command's end and return its returncode.

        Args:
            timeout: Seconds; None for ever.

        Raises:
            subprocess.TimeoutExpired: It runs on.
            ExecFailed: Its supervisor was killed: nobody knows.
        """
        patience = check_wait(timeout)
        deadline = None if patience is None else time.monotonic() + patience
        code = self._control.await_exit(patience)
        if code is None or not self._streams.settle(_left(deadline)):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:  # noqa: A002 - Popen's
        """Send *input*, read both outputs to their ends, wait for the command's; as `Popen.communicate`.

        After TimeoutExpired it may be called again, without loss.

        Raises:
            ValueError: *input* comes a second time.
            subprocess.TimeoutExpired: It is not over; `output` and `stderr` hold the bytes so far.
            ExecFailed: As `wait`.
        """
        if self._communication is None:
            self._communication = Communication(self.stdin, self.stdout, self.stderr, input)
        elif input:
            raise ValueError("Cannot send input after starting communication")
        patience = check_wait(timeout)
        deadline = None if patience is None else time.monotonic() + patience
        try:
            if not self._communication.run(deadline):
                raise self.timeout_expired(timeout)
            self.wait(_left(deadline))
        except subprocess.TimeoutExpired:
            raise self.timeout_expired(timeout) from None
        return self._communication.results()

    def send_signal(self, sig: int) -> None:
        """Send a signal to the command's main process, if it still runs.

        Raises:
            ValueError: There is no such signal.
            ExecFailed: As `poll`.
        """
        self._control.signal(sig)

    def terminate(self) -> None:
        """Send SIGTERM to the main process."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the main process; see `kill_tree`."""
        self.send_signal(signal.SIGKILL)

    def kill_tree(self) -> None:
        """Kill the command and all that came of it, daemons included, and wait until they are gone.

        Raises:
            ExecFailed: They are not: the container is frozen, or hangs in the kernel.
        """
        self._control.kill_tree()

    def abort(self, *, wait: bool) -> None:
        """Leave by an exception, which is more important than an error here: kill the tree, close everything.

        Args:
            wait: Until the tree is gone, too.
        """
        try:
            if wait:
                with contextlib.suppress(ExecFailed):
                    self.kill_tree()
        finally:
            self.close()

    def timeout_expired(self, timeout: float | None, *, drain: bool = False) -> subprocess.TimeoutExpired:
        """Make the exception, with what has been read so far; *drain* reads what a killed command left in the pipes."""
        output = errors = None
        if self._communication is not None:
            if drain:
                self._communication.drain()
            output, errors = self._communication.so_far()
        return subprocess.TimeoutExpired(self.args, timeout or 0.0, output, errors)

    def close(self) -> None:
        """Close the connection to the supervisor, the pipes, the terminal; a command that runs is killed with its tree.

        Who else has the terminal as the controlling one gets SIGHUP.
        """
        self._control.close()
        self._close_terminal()
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                with contextlib.suppress(OSError):  # unwritten input to a command that has ended
                    file.close()
        self._streams.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the pipes and wait, as Popen; an interruption (KeyboardInterrupt, SystemExit) kills the tree first."""
        if kind is not None and not issubclass(kind, Exception):
            self.abort(wait=True)
            return
        try:
            for file in (self.stdout, self.stderr, self.stdin):
                if file is not None:
                    with contextlib.suppress(BrokenPipeError):
                        file.close()
            self.wait()
        except BaseException:
            self.abort(wait=True)
            raise
        self.close()

    def __del__(self) -> None:
        """Kill a command that nobody can wait for any more; a forked copy of this object does nothing."""
        if self._creator != os.getpid():
            return
        self._close_terminal()
        if self._control.closed:
            return
        if not self._control.ended:
            warnings.warn(f"command {self.pid} is still running: it is killed", ResourceWarning, 2, source=self)
        self._control.close()

    def __repr__(self) -> str:
        """Name the command and its state."""
        return f"<{type(self).__name__}: returncode: {self.returncode} args: {self.args!r}>"

    def _close_terminal(self) -> None:
        if self.terminal is not None:
            os.close(self.terminal)
            self.terminal = None

    def _await_start(self, request: ExecRequest, deadline: float | None) -> None:
        event = self._control.await_start(_left(deadline))
        if event is None:
            raise subprocess.TimeoutExpired(self.args, 0.0)
        if isinstance(event, Started):
            self.pid = event.pid
            self.terminal = self._control.take_terminal()
            if request.terminal is not None and self.terminal is None:
                raise ExecFailed(
                    "the command's terminal did not arrive: this process can have no more descriptors open"
                )
            return
        if event.stage == "user":
            raise ValueError(f"user={request.user!r}: {event.text}")
        if event.stage in ("exec", "cwd"):
            name = request.cwd if event.stage == "cwd" else request.argv[0]
            raise OSError(event.errno, os.strerror(event.errno), name)
        raise ExecFailed(f"{request.argv[0]!r} was not started: {event.text}")

    def _open_files(self, as_text: bool, encoding: str | None, errors: str | None, bufsize: int) -> None:
        line_buffered = as_text and bufsize == 1
        size = -1 if bufsize == 1 else bufsize
        for name, index, mode in (("stdin", 0, "wb"), ("stdout", 1, "rb"), ("stderr", 2, "rb")):
            fd, self._streams.ours[index] = self._streams.ours[index], -1
            if fd >= 0:
                file: IO[Any] = open(fd, mode, size)  # noqa: SIM115 - the caller's to close
                setattr(self, name, file)  # ours to close, if the encoding is unknown
                if as_text:
                    options = {"write_through": True, "line_buffering": line_buffered} if index == 0 else {}
                    wrapped = io.TextIOWrapper(file, encoding, errors, **options)  # type: ignore[arg-type] # bools
                    setattr(self, name, wrapped)


def _terminal(tty: bool | os.terminal_size, stdin: Target, stdout: Target, stderr: Target) -> Terminal | None:
    """Return the terminal that the command gets."""
    if tty is False:
        return None
    if tty is not True and not isinstance(tty, os.terminal_size):
        raise TypeError(f"tty must be a bool or an os.terminal_size, not {tty!r}")
    size = _DEFAULT_SIZE if tty is True else tty
    if stderr == subprocess.STDOUT and stdout is None:
        stderr = None
    streams = tuple(stream for stream, target in enumerate((stdin, stdout, stderr)) if target is None)
    return Terminal(size.lines, size.columns, streams)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()
