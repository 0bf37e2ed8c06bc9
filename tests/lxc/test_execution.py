"""Commands in real containers: streams, statuses, errors, confinement, and what is left afterwards."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lxc_pool.client.process import Launch, Process, run
from lxc_pool.errors import ExecFailed
from lxc_pool.execution import cgroups, namespaces, packets, strays
from lxc_pool.execution.launcher import Launcher, check_stdio
from lxc_pool.execution.protocol import ExecRequest
from lxc_pool.execution.supervisor import HEADER, Supervisor
from tests.lxc.exec_container import ExecContainer, running
from tests.support.waiting import ends, pidfd

PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("lxc-start", "lxc-stop", "busybox"))),
    reason="needs root, lxc and busybox",
)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A directory that a container's shifted root can reach, as pytest's own can't be."""
    path = Path(tempfile.mkdtemp(prefix="lxc_pool-exec."))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as opened:
        yield opened


@pytest.fixture(scope="module", params=["privileged", "idmapped"])
def container(request: pytest.FixtureRequest, directory: Path, launcher: Launcher) -> Iterator[ExecContainer]:
    name = f"exec-{os.getpid()}-{request.param}"
    with running(directory, name, launcher, idmapped=request.param == "idmapped") as made:
        yield made
    eventually(lambda: not made.cgroups(), "cgroups of a stopped container")


