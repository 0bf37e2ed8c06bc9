"""What client, service and supervisor say to each other about one command.

 client ──ExecRequest, 4 descriptors──► service ──► supervisor
    ▲                                                   │
    └────────── control: a SOCK_SEQPACKET pair ─────────┘
      Started, Failed, Exited ◄──                 ──► Signal, KillTree, end of file

One message is one packet of the control socket. The agent loads this module, so it imports next to nothing (`json` and
`dataclasses` would triple what the agent loads; measured 12 ms of its start).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

MAX_REQUEST = 2 * 1024 * 1024
"""Bytes of a request once encoded. Origin: Linux's default limit on argv and environ together (8 MiB stack / 4)."""

MAX_EVENT = 4096
"""Bytes of a control message; a longer error text is cut."""

DEFAULT_CWD = "/"

_MAX_SIDE = 2**16 - 1  # struct winsize, ioctl_tty(2)
_MAX_UID = 2**32 - 2  # 2**32 - 1 means "no change" to setresuid(2)
_HEADER = struct.Struct("<4sIII")  # magic, number of arguments, number of variables, 1 if there is a user
_COMMAND, _OPERATION, _IN_TERMINAL = b"lxe1", b"lxo1", b"lxt1"  # magics; after the last a header's addition
_TERMINAL = struct.Struct("<HHB")  # rows, columns, a bit for each stream
_STARTED, _FAILED, _EXITED, _SIGNAL, _KILL_TREE = range(1, 6)
_NUMBER = struct.Struct("<Bi")
_FAILURE = struct.Struct("<BiB")
OPERATIONS = ("files-in", "files-out", "unmount")
"""What a request can ask for beside a program: what a process of ours does inside, see `operations`."""

MOUNT = "mount"
"""Another operation, which the service alone asks for: the request says who its client is."""

STAGES = ("exec", "cwd", "user", "enter", "kill", "mount")
"""Where a command failed: finding or executing it, its cwd, its user, entering the container, being killed, what has
to be done outside for a mount."""


class ProtocolError(ValueError):
    """The other side sent what it may not send."""


class Terminal(NamedTuple):
    """A terminal to be made for a command.

    Attributes:
        rows, columns: Its size in characters, 0 if unknown.
        streams: Which of 0, 1, 2 are the terminal; the others are pipes as ever. It is the controlling terminal anyhow.
    """

    rows: int
    columns: int
    streams: tuple[int, ...] = (0, 1, 2)


