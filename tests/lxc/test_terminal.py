"""Commands with a terminal of the container's own, and `lxc-pool run` and `exec` at a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from lxc_pool import Container, ExecFailed, PoolServiceProxy
from lxc_pool.host import apparmor
from tests.support.processes import open_descriptors
from tests.support.real_service import ROOT, Service
from tests.support.typist import Typist, typist
from tests.support.waiting import ends, eventually, pidfd

CONFIG = """\
[pool]
workers = 2
[profile.default]
size = 2
[profile.privileged]
privileged = true
size = 1
"""
PROFILES = ("default", "privileged")

AtTerminal = Callable[..., AbstractContextManager[Typist]]

CTRL_C, CTRL_D, CTRL_Z, CTRL_BACKSLASH = b"\x03", b"\x04", b"\x1a", b"\x1c"


@pytest.fixture(scope="module")
def terminal_service(images: Path) -> Iterator[Service]:
    """A service with unprivileged and privileged containers."""
    service = Service(images)
    try:
        service.start(config=CONFIG)
        yield service
    finally:
        service.close()


@pytest.fixture(scope="module")
def terminal_pool(terminal_service: Service) -> Iterator[PoolServiceProxy]:
    with terminal_service.connect() as pool:
        yield pool


@pytest.fixture(scope="module", params=PROFILES)
def module_container(request: pytest.FixtureRequest, terminal_pool: PoolServiceProxy) -> Iterator[Container]:
    with terminal_pool.lease("terminal", 30, profile=request.param) as container:
        yield container


@pytest.fixture
def container(module_container: Container) -> Iterator[Container]:
    """A container of either kind; a test leaves no process and no terminal in it, and no descriptor of ours."""
    inner, descriptors = inside(module_container), open_descriptors()
    assert inner == ([], ["0"]), "its console is all there is"
    yield module_container
    eventually(lambda: inside(module_container) == inner, "nothing is left in the container")
    assert len(open_descriptors()) <= len(descriptors)


@pytest.fixture(params=PROFILES)
def victim(request: pytest.FixtureRequest, terminal_pool: PoolServiceProxy) -> Iterator[Container]:
    """A container of either kind that the test may spoil."""
    with terminal_pool.lease("victim", 30, profile=request.param) as container:
        yield container


@pytest.fixture
def at_terminal(terminal_service: Service) -> AtTerminal:
    """Runs `lxc-pool` with arguments at a terminal."""

    def run(*arguments: str, **options: Any) -> AbstractContextManager[Typist]:
        return typist(terminal_service.command(*arguments), ROOT, **options)

    return run


def sh(container: Container, script: str) -> str:
    """Run a script without a terminal; return what it wrote."""
    done = container.run(["sh", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done
    return str(done.stdout)


def spoil(container: Container, script: str) -> None:
    """Have a container's root run a script; skip the test if liblxc's AppArmor profile denies it to mount a devpts.

    That profile is for privileged containers, and for others where ours is not loaded. Terminals must be of use then.
    Source: Debian's lxc 5.0.2, /etc/apparmor.d/abstractions/lxc/container-base.
    """
    done = container.run(["sh", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    if done.returncode == 0:
        return
    label = Path(f"/proc/{container.init_pid}/attr/current").read_text(encoding="ascii")
    assert label.startswith(apparmor.LIBLXC_PROFILE), done
    assert re.search(r"mounting devpts on .*Permission denied", done.stderr), done
    with container.popen(["tty"], tty=True) as process:
        assert process.wait(10) == 0
    pytest.skip(f"AppArmor denies it under {label.strip()}: {done.stderr.strip()}")


def inside(container: Container) -> tuple[list[str], list[str]]:
    """Return the processes, but init, and the terminals that are in a container."""
    processes, _, terminals = sh(container, "ps -o pid,stat,args; echo --; ls /dev/pts").partition("--\n")
    found = [line.split(None, 2) for line in processes.splitlines()[1:]]
    left = [args for pid, stat, args in found if pid != "1" and stat[0] != "Z" and "ps -o" not in args]
    return left, [name for name in terminals.split() if name != "ptmx"]


def read_all(descriptor: int) -> bytes:
    """Read a master until nobody has its slave open."""
    os.set_blocking(descriptor, True)
    data = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(descriptor, 65536):
            data += chunk
    return data


# --- popen(tty=…) -----------------------------------------------------------------------------------------------------


def test_a_command_can_have_a_terminal_for_its_streams(container: Container) -> None:
    script = (
        "test -t 0 && test -t 1 && test -t 2 && tty && stty size && echo by-name >/dev/tty && read x && echo got $x"
    )
    with container.popen(["sh", "-c", script], tty=True) as process:
        assert process.terminal is not None
        assert not os.get_inheritable(process.terminal)
        os.write(process.terminal, b"words\n")
        said = [
            line for line in read_all(process.terminal).splitlines() if line != b"words"
        ]  # the echo, if before stty
        assert said == [b"/dev/pts/1", b"24 80", b"by-name", b"got words"]
        assert process.wait(10) == 0
    assert process.terminal is None


def test_a_terminal_belongs_to_the_user_and_has_the_size_asked_for(container: Container) -> None:
    script = "stty size; stat -c '%u %a' $(tty); stty -a | grep -o iutf8"
    with container.popen(["sh", "-c", script], tty=os.terminal_size((132, 43)), user="user") as process:
        assert process.terminal is not None
        assert read_all(process.terminal).split() == [b"43", b"132", b"1000", b"620", b"iutf8"]
        process.wait(10)


def test_streams_that_are_named_stay_what_they_are(container: Container) -> None:
    script = "test -t 0 && ! test -t 1 && test -t 2 && echo out && echo err >&2"
    with container.popen(["sh", "-c", script], tty=True, stdout=subprocess.PIPE) as process:
        assert process.terminal is not None
        assert process.communicate() == (b"out\n", None)
        assert read_all(process.terminal) == b"err\r\n"
    with container.popen(["sh", "-c", "test -t 2 && exit 9"], tty=True, stderr=subprocess.STDOUT) as process:
        assert process.wait(10) == 9


def test_the_terminal_is_the_containers_and_not_one_of_the_hosts(container: Container) -> None:
    with container.popen(["cat"], tty=True) as process:
        assert process.terminal is not None
        devices = {os.stat(f"/proc/{process.pid}/fd/{stream}").st_dev for stream in range(3)}
        assert devices == {os.stat(f"/proc/{container.init_pid}/root/dev/pts/1").st_dev}
        assert os.stat("/dev/pts").st_dev not in devices
        held = os.listdir(f"/proc/{process.pid}/fd")
        assert sorted(held) == ["0", "1", "2"]
        os.write(process.terminal, CTRL_D)


def test_closing_hangs_up(container: Container) -> None:
    process = container.popen(["sh", "-c", "sleep 1000 & sleep 1001"], tty=True)
    with pidfd(process.pid) as command:
        process.close()
        assert ends(command)


@pytest.mark.parametrize(
    ("tty", "error"),
    [
        (1, TypeError),
        ("yes", TypeError),
        ((80, 24), TypeError),
        (os.terminal_size((1, -1)), ValueError),
        (os.terminal_size((65536, 1)), ValueError),
    ],
)
def test_a_wrong_tty_is_refused(container: Container, tty: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        container.popen(["true"], tty=tty)


def test_a_missing_program_is_told_as_without_a_terminal(container: Container) -> None:
    with pytest.raises(FileNotFoundError):
        container.popen(["no-such-program"], tty=True)


# --- the command line, at a terminal ----------------------------------------------------------------------------------


def test_a_command_at_a_terminal_has_one(container: Container, at_terminal: AtTerminal) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && tty && stty size && echo $TERM && exit 7"
    with at_terminal("exec", container.name, "--", "sh", "-c", script, size=(33, 111)) as somebody:
        assert somebody.ends() == 7
        assert somebody.shown == b"/dev/pts/1\r\n33 111\r\nvt220\r\n"
        assert somebody.is_as_before


def test_run_gives_a_terminal_in_a_fresh_container(terminal_pool: PoolServiceProxy, at_terminal: AtTerminal) -> None:
    with at_terminal("run", "--id", "fresh", "--", "sh") as somebody:
        somebody.sees(b"# ")
        somebody.type(b"tty; hostname\n")
        name = somebody.sees(rb"/dev/pts/1\r\n(lxp-[0-9a-z-]+)\r\n")[1].decode()
        (info,) = [info for info in terminal_pool.containers() if info.id == "fresh"]
        assert name == info.name
        somebody.type(b"exit 3\n")
        assert somebody.ends() == 3
        assert somebody.is_as_before
    eventually(lambda: all(info.id != "fresh" for info in terminal_pool.containers()), "it is released")


@pytest.mark.parametrize(("key", "signum"), [(CTRL_C, signal.SIGINT), (CTRL_BACKSLASH, signal.SIGQUIT)])
def test_keys_that_mean_signals_reach_the_command(
    container: Container, at_terminal: AtTerminal, key: bytes, signum: int
) -> None:
    with at_terminal("exec", container.name, "--", "sleep", "1000") as somebody:
        eventually(lambda: somebody.is_raw, "it has begun", timeout=30)
        somebody.type(key)
        assert somebody.ends() == 128 + signum
        assert somebody.is_as_before


def test_a_shell_has_job_control(container: Container, at_terminal: AtTerminal) -> None:
    with at_terminal("exec", container.name, "--", "sh") as somebody:
        somebody.sees(b"# ")
        somebody.type(b"sh -c 'echo begun; while read x; do echo got $x; done'\n")
        somebody.sees(b"\nbegun\r\n")
        somebody.type(CTRL_Z)
        somebody.sees(b"Stopped")
        somebody.type(b"fg\n")
        somebody.type(b"words\n")
        somebody.sees(b"got words\r\n")
        somebody.type(CTRL_C)
        somebody.sees(b"# ")
        somebody.type(b"echo $?; exit 5\n")
        somebody.sees(b"130\r\n")
        assert somebody.ends() == 5
        assert b"job control" not in somebody.shown


def test_ctrl_d_is_an_end_of_file(container: Container, at_terminal: AtTerminal) -> None:
    with at_terminal("exec", container.name, "--", "cat") as somebody:
        somebody.type(b"words\n")
        somebody.sees(b"words\r\nwords\r\n")
        somebody.type(CTRL_D)
        assert somebody.ends() == 0


def test_a_change_of_size_reaches_the_command(container: Container, at_terminal: AtTerminal) -> None:
    script = "trap 'stty size; exit 0' WINCH; sleep 1000 & echo begun; wait"
    with at_terminal("exec", container.name, "--", "sh", "-c", script) as somebody:
        somebody.sees(b"begun\r\n")
        somebody.resize(40, 120)
        somebody.sees(b"40 120\r\n")
        assert somebody.ends() == 0


def test_what_is_typed_ahead_is_not_lost(container: Container, at_terminal: AtTerminal) -> None:
    with at_terminal(
        "exec", container.name, "--", "sh", "-c", "read x; echo got $x", typed_ahead=b"early\n"
    ) as somebody:
        somebody.sees(b"got early\r\n")
        assert somebody.ends() == 0


def test_much_output_is_shown_whole_and_much_input_is_taken(container: Container, at_terminal: AtTerminal) -> None:
    with at_terminal("exec", container.name, "--", "seq", "50000") as somebody:
        assert somebody.ends() == 0
        assert somebody.shown == b"".join(b"%d\r\n" % number for number in range(1, 50001))
    script = "stty raw -echo; echo begun; head -c 307200 | md5sum"
    with at_terminal("exec", container.name, "--", "sh", "-c", script) as somebody:
        somebody.sees(b"begun")
        keys = bytes(range(256)) * 1200
        typing = threading.Thread(target=somebody.type, args=(keys,), daemon=True)
        typing.start()
        expected = subprocess.run(["md5sum"], input=keys, capture_output=True, check=True).stdout.split()[0]
        somebody.sees(expected)
        typing.join()
        assert somebody.ends() == 0


def test_ctrl_c_gets_through_a_flood_of_output(container: Container, at_terminal: AtTerminal) -> None:
    with at_terminal("exec", container.name, "--", "yes") as somebody:
        somebody.sees(b"y\r\n")
        somebody.type(CTRL_C)
        assert somebody.ends() == 128 + signal.SIGINT


def test_what_a_command_leaves_behind_does_not_keep_the_terminal(container: Container, at_terminal: AtTerminal) -> None:
    # by its name: what was open is hung up at the end of the session's leader
    script = (
        "setsid sh -c 'while :; do echo flood >/dev/pts/1; done' 2>/dev/null & echo $! >/tmp/pid; sleep 0.1; exit 4"
    )
    with at_terminal("exec", container.name, "--", "sh", "-c", script) as somebody:
        assert somebody.ends() == 4
        assert b"flood" in somebody.shown
        assert somebody.is_as_before
    sh(container, "kill $(cat /tmp/pid)")


def test_whoever_closes_its_terminal_may_open_it_again(container: Container, at_terminal: AtTerminal) -> None:
    script = (
        "t=$(tty); mkfifo /tmp/f; exec </dev/null >/dev/null 2>&1; read x </tmp/f; echo back >$t; rm /tmp/f; exit 6"
    )
    with at_terminal("exec", container.name, "--", "sh", "-c", script) as somebody:
        eventually(lambda: "f" in sh(container, "ls /tmp").split(), "it has closed it")
        sh(container, "echo >/tmp/f")
        somebody.sees(b"back\r\n")
        assert somebody.ends() == 6


# --- mixed streams ----------------------------------------------------------------------------------------------------


def streams_of(container: Container, at_terminal: AtTerminal, *options: str, **streams: Any) -> str:
    """Return which of a command's streams are terminals."""
    script = "exec 3>/tmp/streams; for fd in 0 1 2; do test -t $fd && printf y >&3 || printf n >&3; done"
    with at_terminal("exec", *options, container.name, "--", "sh", "-c", script, **streams) as somebody:
        assert somebody.ends() == 0, somebody.shown
        assert somebody.is_as_before
    return sh(container, "cat /tmp/streams")


