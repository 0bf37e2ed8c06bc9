"""The pytest plugin with real containers: whole sessions as processes of their own, some of which die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lxc_pool import LeaseExpired, PoolServiceProxy, State
from tests.support.real_service import ROOT, Service
from tests.support.waiting import eventually

TIMEOUT = 90.0
"""Seconds for a session; a guess, it takes two or three."""

NOTES = """
    import json, os, pathlib, signal, time
    import pytest

    def note(topic, **facts):
        path = pathlib.Path(__file__).with_name(f"{topic}.note")
        path.with_suffix(".part").write_text(json.dumps(facts | {"pid": os.getpid()}))
        path.with_suffix(".part").rename(path)
"""
"""What test files begin with: `note` writes down facts for the test outside."""


class Suite:
    """A directory with one test file, for sessions against one service."""

    def __init__(self, directory: Path, service: Service) -> None:
        self.directory = directory
        self.service = service

    def write(self, text: str) -> None:
        (self.directory / "test_it.py").write_text(textwrap.dedent(NOTES) + textwrap.dedent(text))

    def start(self, *options: str, plugins: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start a session with this plugin and those named, and no others."""
        command = [sys.executable, "-m", "pytest", "--rootdir", ".", "--lxc-pool-require", "-p", "no:cacheprovider"]
        for plugin in ("lxc_pool.pytest_plugin", *plugins):
            command += ["-p", plugin]
        command += ["--lxc-pool-host-dir", str(self.service.host_dir), *options, "test_it.py"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.Popen(
            command,
            cwd=self.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *options: str, plugins: Sequence[str] = ()) -> tuple[int, str]:
        """Run a session; return its status and what it wrote."""
        return self.finish(self.start(*options, plugins=plugins))

    def finish(self, session: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            output, _ = session.communicate(timeout=TIMEOUT)
        finally:
            session.kill()
            session.wait()
        return session.returncode, output

    def notes(self) -> dict[str, Any]:
        return {path.stem: json.loads(path.read_text()) for path in self.directory.glob("*.note")}

    def await_note(self, name: str, session: subprocess.Popen[str]) -> Any:
        """Wait until a running session has come to a note."""
        path = self.directory / f"{name}.note"
        eventually(lambda: path.exists() or session.poll() is not None, f"{name} is reached", timeout=TIMEOUT)
        assert path.exists(), self.finish(session)
        return self.notes()[name]


@pytest.fixture
def suite(tmp_path: Path, shared_service: Service, pool: PoolServiceProxy) -> Suite:
    """The suite; `pool` looks that nothing stays leased."""
    assert pool.echo("x") == "x"
    return Suite(tmp_path, shared_service)


def ended_because_its_owner_died(pool: PoolServiceProxy, name: str) -> bool:
    """Wait until a lease has ended; return whether it was for that reason."""
    eventually(lambda: name not in {info.name for info in pool.containers() if info.state is State.LEASED}, "it ended")
    with pytest.raises(LeaseExpired) as caught:
        pool.container(name)
    return "owner died" in str(caught.value)


def test_tests_run_commands_each_in_a_fresh_system(suite: Suite) -> None:
    suite.write("""
        @pytest.mark.parametrize("number", range(4))
        def test_fresh(lxc_container, number):
            lxc_container.run(["sh", "-c", "test ! -e /tmp/mark && echo here >/tmp/mark"], check=True, timeout=10)
            name = lxc_container.run(["hostname"], capture_output=True, text=True, timeout=10).stdout.strip()
            assert name == lxc_container.name
            note(f"test{number}", name=name)
    """)
    status, output = suite.run()
    assert status == 0, output
    assert len({facts["name"] for facts in suite.notes().values()}) == 4


def test_workers_of_xdist_have_containers_of_their_own(suite: Suite, pool: PoolServiceProxy) -> None:
    suite.write("""
        @pytest.mark.parametrize("number", range(8))
        def test_own(lxc_container, lxc_pool, number):
            (info,) = [info for info in lxc_pool.containers() if info.name == lxc_container.name]
            assert info.owner_pid == os.getpid()
            lxc_container.run(["true"], check=True, timeout=10)
            note(f"test{number}", name=lxc_container.name)
    """)
    status, output = suite.run("-n", "2", plugins=["xdist.plugin"])
    assert status == 0, output
    notes = suite.notes().values()
    assert len({facts["name"] for facts in notes}) == 8
    assert len({facts["pid"] for facts in notes}) == 2
    assert not [info for info in pool.containers() if info.state is State.LEASED]


def test_a_killed_workers_containers_are_reaped_and_the_others_left_alone(
    suite: Suite, pool: PoolServiceProxy, shared_service: Service
) -> None:
    suite.write("""
        def test_killed(lxc_container):
            note("killed", name=lxc_container.name)
            os.kill(os.getpid(), signal.SIGKILL)

        def test_other(lxc_container, lxc_pool):
            note("other", name=lxc_container.name)
            here = pathlib.Path(__file__)
            while not here.with_name("go.on").exists():
                lxc_container.run(["true"], check=True, timeout=10)
    """)
    session = suite.start("-n", "2", plugins=["xdist.plugin"])
    try:
        name = suite.await_note("killed", session)["name"]
        other = suite.await_note("other", session)["name"]
        assert ended_because_its_owner_died(pool, name)
        eventually(lambda: not shared_service.has_traces(name), "it is removed")
        assert pool.container(other).state is State.LEASED
    finally:
        (suite.directory / "go.on").touch()
        status, output = suite.finish(session)
    assert status == 1, output
    assert "1 failed, 1 passed" in output
    assert "crashed while running 'test_it.py::test_killed'" in output


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_failed_tests_container_can_be_entered(suite: Suite, options: tuple[str, ...]) -> None:
    suite.write("""
        def test_bad(lxc_container):
            lxc_container.run(["sh", "-c", "echo what was wrong >/tmp/evidence"], check=True)
            lxc_container.run(["sh", "-c", "echo '\033[1mpanic' >/dev/console"], check=True)
            while "panic" not in lxc_container.console_log(): pass
            note("bad", name=lxc_container.name, pid_inside=lxc_container.init_pid)
            assert False

        def test_good(lxc_container):
            note("good", name=lxc_container.name)
    """)
    status, output = suite.run("--lxc-pool-keep-failed", "5", *options, plugins=["xdist.plugin"])
    assert status == 1, output
    bad = suite.notes()["bad"]
    try:
        assert "lxc_pool container" in output
        assert f"init:    pid {bad['pid_inside']} on the host" in output
        enter = f"lxc-pool --host-dir {suite.service.host_dir} exec {bad['name']} -- sh"
        assert f"enter:   {enter}" in output
        assert "the end of its console log:\npanic\n" in output
        assert f"test_it.py::test_bad: {enter}" in output.partition("= kept containers =")[2]
        entered = suite.service.cli("exec", bad["name"], "--", "sh", stdin="cat /tmp/evidence\n")
        assert (entered.returncode, entered.stdout) == (0, "what was wrong\n")
        kept = [info["name"] for info in json.loads(suite.service.cli("ls", "--json").stdout) if info["id"]]
        assert kept == [bad["name"]]
    finally:
        assert suite.service.cli("release", bad["name"]).returncode == 0


def test_a_timeouts_signal_gives_the_container_back_at_once(suite: Suite) -> None:
    suite.write("""
        def test_hangs(lxc_container):
            note("hangs", name=lxc_container.name)
            lxc_container.run(["sleep", "60"])

        def test_next(lxc_container, lxc_pool):
            leased = [info.name for info in lxc_pool.containers() if info.state == "leased"]
            assert leased == [lxc_container.name]
    """)
    status, output = suite.run("--timeout=1", "--timeout-method=signal", plugins=["pytest_timeout"])
    assert status == 1, output
    assert "1 failed, 1 passed" in output
    assert f"name:    {suite.notes()['hangs']['name']}" in output


def test_a_timeouts_thread_ends_the_session_and_the_container_is_reaped(suite: Suite, pool: PoolServiceProxy) -> None:
    suite.write("""
        def test_hangs(lxc_container):
            note("hangs", name=lxc_container.name)
            lxc_container.run(["sleep", "60"])
    """)
    status, output = suite.run("--timeout=1", "--timeout-method=thread", plugins=["pytest_timeout"])
    assert status == 1, output
    assert ended_because_its_owner_died(pool, suite.notes()["hangs"]["name"])


def test_an_interrupted_session_gives_its_container_back(suite: Suite, pool: PoolServiceProxy) -> None:
    suite.write("""
        def test_hangs(lxc_container):
            note("hangs", name=lxc_container.name)
            lxc_container.run(["sleep", "60"])
    """)
    session = suite.start()
    name = suite.await_note("hangs", session)["name"]
    os.kill(session.pid, signal.SIGINT)
    status, output = suite.finish(session)
    assert status == 2, output
    assert "KeyboardInterrupt" in output
    assert not ended_because_its_owner_died(pool, name)  # it was released
