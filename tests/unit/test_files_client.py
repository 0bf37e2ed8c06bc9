"""`push` and `pull` with a process that copies here, not in a container: what they make of its answers and its end."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lxc_pool.client import files
from lxc_pool.client.inside import Inside, Launch
from lxc_pool.errors import ExecFailed, UnknownLease
from lxc_pool.execution import operations
from lxc_pool.execution.frames import DIRECTORY, DONE, END, FILE, SPECIAL
from lxc_pool.execution.protocol import (
    MAX_EVENT,
    ExecRequest,
    Exited,
    Failed,
    KillTree,
    Signal,
    Started,
    decode_order,
)
from tests.support.waiting import eventually
from tests.unit.test_files_format import frame, head

ME = f"{os.geteuid()}:{os.getegid()}"

Work = Callable[[ExecRequest], int]


def perform(request: ExecRequest) -> int:
    return operations.perform(request.argv)


def say(data: bytes, then: int = 0) -> Work:
    """Return work that writes *data* and ends, or is killed by the signal *then*."""

    def work(_request: ExecRequest) -> int:
        left = data
        while left:
            left = left[os.write(1, left) :]
        if then:
            os.kill(os.getpid(), then)
        return 0

    return work


class Supervisors:
    """Starts what supervises the work, as the service's agent does."""

    def __init__(self) -> None:
        self.requests: list[ExecRequest] = []
        self._pids: list[int] = []

    def launching(self, work: Work) -> Launch:
        def launch(request: ExecRequest, fds: tuple[int, int, int, int]) -> None:
            self.requests.append(ExecRequest.decode(request.encode()))
            pid = os.fork()
            if not pid:
                try:
                    _supervise(request, fds, work)
                finally:
                    os._exit(0)
            self._pids.append(pid)

        return launch

    def close(self) -> None:
        for pid in self._pids:
            os.waitpid(pid, 0)


def _supervise(request: ExecRequest, fds: tuple[int, int, int, int], work: Work) -> None:
    worker = os.fork()
    if not worker:
        os.dup2(fds[0], 0)
        os.dup2(fds[1], 1)
        os.closerange(3, 256)
        os._exit(work(request))
    os.dup2(fds[3], 3)
    os.closerange(4, 256)
    control = socket.socket(fileno=3)
    control.send(Started(worker).encode())
    pidfd = os.pidfd_open(worker)
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(pidfd, select.POLLIN)
    while True:
        ready = dict(poller.poll())
        if pidfd in ready:
            control.send(Exited(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])).encode())
            return
        data = control.recv(100)
        order = decode_order(data) if data else KillTree()
        os.kill(worker, order.signum if isinstance(order, Signal) else signal.SIGKILL)


@pytest.fixture
def supervisors() -> Iterator[Supervisors]:
    before = len(os.listdir("/proc/self/fd"))
    made = Supervisors()
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "deep").mkdir(parents=True)
    (root / "deep/file").write_text("words")
    (root / "link").symlink_to("deep")
    os.mkfifo(root / "fifo")
    return root


def test_a_tree_goes_and_comes_back(supervisors: Supervisors, tree: Path, tmp_path: Path) -> None:
    launch = supervisors.launching(perform)
    pushed = files.push(launch, tree, tmp_path / "in", owner=ME)
    assert pushed == (str(tmp_path / "in"), 5, 4, (str(tree / "fifo"),))
    os.mkfifo(tmp_path / "in/fifo")
    pulled = files.pull(launch, tmp_path / "in", tmp_path / "out")
    assert pulled == (str(tmp_path / "out"), 5, 4, ("/fifo",))
    assert (tmp_path / "out/link/file").read_text() == "words"
    assert [request.argv[0] for request in supervisors.requests] == ["files-in", "files-out"]


def test_options_go_inside(supervisors: Supervisors, tree: Path, tmp_path: Path) -> None:
    launch = supervisors.launching(perform)
    for _ in range(2):
        files.push(launch, tree, f"{tmp_path}/a/b/", owner=ME, parents=True, dirs_exist_ok=True)
    assert (tmp_path / "a/b/tree/deep/file").read_text() == "words"
    with pytest.raises(FileExistsError) as caught:
        files.push(launch, tree, tmp_path / "a/b", owner=ME)
    assert caught.value.filename == f"{tmp_path}/a/b/tree"
    with pytest.raises(ValueError, match="no-such-user"):
        files.push(launch, tree, tmp_path / "x", owner="no-such-user")


