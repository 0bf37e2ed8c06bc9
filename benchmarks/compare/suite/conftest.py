"""A fresh system for each test, of lxc_pool or by a peer's commands; and what pytest measures of each test, kept."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from benchmarks.compare.commands import Commands, filled
from lxc_pool import Container

_NUMBERS = itertools.count(1)
_PAYLOAD_BYTES = 4096


class System(Protocol):
    """What a test needs of a system."""

    def run(self, *argv: str) -> str:
        """Run a command, which has to succeed; return its output."""
        ...

    def push(self, src: Path, dst: str) -> None:
        """Copy a file into the system."""
        ...


class PoolSystem:
    """A container of lxc_pool's."""

    def __init__(self, container: Container) -> None:
        self._container = container

    def run(self, *argv: str) -> str:
        """See `System`."""
        return str(self._container.run(list(argv), capture_output=True, text=True, check=True).stdout)

    def push(self, src: Path, dst: str) -> None:
        """See `System`."""
        self._container.push(src, dst)


class CommandSystem:
    """What a peer's commands make: each is a process, as in a test suite that uses them."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._name = f"{commands.prefix}-{os.getpid()}-{next(_NUMBERS)}"
        self._call(commands.start)

    def run(self, *argv: str) -> str:
        """See `System`."""
        return self._call(self._commands.run, *argv)

    def push(self, src: Path, dst: str) -> None:
        """See `System`."""
        if self._commands.push_reads:
            with src.open("rb") as file:
                self._call(self._commands.push, stdin=file.fileno(), src=str(src), dst=dst)
        else:
            self._call(self._commands.push, src=str(src), dst=dst)

    def remove(self) -> None:
        """End it."""
        self._call(self._commands.remove)

    def _call(self, command: Sequence[str], *more: str, stdin: int = subprocess.DEVNULL, **values: str) -> str:
        argv = [*filled(command, name=self._name, **values), *more]
        done = subprocess.run(
            argv, stdin=stdin, capture_output=True, text=True, check=False, env=self._commands.environment
        )
        if done.returncode != 0:
            raise RuntimeError(f"{argv} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout


class Recorder:
    """Keep what pytest measures, and write it to a file at the end. For xdist's controller."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._phases: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep one phase of one test."""
        self._phases.append(
            {
                "test": report.nodeid,
                "worker": vars(report)["worker_id"],  # xdist's addition
                "phase": report.when,
                "outcome": report.outcome,
                "start": report.start,
                "stop": report.stop,
                "duration": report.duration,
            }
        )

    def pytest_sessionfinish(self) -> None:
        """Write them."""
        self._file.write_text(json.dumps(self._phases), encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `benchmarks.compare.session` gives."""
    group = parser.getgroup("compare")
    group.addoption("--fresh", type=int, default=1, metavar="N", help="how many tests there are")
    group.addoption("--commands", type=Path, metavar="FILE", help="a peer's commands; lxc_pool without")
    group.addoption("--record", type=Path, metavar="FILE", help="where to write what was measured")


def pytest_configure(config: pytest.Config) -> None:
    """Record in the controller, which is told of all tests."""
    file = config.getoption("record")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(file))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make as many tests of the one as are asked for."""
    metafunc.parametrize("number", range(metafunc.config.getoption("fresh")))


@pytest.fixture
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    """A fresh system of the test's own."""
    file = request.config.getoption("commands")
    if file is None:
        yield PoolSystem(request.getfixturevalue("lxc_container"))
        return
    made = CommandSystem(Commands.read(file))
    yield made
    made.remove()


@pytest.fixture(scope="session")
def payload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file to be pushed."""
    path = tmp_path_factory.mktemp("payload") / "file"
    path.write_bytes(b"0123456789abcde\n" * (_PAYLOAD_BYTES // 16))
    return path


@pytest.fixture(scope="session")
def unproven() -> list[str]:
    """What has not been proven yet in this session: that what is pushed arrives."""
    return ["push"]
