"""What work that takes a while says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self


class Milestone(str):
    """A line for the user that says, too, how much is done. Whoever knows nothing of that has a str.

    Attributes:
        done: How much of all the work, from 0 to 1.
    """

    __slots__ = ("done",)

    done: float

    def __new__(cls, line: str, done: float) -> Self:
        """Make one; *done* is cut to 0 to 1."""
        milestone = super().__new__(cls, line)
        milestone.done = min(1.0, max(0.0, done))
        return milestone


class Milestones:
    """Decides which milestones are worth a line: one when as much more is done as *every* says."""

    def __init__(self, every: float = 0.05) -> None:
        """Begin with nothing done."""
        self._every = every
        self._next = every

    def is_due(self, done: float) -> bool:
        """Return whether to tell, and take it as told."""
        if done < self._next:
            return False
        self._next = done + self._every
        return True


def part(report: Callable[[str], None], begin: float, end: float) -> Callable[[str], None]:
    """Return a report for one part of the work, which takes it from *begin* to *end*, both from 0 to 1.

    Its milestones say how much of the part is done. What is no milestone becomes one: nothing more is done, then.
    """
    done = begin

    def scaled(line: str) -> None:
        nonlocal done
        if isinstance(line, Milestone):
            done = max(done, begin + (end - begin) * line.done)
        report(Milestone(line, done))

    return scaled
