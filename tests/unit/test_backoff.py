"""Pauses after failures: they grow to seconds, differ between pools, and are over at the first success."""

from __future__ import annotations

import random

import pytest

from lxc_pool.service.backoff import Backoff


def backoff_of(seed: int) -> Backoff:
    return Backoff(random.Random(seed))  # noqa: S311  # for jitter


def pauses(seed: int, count: int) -> list[float]:
    """Return the pauses after *count* failures in a row, each as soon as it may be tried again."""
    backoff, now, found = backoff_of(seed), 0.0, []
    for _ in range(count):
        until = backoff.fail(now)
        found.append(until - now)
        now = until
    return found


def test_is_clear_at_first() -> None:
    backoff = backoff_of(1)
    assert backoff.clear
    assert backoff.remaining(0.0) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_pauses_double_within_their_jitter_and_never_exceed_three_seconds(seed: int) -> None:
    for number, pause in enumerate(pauses(seed, 40)):
        whole = min(3.0, 0.1 * 2**number)
        assert whole / 2 <= pause <= whole + 1e-9


def test_two_pools_do_not_try_at_the_same_moments() -> None:
    assert pauses(1, 5) != pauses(2, 5)


def test_failures_that_were_under_way_together_count_as_one() -> None:
    backoff = backoff_of(1)
    until = backoff.fail(0.0)
    assert backoff.fail(0.01) == until
    assert backoff.fail(0.02) == until
    assert backoff.fail(until) - until <= 0.2


def test_says_how_long_it_still_takes() -> None:
    backoff = backoff_of(1)
    until = backoff.fail(10.0)
    assert backoff.remaining(10.0) == until - 10.0
    assert backoff.remaining(until + 5) == 0.0
    assert not backoff.clear


def test_a_success_after_any_number_of_failures_is_full_speed() -> None:
    backoff, now = backoff_of(1), 0.0
    for _ in range(1000):
        now = backoff.fail(now)
    backoff.succeed()
    assert backoff.clear
    assert backoff.remaining(now) == 0.0
    assert backoff.fail(now) - now <= 0.1
