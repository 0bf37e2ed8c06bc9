"""What removals put off is done by a process of its own, whatever becomes of that."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool.errors import DestroyFailed
from lxc_pool.service.sweeper import Sweeper
from lxc_pool.service.worker import stop_fork_server
from tests.support.trial_backend import TrialBackend
from tests.support.waiting import ends, eventually, pidfd


class LitterBackend(TrialBackend):
    """Its leftovers are files in a directory; one whose name begins with `stuck` can't be removed."""

    def __init__(self, notes: Path) -> None:
        super().__init__(notes)
        self.litter = notes.with_name("litter")
        self.litter.mkdir()

    def leftovers(self) -> bool:
        return any(self.litter.iterdir())

    def sweep(self) -> None:
        partial = self.litter.with_name("partial")
        partial.write_text(str(os.getpid()))
        partial.rename(self.litter.with_name("pid"))
        for path in self.litter.iterdir():
            if not path.name.startswith("stuck"):
                path.unlink()
        if self.leftovers():
            raise DestroyFailed("stuck")


@pytest.fixture
def backend(tmp_path: Path) -> LitterBackend:
    return LitterBackend(tmp_path / "notes")


@pytest.fixture
def sweeper(backend: LitterBackend) -> Iterator[Sweeper]:
    sweeper = Sweeper(backend)
    try:
        yield sweeper
    finally:
        for path in backend.litter.iterdir():
            path.unlink()
        sweeper.close(30)
        stop_fork_server()


def _pid(backend: LitterBackend) -> int:
    return int(backend.litter.with_name("pid").read_text())


def test_there_is_no_process_as_long_as_there_is_nothing_to_do(backend: LitterBackend, sweeper: Sweeper) -> None:
    sweeper.wake()
    sweeper.close(30)
    assert not backend.litter.with_name("pid").exists()


def test_one_process_does_all_of_it(backend: LitterBackend, sweeper: Sweeper) -> None:
    pids = set()
    for name in "abc":
        (backend.litter / name).touch()
        sweeper.wake()
        eventually(lambda: not backend.leftovers(), "it is swept")
        pids.add(_pid(backend))
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_what_fails_is_tried_again_unasked(backend: LitterBackend, sweeper: Sweeper) -> None:
    (backend.litter / "stuck").touch()
    sweeper.wake()
    eventually(lambda: backend.litter.with_name("pid").exists(), "it was tried")
    (backend.litter / "stuck").rename(backend.litter / "free")
    eventually(lambda: not backend.leftovers(), "it was tried again")


def test_a_process_that_is_killed_has_a_successor(
    backend: LitterBackend, sweeper: Sweeper, caplog: pytest.LogCaptureFixture
) -> None:
    (backend.litter / "stuck").touch()
    sweeper.wake()
    eventually(lambda: backend.litter.with_name("pid").exists(), "it was tried")
    first = _pid(backend)
    with pidfd(first) as descriptor:
        os.kill(first, signal.SIGKILL)
        assert ends(descriptor)
    eventually(lambda: _pid(backend) != first, "another one tries")
    assert "another one takes its place" in caplog.text


def test_the_end_comes_after_the_last_of_it(backend: LitterBackend, sweeper: Sweeper) -> None:
    for number in range(100):
        (backend.litter / str(number)).touch()
    sweeper.close(30)  # which was never woken
    assert not backend.leftovers()


def test_the_end_does_not_wait_for_ever(
    backend: LitterBackend, sweeper: Sweeper, caplog: pytest.LogCaptureFixture
) -> None:
    (backend.litter / "stuck").touch()
    sweeper.wake()
    sweeper.close(0.5)
    assert "the next service" in caplog.text
    sweeper.wake()  # too late: nothing comes of it