def test_a_terminal_comes_with_stdin_and_stdout_unless_told_otherwise(
    container: Container, at_terminal: AtTerminal, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("w") as file:
        assert streams_of(container, at_terminal) == "yyy"
        assert streams_of(container, at_terminal, stderr=file) == "yyn"
        assert streams_of(container, at_terminal, stdout=file) == "nnn"
        assert streams_of(container, at_terminal, "--no-tty") == "nnn"
        assert streams_of(container, at_terminal, "--tty", stdout=file, stderr=file) == "yyy"


def test_stderr_in_a_file_stays_apart(container: Container, at_terminal: AtTerminal, tmp_path: Path) -> None:
    with (tmp_path / "errors").open("w") as errors:
        script = "echo shown; echo noted >&2"
        with at_terminal("exec", container.name, "--", "sh", "-c", script, stderr=errors) as somebody:
            assert somebody.ends() == 0
            assert somebody.shown == b"shown\r\n"
    assert (tmp_path / "errors").read_text() == "noted\n"


def test_a_terminal_without_one_of_ours_is_refused(container: Container, terminal_service: Service) -> None:
    done = terminal_service.cli("exec", "--tty", container.name, "--", "true")
    assert (done.returncode, done.stdout) == (125, "")
    assert "--tty needs a terminal on stdin" in done.stderr
    assert terminal_service.cli("exec", "-t", "-T", container.name, "--", "true").returncode == 2


# --- ways out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_ends_the_command_and_leaves_the_terminal_as_it_was(
    container: Container, at_terminal: AtTerminal, signum: signal.Signals
) -> None:
    with at_terminal("exec", container.name, "--", "sh", "-c", "echo begun; sleep 1000") as somebody:
        somebody.sees(b"begun")
        assert somebody.is_raw
        somebody.process.send_signal(signum)
        assert somebody.ends() == (130 if signum == signal.SIGINT else -signum)
        assert somebody.is_as_before