@pytest.fixture
def own(directory: Path, launcher: Launcher) -> Iterator[ExecContainer]:
    """A container that the test may end."""
    with running(directory, f"exec-{os.getpid()}-own", launcher) as made:
        yield made
    eventually(lambda: not made.cgroups(), "cgroups of a stopped container")


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that a test leaves no process in the container, no descriptor and no thread of its own."""
    container: ExecContainer | None = None
    if "container" in request.fixturenames:
        container = request.getfixturevalue("container")
        container.run(["true"], stdin=DEVNULL)
    fds, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    if container is not None:
        init = container.init_pid
        made = container
        eventually(lambda: made.pids() == {init}, f"processes beside init {init}: {container.pids()}")
        container.run(["true"], stdin=DEVNULL)  # that is when cgroups of background processes are removed
        eventually(lambda: not own_cgroups(made), f"cgroups of commands: {own_cgroups(made)}")
        eventually(lambda: len(set(os.listdir("/proc/self/fd")) - fds) <= 1, "descriptors")  # one is listdir's own
    eventually(lambda: threading.active_count() <= threads, "threads")


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for what other processes do on their own time; a test has no event for it."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"still there: {what}"
        time.sleep(0.005)


def own_cgroups(container: ExecContainer) -> list[Path]:
    return [path for place in container.cgroups() for path in place.glob("**/lxc_pool.*")]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_streams_are_kept_apart(container: ExecContainer) -> None:
    result = container.run(["sh", "-c", "echo out; echo err >&2"], capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"out\n", b"err\n")
    assert result.args == ["sh", "-c", "echo out; echo err >&2"]


def test_stderr_can_join_stdout(container: ExecContainer) -> None:
    result = container.run(["sh", "-c", "echo out; echo err >&2"], stdout=PIPE, stderr=STDOUT)
    assert (result.stdout, result.stderr) == (b"out\nerr\n", None)


def test_input_comes_back(container: ExecContainer) -> None:
    assert container.run(["cat"], input=b"a\0b", capture_output=True).stdout == b"a\0b"
    assert container.run(["cat"], input="ä\n", capture_output=True, text=True, encoding="utf-8").stdout == "ä\n"
    assert container.run(["printf", "a\\r\\nb"], capture_output=True, text=True).stdout == "a\nb"


def test_input_of_the_wrong_type_is_refused(container: ExecContainer) -> None:
    with pytest.raises(TypeError):
        container.run(["cat"], input="text")
    with pytest.raises(TypeError):
        container.run(["cat"], input=b"bytes", text=True)


def test_64_mib_go_both_ways(container: ExecContainer) -> None:
    data = os.urandom(1024 * 1024) * 64
    assert container.run(["cat"], input=data, stdout=PIPE).stdout == data


def test_input_that_is_not_read_is_no_error(container: ExecContainer) -> None:
    assert container.run(["true"], input=b"x" * 1_000_000, capture_output=True).returncode == 0


def test_devnull(container: ExecContainer) -> None:
    result = container.run(["sh", "-c", "cat; echo x; stat -L -c %t:%T /proc/self/fd/0"], stdin=DEVNULL, stdout=PIPE)
    assert result.stdout == b"x\n1:3\n"
    assert container.run(["sh", "-c", "echo x"], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL).returncode == 0


def test_files_of_the_caller_are_copied(container: ExecContainer, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from a file\n")
    with (tmp_path / "in").open() as source, (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        script = "cat; echo err >&2; stat -L -c %F /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2"
        container.run(["sh", "-c", script], stdin=source, stdout=out, stderr=err.fileno(), check=True)
    assert (tmp_path / "out").read_text() == "from a file\n" + "fifo\n" * 3
    assert (tmp_path / "err").read_text() == "err\n"


def test_one_file_for_both_outputs_keeps_the_order(container: ExecContainer, tmp_path: Path) -> None:
    script = "for i in 1 2 3; do echo out $i; echo err $i >&2; done"
    with (tmp_path / "out").open("w") as out:
        container.run(["sh", "-c", script], stdin=DEVNULL, stdout=out, stderr=out)
    assert (tmp_path / "out").read_text().split("\n")[:4] == ["out 1", "err 1", "out 2", "err 2"]


def test_much_data_through_files(container: ExecContainer, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 8
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as out:
        container.run(["cat"], stdin=source, stdout=out, check=True)
    assert (tmp_path / "out").read_bytes() == data


def test_a_terminal_of_the_caller_never_enters(container: ExecContainer) -> None:
    master, terminal = os.openpty()
    try:
        container.run(["sh", "-c", "test ! -t 1 && echo seen"], stdin=terminal, stdout=terminal, stderr=terminal)
        assert os.read(master, 100) == b"seen\r\n"
    finally:
        os.close(master)
        os.close(terminal)


def test_a_terminal_as_stdin_is_not_waited_for(container: ExecContainer) -> None:
    master, terminal = os.openpty()
    try:
        assert container.run(["true"], stdin=terminal, stdout=DEVNULL, timeout=10).returncode == 0
        os.write(master, b"typed\n")
        assert container.run(["head", "-n1"], stdin=terminal, stdout=PIPE, timeout=10).stdout == b"typed\n"
    finally:
        os.close(master)
        os.close(terminal)


def test_a_socket_of_the_caller_is_copied(container: ExecContainer) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        process = container.popen(["sh", "-c", "cat; stat -L -c %F /proc/self/fd/1"], stdin=theirs, stdout=theirs)
        ours.sendall(b"hello\n")
        ours.shutdown(socket.SHUT_WR)
        process.wait(10)
        process.close()
        assert ours.recv(100) == b"hello\nfifo\n"


def test_pipes_of_the_caller_are_passed_themselves(container: ExecContainer) -> None:
    read, write = os.pipe()
    with open(read, "rb") as reader:
        process = container.popen(["echo", "hi"], stdin=DEVNULL, stdout=write)
        os.close(write)
        assert reader.read() == b"hi\n"
        assert process.wait(10) == 0
        process.close()


@pytest.mark.parametrize("user", [None, "alice"])
def test_a_command_can_open_its_streams_again(container: ExecContainer, user: str | None) -> None:
    result = container.run(
        ["sh", "-c", "cat /proc/self/fd/0 >/proc/$$/fd/2"], input=b"x", capture_output=True, user=user
    )
    assert result.stderr == b"x"


def test_a_closed_stream_is_devnull(container: ExecContainer) -> None:
    saved = os.dup(0)
    os.close(0)
    try:
        assert container.run(["cat"], stdout=PIPE).stdout == b""
    finally:
        os.dup2(saved, 0)
        os.close(saved)


# --- statuses, signals, errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 2, 3, 77, 125, 126, 127, 128, 137, 254, 255])
def test_exit_statuses(container: ExecContainer, status: int) -> None:
    assert container.run(["sh", "-c", f"exit {status}"], stdin=DEVNULL).returncode == status


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGPIPE, signal.SIGINT, signal.SIGSEGV])
def test_a_signal_is_a_negative_returncode(container: ExecContainer, signum: int) -> None:
    assert container.run(["sh", "-c", f"kill -{int(signum)} $$; sleep 5"], stdin=DEVNULL).returncode == -signum


def test_check(container: ExecContainer) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        container.run(["sh", "-c", "echo x; exit 3"], capture_output=True, check=True)
    assert (caught.value.returncode, caught.value.output, caught.value.stderr) == (3, b"x\n", b"")


@pytest.mark.parametrize("program", ["no-such-program", "/no/such", "", "./no-such"])
def test_a_missing_program(container: ExecContainer, program: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        container.run([program])
    assert caught.value.filename == program


def test_a_program_that_is_not_executable(container: ExecContainer) -> None:
    for program in ("not-executable", "/bin/not-executable", "/etc"):
        with pytest.raises(PermissionError) as caught:
            container.run([program])
        assert caught.value.filename == program


def test_a_missing_cwd(container: ExecContainer) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        container.run(["true"], cwd="/nowhere")
    assert caught.value.filename == "/nowhere"
    with pytest.raises(NotADirectoryError):
        container.run(["true"], cwd="/etc/passwd")


def test_arguments_that_are_too_long(container: ExecContainer) -> None:
    with pytest.raises(OSError, match="too long"):
        container.run(["true", "x" * 200_000])
    assert container.run(["sh", "-c", "echo $#", *(["y" * 1000] * 1000)], stdout=PIPE).stdout == b"999\n"
    with pytest.raises(ValueError, match="2097152"):
        container.run(["true", "x" * 3_000_000])


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ([], {}),
        (["a\0b"], {}),
        (["true"], {"input": b"", "stdin": PIPE}),
        (["true"], {"capture_output": True, "stdout": PIPE}),
        (["true"], {"stdin": STDOUT}),
        (["true"], {"stdout": STDOUT}),
        (["true"], {"env": {"A=B": "c"}}),
        (["true"], {"user": "no-such-user"}),
        (["true"], {"user": "root:no-such-group"}),
    ],
)
def test_wrong_values(container: ExecContainer, args: list[str], options: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the texts are subprocess's
        container.run(args, **options)


# --- where, as whom, with what ----------------------------------------------------------------------------------------


def test_cwd(container: ExecContainer) -> None:
    assert container.sh("pwd") == "/\n"
    assert container.sh("pwd", cwd="/home/alice") == "/home/alice\n"
    assert container.sh("pwd", cwd="home") == "/home\n"


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (None, "0 0 0 /root root"),
        ("root", "0 0 0 /root root"),
        ("alice", "1000 1000 1000 29 44 /home/alice alice"),
        (1000, "1000 1000 1000 29 44 /home/alice alice"),
        ("1000", "1000 1000 1000 29 44 /home/alice alice"),
        ("alice:audio", "1000 29 29 /home/alice alice"),
        ("1000:7", "1000 7 7 /home/alice alice"),
        (4242, "4242 4242 4242 / 4242"),
    ],
)
def test_user(container: ExecContainer, user: str | int | None, expected: str) -> None:
    assert container.sh("echo $(id -u) $(id -g) $(id -G) $HOME $USER", user=user) == expected + "\n"


def test_a_user_has_no_capabilities_and_no_way_into_others_directories(container: ExecContainer) -> None:
    assert "CapEff:\t0000000000000000" in container.sh("cat /proc/self/status", user="alice")
    with pytest.raises(PermissionError) as caught:
        container.run(["true"], user="alice", cwd="/locked")
    assert caught.value.filename == "/locked"


def test_the_environment_does_not_leak(container: ExecContainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAK", "1")
    variables = set(container.run(["env"], stdin=DEVNULL, stdout=PIPE, text=True).stdout.splitlines())
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert variables == {path, "HOME=/root", "USER=root", "LANG=C.UTF-8"}
    more = container.run(["env"], stdin=DEVNULL, stdout=PIPE, text=True, env={"A": "b", "HOME": "/x"}).stdout
    assert set(more.splitlines()) == {path, "A=b", "HOME=/x", "USER=root", "LANG=C.UTF-8"}


def test_the_program_is_looked_for_in_the_commands_own_path(container: ExecContainer) -> None:
    with pytest.raises(FileNotFoundError):
        container.run(["true"], env={"PATH": "/nowhere"})


def test_signals_and_umask_are_the_default(container: ExecContainer) -> None:
    status = container.sh("umask; exec cat /proc/self/status")
    assert status.startswith("0022\n")
    for field in ("SigBlk", "SigIgn"):
        assert f"{field}:\t0000000000000000" in status
    assert container.sh("echo $(cut -d' ' -f6 /proc/self/stat) $$").split()[0] != "0", "it leads a session"


def test_no_descriptor_of_the_host_enters(container: ExecContainer) -> None:
    # fd 3 is ls's own, of the directory it lists
    listed = container.run(["ls", "/proc/self/fd"], stdin=DEVNULL, capture_output=True, text=True).stdout
    assert listed.split() == ["0", "1", "2", "3"]


def test_the_commands_null_device_is_not_the_hosts(container: ExecContainer) -> None:
    before = os.stat("/dev/null")
    container.run(["sh", "-c", "chmod 600 /proc/self/fd/0; chmod 666 /dev/null"], stdin=DEVNULL)
    assert os.stat("/dev/null").st_mode == before.st_mode


def test_every_cgroup_is_inits(container: ExecContainer) -> None:
    process = container.popen(["cat"], stdin=PIPE)
    inits, its = (
        dict(line.split(":", 2)[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
        for pid in (container.init_pid, process.pid)
    )
    # But for the one of its own, which is in version 2's hierarchy, and in the freezer's where that is not mounted.
    holder = "" if "" in its else next(controllers for controllers in its if "freezer" in controllers.split(","))
    above = inits.pop(holder)
    assert above != "/"
    assert its.pop(holder).startswith(f"{above}/lxc_pool.")
    assert its == inits
    process.communicate()
    process.close()


def test_every_namespace_is_inits(container: ExecContainer) -> None:
    process = container.popen(["cat"], stdin=PIPE)
    for kind in os.listdir(f"/proc/{container.init_pid}/ns"):
        its, inits = (os.readlink(f"/proc/{pid}/ns/{kind}") for pid in (process.pid, container.init_pid))
        assert its == inits, kind
    process.communicate()
    process.close()


def test_capabilities_are_inits(container: ExecContainer) -> None:
    def capabilities(status: str) -> dict[str, str]:
        return {line.split()[0]: line.split()[1] for line in status.splitlines() if line.startswith("Cap")}

    inits = capabilities(Path(f"/proc/{container.init_pid}/status").read_text())
    its = capabilities(container.run(["cat", "/proc/self/status"], stdout=PIPE, text=True).stdout)
    assert its == inits
    assert not int(its["CapBnd:"], 16) >> 16 & 1, "sys_module is dropped by the container's configuration"


@pytest.mark.parametrize("idmapped", [False, True])
def test_seccomp_filters_limits_and_oom_score_are_inits(directory: Path, launcher: Launcher, idmapped: bool) -> None:
    extra = "lxc.prlimit.nofile = 300:400\nlxc.proc.oom_score_adj = 100\nlxc.no_new_privs = 1\n"
    name = f"exec-{os.getpid()}-filtered"
    with running(directory, name, launcher, idmapped=idmapped, seccomp=True, extra=extra) as made:
        for _ in range(2):
            status = made.sh("ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj /proc/self/status")
            assert status.startswith("300\n400\n100\n")
            assert "Seccomp:\t2" in status
            assert "NoNewPrivs:\t1" in status
            result = made.run(["mkdir", "/tmp/x"], capture_output=True)
            assert b"not supported" in result.stderr
        assert "TracerPid:\t0" in Path(f"/proc/{made.init_pid}/status").read_text()


# --- time and ends ----------------------------------------------------------------------------------------------------


def test_a_timeout_leaves_nothing_and_keeps_the_output(container: ExecContainer) -> None:
    script = "echo out; echo err >&2; setsid sh -c 'trap \"\" TERM HUP; sleep 1000' & sleep 1000"
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        container.run(["sh", "-c", script], capture_output=True, timeout=0.5)
    assert container.pids() == {container.init_pid}
    assert 0.5 <= time.monotonic() - began < 20
    assert (caught.value.output, caught.value.stderr, caught.value.timeout) == (b"out\n", b"err\n", 0.5)


def test_a_timeout_kills_what_a_command_that_ended_left(container: ExecContainer) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        container.run(["sh", "-c", "sleep 1000 & exit 0"], stdin=DEVNULL, stdout=PIPE, timeout=0.3)
    assert container.pids() == {container.init_pid}


def test_a_timeout_of_zero(container: ExecContainer) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        container.run(["sleep", "1000"], timeout=0)
    assert container.pids() == {container.init_pid}
    with pytest.raises(subprocess.TimeoutExpired):
        container.run(["sleep", "1000"], timeout=0.05)


def test_a_keyboard_interrupt_kills_the_tree(container: ExecContainer) -> None:
    main = threading.main_thread().ident
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        container.run(["sh", "-c", "sleep 1000 & sleep 1000"], capture_output=True)
    timer.join()
    assert container.pids() == {container.init_pid}
    with pytest.raises(KeyboardInterrupt), container.popen(["sleep", "1000"]):
        raise KeyboardInterrupt
    assert container.pids() == {container.init_pid}


def test_a_dead_client_takes_its_command_along(container: ExecContainer) -> None:
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            container.popen(["sh", "-c", "setsid sleep 1000 & sleep 1000"], stdin=DEVNULL, stdout=DEVNULL)
            signal.pause()
        os._exit(1)
    eventually(lambda: len(container.pids()) >= 3, "the command is not there")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    eventually(lambda: container.pids() == {container.init_pid}, "processes of the dead client")


def test_background_processes_survive_a_normal_exit(container: ExecContainer) -> None:
    assert container.run(["sh", "-c", "sleep 1000 >/dev/null 2>&1 & exit 0"], stdin=DEVNULL).returncode == 0
    assert len(container.pids()) == 2
    container.run(["killall", "sleep"], check=True)


def test_a_background_process_can_be_killed_with_the_tree(container: ExecContainer) -> None:
    process = container.popen(["sh", "-c", "sleep 1000 & exit 3"], stdin=DEVNULL, stdout=DEVNULL)
    assert process.wait(10) == 3
    assert len(container.pids()) == 2
    process.kill_tree()
    assert container.pids() == {container.init_pid}
    assert process.wait(0) == 3
    process.close()


def test_a_background_process_goes_on_writing_to_the_callers_file(container: ExecContainer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as out:
        container.run(["sh", "-c", "echo one; (sleep 0.3; echo two) & exit 0"], stdin=DEVNULL, stdout=out)
    assert log.read_text() == "one\n"
    eventually(lambda: log.read_text() == "one\ntwo\n", "not yet written")


def test_popen(container: ExecContainer) -> None:
    with container.popen(
        ["sh", "-c", "read a; echo got $a; exit 4"], stdin=PIPE, stdout=PIPE, text=True, bufsize=1
    ) as p:
        assert p.poll() is None
        assert Path(f"/proc/{p.pid}").exists()
        with pytest.raises(subprocess.TimeoutExpired):
            p.wait(0.05)
        assert p.stdin is not None
        assert p.stdout is not None
        p.stdin.write("this\n")
        assert p.stdout.readline() == "got this\n"
    assert p.returncode == p.poll() == p.wait() == 4
    p.kill()
    assert "returncode: 4" in repr(p)


def test_signals_go_to_the_main_process(container: ExecContainer) -> None:
    script = "trap 'echo usr1; exit 5' USR1; echo ready; while :; do sleep 0.01; done"
    with container.popen(["sh", "-c", script], stdin=DEVNULL, stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(0)
        process.send_signal(signal.SIGUSR1)
        assert process.communicate() == ("usr1\n", None)
    assert process.returncode == 5
    with pytest.raises(ValueError, match="99"):
        process.send_signal(99)
    for end, code in ((Process.terminate, -signal.SIGTERM), (Process.kill, -signal.SIGKILL)):
        with container.popen(["sleep", "1000"], stdin=DEVNULL) as process:
            end(process)
            assert process.wait(10) == code


def test_communicate_can_be_resumed(container: ExecContainer) -> None:
    process = container.popen(["sh", "-c", "cat; echo a; sleep 0.3; echo b"], stdin=PIPE, stdout=PIPE)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        process.communicate(b"in\n", timeout=0.1)
    assert caught.value.output == b"in\na\n"
    with pytest.raises(ValueError, match="input"):
        process.communicate(b"more")
    assert process.communicate() == (b"in\na\nb\n", None)
    process.close()


def test_communicate_keeps_what_was_buffered(container: ExecContainer) -> None:
    process = container.popen(["sh", "-c", "echo a; echo b"], stdin=DEVNULL, stdout=PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"a\n"
    assert process.communicate() == (b"b\n", None)
    process.close()


def test_a_forgotten_process_warns_and_is_killed(container: ExecContainer) -> None:
    process: Process | None = container.popen(["sleep", "1000"], stdin=DEVNULL)
    assert process is not None
    with pytest.warns(ResourceWarning, match="still running"):
        del process


def test_several_threads_may_wait_and_kill(container: ExecContainer) -> None:
    process = container.popen(["sleep", "1000"], stdin=DEVNULL)
    with ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(process.wait, 20) for _ in range(3)]
        process.kill_tree()
        assert {wait.result() for wait in waits} == {-signal.SIGKILL}
    process.close()


def test_many_at_once(container: ExecContainer) -> None:
    def one(number: int) -> bytes:
        return bytes(container.run(["sh", "-c", f"echo {number}; cat"], input=b"x" * 100_000, stdout=PIPE).stdout)

    with ThreadPoolExecutor(12) as pool:
        for number, output in enumerate(pool.map(one, range(60))):
            assert output == b"%d\n" % number + b"x" * 100_000


def test_descriptors_stay_level_and_nobody_becomes_a_zombie(container: ExecContainer) -> None:
    agent = container.launcher.agent_pid
    assert agent is not None

    def state() -> tuple[int, int, int]:
        family = [agent, *descendants(agent)]
        return len(family), sum(map(descriptors, family)), descriptors(os.getpid())

    container.run(["true"], stdin=DEVNULL)
    before = state()
    for number in range(200):
        if number % 4 == 0:
            with pytest.raises(FileNotFoundError):
                container.run(["missing"])
        else:
            container.run(["true"], stdin=DEVNULL, capture_output=number % 2 == 0)
    eventually(lambda: all(now <= then for now, then in zip(state(), before, strict=True)), f"{state()}, not {before}")


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open: none, if it has just ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def parent(pid: int) -> int:
    """Return a process's parent: of a command, that is its supervisor."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("PPid")).split()[1])


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return []
    return [found for child in children for found in (child, *descendants(child))]


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_containers_death_ends_its_commands(own: ExecContainer) -> None:
    process = own.popen(["sleep", "1000"], stdin=DEVNULL)
    os.kill(own.init_pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    process.close()
    with pytest.raises(ExecFailed, match=r"ended|entering the container"):
        own.run(["true"])


def test_a_killed_agent_is_replaced_and_its_commands_go_on(container: ExecContainer) -> None:
    agent = container.launcher.agent_pid
    assert agent is not None
    with container.popen(["cat"], stdin=PIPE, stdout=PIPE) as process:
        os.kill(agent, signal.SIGKILL)
        eventually(lambda: is_dead(agent), "the agent")
        assert container.sh("echo again") == "again\n"
        container.launcher._lines.pop(os.getuid()).close()
        assert container.sh("echo anew") == "anew\n"
        assert container.launcher.agent_pid != agent
        assert process.communicate(b"still here")[0] == b"still here"
    assert process.returncode == 0


def test_commands_outlive_the_launcher(container: ExecContainer) -> None:
    with Launcher() as other:
        process = Process.start(
            lambda request, fds: other.launch(0, request, fds, (container.init_pidfd, container.init_pid)),
            ["cat"],
            stdin=PIPE,
            stdout=PIPE,
        )
    with pytest.raises(ExecFailed, match="closed"):
        run(lambda request, fds: other.launch(0, request, fds, (container.init_pidfd, 1)), ["true"])
    assert process.communicate(b"on and on")[0] == b"on and on"
    process.close()


def test_a_user_has_one_supervisor_which_ends_with_the_last_command(
    container: ExecContainer, own: ExecContainer
) -> None:
    """One that somebody hangs, or that is killed, is their own; and a container costs none before its first command."""
    with Launcher() as launcher, contextlib.ExitStack() as stack:

        def start(uid: int, place: ExecContainer) -> Process:
            def launch(request: ExecRequest, fds: tuple[int, int, int, int]) -> None:
                launcher.launch(uid, request, fds, (place.init_pidfd, place.init_pid))

            return stack.enter_context(Process.start(launch, ["cat"], stdin=PIPE))

        mine, mine_too, another = start(1, container), start(1, own), start(2, own)
        supervisor = parent(mine.pid)
        assert parent(mine_too.pid) == supervisor
        assert parent(another.pid) != supervisor
        launcher.close()
        mine.communicate(b"")
        assert not is_dead(supervisor)
        mine_too.communicate(b"")
        eventually(lambda: is_dead(supervisor), "the supervisor")
        another.communicate(b"")


def test_a_frozen_container_keeps_no_other_command_waiting(
    container: ExecContainer, directory: Path, launcher: Launcher
) -> None:
    """Not even its first one, for which its init has to stand still."""

    def tell(command: str) -> None:
        place = ["-P", str(frozen.lxcpath), "-n", frozen.name]
        subprocess.run([command, *place], check=True, stdin=DEVNULL, timeout=10)

    with running(directory, f"exec-{os.getpid()}-frozen", launcher, seccomp=True) as frozen:
        tell("lxc-freeze")
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                frozen.run(["touch", "/tmp/given-up"], timeout=0.2)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(frozen.run, ["echo", "thawed"], stdout=PIPE)
                assert container.sh("echo warm") == "warm\n"
                assert not waiting.done()
                tell("lxc-unfreeze")
                assert waiting.result(10).stdout == b"thawed\n"
        finally:
            tell("lxc-unfreeze")
        assert frozen.run(["test", "-e", "/tmp/given-up"]).returncode == 1


def test_a_command_that_is_frozen_on_its_way_in_holds_nothing_of_another_containers(
    container: ExecContainer, own: ExecContainer
) -> None:
    own.run(["true"])  # the way in is known
    place = ["-P", str(own.lxcpath), "-n", own.name]
    with container.popen(["cat"], stdin=PIPE, stdout=PIPE) as running, ThreadPoolExecutor(1) as pool:
        subprocess.run(["lxc-freeze", *place], check=True, stdin=DEVNULL, timeout=10)
        try:
            waiting = pool.submit(own.run, ["true"])
            eventually(lambda: bool(own_cgroups(own)), "it is on its way")
            time.sleep(0.3)  # it stands still before it has let go of what is its supervisor's; nothing tells of that
            running.kill_tree()
            assert running.wait(30) == -signal.SIGKILL
            assert running.communicate(timeout=30)[0] == b""
            assert not waiting.done()
        finally:
            subprocess.run(["lxc-unfreeze", *place], check=True, stdin=DEVNULL, timeout=10)
        assert waiting.result(10).returncode == 0


def test_who_finds_init_traced_waits_for_a_moment(directory: Path, launcher: Launcher) -> None:
    with running(directory, f"exec-{os.getpid()}-traced", launcher, seccomp=True) as traced:
        tracee = namespaces.Tracee(traced.init_pid)  # as another user's supervisor does
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(traced.run, ["echo", "untraced"], stdout=PIPE)
            with pytest.raises(TimeoutError):
                waiting.result(0.1)
            eventually(lambda: tracee.seccomp_filters() is not None, "it stands still, and goes on")
            assert waiting.result(10).stdout == b"untraced\n"


def test_a_container_whose_init_stays_traced_can_not_be_entered(directory: Path, launcher: Launcher) -> None:
    with running(directory, f"exec-{os.getpid()}-traced", launcher, seccomp=True) as traced:
        tracee = namespaces.Tracee(traced.init_pid)
        with pytest.raises(ExecFailed, match="not permitted"):
            traced.run(["true"])
        eventually(lambda: tracee.seccomp_filters() is not None, "it stands still, and goes on")
        assert traced.run(["true"]).returncode == 0


def test_a_container_that_ends_while_its_first_command_waits_ends_that(directory: Path, launcher: Launcher) -> None:
    with running(directory, f"exec-{os.getpid()}-ended", launcher, seccomp=True) as frozen:
        place = ["-P", str(frozen.lxcpath), "-n", frozen.name]
        subprocess.run(["lxc-freeze", *place], check=True, stdin=DEVNULL, timeout=10)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(frozen.run, ["true"])
            with pytest.raises(subprocess.TimeoutExpired):
                frozen.run(["true"], timeout=0.2)
            os.kill(frozen.init_pid, signal.SIGKILL)
            subprocess.run(["lxc-unfreeze", *place], check=False, stdin=DEVNULL, timeout=10)
            with pytest.raises(ExecFailed, match="ended"):
                waiting.result(10)
    eventually(lambda: not frozen.cgroups(), "cgroups of a stopped container")


def test_a_supervisor_without_descriptors_refuses_commands_and_goes_on(container: ExecContainer) -> None:
    with container.popen(["cat"], stdin=PIPE, stdout=PIPE) as process:
        supervisor = parent(process.pid)
        allowed = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
        outcomes = []
        for spare in range(13):
            numbers = map(int, os.listdir(f"/proc/{supervisor}/fd"))
            resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (max(numbers) + 1 + spare, allowed[1]))
            try:
                outcomes.append(container.run(["true"]).returncode)
            except ExecFailed:
                outcomes.append(-1)
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, allowed)
        assert outcomes[0] == -1
        assert outcomes[-1] == 0
        assert process.communicate(b"still here")[0] == b"still here"
    with container.popen(["cat"], stdin=PIPE) as process:
        assert parent(process.pid) == supervisor


