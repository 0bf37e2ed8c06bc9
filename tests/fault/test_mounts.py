"""Whatever dies while something is mounted into a container: nothing is left on the host, and the container goes on."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lxc_pool import Container, LxcPoolError
from tests.support.faults import FaultyService
from tests.support.oracle import assert_healed
from tests.support.waiting import eventually

CONFIG = "[pool]\nsize = 1\nworkers = 1\n"

MOUNT_WHAT_HANGS = """
    import os
    from lxc_pool.client import mounts
    from lxc_pool.execution.protocol import ExecRequest

    source = os.open({path!r}, os.O_PATH)
    container = pool.container({name!r})
    container.run(["true"], check=True)  # whoever serves its commands is there

    def launch(_request, fds):
        container._mount(b"/mnt/x", True, (source, fds[1], fds[3]))

    print("begun", flush=True)
    try:
        mounts._perform(launch, ExecRequest.for_operation("unmount", "/mnt/x"), "x")
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    else:
        print("mounted", flush=True)
"""


@contextlib.contextmanager
def mounted_fuse(path: Path) -> Iterator[int]:
    """Have a FUSE file system there; yield the descriptor that its server has to read."""
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"needs a file system that hangs, by FUSE: {error}")
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    try:
        assert libc.mount(b"hanging", os.fsencode(path), b"fuse", 0, options.encode()) == 0, ctypes.get_errno()
        try:
            yield device
        finally:
            assert libc.umount2(os.fsencode(path), 2) == 0
    finally:
        os.close(device)


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system whose server never answers."""
    path = tmp_path / "hanging"
    path.mkdir()
    with mounted_fuse(path):
        yield path


@pytest.fixture(scope="module")
def module_service(images: Path) -> Iterator[FaultyService]:
    service = FaultyService(images)
    try:
        service.start(config=CONFIG)
        yield service
    finally:
        service.close()


@pytest.fixture
def service(module_service: FaultyService) -> FaultyService:
    """The module's service, which runs."""
    if module_service.process is None:
        module_service.launch(config=CONFIG)
        module_service.await_ready()
    return module_service


@pytest.fixture
def leased(service: FaultyService, tmp_path: Path) -> Iterator[Container]:
    """A container; when the test is over the pool is whole, and nothing of it is mounted on the host."""
    pool = service.connect()
    with pool.lease("mounts", timeout=30) as container:
        yield container
        assert "/mnt/x" not in Path(f"/proc/{container.init_pid}/mountinfo").read_text()
        assert container.run(["true"]).returncode == 0
    assert_healed(service, pool)
    assert mounts_of(service, tmp_path) == []


def mounts_of(service: FaultyService, directory: Path) -> list[str]:
    """Return what the host has mounted of the test's *directory*, at the service's places, or where it is prepared."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    ours = (str(directory), str(service.directory), "/dev/mount")
    return [line for line in lines if any(path in line for path in ours) and "/hanging" not in line]


def restart(service: FaultyService) -> None:
    service.wait()
    service.launch(config=CONFIG)
    service.await_ready()


def working(service: FaultyService) -> list[int]:
    """Return the processes in cgroups of commands in this service's containers."""
    found: list[int] = []
    for directory in service.cgroups("lxc_pool."):
        if f"lxp-{service.instance}" not in directory:
            continue
        with contextlib.suppress(OSError):  # it has ended just now
            found += map(int, Path(directory, "cgroup.procs").read_text().split())
    return sorted(set(found))


def find(service: FaultyService, who: str) -> int:
    """Return the pid of one of those through whose hands a mount goes, while one is under way."""
    (worker,) = working(service)
    supervisor = psutil.Process(worker).parent()
    assert supervisor is not None
    agent = supervisor.parent()
    assert agent is not None
    pids = {"worker": worker, "supervisor": supervisor.pid, "agent": agent.pid, "service": service.pid}
    return pids[who]


@pytest.mark.parametrize("victim", ["worker", "supervisor", "agent", "service", "client"])
def test_whoever_dies_meanwhile_leaves_nothing(
    service: FaultyService, leased: Container, hanging: Path, victim: str
) -> None:
    with service.client(MOUNT_WHAT_HANGS.format(path=str(hanging), name=leased.name)) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        eventually(lambda: working(service), "it is under way")
        if victim == "client":
            client.kill()
        else:
            os.kill(find(service, victim), signal.SIGKILL)
        if victim == "service":
            restart(service)
        elif victim in ("worker", "supervisor"):
            assert "ExecFailed" in client.stdout.readline()
        if victim in ("agent", "service"):  # it goes on without them, until its client goes
            assert working(service)
            client.kill()
    eventually(lambda: not working(service), "nothing is under way any more")


def test_it_has_a_deadline(service: FaultyService, leased: Container, hanging: Path) -> None:
    """The alarm rings ahead of time here; `tests/unit/test_mounting` sees that it is set."""
    with service.client(MOUNT_WHAT_HANGS.format(path=str(hanging), name=leased.name)) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        eventually(lambda: working(service), "it is under way")
        os.kill(find(service, "worker"), signal.SIGALRM)
        assert client.stdout.readline().startswith("TimeoutError")
    assert working(service) == []


