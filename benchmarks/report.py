"""What was measured, as a table to read, as JSON to keep, and as the generated part of docs/performance.md."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stats import Ratio, Summary

FORMAT = 1
"""Of the JSON document; another number when a reader of this one could misread it."""


class Sense(enum.StrEnum):
    """Which side of its limit a measured value should be on."""

    AT_LEAST = "at least"
    AT_MOST = "at most"
    UNDER = "under"


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """One target and what came of it.

    Attributes:
        what: What is measured, in words.
        interval: Between what the value would be, 19 times in 20, if it were measured again; None where unknown.
    """

    what: str
    sense: Sense
    limit: float
    unit: str
    measured: float
    interval: tuple[float, float] | None = None

    @classmethod
    def of_ratio(cls, what: str, sense: Sense, limit: float, ratio: Ratio) -> Claim:
        """Make a claim about a ratio of medians."""
        return cls(what, sense, limit, "×", ratio.value, (ratio.low, ratio.high))

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        match self.sense:
            case Sense.AT_LEAST:
                return self.measured >= self.limit
            case Sense.AT_MOST:
                return self.measured <= self.limit
            case Sense.UNDER:
                return self.measured < self.limit

    @property
    def target(self) -> str:
        """The target in words."""
        return f"{self.sense} {self.limit:g} {self.unit}"

    @property
    def result(self) -> str:
        """What was measured, in words."""
        words = f"{in_words(self.measured)} {self.unit}"
        if self.interval is not None:
            words += f" ({in_words(self.interval[0])}–{in_words(self.interval[1])})"
        return words

    def as_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return {**dataclasses.asdict(self), "sense": str(self.sense), "met": self.met}


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """A measurement without a target: a series, or one number."""

    what: str
    unit: str
    value: Summary | float

    @classmethod
    def of_seconds(cls, what: str, seconds: Sequence[float]) -> Figure:
        """Summarize durations, in milliseconds."""
        return cls(what, "ms", Summary.of([value * 1e3 for value in seconds]))

    def cells(self) -> tuple[str, str, str, str]:
        """Return the median or only value, the 99th percentile, the count, and the unit."""
        if isinstance(self.value, Summary):
            return in_words(self.value.median), in_words(self.value.p99), str(self.value.count), self.unit
        return in_words(self.value), "", "", self.unit

    def as_dict(self) -> dict[str, Any]:
        """Return plain types."""
        value = dataclasses.asdict(self.value) if isinstance(self.value, Summary) else self.value
        return {"what": self.what, "unit": self.unit, "value": value}


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What one benchmark found.

    Attributes:
        not_measured: Why it found nothing; empty if it did.
    """

    claims: tuple[Claim, ...]
    figures: tuple[Figure, ...]
    not_measured: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            "claims": [claim.as_dict() for claim in self.claims],
            "figures": [figure.as_dict() for figure in self.figures],
            **({"not_measured": self.not_measured} if self.not_measured else {}),
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What one run of the benchmarks found.

    Attributes:
        began: When, in ISO 8601, universal time.
        seconds: How long it took.
        plan: The counts and durations.
    """

    began: str
    seconds: float
    machine: Mapping[str, str | int | float]
    plan: Mapping[str, Any]
    outcomes: Mapping[str, Outcome]

    @property
    def met(self) -> bool:
        """Whether every target is met."""
        return all(claim.met for outcome in self.outcomes.values() for claim in outcome.claims)

    def as_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            "format": FORMAT,
            "began": self.began,
            "seconds": self.seconds,
            "machine": dict(self.machine),
            "plan": dict(self.plan),
            "met": self.met,
            "benchmarks": {name: outcome.as_dict() for name, outcome in self.outcomes.items()},
        }

    def text(self) -> str:
        """Return the tables for a terminal."""
        title = "  ".join(f"{key}: {value}" for key, value in self.machine.items())
        parts = [title, "", *_aligned(self._claims()), "", *_aligned(self._figures())]
        if self.plan["quick"]:
            parts += ["", "A quick run: it shows that all of this can be measured; its numbers mean nothing."]
        return "\n".join(parts)

    def markdown(self) -> str:
        """Return the tables for the documentation."""
        machine = [("machine", ""), *((key.replace("_", " "), str(value)) for key, value in self.machine.items())]
        when = f"Measured on {self.began[:10]} in one run of {self.seconds / 60:.0f} minutes."
        return "\n\n".join(
            [
                when,
                *("\n".join(_piped(rows)) for rows in (machine, self._claims(), self._figures())),
            ]
        )

    def _claims(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("benchmark", "what", "target", "measured", "met")]
        for name, outcome in self.outcomes.items():
            rows += [
                (name, claim.what, claim.target, claim.result, "yes" if claim.met else "NO") for claim in outcome.claims
            ]
            if outcome.not_measured:
                rows.append((name, f"not measured: {outcome.not_measured}", "", "", ""))
        return rows

    def _figures(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("benchmark", "what", "median", "p99", "count", "unit")]
        for name, outcome in self.outcomes.items():
            rows += [(name, figure.what, *figure.cells()) for figure in outcome.figures]
        return rows


def marks(name: str = "benchmarks") -> tuple[str, str]:
    """Return the lines between which the program *name* writes its tables."""
    return f"<!-- {name}: begin, written by `python -m {name} --write-docs` -->", f"<!-- {name}: end -->"


def write_docs(path: Path, text: str, name: str = "benchmarks") -> None:
    """Put *text* between the two marks of the program *name* in the file *path*.

    Raises:
        ValueError: It does not have the marks, once each and in order.
    """
    first, last = marks(name)
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"{first}\n")
    _old, end, after = rest.partition(last)
    if not begin or not end or first in after or last in before:
        raise ValueError(f"{path} needs the lines `{first}` and `{last}`, once each")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")
    partial.rename(path)


def in_words(value: float) -> str:
    """Write a number with three significant digits, or all of its whole ones."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    text = f"{value:#.3g}"
    return f"{value:.6f}" if "e" in text else text


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _piped(rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]
