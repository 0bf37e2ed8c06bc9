"""Commands in a leased container, all the way through the real service."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool import Container, LeaseExpired, PoolServiceProxy
from tests.support.waiting import ends, eventually, pidfd

PIPE = subprocess.PIPE


@pytest.fixture
def container(pool: PoolServiceProxy) -> Iterator[Container]:
    with pool.lease("run") as container:
        yield container


def processes(container: Container) -> list[str]:
    """Return what lives in the container, but its init; who has ended and was not waited for yet does not."""
    listing = container.run(["ps", "-o", "pid,stat,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    found = [line.split(None, 2) for line in listing]
    return [args for pid, state, args in found if pid != "1" and state[0] != "Z" and not args.startswith("ps ")]


def test_output_and_status_come_back(container: Container) -> None:
    done = container.run(["sh", "-c", "echo out; echo err >&2; exit 3"], capture_output=True)
    assert (done.args, done.returncode) == (["sh", "-c", "echo out; echo err >&2; exit 3"], 3)
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")


def test_a_signal_is_a_negative_status(container: Container) -> None:
    assert container.run(["sh", "-c", "kill -9 $$"]).returncode == -9


def test_input_goes_in(container: Container) -> None:
    assert container.run(["cat"], input=b"\0\xff", capture_output=True).stdout == b"\0\xff"
    assert container.run(["cat"], input="grüße", capture_output=True, encoding="utf-8").stdout == "grüße"


def test_streams_may_be_files_or_null(container: Container, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("words\n")
    with source.open() as stdin, target.open("w") as stdout:
        container.run(["sh", "-c", "cat; echo lost >&2"], stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL)
    assert target.read_text() == "words\n"
    both = container.run(["sh", "-c", "echo a; echo b >&2"], stdout=PIPE, stderr=subprocess.STDOUT, text=True)
    assert both.stdout == "a\nb\n"


def test_check_raises_with_what_it_wrote(container: Container) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        container.run(["sh", "-c", "echo why; exit 4"], check=True, capture_output=True, text=True)
    assert (caught.value.returncode, caught.value.stdout) == (4, "why\n")


def test_a_timeout_leaves_no_process_of_the_command(container: Container) -> None:
    script = "echo begun; setsid sleep 1000 & (sleep 1001 &) ; sleep 1002"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        container.run(["sh", "-c", script], capture_output=True, timeout=0.5)
    assert caught.value.stdout == b"begun\n"
    assert processes(container) == []


def test_the_environment_is_the_containers_own(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the host")
    done = container.run(["env"], env={"MINE": "1"}, capture_output=True, text=True)
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert variables.keys() - {"PWD", "SHLVL"} == {"PATH", "HOME", "USER", "LANG", "MINE"}
    assert (variables["HOME"], variables["USER"], variables["LANG"]) == ("/root", "root", "C.UTF-8")


def test_a_directory_and_a_user_may_be_chosen(container: Container) -> None:
    assert container.run(["pwd"], capture_output=True, text=True).stdout == "/\n"
    assert container.run(["pwd"], cwd="/usr/bin", capture_output=True, text=True).stdout == "/usr/bin\n"
    script = "id -u; echo $HOME $USER"
    for user in ("user", 1000):
        done = container.run(["sh", "-c", script], user=user, capture_output=True, text=True)
        assert done.stdout == "1000\n/home/user user\n"


@pytest.mark.parametrize(
    ("argv", "options", "error"),
    [
        (["no-such-program"], {}, FileNotFoundError),
        (["/etc/passwd"], {}, PermissionError),
        (["true"], {"cwd": "/nowhere"}, FileNotFoundError),
        (["true"], {"cwd": "/etc/passwd"}, NotADirectoryError),
        (["true"], {"user": "nobody-here"}, ValueError),
        (["true"], {"input": b"", "stdin": PIPE}, ValueError),
        ([], {}, ValueError),
        ([7], {}, TypeError),
    ],
)
def test_what_can_not_be_run_is_told_as_subprocess_does(
    container: Container, argv: list[str], options: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        container.run(argv, **options)  # type: ignore[arg-type]  # wrong on purpose


def test_much_output_comes_back_whole(container: Container) -> None:
    size = 8 << 20
    done = container.run(["head", "-c", str(size), "/dev/zero"], capture_output=True)
    assert done.stdout == bytes(size)


def test_a_started_command_is_spoken_to_and_signalled(container: Container) -> None:
    with container.popen(["cat"], stdin=PIPE, stdout=PIPE) as echo:
        assert echo.communicate(b"x") == (b"x", None)
    with container.popen(["sleep", "1000"]) as sleep:
        assert sleep.poll() is None
        sleep.terminate()
        assert sleep.wait(10) == -15


def test_many_commands_run_in_one_container_at_once(container: Container) -> None:
    with contextlib.ExitStack() as stack:
        commands = [stack.enter_context(container.popen(["cat"], stdin=PIPE, stdout=PIPE)) for _ in range(9)]
        said = [command.communicate(b"%d" % number)[0] for number, command in reversed([*enumerate(commands)])]
    assert said == [b"%d" % number for number in reversed(range(9))]


def test_the_host_sees_the_command_in_the_containers_cgroup(container: Container) -> None:
    with container.popen(["sleep", "1000"]) as command:
        groups = Path(f"/proc/{command.pid}/cgroup").read_text()
        assert os.readlink(f"/proc/{command.pid}/ns/pid") == os.readlink(f"/proc/{container.init_pid}/ns/pid")
        command.kill()
    assert f"lxc.payload.{container.name}" in groups


def test_a_release_ends_the_commands_that_run(pool: PoolServiceProxy) -> None:
    container = pool.get("x", 10)
    assert container is not None
    with container.popen(["sleep", "1000"]) as command, pidfd(command.pid) as process:
        container.release()
        assert ends(process)
        assert command.wait(10) == -9
        with pytest.raises(LeaseExpired, match="released"):
            container.run(["true"])


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 10**400])
def test_a_timeout_that_nobody_lives_to_see_is_none(container: Container, timeout: float) -> None:
    done = container.run(["sh", "-c", "cat; exit 3"], input=b"x", capture_output=True, timeout=timeout)
    assert (done.returncode, done.stdout) == (3, b"x")
    process = container.popen(["true"])
    assert process.wait(timeout) == 0
    process.close()


def test_who_has_run_a_command_has_the_way_into_the_next_container_looked_up_ahead(pool: PoolServiceProxy) -> None:
    with pool.lease("first") as container, container.popen(["cat"], stdin=PIPE) as command:
        stat = Path(f"/proc/{command.pid}/stat").read_text().rpartition(")")[2].split()
    supervisor = Path(f"/proc/{stat[1]}/fdinfo")

    def holds(pid: int | None) -> bool:
        found = False
        for entry in supervisor.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has been closed just now
                found |= f"\nPid:\t{pid}\n" in entry.read_text()
        return found

    with pool.lease("second") as container:
        init = container.init_pid
        eventually(lambda: holds(init), "its init is known")
    eventually(lambda: not holds(init), "it is forgotten")