def test_a_hanging_file_system_holds_up_no_other_command(
    service: FaultyService, leased: Container, hanging: Path
) -> None:
    with service.client(MOUNT_WHAT_HANGS.format(path=str(hanging), name=leased.name)) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        eventually(lambda: working(service), "it is under way")
        assert leased.run(["echo", "x"], capture_output=True, timeout=30).stdout == b"x\n"
        assert client.poll() is None
    eventually(lambda: not working(service), "nothing is under way any more")


def test_killed_wherever_it_is_a_mount_is_there_or_not(
    service: FaultyService, leased: Container, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("words\n")
    leased.run(["true"], check=True)
    done = threading.Event()

    def kill_all() -> None:
        while not done.is_set():
            for pid in working(service):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    killer.start()
    failures = 0
    try:
        for _ in range(20):
            try:
                leased.mount(tmp_path, "/mnt/x")
            except (LxcPoolError, OSError):
                failures += 1
    finally:
        done.set()
        killer.join()
    assert failures
    assert mounts_of(service, tmp_path) == []
    while "/mnt/x" in Path(f"/proc/{leased.init_pid}/mountinfo").read_text():
        assert leased.run(["cat", "/mnt/x/file"], capture_output=True).stdout == b"words\n"
        leased.unmount("/mnt/x")
    leased.mount(tmp_path, "/mnt/x")
    leased.unmount("/mnt/x")


def test_a_mount_outlives_the_service_and_the_next_one_takes_it_away(
    service: FaultyService, leased: Container, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("words\n")
    leased.mount(tmp_path, "/mnt/x")
    service.kill()
    service.launch(config=CONFIG)
    service.await_ready()
    assert leased.run(["cat", "/mnt/x/file"], stdout=subprocess.PIPE).stdout == b"words\n"
    leased.unmount("/mnt/x")


RUN_ON_WHAT_STALLS = """
    import os, socket
    from lxc_pool.execution.protocol import ExecRequest
    from lxc_pool.wire import messages

    stream = os.open({path!r}, os.O_RDONLY)
    null = os.open("/dev/null", os.O_RDWR)
    ours, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    container = pool.container({name!r})
    print("begun", flush=True)
    call = messages.Execute(container.name, ExecRequest(("true",), {{}}).encode())
    try:
        container._caller.ask(call, descriptors=[stream, null, null, control.fileno()])
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


class StallingServer:
    """Answers for a FUSE file system until somebody asks what a file is like: that it hears, and says nothing more.

    Source: Linux include/uapi/linux/fuse.h.
    """

    def __init__(self, path: Path, device: int) -> None:
        self._path = path
        self.asked = threading.Event()
        self._device = device
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        poll.register(self._end, select.POLLIN)
        while self._end not in dict(poll.poll()):
            try:
                request = os.read(self._device, 1 << 18)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return  # it has been aborted
                raise
            _length, kind, unique = struct.unpack_from("=IIQ", request)
            if kind == 26:  # FUSE_INIT
                body = struct.pack("=4I2H2I2HI", 7, 31, 65536, 0, 12, 9, 4096, 1, 1, 0, 0) + bytes(28)
            elif kind == 27:  # FUSE_OPENDIR
                body = bytes(16)
            else:
                self.asked.set()
                continue
            os.write(self._device, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)

    def abort(self) -> None:
        """End the file system, as root can: everybody who waits for it is told so."""
        # MNT_FORCE; whoever has it open keeps it mounted. Source: Linux fs/fuse/inode.c, fuse_umount_begin.
        ctypes.CDLL(None).umount2(os.fsencode(self._path), 1)

    def close(self) -> None:
        os.eventfd_write(self._end, 1)
        self._thread.join()
        os.close(self._end)


@pytest.fixture
def stalling(tmp_path: Path) -> Iterator[tuple[Path, StallingServer]]:
    """A directory that can be opened, on a file system whose server then answers no more; it ends with the fixture."""
    path = tmp_path / "hanging"
    path.mkdir()
    with mounted_fuse(path) as device, contextlib.closing(StallingServer(path, device)) as server:
        yield path, server


def test_a_stream_on_a_file_system_that_hangs_holds_up_its_own_connection_alone(
    service: FaultyService, leased: Container, stalling: tuple[Path, StallingServer]
) -> None:
    path, server = stalling
    pool = service.connect()
    before = pool.status().client_count
    with service.client(RUN_ON_WHAT_STALLS.format(path=str(path), name=leased.name)) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        assert server.asked.wait(10), "the service has not looked at it"
        assert leased.run(["echo", "x"], capture_output=True, timeout=30).stdout == b"x\n"
        pool.wait_ready(timeout=30)
        with pool.lease("another", timeout=30) as another:
            assert another.run(["true"], timeout=30).returncode == 0
        client.kill()
        client.wait()
        assert pool.status().client_count > before  # it counts as its user's for as long as it is held up
    server.abort()
    eventually(lambda: pool.status().client_count <= before, "the kernel has let it go")
