"""What one user may take of the service itself."""

from __future__ import annotations

import threading

import pytest

from lxc_pool.service import fairness
from lxc_pool.service.fairness import Pace, Quietly, Turns


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_seconds_calls_come_at_once_and_then_one_after_another() -> None:
    clock = Clock()
    pace = Pace(100, clock)
    assert max(pace.delay(1) for _ in range(100)) < 1e-9
    assert [round(pace.delay(1), 6) for _ in range(3)] == [0.01, 0.02, 0.03]
    assert pace.delay(2) == 0.0  # another user
    clock.now += 0.5
    assert pace.delay(1) == 0.0
    clock.now += 100
    assert pace.delay(1, 100) < 1e-9  # what was not used is not saved up
    assert pace.delay(1, 100) == pytest.approx(1.0)


def test_users_who_have_been_quiet_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "_USERS", 10)
    clock = Clock()
    pace, quietly = Pace(10, clock), Quietly(1, clock)
    for uid in range(11):
        pace.delay(uid)
        quietly.may_speak(uid)
    clock.now += 60
    pace.delay(99)
    quietly.may_speak(99)
    assert len(pace._used_until) == len(quietly._windows) == 1


def test_a_turn_is_waited_for_within_ones_own_only() -> None:
    turns = Turns(1)
    with turns.taken(1, 0), turns.taken(2, 0):
        with pytest.raises(TimeoutError, match="uid 1 has 1 large"), turns.taken(1, 0.01):
            pass
        got = threading.Event()

        def wait() -> None:
            with turns.taken(1, 10):
                got.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not got.wait(0.01)
    thread.join(10)
    assert got.is_set()
    assert turns._taken == {}


def test_lines_beyond_some_are_left_out_and_counted() -> None:
    clock = Clock()
    quietly = Quietly(2, clock)
    assert [quietly.may_speak(1) for _ in range(5)] == [(True, 0), (True, 0), (False, 0), (False, 0), (False, 0)]
    assert quietly.may_speak(2) == (True, 0)
    clock.now += 10
    assert quietly.may_speak(1) == (True, 3)
    assert quietly.may_speak(1) == (True, 0)
