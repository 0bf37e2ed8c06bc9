"""Medians, percentiles, and ratios of medians with their uncertainty."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Sequence

_RESAMPLES = 1000
_INTERVAL = 0.95


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What there is to know of a series of measurements, in their unit."""

    count: int
    least: float
    median: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarize at least one value."""
        return cls(len(values), min(values), statistics.median(values), percentile(values, 99), max(values))


@dataclasses.dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio, and between what it would be, 19 times in 20, were the same measured again under the same conditions."""

    value: float
    low: float
    high: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest of *values* that *percent* of them do not exceed (the nearest rank: no value is made up)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Return the ratio of two series' medians; its interval by the bootstrap, always of the same random numbers."""
    rng = random.Random(0)  # noqa: S311  # statistics, not secrets

    def resampled(values: Sequence[float]) -> float:
        return statistics.median(rng.choices(values, k=len(values)))

    ratios = [resampled(above) / resampled(below) for _ in range(_RESAMPLES)]
    tail = (1 - _INTERVAL) / 2 * 100
    return Ratio(
        statistics.median(above) / statistics.median(below), percentile(ratios, tail), percentile(ratios, 100 - tail)
    )
