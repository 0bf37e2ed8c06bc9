"""The dispatcher's one thread: it works after each wake, never for one that is asked twice, and survives bugs."""

from __future__ import annotations

import logging
import threading

import pytest

from lxc_pool.service import dispatcher as module
from lxc_pool.service.dispatcher import Dispatcher

SOON = 10.0


def test_works_after_a_wake_and_not_before() -> None:
    worked = threading.Semaphore(0)
    dispatcher = Dispatcher(worked.release)
    dispatcher.open()
    assert not worked.acquire(blocking=False)
    dispatcher.wake()
    assert worked.acquire(timeout=SOON)
    dispatcher.close()
    assert not worked.acquire(blocking=False)


def test_wakes_that_come_while_it_works_are_one_more_round_together() -> None:
    rounds: list[int] = []
    began, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def work() -> None:
        rounds.append(1)
        began.release()
        go_on.acquire(timeout=SOON)

    dispatcher = Dispatcher(work)
    dispatcher.open()
    dispatcher.wake()
    assert began.acquire(timeout=SOON)
    for _ in range(5):
        dispatcher.wake()
    go_on.release()
    assert began.acquire(timeout=SOON)
    go_on.release()
    dispatcher.close()
    assert len(rounds) == 2


def test_a_wake_before_it_is_open_is_not_lost() -> None:
    worked = threading.Event()
    dispatcher = Dispatcher(worked.set)
    dispatcher.wake()
    dispatcher.open()
    assert worked.wait(SOON)
    dispatcher.close()


def test_a_bug_in_the_work_is_logged_and_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    worked = threading.Semaphore(0)

    def fail() -> None:
        worked.release()
        raise RuntimeError("a bug")

    dispatcher = Dispatcher(fail)
    dispatcher.open()
    with caplog.at_level(logging.ERROR, module.__name__):
        for _ in range(2):
            dispatcher.wake()
            assert worked.acquire(timeout=SOON)
        dispatcher.close()
    assert "the dispatcher failed" in caplog.text
    assert "RuntimeError: a bug" in caplog.text


def test_closing_waits_for_the_work_under_way_and_leaves_no_thread() -> None:
    before = threading.active_count()
    began, go_on = threading.Event(), threading.Event()
    ended: list[bool] = []

    def work() -> None:
        began.set()
        go_on.wait(SOON)
        ended.append(True)

    dispatcher = Dispatcher(work)
    dispatcher.close()  # not open: nothing to do
    dispatcher.open()
    dispatcher.wake()
    assert began.wait(SOON)
    closer = threading.Thread(target=dispatcher.close)
    closer.start()
    go_on.set()
    closer.join(SOON)
    assert ended == [True]
    assert threading.active_count() == before
