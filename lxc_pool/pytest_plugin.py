"""The pytest plugin: a fresh container for each test that asks for one.

```
 setup     lxc_pool (session, one connection) ──► lxc_container: get ──► the test has it
 report    of a failed phase: what the container is; with --lxc-pool-keep-failed it is kept from here on
 teardown  the container is released, unless it is kept
 the process dies (SIGKILL, pytest-timeout's thread method, an xdist worker's crash): the service reaps it
```

pytest loads this by its entry point in every session, so it does nothing until a fixture is asked for. Under
pytest-xdist each worker is a process with a session of its own, and so the owner of its containers.

PYTEST_DONT_REWRITE: no assert here is a test's; and rewriting warns if the plugin was imported before.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
from collections.abc import Generator, Iterator
from typing import Any, Final

import pytest

from lxc_pool.client.caller import check_timeout
from lxc_pool.client.container import Container
from lxc_pool.client.pool import PoolServiceProxy
from lxc_pool.config import DEFAULT_HOST_DIR
from lxc_pool.errors import AccessDenied, LeaseError, LxcPoolError, PoolTimeout, ServiceUnavailable
from lxc_pool.manager import PoolManager
from lxc_pool.model import MAX_ID_LENGTH, ContainerId

_LEASE_TIMEOUT: Final = 30.0
"""Seconds to wait for a container if the marker says nothing. Origin: `PoolServiceProxy.lease`."""

_CONNECT_TIMEOUT: Final = 1.0
"""Seconds to wait for a service before the tests that need it are skipped. A guess: one that is there takes 2 ms."""

_REQUIRED_TIMEOUT: Final = 5.0
"""Seconds to wait for a service that has to be there. Origin: `PoolManager.connect`."""

_CONSOLE_LINES: Final = 20
_CONSOLE_LENGTH: Final = 4000
"""Lines, and characters, of a failed test's container's console that are shown at most: a screenful, a guess."""

_TITLE: Final = "lxc_pool container"
_KEPT: Final = "lxc_pool_kept"
"""A failed report's attribute: the command that enters the container. A str, which xdist sends to its controller."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Wish:
    """What a test's markers ask for."""

    profile: str = "default"
    timeout: float | None = _LEASE_TIMEOUT


@dataclasses.dataclass(slots=True)
class _Held:
    """The container of the test that runs.

    Attributes:
        pool: Where it comes from.
        container: The container.
        minutes: How long it is kept if the test fails; None: it is not.
        kept: Whether it is.
        released: Whether the lease has been ended from here.
        words: What it was when the teardown failed; None: that has not.
        in_teardown: Whether `pytest_runtest_teardown` gives it back, which sees whether any fixture fails.
    """

    pool: PoolServiceProxy
    container: Container
    minutes: float | None
    kept: bool = False
    released: bool = False
    words: str | None = None
    in_teardown: bool = False

    def release(self) -> None:
        """End the lease, unless it is kept."""
        if not self.kept:
            self.released = True
            self.container.release()

    def explain(self) -> str:
        """Say what the container is, after a failure; keep it if that was asked for."""
        container = self.container
        facts = {"name": container.name, "profile": container.profile, "id": str(container.id)}
        facts["init"] = f"pid {container.init_pid} on the host"
        try:
            # The pool may be closed already where it is released.
            facts["state"] = "released" if self.released else str(container.state)
            if self.minutes is not None and not self.kept:
                container.keep(self.minutes * 60)
                self.kept = True
        except LeaseError as error:
            facts["state"] = str(error)
        except LxcPoolError as error:
            facts["state"] = f"unknown: {error}"
        if self.kept:
            facts["kept"] = f"for up to {self.minutes:g} minutes from the failure on"
            facts["enter"] = self.command("exec", "--", "sh")
            facts["release"] = self.command("release")
        return "".join(f"{key + ':':<9}{value}\n" for key, value in facts.items()) + self._console()

    def _console(self) -> str:
        """Return what the container's console said last; empty if that can't be known any more."""
        try:
            said = "" if self.released else self.container.console_log(_CONSOLE_LINES)[-_CONSOLE_LENGTH:]
        except LxcPoolError:  # the state says why
            return ""
        return said and f"the end of its console log:\n{said.rstrip()}\n"

    def command(self, verb: str, *arguments: str) -> str:
        """Return the shell's command that does something with the container."""
        host_dir = self.pool.host_dir
        where = () if host_dir == DEFAULT_HOST_DIR else ("--host-dir", str(host_dir))
        return shlex.join(["lxc-pool", *where, verb, self.container.name, *arguments])


_HELD = pytest.StashKey[_Held]()


# --- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lxc_pool(request: pytest.FixtureRequest) -> Iterator[PoolServiceProxy]:
    """The pool, connected; the tests that need it are skipped if no service is reachable."""
    required = request.config.getoption("lxc_pool_require")
    try:
        pool = PoolManager.connect(
            request.config.getoption("lxc_pool_host_dir"), _REQUIRED_TIMEOUT if required else _CONNECT_TIMEOUT
        )
    except (ServiceUnavailable, AccessDenied) as error:
        # Anything else is a fault to be seen: a wrong key, or something that is no service of ours.
        reason = str(error)
    else:
        with pool:
            yield pool
        return
    if required:
        pytest.fail(f"--lxc-pool-require: {reason}", pytrace=False)
    pytest.skip(f"lxc_pool: {reason}")


