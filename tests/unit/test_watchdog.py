"""The watchdog on real processes, real pidfds and the real clock; every wait is for an event."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import resource
import threading
import time
from collections.abc import Iterator
from unittest import mock

import pytest

from lxc_pool.host.processes import ProcessIdentity, identify
from lxc_pool.service import watchdog as module
from lxc_pool.service.watchdog import Timer, Watchdog
from tests.support.processes import open_descriptors, sleeper

SOON = 10.0
"""Seconds in which what should happen must have happened; it takes milliseconds."""


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    before, threads = open_descriptors(), threading.active_count()
    watchdog = Watchdog()
    watchdog.open()
    try:
        yield watchdog
    finally:
        watchdog.close()
    assert open_descriptors() == before
    assert threading.active_count() == threads


def settle(watchdog: Watchdog) -> None:
    """Wait until the watchdog has dealt with all that it had been told before."""
    done = threading.Event()
    watchdog.call_at(0.0, done.set)
    assert done.wait(SOON)


def test_tells_once_when_a_process_ends(watchdog: Watchdog) -> None:
    told = threading.Semaphore(0)
    with sleeper() as process:
        watched = watchdog.watch(identify(process.pid), told.release)
        assert not told.acquire(blocking=False)
        process.kill()
        assert told.acquire(timeout=SOON)
    settle(watchdog)
    assert not told.acquire(blocking=False)
    watchdog.forget(watched)
    watchdog.forget(watched)


def test_what_can_not_be_watched_is_let_go_of(watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    with sleeper() as process, monkeypatch.context() as patch:
        patch.setattr(watchdog, "_epoll", mock.Mock(register=mock.Mock(side_effect=OSError(errno.ENOSPC, "full"))))
        with pytest.raises(OSError, match="full"):
            watchdog.watch(identify(process.pid), lambda: None)
    assert open_descriptors() == before


def test_a_process_that_has_ended_can_not_be_watched(watchdog: Watchdog) -> None:
    with sleeper() as process:
        identity = identify(process.pid)
    with pytest.raises(ProcessLookupError):
        watchdog.watch(identity, lambda: None)


def test_a_pid_that_is_another_processs_now_can_not_be_watched(watchdog: Watchdog) -> None:
    me = identify(os.getpid())
    with pytest.raises(ProcessLookupError, match="another's now"):
        watchdog.watch(ProcessIdentity(me.boot_id, me.pid, me.start_ticks + 1), lambda: None)


def test_nothing_is_told_of_a_process_that_was_forgotten(watchdog: Watchdog) -> None:
    told: list[str] = []
    with sleeper() as process:
        watched = watchdog.watch(identify(process.pid), lambda: told.append("forgotten"))
        watchdog.forget(watched)
        process.kill()
        process.wait()
    settle(watchdog)
    assert told == []


def test_a_descriptors_number_that_is_used_again_tells_of_its_new_process_only(watchdog: Watchdog) -> None:
    told: list[str] = []
    with sleeper() as old, sleeper() as new:
        first = watchdog.watch(identify(old.pid), lambda: told.append("old"))
        # A copy, as a command's start takes one, keeps the old registration alive in the kernel.
        copy = os.dup(first.descriptor)
        watchdog.forget(first)
        second = watchdog.watch(identify(new.pid), lambda: told.append("new"))
        assert second.descriptor == first.descriptor
        old.kill()
        old.wait()
        settle(watchdog)
        assert told == []
        watchdog.forget(first)  # not the second, though the number is the same
        new.kill()
        new.wait()
        settle(watchdog)
        assert told == ["new"]
        os.close(copy)


def test_watches_hundreds_of_descriptors_above_1024(watchdog: Watchdog) -> None:
    count = 300
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit[1] < 2048:
        pytest.skip(f"this user may open only {limit[1]} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit[0], 2048), limit[1]))
    told = threading.Semaphore(0)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        fillers: list[int] = []
        while not fillers or fillers[-1] < 1024:
            fillers.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for filler in fillers:
            stack.callback(os.close, filler)
        process = stack.enter_context(sleeper())
        identity = identify(process.pid)
        watched = [watchdog.watch(identity, told.release) for _ in range(count)]
        assert min(each.descriptor for each in watched) > 1024
        process.kill()
        for _ in range(count):
            assert told.acquire(timeout=SOON)
        for each in watched:
            watchdog.forget(each)


def test_timers_are_called_in_the_order_of_their_times(watchdog: Watchdog) -> None:
    called: list[int] = []
    done = threading.Event()
    now = watchdog.now()
    watchdog.call_at(now + 0.03, done.set)
    watchdog.call_at(now + 0.02, lambda: called.append(2))
    watchdog.call_at(now + 0.01, lambda: called.append(1))
    watchdog.call_at(now + 0.02, lambda: called.append(3))
    assert done.wait(SOON)
    assert called == [1, 2, 3]


def test_a_nearer_timer_wakes_a_watchdog_that_waits_for_a_far_one(watchdog: Watchdog) -> None:
    watchdog.call_at(watchdog.now() + 3600, lambda: None)
    settle(watchdog)
    done = threading.Event()
    watchdog.call_at(watchdog.now() + 0.01, done.set)
    assert done.wait(SOON)


def test_a_timer_is_not_called_before_its_time(watchdog: Watchdog) -> None:
    called_at: list[float] = []
    done = threading.Event()
    when = watchdog.now() + 0.02

    def note() -> None:
        called_at.append(time.monotonic())
        done.set()

    watchdog.call_at(when, note)
    assert done.wait(SOON)
    assert called_at[0] >= when


def test_a_cancelled_timer_is_not_called_even_if_it_is_due_already(watchdog: Watchdog) -> None:
    called: list[str] = []
    reached, go_on = threading.Event(), threading.Event()

    def block() -> None:
        reached.set()
        go_on.wait(SOON)

    watchdog.call_at(0.0, block)
    assert reached.wait(SOON)
    timers = [watchdog.call_at(when, lambda: called.append("cancelled")) for when in (0.0, watchdog.now() + 0.001)]
    for timer in timers:
        timer.cancel()
    go_on.set()
    settle(watchdog)
    assert called == []


def test_a_callback_cancels_a_timer_that_is_due_with_it(watchdog: Watchdog) -> None:
    called: list[str] = []
    when = watchdog.now() + 0.01
    timers: list[Timer] = []
    watchdog.call_at(when, lambda: timers.pop().cancel())
    timers.append(watchdog.call_at(when, lambda: called.append("cancelled")))
    done = threading.Event()
    watchdog.call_at(when, done.set)
    assert done.wait(SOON)
    assert called == []


@pytest.mark.parametrize("seconds", [3e6, 1e12, math.inf])
def test_a_timer_that_is_years_away_stops_nothing(watchdog: Watchdog, seconds: float) -> None:
    watchdog.call_at(watchdog.now() + seconds, lambda: None)
    settle(watchdog)
    # It sleeps until that far timer now: whatever comes has to wake it.
    done = threading.Event()
    watchdog.call_at(watchdog.now() + 0.001, done.set)
    assert done.wait(SOON)


def test_a_wait_longer_than_the_longest_is_simply_done_again(
    watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_WAIT", 0.001)
    done = threading.Event()
    watchdog.call_at(watchdog.now() + 0.02, done.set)
    assert done.wait(SOON)


def test_a_callback_that_raises_is_logged_and_stops_nothing(
    watchdog: Watchdog, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    told = threading.Event()
    with sleeper() as process:
        watchdog.watch(identify(process.pid), fail)
        watchdog.watch(identify(process.pid), told.set)
        watchdog.call_at(0.0, fail)
        with caplog.at_level(logging.ERROR, module.__name__):
            process.kill()
            assert told.wait(SOON)
            settle(watchdog)
    assert [record.getMessage() for record in caplog.records] == ["a watchdog callback failed"] * 2


def test_callbacks_may_watch_and_set_timers(watchdog: Watchdog) -> None:
    done = threading.Event()
    with sleeper() as first, sleeper() as second:

        def set_timer() -> None:
            watchdog.call_at(0.0, done.set)

        def next_one() -> None:
            watchdog.watch(identify(second.pid), set_timer)
            second.kill()

        watchdog.watch(identify(first.pid), next_one)
        first.kill()
        assert done.wait(SOON)


def test_an_idle_watchdog_does_not_wake_up() -> None:
    watchdog = Watchdog()
    watchdog.open()
    settle(watchdog)
    assert watchdog._timeout() is None
    watchdog.call_at(watchdog.now() + 100, lambda: None).cancel()
    assert watchdog._timeout() is None
    watchdog.close()


def test_closing_forgets_what_is_still_watched() -> None:
    before = open_descriptors()
    watchdog = Watchdog()
    watchdog.close()  # not open: nothing to do
    with sleeper() as process:
        watchdog.open()
        watchdog.watch(identify(process.pid), lambda: None)
        watchdog.close()
        watchdog.close()
    assert open_descriptors() == before


def test_cancelled_timers_do_not_pile_up_until_their_time(watchdog: Watchdog) -> None:
    for _ in range(10_000):
        watchdog.call_at(watchdog.now() + 86400, lambda: None).cancel()
    assert len(watchdog._timers) <= 2 * module._CROWD
    kept = [watchdog.call_at(watchdog.now() + 86400, lambda: None) for _ in range(2000)]
    assert len(watchdog._timers) >= 2000
    for timer in kept:
        timer.cancel()
