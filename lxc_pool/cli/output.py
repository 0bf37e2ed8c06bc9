"""What the commands print: tables and progress for people, one JSON document for programs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lxc_pool.progress import Milestone

if TYPE_CHECKING:
    from lxc_pool.host.setup import Step


def print_json(document: Any) -> None:
    """Print *document* as JSON."""
    print(json.dumps(document, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns that line up; None shows as a dash."""
    for line in table(header, rows):
        print(line)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of columns that line up; None shows as a dash."""
    cells = [list(header), *([("-" if value is None else str(value)) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def step_line(step: Step, *, would: bool) -> str:
    """Return a line about a step of a set-up; *would*: it was not really done."""
    sign = ("would " if would else "done  ") if step.changed else "ok    "
    return f"{sign} {step.name} {step.target}: {step.detail}"


_BAR = 24
"""Characters of a bar."""


class Progress:
    """One line on stderr that is written over on a terminal, and written once for each change elsewhere.

    On a terminal a `progress.Milestone` has a bar before it.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._last = ""

    def show(self, text: str) -> None:
        """Show *text* as the state that things are in."""
        line = text
        if self._terminal:
            # A line that goes on in the next one can't be written over.
            line = f"{_bar(text.done)} {text}" if isinstance(text, Milestone) else text
            line = line[: shutil.get_terminal_size().columns - 1]
        if self._quiet or line == self._last:
            return
        if self._terminal:
            print(f"\r{line:<{len(self._last)}}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
        self._last = line

    def end(self) -> None:
        """Leave the line."""
        if self._terminal and self._last and not self._quiet:
            print(file=sys.stderr)
        self._last = ""


def _bar(done: float) -> str:
    """Return a bar, of which as much is filled as is done."""
    return f"[{'#' * int(done * _BAR):<{_BAR}}] {done:4.0%}"