def test_a_stop_lends_the_terminal_back_until_it_goes_on(container: Container, terminal_service: Service) -> None:
    shell = ["sh", "-c", 'set -m; "$@"; echo is stopped; read x; fg; echo status $?', "sh"]
    command = terminal_service.command("exec", container.name, "--", "sh", "-c", "echo begun; exec cat")
    with typist([*shell, *command], ROOT) as somebody:
        somebody.sees(b"begun")
        pid = somebody.process.pid
        (ours,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(ours), signal.SIGTSTP)
        somebody.sees(b"is stopped")
        assert somebody.is_as_before
        somebody.resize(50, 100)
        somebody.type(b"\n")
        eventually(lambda: somebody.is_raw, "it goes on")
        somebody.type(b"words\n")
        somebody.sees(b"words\r\nwords\r\n")
        assert sh(container, "stty size </dev/pts/1") == "50 100\n"
        somebody.type(CTRL_D)
        somebody.sees(b"status 0")
        assert somebody.ends() == 0
        assert somebody.is_as_before


def test_a_killed_client_takes_its_command_along(container: Container, at_terminal: AtTerminal) -> None:
    script = "echo begun; (trap '' HUP TERM; sleep 1000) & trap '' HUP TERM; sleep 1001"
    with at_terminal("exec", container.name, "--", "sh", "-c", script) as somebody:
        somebody.sees(b"begun")
        somebody.process.kill()
        assert somebody.ends() == -signal.SIGKILL
        eventually(lambda: inside(container) == ([], ["0"]), "command and terminal are gone")


