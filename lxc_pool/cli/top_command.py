"""The command top: the pool's counts and containers, live.

At a terminal it has the screen to itself, writes each picture over the last one, in one piece, and gives the screen
back as it was. Elsewhere it prints a picture after the other, without escape sequences; with --json a document a line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Sequence

from lxc_pool.cli import views
from lxc_pool.cli.borrowed import borrowed, drain
from lxc_pool.client.pool import PoolServiceProxy
from lxc_pool.manager import PoolManager
from lxc_pool.model import ContainerInfo, PoolStatus, State

_STDIN = 0

_SHORTEST = 0.1
"""Seconds between two pictures at least: each is two calls."""

# Source: xterm's "Control Sequences"; what terminals of today and the Linux console understand.
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"  # another screen, no cursor, no wrapping of long lines
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"

_FIRST = (State.STUCK, State.LEASED, State.RESERVED, State.BUILDING, State.REAPING, State.WARM)
"""Which containers come first, where there is not room for all."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("top", parents=[common], help="show counts and containers, live; q ends it")
    parser.add_argument(
        "-n", "--interval", type=_interval, default=2.0, metavar="S", help="seconds between two pictures (default: 2)"
    )
    parser.set_defaults(function=_top)


def _top(arguments: argparse.Namespace) -> int:
    with PoolManager.connect(arguments.host_dir) as pool:
        if arguments.json or not (os.isatty(_STDIN) and sys.stdout.isatty()):
            _print_for_ever(pool, arguments)
        else:
            _Screen(pool, arguments.interval).run()
    return 0


def _print_for_ever(pool: PoolServiceProxy, arguments: argparse.Namespace) -> None:
    while True:
        status, infos = pool.status(), pool.containers()
        if arguments.json:
            print(json.dumps({"status": status.as_dict(), "containers": [info.as_dict() for info in infos]}))
        else:
            print("\n".join((*_picture(status, infos), "")))
        sys.stdout.flush()
        time.sleep(arguments.interval)  # the period that was asked for


class _Screen:
    """The whole terminal."""

    def __init__(self, pool: PoolServiceProxy, interval: float) -> None:
        self._pool = pool
        self._interval = interval
        self._modes = termios.tcgetattr(_STDIN)
        self._stale = False  # the size has changed, or the picture has gone; set by signals' handlers
        self._lines: list[str] = []

    def run(self) -> None:
        """Show pictures until somebody types q, or an end of file."""
        with borrowed(self._enter, self._leave, {signal.SIGWINCH: self._look_again}) as woken:
            while True:
                self._lines = _picture(self._pool.status(), self._pool.containers())
                if self._shows_until_quit(woken):
                    return

    def _shows_until_quit(self, woken: int) -> bool:
        """Show the picture for its time; return whether that was the last one."""
        until = time.monotonic() + self._interval
        self._draw()
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select([_STDIN, woken], [], [], left)
            if woken in ready:
                drain(woken)
            if self._stale:
                self._draw()
            if _STDIN in ready and (os.read(_STDIN, 1) or b"q") in b"qQ":
                return True
        return False

    def _draw(self) -> None:
        self._stale = False
        rows, columns = termios.tcgetwinsize(_STDIN)
        rows = rows or len(self._lines)
        lines = self._lines if len(self._lines) <= rows else [*self._lines[: rows - 1], "…"]
        # an error's words may have a line's end in them, or what a terminal obeys
        plain = ("".join(c if c.isprintable() else " " for c in line) for line in lines)
        shown = "\n".join(line[: columns or None] + _CLEAR_LINE for line in plain)
        sys.stdout.write(f"{_HOME}{shown}{_CLEAR_BELOW}")
        sys.stdout.flush()

    def _look_again(self) -> None:
        self._stale = True

    def _enter(self) -> None:
        with contextlib.suppress(termios.error):
            tty.setcbreak(_STDIN, termios.TCSADRAIN)
        self._say(_ENTER)
        self._look_again()

    def _leave(self) -> None:
        self._say(_LEAVE)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(_STDIN, termios.TCSANOW, self._modes)

    def _say(self, text: str) -> None:
        # Not by sys.stdout: in a signal's handler that may be in the middle of a picture, which it does not allow.
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(sys.stdout.fileno(), text.encode())


def _picture(status: PoolStatus, infos: Sequence[ContainerInfo]) -> list[str]:
    ordered = sorted(infos, key=lambda info: (_FIRST.index(info.state), info.name))
    return [*views.status(status), "", *views.containers(ordered)]


def _interval(text: str) -> float:
    value = float(text)
    if not _SHORTEST <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be {_SHORTEST} or more seconds, not {text}")
    return value