def test_relative_paths_of_the_container_begin_at_its_root(supervisors: Supervisors, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.pull(supervisors.launching(perform), "no/such", tmp_path)
    assert caught.value.filename == "/no/such"


def test_nothing_is_begun_for_a_source_that_is_not_there(supervisors: Supervisors, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.push(supervisors.launching(perform), tmp_path / "none", "/tmp")
    assert caught.value.filename == str(tmp_path / "none")
    assert supervisors.requests == []


def test_an_answer_that_comes_early_is_heard(supervisors: Supervisors, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(bytes(8 << 20))
    with pytest.raises(NotADirectoryError):
        files.push(supervisors.launching(perform), tmp_path / "long", "/proc/version/x", owner=ME)


@pytest.mark.parametrize("answer", [frame(END), frame(200), b"Traceback (most recent call last)"])
def test_an_answer_that_is_none_is_told(supervisors: Supervisors, tree: Path, answer: bytes) -> None:
    with pytest.raises(OSError, match="no tree") as caught:
        files.push(supervisors.launching(say(answer)), tree, "/x")
    assert (caught.value.errno, caught.value.filename) == (errno.EPROTO, "/x")


@pytest.mark.parametrize(
    ("then", "words"), [(signal.SIGKILL, "killed"), (signal.SIGTERM, "status -15"), (0, "status 0")]
)
def test_an_end_without_an_answer_is_told(
    supervisors: Supervisors, tree: Path, tmp_path: Path, then: int, words: str
) -> None:
    launch = supervisors.launching(say(frame(FILE, head()), then))
    with pytest.raises(ExecFailed, match=words):
        files.pull(launch, "/x", tmp_path / "out")
    with pytest.raises(ExecFailed, match=words):
        files.push(supervisors.launching(say(b"", then)), tree, "/x")
    assert os.listdir(tmp_path) == ["tree"]


def test_an_endless_stream_meets_the_deadline(supervisors: Supervisors, tmp_path: Path) -> None:
    def endless(_request: ExecRequest) -> int:
        os.write(1, frame(FILE, head()))
        while True:
            os.write(1, frame(5) * 100)

    began = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        files.pull(supervisors.launching(endless), "/x", tmp_path / "out", timeout=0.2)
    assert caught.value.filename == "/x"
    assert time.monotonic() - began < 20
    assert os.listdir(tmp_path) == []


def test_one_that_does_not_end_when_told_is_killed(
    supervisors: Supervisors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(_request: ExecRequest) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
        return 0

    monkeypatch.setattr("lxc_pool.client.inside.GRACE", 0.1)
    with pytest.raises(TimeoutError):
        files.pull(supervisors.launching(deaf), "/x", tmp_path / "out", timeout=0.2)


def test_the_names_of_what_is_left_out_do_not_fill_the_memory(supervisors: Supervisors, tmp_path: Path) -> None:
    name = b"n" * 255
    flood = frame(DIRECTORY, head()) + frame(DIRECTORY, head(name)) * 100 + frame(SPECIAL, head(name)) * 1000
    launch = supervisors.launching(say(flood + frame(END) * 101 + frame(DONE)))
    copied = files.pull(launch, "/x", tmp_path / "out")
    assert copied.entry_count == 101
    assert 0 < sum(map(len, copied.skipped)) <= files.MAX_NAMED


def test_what_can_not_begin_is_not_told_to_end_or_waited_for() -> None:
    supervisors: list[socket.socket] = []

    def launch(_request: ExecRequest, descriptors: tuple[int, int, int, int]) -> None:
        supervisors.append(socket.socket(fileno=os.dup(descriptors[3])))
        supervisors[0].send(Failed(errno.EOPNOTSUPP, "mount", "no such owners").encode())

    inside = Inside(launch, ExecRequest.for_operation("unmount", b"/x"), None)
    try:
        with pytest.raises(OSError, match="no such owners"):
            inside.await_begin()
    finally:
        inside.close()
    with supervisors[0] as supervisor:
        supervisor.settimeout(10)
        assert supervisor.recv(MAX_EVENT) == b""


def test_a_refused_launch_is_the_callers_to_see(supervisors: Supervisors, tree: Path, tmp_path: Path) -> None:
    def refuse(_request: ExecRequest, _fds: tuple[int, int, int, int]) -> None:
        raise UnknownLease("it has ended")

    def fail(_request: ExecRequest, fds: tuple[int, int, int, int]) -> None:
        with socket.socket(fileno=os.dup(fds[3])) as control:
            control.send(Failed(errno.ESRCH, "enter", "the container has ended").encode())

    assert supervisors.requests == []
    for launch, error in ((refuse, UnknownLease), (fail, ExecFailed), (lambda *_: None, ExecFailed)):
        with pytest.raises(error):
            files.push(launch, tree, "/x")
        with pytest.raises(error):
            files.pull(launch, "/x", tmp_path / "out")
    assert os.listdir(tmp_path) == ["tree"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, FileNotFoundError])
def test_what_progress_raises_comes_out_as_it_is(
    supervisors: Supervisors, tree: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def progress(_count: int, entries: int) -> None:
        if entries > 2:
            raise error

    with pytest.raises(error) as caught:
        files.push(supervisors.launching(perform), tree, tmp_path / "in", owner=ME, progress=progress)
    assert str(caught.value) == ""
    with pytest.raises(error):
        files.pull(supervisors.launching(perform), tree, tmp_path / "out", progress=progress)
    assert os.listdir(tmp_path) == ["tree"]


def test_an_operation_with_the_wrong_arguments_ends(supervisors: Supervisors, tree: Path, tmp_path: Path) -> None:
    def wrong(_request: ExecRequest) -> int:
        return operations.perform(["files-in", "/x"])

    with pytest.raises(ValueError, match="values to unpack"):
        files.push(supervisors.launching(wrong), tree, tmp_path / "in")
    with pytest.raises(ExecFailed, match="status 1"):
        files.push(supervisors.launching(lambda _: operations.perform(["files-out"])), tree, tmp_path / "in")


def test_sigterm_does_not_cut_short_the_removal_of_what_was_begun(tmp_path: Path) -> None:
    """A killed client is both the end of the stream, which has it remove what it made, and a SIGTERM."""
    code = "import sys; from lxc_pool.execution import operations; sys.exit(operations.perform(sys.argv[1:]))"
    arguments = ["files-in", str(tmp_path), "in", "", ME]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        count = 5000
        process.stdin.write(frame(DIRECTORY, head(mode=0o755)))
        for number in range(count):
            process.stdin.write(frame(FILE, head(b"%d" % number)) + frame(END))
        process.stdin.flush()
        eventually(lambda: os.listdir(tmp_path), "it has begun")
        (begun,) = tmp_path.iterdir()
        eventually(lambda: len(os.listdir(begun)) == count, "all came")
        process.stdin.close()
        eventually(lambda: not begun.exists() or len(os.listdir(begun)) < count, "it removes them")
        process.terminate()
    assert os.listdir(tmp_path) == []