class ExecRequest(NamedTuple):
    """One command to run.

    Attributes:
        argv: The program and its arguments, at least one.
        env: Variables set beside, or instead of, the default PATH, HOME, USER and LANG.
        cwd: Where the command starts, inside the container.
        user: `name`, `uid`, `name:group`, `uid:gid`, or a mixture; None for root.
        operation: argv[0] is no program, but one of `OPERATIONS`, or `MOUNT`.
        terminal: What the command gets as its terminal; None for none.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str = DEFAULT_CWD
    user: str | None = None
    operation: bool = False
    terminal: Terminal | None = None

    @classmethod
    def create(
        cls,
        args: str | bytes | os.PathLike[str] | os.PathLike[bytes] | Iterable[object],
        env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
        cwd: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None = None,
        user: str | int | None = None,
        terminal: Terminal | None = None,
    ) -> ExecRequest:
        """Check what a caller passed to `run` or `popen`, and make a request of it.

        Args:
            args: As for `subprocess.run`: a sequence, or the program alone.
            env: Variables for the command; None for the defaults alone.
            cwd: A directory in the container; None for `/`.
            user: A name, a uid, or either with `:group`; None for root.
            terminal: What the command gets as its terminal; None for none.

        Raises:
            TypeError: A part is of a type that can't be passed to a command.
            ValueError: *args* is empty, a part holds a NUL byte, *user* is malformed, the terminal is larger than one
                can be, or all is over 2 MiB.
        """
        request = cls(
            _checked_argv(args),
            _checked_env(env),
            DEFAULT_CWD if cwd is None else _text(cwd, "cwd"),
            check_user(user),
            terminal=_checked_terminal(terminal),
        )
        request.encode()
        return request

    @classmethod
    def for_operation(cls, *args: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> ExecRequest:
        """Make a request for one of `OPERATIONS`, or `MOUNT`, and its arguments.

        Raises:
            TypeError: An argument is neither text nor a path.
            ValueError: One holds a NUL byte, or all is over 2 MiB.
        """
        request = cls(_checked_argv(args), {}, operation=True)
        request.encode()
        return request

    def encode(self) -> bytes:
        """Return the request as bytes: a header, then NUL-terminated strings.

        Raises:
            ValueError: It is longer than `MAX_REQUEST`.
        """
        parts = [self.cwd, self.user or "", *self.argv]
        for name, value in self.env.items():
            parts += (name, value)
        body = "\0".join(parts).encode("utf-8", "surrogateescape")
        magic = _OPERATION if self.operation else _COMMAND if self.terminal is None else _IN_TERMINAL
        header = _HEADER.pack(magic, len(self.argv), len(self.env), self.user is not None)
        if self.terminal is not None:
            rows, columns, streams = self.terminal
            header += _TERMINAL.pack(rows, columns, sum(1 << stream for stream in streams))
        if len(header) + len(body) > MAX_REQUEST:
            raise ValueError(f"arguments and environment take {len(body)} bytes; at most {MAX_REQUEST} can be passed")
        return header + body

    @classmethod
    def decode(cls, data: bytes, *, trusted: bool = False) -> ExecRequest:
        """Read what `encode` wrote; *data* may come from an untrusted client, unless *trusted*: then from the service.

        Raises:
            ProtocolError: It is not an encoded request.
        """
        if not _HEADER.size <= len(data) <= MAX_REQUEST:
            raise ProtocolError(f"a request of {len(data)} bytes")
        magic, argc, envc, has_user = _HEADER.unpack_from(data)
        terminal, begin = None, _HEADER.size
        if magic == _IN_TERMINAL:
            terminal, begin = _decode_terminal(data), begin + _TERMINAL.size
        parts = data[begin:].decode("utf-8", "surrogateescape").split("\0")
        if (
            magic not in (_COMMAND, _OPERATION, _IN_TERMINAL)
            or argc < 1
            or has_user > 1
            or len(parts) != 2 + argc + 2 * envc
        ):
            raise ProtocolError("not an encoded request")
        if magic == _OPERATION and parts[2] not in OPERATIONS and not (trusted and parts[2] == MOUNT):
            raise ProtocolError(f"unknown operation {parts[2][:40]!r}")
        env = dict(zip(parts[2 + argc :: 2], parts[3 + argc :: 2], strict=True))
        if any(not name or "=" in name for name in env):
            raise ProtocolError("an environment variable without a proper name")
        user = parts[1] if has_user else None
        try:
            check_user(user)
        except ValueError as exc:
            raise ProtocolError(str(exc)) from None
        return cls(tuple(parts[2 : 2 + argc]), env, parts[0], user, magic == _OPERATION, terminal)


OPENED = b"\6"
"""What a command that is entering says beside its terminal's master."""


class Started(NamedTuple):
    """The command has been executed. The master of its terminal comes beside it, if it has one.

    Attributes:
        pid: Its process, as the host numbers it.
    """

    pid: int

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _NUMBER.pack(_STARTED, self.pid)


class Failed(NamedTuple):
    """The command has not been started, or (stage "kill") not been ended.

    Attributes:
        errno: What the kernel said; 0 if it was not the kernel.
        stage: One of `STAGES`.
        text: What was being done, for people.
    """

    errno: int
    stage: str
    text: str

    def encode(self) -> bytes:
        """Return the message's bytes."""
        text = self.text.encode("utf-8", "replace")[: MAX_EVENT - _FAILURE.size]
        return _FAILURE.pack(_FAILED, self.errno, STAGES.index(self.stage)) + text


class Exited(NamedTuple):
    """The command's main process has ended and been reaped.

    Attributes:
        status: Its exit code, or a signal's number negated, as `subprocess` has it.
    """

    status: int

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _NUMBER.pack(_EXITED, self.status)


class Signal(NamedTuple):
    """Send *signum* to the command's main process."""

    signum: int

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _NUMBER.pack(_SIGNAL, self.signum)


class KillTree(NamedTuple):
    """Kill the command and every process that came of it."""

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _NUMBER.pack(_KILL_TREE, 0)


def is_operation(request: bytes) -> bool:
    """Tell whether an encoded request asks for an operation."""
    return request.startswith(_OPERATION)