def test_a_killed_supervisor_takes_its_command_along(container: ExecContainer) -> None:
    process = container.popen(["sleep", "1000"], stdin=DEVNULL)
    os.kill(parent(process.pid), signal.SIGKILL)
    with pytest.raises(ExecFailed, match="supervisor"):
        process.wait(10)
    with pytest.raises(ExecFailed):
        process.poll()
    process.close()
    eventually(lambda: container.pids() == {container.init_pid}, "the command")
    assert container.sh("echo again") == "again\n"
    for left in own_cgroups(container):
        left.rmdir()


def test_a_supervisor_without_descriptors_starts_nothing_more_and_goes_on_with_what_runs(
    container: ExecContainer,
) -> None:
    with container.popen(["cat"], stdin=PIPE, stdout=PIPE) as process:
        supervisor = parent(process.pid)
        most = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{supervisor}/fd"))
        for spare in range(12):  # a command takes so many, for a moment
            resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (used + spare, most[1]))
            with pytest.raises(ExecFailed) if spare < 2 else contextlib.suppress(ExecFailed):
                container.run(["true"], timeout=10)
            assert parent(process.pid) == supervisor
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, most)
        assert container.sh("echo again") == "again\n"
        assert process.communicate(b"on and on", timeout=10)[0] == b"on and on"