@pytest.fixture
def lxc_container(request: pytest.FixtureRequest, lxc_pool: PoolServiceProxy) -> Iterator[Container]:
    """A fresh container of the test's own, released afterwards; `@pytest.mark.lxc` chooses which."""
    wish = _wish(request.node)
    container = lxc_pool.get(_identity(request.node.nodeid), wish.timeout, profile=wish.profile)
    if container is None:
        raise PoolTimeout(_none_came(lxc_pool, wish))
    held = _Held(lxc_pool, container, request.config.getoption("lxc_pool_keep_failed"))
    request.node.stash[_HELD] = held
    yield container
    if not held.in_teardown:
        held.release()


# --- hooks -----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("lxc_pool", "containers of lxc_pool")
    group.addoption(
        "--lxc-pool-host-dir",
        type=os.path.abspath,
        metavar="DIR",
        help="where the service's socket is (default: $LXC_POOL_HOST_DIR, else /run/lxc-pool)",
    )
    group.addoption(
        "--lxc-pool-require",
        action="store_true",
        help="fail the tests that need a container if no service is reachable, instead of skipping them",
    )
    group.addoption(
        "--lxc-pool-keep-failed",
        type=_minutes,
        metavar="MINUTES",
        help="keep a failed test's container that long; the report says how to enter it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        f"lxc(profile='default', timeout={_LEASE_TIMEOUT:g}): which kind of container `lxc_container` is, and how many "
        "seconds to wait for it (None: for ever)",
    )


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    """Refuse wrong markers before anything runs.

    Raises:
        CollectError: A marker has arguments that it does not take. A UsageError would be xdist's INTERNALERROR.
    """
    made = yield
    for item in made if isinstance(made, list) else [made]:
        if isinstance(item, pytest.Item):
            try:
                _wish(item)
            except pytest.UsageError as error:
                raise pytest.Collector.CollectError(str(error)) from None
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """Where a failed test's container may be kept, give it back only when it is known whether the teardown fails."""
    held = item.stash.get(_HELD, None)
    if held is None or held.minutes is None:
        yield
        return
    held.in_teardown = True
    try:
        yield
    except (KeyboardInterrupt, SystemExit, pytest.exit.Exception):
        raise
    except BaseException:  # pytest's own outcomes are no Exceptions
        held.words = held.explain()
        raise
    finally:
        held.release()
        if nextitem is None:
            held.pool.close()  # its fixture has been torn down before, and the release has connected anew


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the container is to the report of a failure."""
    report = yield
    held = item.stash.get(_HELD, None)
    if held is not None and report.failed:
        report.sections.append((_TITLE, held.words or held.explain()))
        if held.kept:
            setattr(report, _KEPT, held.command("exec", "--", "sh"))
    if held is not None and report.when == "teardown":
        del item.stash[_HELD]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the containers that are kept: the reports' sections may be hidden by --tb or --show-capture."""
    reports = [*terminalreporter.stats.get("failed", []), *terminalreporter.stats.get("error", [])]
    kept = {command: report.nodeid for report in reports if (command := getattr(report, _KEPT, None)) is not None}
    if kept:
        terminalreporter.section("kept containers")
        for command, nodeid in kept.items():
            terminalreporter.write_line(f"{nodeid}: {command}")


# --- the parts -------------------------------------------------------------------------------------------------------


def _wish(item: pytest.Item) -> _Wish:
    """Return what the markers of a test, its class and its module ask for; the closest one wins.

    Raises:
        UsageError: One has arguments that the marker does not take.
    """
    wishes: dict[str, Any] = {}
    for mark in reversed(list(item.iter_markers("lxc"))):
        try:
            if mark.args or not mark.kwargs.keys() <= {"profile", "timeout"}:
                raise TypeError("it takes profile= and timeout=, by name")
            if not isinstance(mark.kwargs.get("profile", ""), str):
                raise TypeError(f"profile must be a str, not {mark.kwargs['profile']!r}")
            check_timeout("timeout", mark.kwargs.get("timeout"))
        except (TypeError, ValueError) as error:
            given = [*map(repr, mark.args), *(f"{key}={value!r}" for key, value in mark.kwargs.items())]
            raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.lxc({', '.join(given)}): {error}") from None
        wishes.update(mark.kwargs)
    return _Wish(**wishes)


def _identity(nodeid: str) -> ContainerId:
    """Name a lease after a test: `lxc-pool ls` shows who has what."""
    # 28 characters are for what a ContainerId adds: "test_", two "_", the time and the pid.
    printable = "".join(character if character.isprintable() else "?" for character in nodeid)
    return ContainerId.create(printable[-(MAX_ID_LENGTH - 28) :])


def _none_came(pool: PoolServiceProxy, wish: _Wish) -> str:
    status = pool.status()
    words = (
        f"no container of profile {wish.profile!r} came free in {wish.timeout:g} s: {status.size} warm, "
        f"{status.building} building, {status.leased} leased, {status.waiting} callers waiting"
    )
    if status.last_error:
        words += f"; last error: {status.last_error}"
    return words + "; `lxc-pool ls` shows who has them, @pytest.mark.lxc(timeout=…) waits longer"


def _minutes(text: str) -> float:
    """Parse --lxc-pool-keep-failed."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"MINUTES must be a number greater than 0, not {text!r}")
    return minutes