def wants_terminal(request: bytes) -> bool:
    """Tell whether an encoded request asks for a terminal."""
    return request.startswith(_IN_TERMINAL)


def decode_event(data: bytes) -> Started | Failed | Exited:
    """Read a message of a supervisor.

    Raises:
        ProtocolError: It is none.
    """
    kind = data[:1]
    if kind == bytes([_FAILED]) and len(data) >= _FAILURE.size:
        _, number, stage = _FAILURE.unpack_from(data)
        if stage < len(STAGES):
            return Failed(number, STAGES[stage], data[_FAILURE.size :].decode("utf-8", "replace"))
    elif len(data) == _NUMBER.size:
        code, number = _NUMBER.unpack(data)
        if code == _STARTED:
            return Started(number)
        if code == _EXITED:
            return Exited(number)
    raise ProtocolError(f"not an event: {data[:16]!r}")


def decode_order(data: bytes) -> Signal | KillTree:
    """Read a message of a client.

    Raises:
        ProtocolError: It is none.
    """
    if len(data) == _NUMBER.size:
        code, number = _NUMBER.unpack(data)
        if code == _SIGNAL and 0 <= number <= 64:
            return Signal(number)
        if code == _KILL_TREE:
            return KillTree()
    raise ProtocolError(f"not an order: {data[:16]!r}")


def _text(value: object, what: str) -> str:
    """Return *value* as str, undecodable bytes as surrogates."""
    if isinstance(value, (str, bytes, os.PathLike)):
        text: str | bytes = os.fspath(value)
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        if "\0" in text:
            raise ValueError(f"{what} holds a NUL byte: {text[:80]!r}")
        try:
            text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise ValueError(f"{what} can't be encoded as UTF-8: {text[:80]!r}") from None
        return text
    raise TypeError(f"{what} must be str, bytes or a path, not {type(value).__name__}: {value!r}")


def _checked_argv(args: object) -> tuple[str, ...]:
    if isinstance(args, (str, bytes, os.PathLike)):
        return (_text(args, "the program"),)
    if not isinstance(args, Iterable):
        raise TypeError(f"args must be a sequence of str, not {type(args).__name__}: {args!r}")
    argv = tuple(_text(arg, f"argument {index}") for index, arg in enumerate(args))
    if not argv:
        raise ValueError("args is empty: there is no command to run")
    return argv


def _checked_env(env: object) -> dict[str, str]:
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise TypeError(f"env must be a mapping, not {type(env).__name__}: {env!r}")
    checked = {}
    for key, value in env.items():
        name = _text(key, "an environment variable's name")
        if not name or "=" in name:
            raise ValueError(f"illegal environment variable name: {name!r}")
        checked[name] = _text(value, f"environment variable {name}")
    return checked


def _checked_terminal(terminal: Terminal | None) -> Terminal | None:
    if terminal is not None and not all(0 <= side <= _MAX_SIDE for side in terminal[:2]):
        raise ValueError(f"a terminal has from 0 to {_MAX_SIDE} rows and columns, not {terminal[0]} and {terminal[1]}")
    return terminal


def _decode_terminal(data: bytes) -> Terminal:
    if len(data) < _HEADER.size + _TERMINAL.size:
        raise ProtocolError("not an encoded request")
    rows, columns, streams = _TERMINAL.unpack_from(data, _HEADER.size)
    if streams > 0b111:
        raise ProtocolError("a terminal for streams that there are not")
    return Terminal(rows, columns, tuple(stream for stream in range(3) if streams >> stream & 1))


def check_user(user: object) -> str | None:
    """Return *user* as a request holds it: a name, a uid, or either with `:group`; None stays None.

    Raises:
        TypeError: It is neither text nor a number.
        ValueError: It is malformed.
    """
    if user is None:
        return None
    if isinstance(user, bool) or not isinstance(user, (str, int)):
        raise TypeError(f"user must be a name, a uid or 'user:group', not {user!r}")
    text = str(user)
    name, colon, group = text.partition(":")
    if not name or (colon and not group) or ":" in group or any(c in text for c in "\0\n,/"):
        raise ValueError(f"user must be a name, a uid or 'user:group', not {user!r}")
    for part in (name, group):
        if part.isascii() and part.lstrip("-").isdecimal() and not 0 <= int(part) <= _MAX_UID:
            raise ValueError(f"a uid and a gid are from 0 to {_MAX_UID}, not {part}")
    return text