def test_a_released_container_ends_the_command_and_leaves_the_terminal_as_it_was(
    victim: Container, at_terminal: AtTerminal
) -> None:
    with at_terminal("exec", victim.name, "--", "cat") as somebody:
        eventually(lambda: somebody.is_raw, "it has begun", timeout=30)
        victim.release()
        assert somebody.ends() == 128 + signal.SIGKILL
        assert somebody.is_as_before


def test_a_killed_supervisor_is_an_error_that_leaves_the_terminal_as_it_was(
    container: Container, at_terminal: AtTerminal
) -> None:
    with at_terminal("exec", container.name, "--", "sleep", "1000") as somebody:
        eventually(lambda: somebody.is_raw, "it has begun", timeout=30)
        (command,) = pids_in(container, "sleep")
        os.kill(int(re.search(r"PPid:\t(\d+)", Path(f"/proc/{command}/status").read_text())[1]), signal.SIGKILL)  # type: ignore[index] # it has one
        assert somebody.ends() == 125
        somebody.sees(b"supervisor was killed")
        assert somebody.is_as_before


def test_a_session_survives_the_service(service: Service) -> None:
    pool = service.start(size=1)
    with pool.lease("x", 30) as container:
        with typist(service.command("exec", container.name, "--", "sh"), ROOT) as somebody:
            somebody.sees(b"# ")
            service.kill()
            somebody.type(b"echo $((6*7)); exit 8\n")
            somebody.sees(b"42\r\n")
            assert somebody.ends() == 8
            assert somebody.is_as_before
        service.launch(size=1)
        service.await_ready()


