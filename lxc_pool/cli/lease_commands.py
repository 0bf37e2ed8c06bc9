"""Commands about one container: run, get, exec, logs, release."""

from __future__ import annotations

import argparse
import math
import os
import sys

from lxc_pool.cli import terminal
from lxc_pool.cli.output import print_json
from lxc_pool.client.container import Container
from lxc_pool.client.pool import PoolServiceProxy
from lxc_pool.errors import LeaseExpired, LxcPoolError
from lxc_pool.manager import PoolManager
from lxc_pool.model import ContainerId, ContainerInfo

_NOT_EXECUTABLE, _MISSING = 126, 127


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    run = commands.add_parser("run", parents=[common], help="run a command in a fresh container")
    get = commands.add_parser("get", parents=[common], help="lease a container to a process; print its name")
    for parser in (run, get):
        parser.add_argument("--id", metavar="ID", help="what to call the lease (default: made of time and pid)")
        parser.add_argument(
            "--timeout", type=float, default=30.0, metavar="S", help="seconds to wait for a container (default: 30)"
        )
        parser.add_argument("--profile", default="default", metavar="P", help="which kind of container")
    get.add_argument("--ttl", type=float, metavar="S", help="seconds after which the lease ends by itself")
    get.add_argument(
        "--owner", type=int, metavar="PID", help="the process that holds the lease (default: this session's leader)"
    )
    get.set_defaults(function=_get)
    _add_command(run)
    run.set_defaults(function=_run)
    parser = commands.add_parser("exec", parents=[common], help="run a command in a container that `get` leased")
    parser.add_argument("name", metavar="NAME")
    _add_command(parser)
    parser.set_defaults(function=_exec)
    parser = commands.add_parser("logs", parents=[common], help="show what a leased container wrote to its console")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("-n", "--tail", type=_lines, metavar="N", help="the last N lines (default: all that is kept)")
    parser.set_defaults(function=_logs)
    parser = commands.add_parser("release", parents=[common], help="end the lease of a container")
    parser.add_argument("name", metavar="NAME")
    parser.set_defaults(function=_release)


def _add_command(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "-t",
        "--tty",
        action="store_true",
        default=None,
        help="give the command a terminal of its own for all three streams (default: if stdin and stdout are one)",
    )
    choice.add_argument(
        "-T",
        "--no-tty",
        dest="tty",
        action="store_false",
        help="give it none: pass bytes on as they are",
    )
    parser.add_argument("argv", nargs="+", metavar="CMD", help="the command, best after `--`")


def _run(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir) as pool:
        identity = ContainerId.create("run") if arguments.id is None else arguments.id
        with pool.lease(identity, _timeout(arguments), profile=arguments.profile) as container:
            return _run_in(container, arguments)


def _exec(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir) as pool:
        return _run_in(pool.container(arguments.name), arguments)


def _get(arguments: argparse.Namespace) -> int:
    owner = _session_leader() if arguments.owner is None else arguments.owner
    with PoolManager.connect(arguments.host_dir) as pool:
        identity = ContainerId.create("get") if arguments.id is None else arguments.id
        container = pool.get(identity, _timeout(arguments), profile=arguments.profile, owner=owner, ttl=arguments.ttl)
        if container is None:
            if arguments.json:
                print_json(None)
            print(f"lxc-pool: no container came free in {arguments.timeout:g} s", file=sys.stderr)
            return 1
        try:
            if arguments.json:
                print_json(_info(pool, container).as_dict())
            else:
                print(container.name)
            sys.stdout.flush()
        except BaseException:  # Ctrl-C, or a reader that has gone: nobody has its name, and its owner may live long
            container.release()
            raise
        print(f"leased to process {owner}; it is reaped when that ends", file=sys.stderr)
    return 0


def _info(pool: PoolServiceProxy, container: Container) -> ContainerInfo:
    """Return what `ls` shows of a container.

    Raises:
        LeaseExpired: Its lease has ended.
    """
    for info in pool.containers():
        if info.name == container.name:
            return info
    raise LeaseExpired(f"the lease of {container.name} has ended already")


def _session_leader() -> int:
    """Return the pid of the process that leads this session, if a lease can be its.

    Raises:
        ValueError: It can't.
    """
    leader = os.getsid(0)
    if leader == os.getpid():
        reason = "this process leads its session, so that its lease would end with it, now"
    elif not leader or not os.path.exists(f"/proc/{leader}"):  # 0: it is in another pid namespace
        reason = "the process that led this session has ended"
    else:
        return leader
    raise ValueError(f"{reason}: name the process that is to hold the lease with --owner PID")


def _logs(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir) as pool:
        text = pool.container(arguments.name).console_log(arguments.tail)
    if arguments.json:
        print_json({"name": arguments.name, "console": text})
    else:
        # A locale that lacks a character must not keep the rest from being seen.
        print(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding), end="")
    return 0


def _lines(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"N must be a number of lines, 0 or more, not {text!r}")
    return int(text)


def _release(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir) as pool:
        pool.container(arguments.name).release()
    if arguments.json:
        print_json({"name": arguments.name, "released": True})
    return 0


def _run_in(container: Container, arguments: argparse.Namespace) -> int:
    """Run a command with this process's stdin, stdout and stderr; return what a shell would."""
    try:
        if terminal.is_wanted(arguments.tty):
            status = terminal.run(container, arguments.argv, everything=bool(arguments.tty))
        else:
            status = container.run(arguments.argv).returncode
    except LxcPoolError:  # first: AccessDenied is a PermissionError, too
        raise
    except FileNotFoundError as error:
        print(f"lxc-pool: {error}", file=sys.stderr)
        return _MISSING
    except (PermissionError, NotADirectoryError) as error:
        print(f"lxc-pool: {error}", file=sys.stderr)
        return _NOT_EXECUTABLE
    return status if status >= 0 else 128 - status


def _timeout(arguments: argparse.Namespace) -> float | None:
    return None if math.isinf(arguments.timeout) else float(arguments.timeout)
