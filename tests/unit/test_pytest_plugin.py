"""The pytest plugin: pytest sessions inside this one, against a service in this process with containers in memory.

Most run in this process, which is then the owner of what they lease: only a release gives it back, nobody's death.
"""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lxc_pool import CloneFailed, Container, ContainerInfo, PoolManager, ServiceUnavailable, State, pytest_plugin
from lxc_pool.backend.memory import HANG, Fault
from lxc_pool.config import ProfileConfig
from tests.support.memory_service import MemoryService, memory_service
from tests.support.waiting import eventually

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = pytest_plugin.__name__
NO_OTHERS = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"
"""Set in most sessions: this plugin is loaded by name, installed or not; importing hypothesis anew takes a second."""

SUBPROCESS_TIMEOUT = 60.0
"""Seconds for one session in a process of its own; a guess, it takes one or two."""

Run = Callable[..., pytest.RunResult]


@pytest.fixture(scope="module")
def service() -> Iterator[MemoryService]:
    with memory_service(profiles=(ProfileConfig("default", 2), ProfileConfig("other", 1))) as service:
        yield service


@pytest.fixture(autouse=True)
def nothing_is_leased(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "service" in request.fixturenames:
        assert leased(request.getfixturevalue("service")) == []


@pytest.fixture
def run(pytester: pytest.Pytester, service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test file's text in a pytest session inside this process."""
    monkeypatch.setenv(NO_OTHERS, "1")
    monkeypatch.setenv("LXC_POOL_HOST_DIR", str(service.host_dir))

    def run(text: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(textwrap.dedent(text))
        options = ("-p", PLUGIN, "-p", "no:cacheprovider", "--strict-markers", "-W", "error", *options)
        return pytester.runpytest_inprocess(*options, no_reraise_ctrlc=True)

    return run


@pytest.fixture
def run_apart(pytester: pytest.Pytester, service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test file's text in a pytest session in a process of its own."""
    monkeypatch.setenv(NO_OTHERS, "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(text: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(textwrap.dedent(text))
        options = ("--lxc-pool-host-dir", str(service.host_dir), *options)
        return pytester.runpytest_subprocess(*options, timeout=SUBPROCESS_TIMEOUT)

    return run


def leased(service: MemoryService) -> list[ContainerInfo]:
    return [info for info in service.pool.containers(None) if info.state in (State.LEASED, State.RESERVED)]


def take_back_kept(service: MemoryService) -> ContainerInfo:
    """Return the one container that was kept, and release it."""
    (info,) = leased(service)
    with PoolManager.connect(service.host_dir) as pool:
        pool.container(info.name).release()
    return info


# --- the fixtures ----------------------------------------------------------------------------------------------------


def test_each_test_has_a_container_of_its_own_until_it_is_over(run: Run) -> None:
    result = run("""
        names = []

        def test_first(lxc_container, lxc_pool):
            names.append(lxc_container.name)
            assert lxc_container.state == "leased"

        def test_second(lxc_container, lxc_pool):
            leased = [info.name for info in lxc_pool.containers() if info.state == "leased"]
            assert leased == [lxc_container.name] != names
    """)
    result.assert_outcomes(passed=2)


def test_a_lease_is_named_after_its_test(run: Run) -> None:
    result = run("""
        import pytest

        @pytest.mark.parametrize("text", ["short", "long" * 25, "wörd"])
        def test_named(lxc_container, text, request):
            assert request.node.nodeid[-100:] == lxc_container.id.job_id
    """)
    result.assert_outcomes(passed=3)


def test_a_failing_test_gives_its_container_back(run: Run, service: MemoryService) -> None:
    run("def test_it(lxc_container): assert False").assert_outcomes(failed=1)
    assert leased(service) == []


@pytest.mark.parametrize("options", [(), ("--lxc-pool-keep-failed", "1")])
@pytest.mark.parametrize("where", ["test", "fixture"])
def test_an_interrupted_test_gives_its_container_back(
    run: Run, service: MemoryService, where: str, options: tuple[str, ...]
) -> None:
    result = run(
        f"""
        import pytest

        @pytest.fixture
        def fixture(lxc_container):
            yield
            if {where!r} == "fixture":
                raise KeyboardInterrupt

        def test_it(fixture):
            if {where!r} == "test":
                raise KeyboardInterrupt
        """,
        *options,
    )
    assert result.ret is pytest.ExitCode.INTERRUPTED
    assert leased(service) == []


def test_without_a_service_tests_are_skipped_with_the_reason(run: Run, tmp_path: Path) -> None:
    result = run("def test_it(lxc_container): pass", "-rs", "--lxc-pool-host-dir", str(tmp_path))
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines([f"SKIPPED * lxc_pool: no service answers in {tmp_path}*"])


def test_a_user_without_access_skips_with_the_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.open", refuse)
    result = run("def test_it(lxc_pool): pass", "-rs")
    monkeypatch.undo()
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * lxc_pool: not allowed to read */authkey*"])


def refuse(path: os.PathLike[str] | str, *arguments: int, _open: Callable[..., int] = os.open) -> int:
    if str(path).endswith("authkey"):
        raise PermissionError(path)
    return _open(path, *arguments)


def test_a_service_that_is_required_and_missing_fails_the_tests(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest_plugin, "_REQUIRED_TIMEOUT", 0.1)
    result = run("def test_it(lxc_container): pass", "--lxc-pool-require", "--lxc-pool-host-dir", str(tmp_path / "no"))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["--lxc-pool-require: no service answers in */no*"])


def test_what_is_no_host_dir_is_an_error_and_not_skipped(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pool.sock").touch()
    result = run("def test_it(lxc_container): pass", "--lxc-pool-host-dir", str(tmp_path))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*HostDirError: */pool.sock is not a socket*"])


# --- the marker ------------------------------------------------------------------------------------------------------


def test_the_marker_chooses_the_profile_and_the_closest_one_wins(run: Run) -> None:
    result = run("""
        import pytest

        pytestmark = pytest.mark.lxc(profile="other", timeout=7)

        def test_module(lxc_container):
            assert lxc_container.profile == "other"

        @pytest.mark.lxc(timeout=None)
        class TestClass:
            @pytest.mark.lxc(profile="default")
            def test_method(self, lxc_container):
                assert lxc_container.profile == "default"

            def test_other(self, lxc_container):
                assert lxc_container.profile == "other"
    """)
    result.assert_outcomes(passed=3)


def test_an_unknown_profile_is_an_error(run: Run) -> None:
    result = run("""
        import pytest

        @pytest.mark.lxc(profile="nothing")
        def test_it(lxc_container): pass
    """)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["E *ValueError: *nothing*"])


def test_a_test_that_gets_no_container_in_time_says_why(run: Run) -> None:
    with memory_service(size=1) as own, PoolManager.connect(own.host_dir) as pool:
        own.reaches(size=1)
        own.backend.script("clone", Fault(error=CloneFailed("the disk is full")), HANG)
        with pool.lease("it has the one"):
            eventually(lambda: pool.status().last_error, "the creation of the next one has failed")
            result = run(
                """
                import pytest

                @pytest.mark.lxc(timeout=0)
                def test_it(lxc_container): pass
                """,
                *("--lxc-pool-host-dir", str(own.host_dir)),
            )
    result.assert_outcomes(errors=1)
    why = "no container of profile 'default' came free in 0 s: 0 warm, * 1 leased, * last error: *the disk is full*"
    result.stdout.fnmatch_lines([f"E *PoolTimeout: {why}"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("'debian'", "@pytest.mark.lxc('debian'): it takes profile= and timeout=, by name"),
        ("image='x'", "@pytest.mark.lxc(image='x'): it takes profile= and timeout=, by name"),
        ("profile=3", "@pytest.mark.lxc(profile=3): profile must be a str, not 3"),
        ("timeout='3'", "@pytest.mark.lxc(timeout='3'): timeout must be a number of seconds, not '3'"),
        ("timeout=-1", "@pytest.mark.lxc(timeout=-1): timeout must be 0 or more seconds, not -1"),
    ],
)
def test_a_wrong_marker_is_refused_before_anything_runs(run: Run, arguments: str, complaint: str) -> None:
    result = run(f"""
        import pytest

        def test_before(): pass

        @pytest.mark.lxc({arguments})
        def test_it(lxc_container): pass
    """)
    result.assert_outcomes(errors=1)
    assert f"::test_it: {complaint}" in result.stdout.str()
    assert "Traceback" not in result.stdout.str()


def test_the_marker_and_the_options_explain_themselves(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NO_OTHERS, "1")
    markers = pytester.runpytest_inprocess("-p", PLUGIN, "--markers").stdout.str()
    assert "@pytest.mark.lxc(profile='default', timeout=30): which kind of container" in markers
    text = pytester.runpytest_inprocess("-p", PLUGIN, "--help").stdout.str()
    for option in ("--lxc-pool-host-dir=DIR", "--lxc-pool-require", "--lxc-pool-keep-failed=MINUTES"):
        assert option in text


# --- failed tests ----------------------------------------------------------------------------------------------------


def test_a_failed_tests_report_says_what_its_container_is(run: Run) -> None:
    result = run("""
        import pytest

        def test_good(lxc_container): pass

        @pytest.mark.xfail
        def test_expected(lxc_container): assert False

        def test_bad(lxc_container):
            print(f"it is {lxc_container.name}, {lxc_container.init_pid}")
            assert False

        def test_without(): assert False
    """)
    result.assert_outcomes(passed=1, xfailed=1, failed=2)
    text = result.stdout.str()
    assert text.count("lxc_pool container") == 1
    name, pid = text.partition("\nit is ")[2].splitlines()[0].split(", ")
    result.stdout.fnmatch_lines(
        [
            "*- lxc_pool container -*",
            f"name:    {name}",
            "profile: default",
            "id:      test_*::test_bad_*",
            f"init:    pid {pid} on the host",
            "state:   leased",
        ]
    )
    assert "kept" not in text


def test_a_container_that_is_gone_is_reported_as_that(run: Run) -> None:
    result = run(
        """
        import os, signal

        def test_it(lxc_container):
            os.kill(lxc_container.init_pid, signal.SIGKILL)
            while lxc_container.state == "leased": pass
    """,
        "--lxc-pool-keep-failed=1",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["state:   the lease of * has ended: *"])
    assert "kept" not in result.stdout.str()


def test_a_report_does_without_a_service_that_is_gone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_container: Container) -> State:
        raise ServiceUnavailable("it went away")

    monkeypatch.setattr(Container, "state", property(gone))
    result = run("def test_it(lxc_container): assert False", "--lxc-pool-keep-failed=1")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["state:   unknown: it went away"])
    assert "kept" not in result.stdout.str()


def test_a_failed_setup_and_a_failed_teardown_are_reported(run: Run) -> None:
    result = run("""
        import pytest

        @pytest.fixture
        def broken(lxc_container): assert False

        @pytest.fixture
        def breaking(lxc_container):
            yield
            assert False

        def test_setup(broken): pass
        def test_teardown(breaking): pass
    """)
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["state:   leased", "state:   released"])


# --- keep ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["setup", "call", "teardown"])
def test_a_failed_tests_container_is_kept(
    run: Run, service: MemoryService, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []
    keep = Container.keep

    def note(container: Container, ttl: float) -> None:
        seconds.append(ttl)
        keep(container, ttl)

    monkeypatch.setattr(Container, "keep", note)
    result = run(
        f"""
        import pytest

        @pytest.fixture
        def machine(lxc_container):
            assert {fails!r} != "setup"
            yield
            assert lxc_container.state == "leased"
            assert {fails!r} != "teardown"

        def test_it(machine):
            assert {fails!r} != "call"

        def test_good(lxc_container): pass
        """,
        "--lxc-pool-keep-failed=0.5",
    )
    assert result.ret is pytest.ExitCode.TESTS_FAILED
    info = take_back_kept(service)
    assert info.owner_pid is None
    assert seconds == [30]
    assert "::test_it" in str(info.id)
    enter = f"lxc-pool --host-dir {service.host_dir} exec {info.name} -- sh"
    result.stdout.fnmatch_lines(
        [
            "state:   leased",
            "kept:    for up to 0.5 minutes from the failure on",
            f"enter:   {enter}",
            f"release: lxc-pool --host-dir {service.host_dir} release {info.name}",
            "*= kept containers =*",
            f"test_a_failed_tests_container_is_kept.py::test_it: {enter}",
        ]
    )


def test_kept_containers_are_listed_even_where_reports_are_not(run: Run, service: MemoryService) -> None:
    result = run("def test_it(lxc_container): assert False", "--lxc-pool-keep-failed=1", "--tb=no")
    result.stdout.fnmatch_lines([f"*.py::test_it: lxc-pool * exec {take_back_kept(service).name} -- sh"])


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon"])
def test_wrong_minutes_are_wrong_use(run: Run, minutes: str) -> None:
    result = run("", f"--lxc-pool-keep-failed={minutes}")
    assert result.ret is pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--lxc-pool-keep-failed: MINUTES must be a number greater than 0, not '{minutes}'"])


# --- beside other plugins --------------------------------------------------------------------------------------------


def test_a_test_that_the_timeouts_signal_ends_gives_its_container_back(run_apart: Run) -> None:
    result = run_apart(
        """
        import time

        names = []

        def test_hangs(lxc_container):
            names.append(lxc_container.name)
            time.sleep(60)

        def test_next(lxc_pool):
            assert names
            assert not [info for info in lxc_pool.containers() if info.state == "leased"]
        """,
        *("-p", PLUGIN, "-p", "pytest_timeout", "--timeout=1", "--timeout-method=signal"),
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*- lxc_pool container -*"])


def test_a_session_that_the_timeouts_thread_ends_gives_its_container_back(
    run_apart: Run, service: MemoryService
) -> None:
    result = run_apart(
        "import time\ndef test_hangs(lxc_container): time.sleep(60)",
        *("-p", PLUGIN, "-p", "pytest_timeout", "--timeout=1", "--timeout-method=thread"),
    )
    assert result.ret == 1
    service.reaches(leased=0)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package look installed to new processes: its metadata is where they import from."""
    metadata = tmp_path / "site" / "lxc_pool-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lxc-pool\nVersion: 0\n")
    (metadata / "RECORD").write_text("lxc_pool/__init__.py,,\nlxc_pool/pytest_plugin.py,,\n")
    entry_points = configparser.ConfigParser()
    entry_points.read_dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"])
    with (metadata / "entry_points.txt").open("w") as file:
        entry_points.write(file)
    monkeypatch.delenv(NO_OTHERS, raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{metadata.parent}")


def test_the_plugin_is_loaded_by_its_entry_point(run_apart: Run, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("installed")  # after `run_apart`, whose environment it changes
    run_apart("def test_it(lxc_container): pass").assert_outcomes(passed=1)


@pytest.mark.usefixtures("installed")
def test_a_program_that_has_imported_the_package_may_run_pytest(pytester: pytest.Pytester) -> None:
    # pytest rewrites the asserts of plugins, and warns of those that were imported before it could.
    script = "import sys, lxc_pool, pytest; sys.exit(pytest.main(['-W', 'error', '--markers']))"
    result = pytester.run(sys.executable, "-c", script, timeout=SUBPROCESS_TIMEOUT)
    assert result.ret == 0
    assert "PytestAssertRewriteWarning" not in result.stderr.str()


def test_the_plugin_loads_neither_the_service_nor_liblxc() -> None:
    script = f"import sys, {PLUGIN}; print(*sys.modules)"
    # Without coverage in the child: that loads sqlite3 itself.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS_")}
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    forbidden = ("lxc", "_lxc", "psutil", "sqlite3", "lxc_pool.service", "lxc_pool.backend", "lxc_pool.images")
    assert not [name for name in loaded.stdout.split() if name.startswith(tuple(f"{part}." for part in forbidden))]
    assert not {*loaded.stdout.split()} & {*forbidden}