def test_top_says_that_the_service_has_ended_on_the_terminal_as_it_was(service: Service) -> None:
    service.start(size=1)
    with typist(service.command("top", "-n", "0.1"), ROOT) as somebody:
        somebody.sees(rb"\x1b\[\?1049h(?s:.*)running, pid ")
        service.stop()
        assert somebody.ends() == 3
        assert re.search(rb"\x1b\[\?1049l.*no service answers", somebody.shown, re.DOTALL)
        assert somebody.is_as_before


def pids_in(container: Container, name: str) -> list[int]:
    """Return the host's pids of a container's processes of a name."""
    namespace = os.readlink(f"/proc/{container.init_pid}/ns/pid")

    def matches(pid: int) -> bool:
        try:
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            return comm == name and os.readlink(f"/proc/{pid}/ns/pid") == namespace
        except OSError:  # it has ended meanwhile
            return False

    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and matches(int(entry))]


# --- a hostile container ----------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("mount -t tmpfs none /dev/pts", "no devpts at /dev/pts"),
        ("umount -l /dev/pts", "no devpts at /dev/pts"),
        ("umount -l /dev/pts && rmdir /dev/pts && ln -s /tmp /dev/pts", "no devpts at /dev/pts"),
        ("umount -l /dev/pts && rmdir /dev/pts && mkfifo /dev/pts", "Not a directory"),
        ("umount -l /dev/pts && rmdir /dev/pts", "No such file"),
        ("mount --bind /dev/null /dev/pts/ptmx", "mounted over it"),
        ("mkfifo /tmp/f && mount --bind /tmp/f /dev/pts/ptmx", "mounted over it"),
        (
            "mount -t devpts -o max=1,ptmxmode=666 devpts /dev/pts && (sleep 1000 >/dev/pts/ptmx 2>&1 &)",
            "No space left",
        ),
    ],
)
def test_a_container_without_a_usable_devpts_is_told_of_and_does_not_hang(
    victim: Container, at_terminal: AtTerminal, script: str, complaint: str
) -> None:
    spoil(victim, script)
    with pytest.raises(ExecFailed, match=complaint):
        victim.popen(["true"], tty=True)
    with at_terminal("exec", victim.name, "--", "true") as somebody:
        assert somebody.ends() == 125
        somebody.sees(complaint.encode())
        assert somebody.is_as_before
    assert sh(victim, "echo well") == "well\n"


