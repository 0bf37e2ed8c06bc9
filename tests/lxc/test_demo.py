"""The demonstration, as `scripts/demo` runs it once the machine is set up: what it shows, and that nothing stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lxc_pool import PoolServiceProxy
from scripts.demo_site import Site
from tests.support.real_service import ROOT
from tests.support.waiting import eventually

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("images")]  # which skips where containers can't be

CLEAN = "the host is clean"


class Demo:
    """One run, in a session of its own as at a terminal."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.demo_pool", *options],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        self.site = Site(f"{self.process.pid}-{stat[19]}")
        self.output = ""

    def says(self, words: str, times: int = 1) -> None:
        """Wait until it has printed so many lines with *words*."""
        assert self.process.stdout is not None
        while times and (line := self.process.stdout.readline()):
            self.output += line
            times -= words in line
        assert not times, self.output

    def ends(self) -> int:
        """Wait for its end; return its exit status."""
        self.output += self.process.communicate(timeout=60)[0]
        return self.process.returncode

    def close(self) -> None:
        """Leave nothing, even where it has failed."""
        self.process.kill()
        self.process.communicate()
        self.site.undo()
        self.site.sweep()


def stoppers(run: Demo) -> list[int]:
    """Return the processes that stop a run's service."""
    return [pid for pid, line in run.site.processes().items() if line.endswith(" stop")]


@pytest.fixture
def demo() -> Iterator[Callable[..., Demo]]:
    made: list[Demo] = []

    def start(*options: str) -> Demo:
        made.append(Demo(*options))
        return made[-1]

    try:
        yield start
    finally:
        for run in made:
            run.close()


def test_it_shows_each_container_beside_a_cold_one_and_leaves_the_host_as_it_was(
    pool: PoolServiceProxy, demo: Callable[..., Demo]
) -> None:
    before = {info.name for info in pool.containers()}
    run = demo()
    assert run.ends() == 0, run.output
    numbers = r"(?: +\d+\.\d{3}){4}\n"
    rows = re.findall(rf"^(lxp-\S+) +(\S+) +(\S+){numbers}", run.output, re.MULTILINE)
    assert [row[1].split("_")[1] for row in rows] == [f"demo-{number}" for number in range(20)]
    assert all(name == hostname for name, _id, hostname in rows)
    assert len({name for name, _id, _hostname in rows}) == 20
    assert "ready with 5 warm containers" in run.output
    assert re.search(rf"^median{numbers}", run.output, re.MULTILINE)
    assert re.search(r"get: +\d+ times as fast as lxc-copy \+ lxc-start\n", run.output)
    assert CLEAN in run.output
    assert run.site.residue() == []
    # A service that runs beside it is none of its business.
    assert pool.echo("x") == "x"
    assert {info.name for info in pool.containers()} == before


@pytest.mark.parametrize(
    ("words", "times"),
    [
        ("started lxc-pool serve", 1),
        ("ready with", 1),
        ("trail: lease", 5),
        ("times as fast", 3),
        ("more without a pause", 1),
    ],
    ids=["starting", "ready", "comparing", "leasing", "stopping"],
)
def test_ctrl_c_at_any_point_leaves_nothing(demo: Callable[..., Demo], words: str, times: int) -> None:
    run = demo("--count", "8", "--size", "2")
    run.says(words, times)
    if words == "more without a pause":
        eventually(lambda: stoppers(run), "it stops the service")
        # That comes to an orderly end: no key typed at the terminal reaches it.
        assert os.getsid(stoppers(run)[0]) != os.getsid(run.process.pid)
    os.killpg(run.process.pid, signal.SIGINT)  # a terminal's goes to all of them
    assert run.ends() == 128 + signal.SIGINT, run.output
    assert "ended by SIGINT; cleaning up" in run.output
    assert CLEAN in run.output
    assert "Traceback" not in run.output
    assert run.site.residue() == []


def test_what_a_killed_run_left_the_next_one_removes(demo: Callable[..., Demo]) -> None:
    first = demo("--size", "2")
    first.says("trail: lease", 2)
    first.process.kill()
    first.process.wait()
    assert first.site.processes()
    second = demo("--count", "1", "--size", "1")
    assert second.ends() == 0, second.output
    assert f"removing what an earlier run left in {first.site.state_dir}" in second.output
    assert first.site.residue() == second.site.residue() == []
