"""Lanes with real worker processes: what comes back, what dies with them, and that nothing is left."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing.forkserver
import os
import queue
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest

from lxc_pool.backend.protocol import Blueprint
from lxc_pool.config import ProfileConfig
from lxc_pool.errors import BackendError, DestroyFailed, ImageError, InternalError
from lxc_pool.host.processes import identify
from lxc_pool.images.store import Image
from lxc_pool.service import worker
from lxc_pool.service.jobs import CreateJob, DestroyJob, Job, LaneBroken, Outcome, PrepareJob
from lxc_pool.service.lanes import ProcessLane
from lxc_pool.service.worker import stop_fork_server
from tests.support.descriptors import few_descriptors
from tests.support.trial_backend import TrialBackend

SOON = 30.0
"""Seconds in which what should happen must have happened; a worker's start takes a tenth of one."""

IMAGE = Image("busybox", "1", Path("/nonexistent"), 0, 0.0, "")


@pytest.fixture(autouse=True, scope="module")
def _fork_server() -> Iterator[None]:
    """Have one for all tests: its start takes longer than they do."""
    yield
    stop_fork_server()
    assert psutil.Process().children() == []


@pytest.fixture(autouse=True)
def _no_worker_left(_fork_server: None) -> Iterator[None]:
    yield
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # not in typeshed
    if server is not None:
        for worker in psutil.Process(server).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.wait(SOON)
    for thread in threading.enumerate():
        if type(thread).__name__ == "_ExecutorManagerThread":
            thread.join(SOON)
    assert multiprocessing.active_children() == []


@pytest.fixture
def lane(tmp_path: Path) -> Iterator[ProcessLane]:
    lane = ProcessLane(TrialBackend(tmp_path))
    lane.open()
    yield lane
    lane.close()


def begin(lane: ProcessLane, job: Job) -> queue.Queue[Outcome]:
    outcomes: queue.Queue[Outcome] = queue.Queue()
    lane.start(job, outcomes.put)
    return outcomes


def outcome(lane: ProcessLane, job: Job) -> Outcome:
    return begin(lane, job).get(timeout=SOON)


def worker_of(lane: ProcessLane) -> int:
    assert lane._worker is not None
    return lane._worker._process.result(SOON).pid


def hang(lane: ProcessLane, notes: Path, name: str = "hang") -> tuple[queue.Queue[Outcome], list[int]]:
    """Let the lane hang; return where its outcome would come, and pidfds of the worker and of its child."""
    outcomes = begin(lane, DestroyJob(name, force=False))
    deadline = time.monotonic() + SOON
    while not (notes / name).exists():  # the worker has no other way to say so
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return outcomes, [os.pidfd_open(int(pid)) for pid in (notes / name).read_text().split()]


def ends(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        return bool(poll.poll(SOON * 1000))
    finally:
        os.close(pidfd)


def test_does_each_job_in_its_worker_and_says_what_came_of_it(lane: ProcessLane) -> None:
    image = outcome(lane, PrepareJob("busybox"))
    assert isinstance(image, Image)
    assert image.checksum == str(worker_of(lane)) != str(os.getpid())
    blueprint = Blueprint("c1", ProfileConfig("default", 1), IMAGE, 0.0)
    assert outcome(lane, CreateJob(blueprint)) == identify(worker_of(lane))
    assert outcome(lane, DestroyJob("gone", force=False)) is None


def test_a_declared_error_is_an_outcome_and_the_lane_goes_on(lane: ProcessLane) -> None:
    error = outcome(lane, PrepareJob("unknown"))
    assert isinstance(error, ImageError)
    assert str(error) == "no image 'unknown'"
    error = outcome(lane, DestroyJob("stuck", force=True))
    assert isinstance(error, DestroyFailed)
    assert "force=True" in str(error)
    assert isinstance(outcome(lane, PrepareJob("busybox")), Image)


def test_a_shortage_of_the_workers_is_no_bug(lane: ProcessLane, caplog: pytest.LogCaptureFixture) -> None:
    error = outcome(lane, PrepareJob("shortage"))
    assert isinstance(error, BackendError)
    assert "Too many open files" in str(error)
    assert not caplog.records


def test_an_undeclared_error_is_our_bug_in_the_log_with_where_it_was(
    lane: ProcessLane, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, worker.__name__):
        error = outcome(lane, PrepareJob("bug"))
    assert isinstance(error, InternalError)
    assert "KeyError: 'a bug'" in str(error)
    assert "trial_backend.py" in caplog.text
    assert isinstance(outcome(lane, PrepareJob("busybox")), Image)


def test_a_worker_that_dies_breaks_its_lane_until_that_is_replaced(lane: ProcessLane) -> None:
    error = outcome(lane, PrepareJob("die"))
    assert isinstance(error, LaneBroken)
    assert "died" in str(error)
    assert isinstance(outcome(lane, PrepareJob("busybox")), LaneBroken)
    lane.replace()
    assert isinstance(outcome(lane, PrepareJob("busybox")), Image)


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), EOFError("the fork server has no descriptors left")]
)
def test_a_lane_whose_new_worker_can_not_be_started_is_broken_until_it_can(
    lane: ProcessLane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    worker_of(lane)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "start_fork_server", mock.Mock(side_effect=error))
        lane.replace()
    assert "can't be started" in caplog.text
    assert isinstance(outcome(lane, PrepareJob("busybox")), LaneBroken)
    lane.replace()
    assert isinstance(outcome(lane, PrepareJob("busybox")), Image)