@pytest.mark.host
@pytest.mark.parametrize(
    "script",
    [
        "umount /dev/ptmx; rm /dev/ptmx && ln -s /dev/null /dev/ptmx",
        "umount /dev/ptmx /dev/tty; rm /dev/ptmx /dev/tty && mkfifo /dev/ptmx /dev/tty",
        "mount -t devpts -o ptmxmode=000 devpts /dev/pts",
        "mount --bind /dev/null /dev/ptmx",
    ],
)
def test_what_a_container_does_elsewhere_in_dev_changes_nothing(victim: Container, script: str) -> None:
    spoil(victim, script)
    with victim.popen(["sh", "-c", "test -t 0 && echo well"], tty=True) as process:
        assert process.terminal is not None
        assert read_all(process.terminal) == b"well\r\n"
        assert process.wait(10) == 0


def test_nothing_is_typed_at_our_terminal_from_inside(container: Container, at_terminal: AtTerminal) -> None:
    script = "printf '\\033[6n'; stty size >/dev/tty; stty -F /dev/tty rows 1; echo shown; read x; echo got $x"
    with at_terminal("exec", container.name, "--", "sh", "-c", script) as somebody:
        somebody.sees(rb"\x1b\[6n24 80\r\nshown")  # what it writes is shown, escape sequences, too
        assert somebody.size == (24, 80)
        somebody.type(b"words\n")
        somebody.sees(b"got words")
        assert somebody.ends() == 0
        assert somebody.is_as_before


# --- pipes ------------------------------------------------------------------------------------------------------------

GIBIBYTE = 1 << 30


def test_a_callers_pipes_are_the_commands_own_streams(container: Container) -> None:
    """The very same, so that nobody between copies anything."""
    pipes = [os.pipe() for _ in range(3)]
    stdin, stdout, stderr = pipes[0][0], pipes[1][1], pipes[2][1]
    inodes = [os.fstat(descriptor).st_ino for descriptor in (stdin, stdout, stderr)]
    script = "inodes=$(stat -L -c %i /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2); echo $inodes >/tmp/inodes"
    try:
        container.run(["sh", "-c", script], stdin=stdin, stdout=stdout, stderr=stderr, check=True, timeout=10)
    finally:
        for descriptor in (end for pipe in pipes for end in pipe):
            os.close(descriptor)
    assert [int(inode) for inode in sh(container, "cat /tmp/inodes").split()] == inodes
    with container.popen(["sh", "-c", "stat -L -c %i /proc/self/fd/1"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.read()) == os.fstat(process.stdout.fileno()).st_ino


@pytest.mark.host
def test_a_gibibyte_goes_through_pipes_byte_for_byte(container: Container, terminal_service: Service) -> None:
    block = os.urandom((1 << 20) - 8)
    with subprocess.Popen(
        terminal_service.command("exec", container.name, "--", "cat"),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin = process.stdin

        def feed() -> None:
            with stdin:
                for number in range(GIBIBYTE >> 20):
                    stdin.write(number.to_bytes(8, "big"))
                    stdin.write(block)

        feeder = threading.Thread(target=feed)
        feeder.start()
        for number in range(GIBIBYTE >> 20):
            assert process.stdout.read(8) == number.to_bytes(8, "big")
            assert process.stdout.read(len(block)) == block
        assert process.stdout.read() == b""
        feeder.join()
        assert process.wait(30) == 0
