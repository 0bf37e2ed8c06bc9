"""Commands about the pool as a whole: status, ls, wait, resize, drain, resume, stop."""

from __future__ import annotations

import argparse

from lxc_pool.cli import views
from lxc_pool.cli.output import Progress, print_json
from lxc_pool.errors import PoolTimeout
from lxc_pool.manager import PoolManager
from lxc_pool.model import PoolStatus
from lxc_pool.progress import Milestone


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    parser = commands.add_parser("status", parents=[common], help="show the counts of the pool")
    parser.set_defaults(function=_status)
    parser = commands.add_parser("ls", parents=[common], help="list every container with state, id, owner and age")
    parser.set_defaults(function=_ls)
    parser = commands.add_parser("wait", parents=[common], help="wait until containers are warm")
    parser.add_argument("-n", type=int, metavar="N", help="how many (default: all that the pool keeps)")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="seconds to wait (default: 30)")
    parser.set_defaults(function=_wait)
    parser = commands.add_parser("resize", parents=[common], help="change how many warm containers the pool keeps")
    parser.add_argument("n", type=int, metavar="N")
    parser.set_defaults(function=_resize)
    parser = commands.add_parser("drain", parents=[common], help="discard warm containers and hand out nothing")
    parser.set_defaults(function=_drain)
    parser = commands.add_parser("resume", parents=[common], help="hand out containers again")
    parser.set_defaults(function=_resume)
    parser = commands.add_parser("stop", parents=[common], help="end the service; return once it has really stopped")
    parser.add_argument(
        "--grace", type=float, default=10.0, metavar="S", help="seconds that leases have to end (default: 10)"
    )
    parser.add_argument("--keep-leases", action="store_true", help="leave leases to the next service")
    parser.set_defaults(function=_stop)


def _status(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir) as pool:
        status = pool.status()
    if arguments.json:
        print_json(status.as_dict())
        return 0
    for line in views.status(status):
        print(line)
    return 0


def _ls(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir) as pool:
        infos = pool.containers()
    if arguments.json:
        print_json([info.as_dict() for info in infos])
        return 0
    for line in views.containers(infos):
        print(line)
    return 0


def _wait(arguments: argparse.Namespace) -> int:
    progress = Progress(quiet=arguments.json)

    def show(status: PoolStatus) -> None:
        wanted = status.capacity if arguments.n is None else arguments.n
        size = min(status.size, wanted)
        progress.show(Milestone(f"{size} of {wanted} containers are warm", size / wanted if wanted else 1.0))

    with PoolManager.connect(arguments.host_dir) as pool:
        try:
            pool.wait_ready(arguments.n, arguments.timeout, progress=show)
        except PoolTimeout:
            if arguments.json:
                print_json(pool.status().as_dict())
            raise
        finally:
            progress.end()
        if arguments.json:
            print_json(pool.status().as_dict())
    return 0


def _resize(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir) as pool:
        pool.resize(arguments.n)
    return _say(arguments, f"the pool keeps {arguments.n} containers warm now", {"capacity": arguments.n})


def _drain(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir) as pool:
        pool.drain()
    return _say(arguments, "drained; `lxc-pool resume` hands out containers again", {"draining": True})


def _resume(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir) as pool:
        pool.resume()
    return _say(arguments, "resumed", {"draining": False})


def _stop(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir, timeout=2.0) as pool:
        pool.shutdown(arguments.grace, keep_leases=arguments.keep_leases)
    return _say(arguments, "stopped", {"running": False})


def _say(arguments: argparse.Namespace, text: str, document: dict[str, object]) -> int:
    if arguments.json:
        print_json(document)
    else:
        print(text)
    return 0