def test_a_worker_that_is_killed_between_jobs_breaks_its_lane(lane: ProcessLane) -> None:
    os.kill(worker_of(lane), signal.SIGKILL)
    assert isinstance(outcome(lane, PrepareJob("busybox")), LaneBroken)


def test_replacing_a_lane_kills_its_worker_and_the_workers_children_and_it_works_again(
    lane: ProcessLane, tmp_path: Path
) -> None:
    outcomes, pidfds = hang(lane, tmp_path)
    lane.replace()
    assert [ends(pidfd) for pidfd in pidfds] == [True, True]
    assert isinstance(outcomes.get(timeout=SOON), LaneBroken)
    assert isinstance(outcome(lane, PrepareJob("busybox")), Image)


def test_a_lane_is_not_replaced_before_its_worker_can_be_killed(lane: ProcessLane, tmp_path: Path) -> None:
    _outcomes, pidfds = hang(lane, tmp_path)
    old = worker_of(lane)
    with few_descriptors(0), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        lane.replace()
    assert worker_of(lane) == old
    lane.replace()
    assert [ends(pidfd) for pidfd in pidfds] == [True, True]
    assert isinstance(outcome(lane, PrepareJob("busybox")), Image)


def test_the_end_of_a_worker_is_noticed_without_a_descriptor(lane: ProcessLane) -> None:
    worker_of(lane)
    outcomes = begin(lane, PrepareJob("linger"))
    assert lane._worker is not None
    with few_descriptors(0):
        lane._worker._hang_up()
        assert isinstance(outcomes.get(timeout=SOON), LaneBroken)
    lane.replace()


def test_a_lane_that_hangs_can_say_what_it_hangs_on(lane: ProcessLane, tmp_path: Path) -> None:
    _outcomes, pidfds = hang(lane, tmp_path)
    words = lane.diagnose(DestroyJob("hang", force=False))
    assert f"process {worker_of(lane)}" in words
    assert "sleep infinity" in words
    assert words.endswith("engine's log: the last words of hang")
    blueprint = Blueprint("c1", ProfileConfig("default", 1), IMAGE, 0.0)
    assert "the last words of c1" in lane.diagnose(CreateJob(blueprint))
    assert "engine's log" not in lane.diagnose(PrepareJob("busybox"))
    lane.replace()
    assert [ends(pidfd) for pidfd in pidfds] == [True, True]


def test_a_lane_that_is_not_up_yet_says_that(tmp_path: Path) -> None:
    lane = ProcessLane(TrialBackend(tmp_path))
    assert lane.diagnose(PrepareJob("busybox")) == "its worker has not come up"
    lane.replace()  # not open: nothing to replace
    lane.close()


def test_a_lane_that_is_replaced_before_its_worker_is_up_does_the_old_job_no_more(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    lane = ProcessLane(TrialBackend(tmp_path, gate))
    lane.open()
    outcomes = begin(lane, DestroyJob("hang", force=False))
    lane.replace()
    gate.touch()  # both workers come up now
    assert isinstance(outcomes.get(timeout=SOON), LaneBroken)
    assert outcome(lane, DestroyJob("gone", force=False)) is None
    lane.close()


def test_closing_an_idle_lane_ends_its_worker_in_order(tmp_path: Path) -> None:
    lane = ProcessLane(TrialBackend(tmp_path))
    lane.close()  # not open: nothing to do
    lane = ProcessLane(TrialBackend(tmp_path))
    lane.open()
    pidfd = os.pidfd_open(worker_of(lane))
    lane.close()
    assert ends(pidfd)
    lane.close()


def test_closing_a_busy_lane_kills_its_worker_with_all_its_children(tmp_path: Path) -> None:
    lane = ProcessLane(TrialBackend(tmp_path))
    lane.open()
    outcomes, pidfds = hang(lane, tmp_path)
    lane.close()
    # What it leaves would let go of its semaphores when nobody counts them any more.
    assert "_ExecutorManagerThread" not in [type(thread).__name__ for thread in threading.enumerate()]
    assert [ends(pidfd) for pidfd in pidfds] == [True, True]
    assert isinstance(outcomes.get(timeout=SOON), LaneBroken)


def test_a_closed_lane_takes_no_job_and_stays_closed_when_it_is_replaced(tmp_path: Path) -> None:
    lane = ProcessLane(TrialBackend(tmp_path))
    lane.open()
    _outcomes, pidfds = hang(lane, tmp_path)
    lane.close()
    lane.replace()  # as whoever is told that its job broke does
    assert lane._worker is None
    with pytest.raises(InternalError, match="not open"):
        lane.start(PrepareJob("busybox"), lambda _outcome: None)
    assert [ends(pidfd) for pidfd in pidfds] == [True, True]


def test_the_fork_server_ends_when_told_to_and_comes_again_with_the_next_lane(tmp_path: Path) -> None:
    for _ in range(2):
        lane = ProcessLane(TrialBackend(tmp_path))
        lane.open()
        worker_of(lane)
        server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # not in typeshed
        pidfd = os.pidfd_open(server)
        lane.close()
        stop_fork_server()
        assert ends(pidfd)
        assert psutil.Process().children() == []
        del lane


def test_a_worker_leaves_interrupts_to_the_service(lane: ProcessLane) -> None:
    os.kill(worker_of(lane), signal.SIGINT)
    assert isinstance(outcome(lane, PrepareJob("busybox")), Image)
