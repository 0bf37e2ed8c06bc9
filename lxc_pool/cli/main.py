"""Parse the command line, run the command, turn every error into a message on stderr and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lxc_pool import errors, hostdir
from lxc_pool.cli import host_commands, image_commands, lease_commands, pool_commands, residue_commands, top_command

DONE, NO, WRONG_USE, UNREACHABLE, NOT_ALLOWED, FAILED = range(6)
"""Exit statuses. Origin: the public contract."""

COMMAND_FAILED_TO_RUN, INTERRUPTED = 125, 130

_OF_THE_SERVICE = ("psutil", "lxc")
"""What a client's installation does without."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lxc-pool` with *argv* (default: the process's arguments) and return its exit status."""
    _fill_closed_streams()
    parser = _parser()
    arguments = parser.parse_args(argv)
    runs_a_command = arguments.command in ("run", "exec")
    if runs_a_command and arguments.json:
        parser.error(
            f"`{arguments.command}` prints what its command does, and no JSON document: "
            "leave --json out, or put `--` before the command if it is the command's"
        )
    try:
        status: int = arguments.function(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name not in _OF_THE_SERVICE:
            raise
        print(
            f"lxc-pool: `{arguments.command}` is for the service's host and needs {error.name}, not installed here: "
            "`pip install lxc-pool[server]`",
            file=sys.stderr,
        )
        return WRONG_USE
    except BrokenPipeError:
        _drop_output()  # whoever read it has gone
        return FAILED
    except (errors.LxcPoolError, OSError, ValueError, TypeError) as error:
        advice = "; root may do it" if os.geteuid() != 0 and _is_refused_by_the_host(error) else ""
        print(f"lxc-pool: {error}{advice}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return COMMAND_FAILED_TO_RUN if runs_a_command else status_of(error)
    return status


def _drop_output() -> None:
    """Let what stdout did not take go nowhere: the interpreter would complain of it once more at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fill_closed_streams() -> None:
    """Put /dev/null where a standard stream is closed: what is opened next, a socket say, would become that stream.

    As before, what is written to a closed stdout is an error; there is nowhere to say so if stderr is closed.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_RDWR)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest number that is free: this one
            os.set_inheritable(number, True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # for the process's life
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # as above


def status_of(error: Exception) -> int:
    """Return the exit status for *error*."""
    match error:
        case errors.ConfigError():
            return WRONG_USE
        case errors.ServiceUnavailable():
            return UNREACHABLE
        case errors.AccessDenied() | errors.AuthenticationFailed() | errors.QuotaExceeded():
            return NOT_ALLOWED
        case errors.PoolTimeout():
            return NO
        case _ if _is_refused_by_the_host(error):
            return NOT_ALLOWED
        case errors.LxcPoolError() | OSError():
            return FAILED
        case _:
            return WRONG_USE


def _is_refused_by_the_host(error: Exception) -> bool:
    """Tell whether a command failed because our user may not touch something on this host: images, most likely."""
    reason = error.__cause__ if isinstance(error, errors.LxcPoolError) else error
    return isinstance(reason, PermissionError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lxc-pool",
        description="Lease LXC containers that are started already, and look after the service that keeps them.",
        epilog="Exit status: 0 done; 1 the answer is no; 2 wrong use or configuration; 3 no service; 4 not allowed; "
        "5 any other failure; 130 interrupted. `run` and `exec` end as their command does.",
    )
    _add_common(parser, default=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    _add_common(common, default=argparse.SUPPRESS)
    for module in (host_commands, image_commands, pool_commands, top_command, lease_commands, residue_commands):
        module.add_to(commands, common)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, default: object) -> None:
    """Add the options that may stand before or after the command."""
    parser.add_argument(
        "--host-dir",
        type=Path,
        default=hostdir.default_host_dir() if default is None else default,
        metavar="DIR",
        help="where the service's socket is (default: $LXC_POOL_HOST_DIR, else /run/lxc-pool)",
    )
    parser.add_argument(
        "--json", action="store_true", default=False if default is None else default, help="print one JSON document"
    )
