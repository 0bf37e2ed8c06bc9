"""Commands about this host: setup, check, serve.

What needs the `server` extra is imported where it is used: the program is the clients' too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import logging.handlers
import os
import queue
import sys
from pathlib import Path

from lxc_pool import config
from lxc_pool.cli.options import add_state_dir
from lxc_pool.cli.output import print_json, step_line
from lxc_pool.errors import AccessDenied, ConfigError


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    parser = commands.add_parser("setup", parents=[common], help="make ready what the service wants of the host")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help="set up the system whose root directory this is, which is not running: an image's, say",
    )
    add_state_dir(parser)
    parser.set_defaults(function=_setup)
    parser = commands.add_parser("check", parents=[common], help="name each thing that this host lacks, with the fix")
    _add_config(parser)
    add_state_dir(parser)
    parser.set_defaults(function=_check)
    parser = commands.add_parser("serve", parents=[common], help="run the service in the foreground")
    _add_config(parser)
    parser.add_argument(
        "--size", type=int, metavar="N", help="warm containers to keep (default: the configuration's, or 5)"
    )
    parser.add_argument("--log-json", action="store_true", help="write each line of the log as a JSON object")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    add_state_dir(parser)
    parser.set_defaults(function=_serve)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="F", help=f"the configuration (default: {config.DEFAULT_CONFIG})"
    )


def _setup(arguments: argparse.Namespace) -> int:
    from lxc_pool.host import setup

    if os.geteuid() != 0 and not arguments.dry_run:
        raise AccessDenied("setup needs root: it makes a group and writes to /etc; --dry-run says what it would do")
    site = setup.Site(
        root=arguments.root.absolute(),
        host_dir=arguments.host_dir.absolute(),
        state_dir=arguments.state_dir.absolute(),
        execute=not arguments.dry_run,
    )
    if not site.root.is_dir():
        raise ConfigError(f"--root {site.root} is not a directory")
    steps = []
    for step in setup.set_up(site):
        steps.append(step)
        if not arguments.json:  # at once: a later one may fail
            print(step_line(step, would=arguments.dry_run), flush=True)
    if arguments.json:
        changed = any(step.changed for step in steps)
        print_json({"changed": changed, "dry_run": arguments.dry_run, "steps": [dataclasses.asdict(s) for s in steps]})
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from lxc_pool.host import requirements
    from lxc_pool.service.directories import read_instance

    configuration = config.load(arguments.config)
    network = configuration.network if configuration.wants_bridge else None
    found = requirements.check(arguments.state_dir, network, read_instance(arguments.state_dir) or "000000")
    if arguments.json:
        print_json([{"name": r.name, "ok": r.ok, "advice": r.advice, "detail": r.detail, "fix": r.fix} for r in found])
    else:
        for requirement in found:
            sign = "ok    " if requirement.ok else "advice" if requirement.advice else "LACKS "
            print(f"{sign}  {requirement.name}: {requirement.detail}")
            if not requirement.ok and requirement.fix:
                print(f"        fix: {requirement.fix}")
    return 0 if all(requirement.ok or requirement.advice for requirement in found) else 1


def _serve(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("lxc") is None:
        raise ConfigError(
            "the service needs the Python binding of liblxc: install liblxc's headers and a compiler "
            "(Debian: `apt-get install lxc lxc-dev gcc pkg-config python3-dev`), then `pip install lxc-pool[server]`"
        )
    from lxc_pool.backend.lxc.engine import LxcBackend
    from lxc_pool.host import systemd
    from lxc_pool.service import daemon

    notify_socket = systemd.take_notify_socket()

    def load() -> config.Config:
        return config.load(arguments.config, size=arguments.size)

    configuration = load()
    state_dir = arguments.state_dir.absolute()
    backend = LxcBackend(state_dir, configuration.id_base)

    def ready(socket_path: str) -> None:
        # A line in either case: whoever waits for it reads one.
        document = {"running": True, "socket_path": socket_path, "pid": os.getpid()}
        print(json.dumps(document) if arguments.json else f"ready {socket_path}", flush=True)
        systemd.notify_ready(notify_socket)

    listener = _log_to_stderr(logging.DEBUG if arguments.verbose else logging.INFO, as_json=arguments.log_json)
    try:
        daemon.serve(
            configuration,
            backend,
            host_dir=arguments.host_dir.absolute(),
            state_dir=state_dir,
            ready=ready,
            load=load,
        )
    finally:
        listener.stop()
    return 0


def _log_to_stderr(level: int, *, as_json: bool) -> logging.handlers.QueueListener:
    """Write the log from a thread of its own: whoever logs may hold a lock, and must not wait for a slow reader."""
    from lxc_pool.service.trail import JsonFormatter
    from lxc_pool.service.worker import LOG_FORMAT

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(LOG_FORMAT))
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(records, handler)
    listener.start()
    # Not by basicConfig: it gives the handler a format, and the line would be formatted twice.
    root = logging.getLogger()
    root.setLevel(level)
    root.addHandler(logging.handlers.QueueHandler(records))
    return listener