def test_a_stopped_container_leaves_no_cgroup_behind(directory: Path, launcher: Launcher) -> None:
    for _ in range(5):
        with running(directory, f"exec-{os.getpid()}-brief", launcher) as made:
            made.run(["sh", "-c", "sleep 1000 & exit 0"], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        eventually(lambda made=made: not made.cgroups(), "cgroups")  # type: ignore[misc] # mypy: default


def test_a_containers_cgroups_are_left_to_its_monitor_while_that_lives(
    own: ExecContainer, container: ExecContainer
) -> None:
    """It would read in one that is gone for ever (liblxc 5.0.2, version 2)."""
    command = own.popen(["sleep", "1000"], stdin=DEVNULL, stdout=DEVNULL)
    eventually(lambda: bool(own_cgroups(own)), "the command is in")
    before = own.cgroups()
    monitor = parent(own.init_pid)
    with pidfd(monitor) as descriptor:
        os.kill(monitor, signal.SIGSTOP)
        try:
            signal.pidfd_send_signal(own.init_pidfd, signal.SIGKILL)
            assert command.wait(10) != 0
            container.run(["true"], stdin=DEVNULL)  # their supervisor has done with the other one then
            assert not own_cgroups(own)
            assert own.cgroups() == before
        finally:
            os.kill(monitor, signal.SIGCONT)
        assert ends(descriptor)
    eventually(lambda: not own.cgroups(), "cgroups of a container that has ended")


def test_a_frozen_container_does_not_defeat_a_timeout(own: ExecContainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lxc_pool.client.control.KILL_TIMEOUT", 1.0)
    own.run(["true"])
    subprocess.run(["lxc-freeze", "-P", str(own.lxcpath), "-n", own.name], check=True, stdin=DEVNULL, timeout=10)
    began = time.monotonic()
    try:
        with pytest.raises((subprocess.TimeoutExpired, ExecFailed)):
            own.run(["touch", "/tmp/late"], timeout=0.2)
        assert time.monotonic() - began < 20
    finally:
        subprocess.run(["lxc-unfreeze", "-P", str(own.lxcpath), "-n", own.name], check=True, stdin=DEVNULL, timeout=10)
    eventually(lambda: own.pids() == {own.init_pid}, "the withdrawn command")
    assert own.run(["test", "-e", "/tmp/late"]).returncode == 1


def test_bad_packets_end_neither_agent_nor_supervisor(container: ExecContainer) -> None:
    container.run(["true"])
    agent = container.launcher.agent_pid
    with container.popen(["cat"], stdin=PIPE) as process:
        supervisor = parent(process.pid)
    line = container.launcher._lines[os.getuid()]
    for connection in (container.launcher._connection, line.connection):
        assert connection is not None
        for junk in (b"x", b"i", b"i\1", b"i\7\0\0\0\0", b"i\1\0\0\0\0", b"m", b"i\1\1\0\0\0nonsense" * 9000):
            with contextlib.suppress(OSError):
                connection.send(junk)
        packets.send(connection, b"", [0, 0])
    assert container.sh("echo alive") == "alive\n"
    with container.popen(["cat"], stdin=PIPE) as process:
        assert parent(process.pid) == supervisor
    assert container.launcher.agent_pid == agent
    container.launcher._line(9)
    assert container.launcher.agent_pid == agent


def test_a_launch_that_raises_leaves_nothing(container: ExecContainer, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "the service is gone")

    with (tmp_path / "f").open("w+") as file, pytest.raises(OSError, match="gone"):
        run(broken, ["true"], stdin=file, stdout=file, stderr=PIPE, timeout=1)
    with pytest.raises(ExecFailed, match="ended"):
        run(lambda *_: None, ["true"], stdin=DEVNULL)
    with pytest.raises(LookupError):
        container.run(["sleep", "1000"], stdout=PIPE, encoding="no-such-encoding")


@contextlib.contextmanager
def supervisor_of_our_own(container: ExecContainer) -> Iterator[Launch]:
    """Launch by a fork of this process, which believes what this one does."""
    ours, its = packets.pair()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            ours.close()
            sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", closefd=False)  # pytest's is a file of its own
            Supervisor(its, cgroups.mounted()).run()
        os._exit(0)
    its.close()

    def launch(request: ExecRequest, fds: tuple[int, int, int, int]) -> None:
        packets.send(ours, HEADER.pack(container.init_pid) + request.encode(), [*fds, container.init_pidfd])

    try:
        yield launch
    finally:
        ours.close()
        os.waitpid(pid, 0)


def test_a_container_is_ended_where_what_has_left_a_commands_cgroup_goes_on(
    own: ExecContainer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who such strays are, and how they are killed, security/test_strays and unit/test_strays show."""
    sleeper = own.popen(["sleep", "1000"], stdin=DEVNULL)
    monkeypatch.setattr(strays, "TIMEOUT", 0.05)
    monkeypatch.setattr(strays, "_kill", lambda payload, _mark: (payload.endswith(f"/lxc.payload.{own.name}"), True))
    with supervisor_of_our_own(own) as launch:
        with Process.start(launch, ["true"], stdin=DEVNULL) as process:
            process.wait(10)
        assert sleeper.poll() is None
        with Process.start(launch, ["sleep", "1000"], stdin=DEVNULL) as process:
            process.kill_tree()
            assert process.wait(10) == -signal.SIGKILL
        assert sleeper.wait(10) == -signal.SIGKILL
    sleeper.close()
    assert f"the container of init {own.init_pid} is ended" in capfd.readouterr().err


@pytest.fixture
def v1_launch(own: ExecContainer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Launch by a supervisor of this process's own, which believes that the host has v1 cgroups only."""
    real = cgroups.membership

    def v1_only(pid: int, mounts: cgroups.Mounts) -> cgroups.Membership:
        where = real(pid, mounts)
        return where._replace(parent=next(place for place in where.join if "/freezer/" in place), unified=False)

    if not any("freezer" in options for options in cgroups.mounted()):
        pytest.skip("this host has no v1 freezer")
    monkeypatch.setattr(cgroups, "membership", v1_only)
    with supervisor_of_our_own(own) as launch:
        yield launch


def test_a_host_with_v1_cgroups_only(own: ExecContainer, v1_launch: Launch) -> None:
    text = run(v1_launch, ["cat", "/proc/self/cgroup"], stdout=PIPE, text=True).stdout
    assert ":freezer:/lxc_pool." in text
    assert run(v1_launch, ["sh", "-c", "exit 7"], stdin=DEVNULL).returncode == 7
    with pytest.raises(FileNotFoundError):
        run(v1_launch, ["missing"])
    with pytest.raises(subprocess.TimeoutExpired):
        run(v1_launch, ["sh", "-c", "setsid sleep 1000 & sleep 1000"], stdin=DEVNULL, timeout=0.3)
    assert own.pids() == {own.init_pid}
    run(v1_launch, ["true"])
    assert not own_cgroups(own)


# --- descriptors ------------------------------------------------------------------------------------------------------


def test_only_pipes_and_the_null_device_may_be_streams(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        read, write = os.pipe()
        stack.callback(os.close, read)
        stack.callback(os.close, write)
        null = os.open("/dev/null", os.O_RDWR)
        stack.callback(os.close, null)
        for fd in (read, write, null):
            check_stdio(fd)
        os.mkfifo(tmp_path / "fifo")
        path = os.open(f"/proc/self/fd/{read}", os.O_PATH)
        refused = [path, os.open(tmp_path, os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY), os.open("/", os.O_PATH)]
        refused += [os.open(tmp_path / "fifo", os.O_RDWR), os.open(__file__, os.O_RDONLY), *os.openpty()]
        refused += [sock.detach() for sock in socket.socketpair()]
        for fd in refused:
            stack.callback(os.close, fd)
            with pytest.raises(TypeError, match="only a pipe"):
                check_stdio(fd)
    with pytest.raises(ValueError, match="examined"):
        check_stdio(9999)


def test_a_launch_checks_its_descriptors(container: ExecContainer) -> None:
    read, write = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    request = ExecRequest.create(["true"])
    with ours, theirs:
        root = os.open("/", os.O_RDONLY)
        with pytest.raises(TypeError, match="only a pipe"):
            container.launch(request, (read, write, root, theirs.fileno()))
        with pytest.raises(ValueError, match="SEQPACKET"):
            container.launch(request, (read, write, write, theirs.fileno()))
        for fd in (read, write, root):
            os.close(fd)


def is_dead(pid: int) -> bool:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 0)[0])
    finally:
        os.close(fd)


def test_the_client_needs_neither_service_nor_liblxc() -> None:
    script = "import lxc_pool.client.process, sys; print([m for m in sys.modules if m in ('lxc', 'psutil')])"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout == b"[]\n"
