"""The real service for tests: `lxc-pool serve` as a process of its own, which has to leave the host as it was.

```
 test ── Service.start ──► python -m lxc_pool serve      host dir, state dir and log below one directory
      ── Service.stop, kill
      ── Service.close: ends it if need be, then looks for what it left, with eyes of its own
```

Nothing here uses the package's own way of finding residue: what that overlooks, this has to see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from lxc_pool import PoolManager, PoolServiceProxy
from tests.support.netlab import Namespace
from tests.support.waiting import ends, pidfd

ROOT = Path(__file__).resolve().parents[2]
"""The project's; `python -m lxc_pool` there runs the code under test."""

START_TIMEOUT = 30.0
STOP_TIMEOUT = 30.0
"""Seconds. Guesses: each takes about one on an idle machine."""

_MARK = "LXC_POOL_TEST_SERVICE"
"""A variable in the environment of every process of one service: they are found by it, whoever their parent is."""

_LOCKS = Path("/run/lxc/lock")


def missing() -> str | None:
    """Return what this host lacks for tests on real containers; None if nothing."""
    if os.geteuid() != 0:
        return "needs root: containers are started"
    for program in ("lxc-start", "lxc-attach", "busybox"):
        if shutil.which(program) is None:
            return f"needs lxc and busybox-static: there is no {program}"
    return None


@dataclasses.dataclass
class Finished:
    """How a service ended."""

    status: int
    log: str


class Service:
    """A service with directories of its own; used again after it has ended, it takes them up again."""

    def __init__(
        self, images: Path | None = None, namespace: Namespace | None = None, place: Path | None = None
    ) -> None:
        """Make the directories.

        Args:
            images: An image directory to begin with, by hard links; None: the service has to build its image.
            namespace: The network namespace that it runs in; None: the machine's.
            place: Where its directories are to be; None: where temporary ones are. On another file system, the images
                are copied.
        """
        self.namespace = namespace
        # Not pytest's: users without rights can't get into those, and they are too long for a socket.
        self.directory = Path(tempfile.mkdtemp(prefix="lxp-test-", dir=place))
        self.directory.chmod(0o755)
        self.host_dir = self.directory / "host"
        self.state_dir = self.directory / "state"
        self.log_path = self.directory / "log"
        self.config_path = self.directory / "lxc-pool.toml"
        self.containers = self.state_dir / "containers"
        self.mark = uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None
        self._pools: list[PoolServiceProxy] = []
        if images is not None:
            self.state_dir.mkdir(mode=0o755)
            how = "-al" if place is None else "-a"
            subprocess.run(["cp", how, str(images), str(self.state_dir / "images")], check=True)

    @property
    def pid(self) -> int:
        assert self.process is not None, "the service was not started"
        return self.process.pid

    @property
    def instance(self) -> str:
        return (self.state_dir / "instance").read_text().strip()

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def command(self, *arguments: str | Path) -> list[str]:
        """Return `lxc-pool` with this service's host dir."""
        command = [sys.executable, "-m", "lxc_pool", "--host-dir", str(self.host_dir), *map(str, arguments)]
        return command if self.namespace is None else self.namespace.service_command(*command)

    def cli(self, *arguments: str | Path, stdin: str = "", timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a command of `lxc-pool` against this service."""
        return subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    @contextlib.contextmanager
    def client(self, script: str) -> Iterator[subprocess.Popen[str]]:
        """Run Python code as another client, with the names of lxc_pool and a connected `pool`; kill it at the end."""
        prelude = (
            f"import sys; from lxc_pool import *; pool = PoolManager.connect({str(self.host_dir)!r}, timeout=30)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", prelude + textwrap.dedent(script)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def launch(
        self,
        *,
        size: int | None = None,
        config: str | None = None,
        path: Sequence[Path] = (),
        arguments: Sequence[str] = (),
    ) -> None:
        """Start the service, and return at once.

        Args:
            size: `--size`.
            config: The text of its configuration.
            path: What to put before the PATH.
            arguments: More of them.
        """
        assert self.process is None, "it runs already"
        command = self.command("serve", "--state-dir", self.state_dir, *arguments)
        if size is not None:
            command += ["--size", str(size)]
        # A configuration of its own always: the host's must not come in.
        self.config_path.write_text("[pool]\nworkers = 2\n" if config is None else config)
        command += ["--config", str(self.config_path)]
        environment = os.environ | {_MARK: self.mark, "PATH": ":".join([*map(str, path), os.environ["PATH"]])}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # as a service has it; and Ctrl-C on pytest is pytest's
            )

    def await_ready(self) -> None:
        """Wait for the service's word that it accepts connections."""
        assert self.process is not None
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + START_TIMEOUT
        line = b""
        while not line.endswith(b"\n"):
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            more = os.read(descriptor, 4096) if ready else b""
            assert more, f"the service did not get ready (status {self.process.poll()}):\n{self.log}"
            line += more
        assert line.decode() == f"ready {self.host_dir / 'pool.sock'}\n"

    def start(
        self, *, size: int | None = None, config: str | None = None, path: Sequence[Path] = ()
    ) -> PoolServiceProxy:
        """Start the service; return a connected pool once it accepts connections. See `launch`."""
        self.launch(size=size, config=config, path=path)
        self.await_ready()
        return self.connect()

    def connect(self) -> PoolServiceProxy:
        """Connect to the service; the connection is closed with it."""
        pool = PoolManager.connect(self.host_dir)
        self._pools.append(pool)
        return pool

    def wait(self, timeout: float = STOP_TIMEOUT) -> Finished:
        """Wait for the service's end."""
        assert self.process is not None
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the service did not end within {timeout:g} s:\n{self.log}") from None
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        return Finished(status, self.log)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = STOP_TIMEOUT) -> None:
        """End the service in order; nothing of it is left then."""
        assert self.process is not None
        self.process.send_signal(number)
        finished = self.wait(timeout)
        assert finished.status == 0, finished.log
        self.assert_clean()

    def kill(self) -> None:
        """Kill the service's process, and that alone, as the kernel's out-of-memory killer does."""
        assert self.process is not None
        with contextlib.ExitStack() as stack:
            threads = Path(f"/proc/{self.pid}/task").iterdir()
            children = [int(pid) for thread in threads for pid in _read(f"{thread}/children").split()]
            # The fork server and the resource tracker end by themselves, and take a moment for it; agents live on.
            enders = [pid for pid in children if b"from multiprocessing." in _read(f"/proc/{pid}/cmdline")]
            descriptors = [stack.enter_context(pidfd(pid)) for pid in enders]
            self.process.kill()
            self.wait()
            assert all(ends(descriptor) for descriptor in descriptors), "the fork server has to end"

    def marked(self) -> list[int]:
        """Return the pids of all processes that the service has started, directly or not, but containers'."""
        needle = f"{_MARK}={self.mark}".encode()
        return [pid for pid in _pids() if needle in _read(f"/proc/{pid}/environ").split(b"\0") and _lives(pid)]

    def cgroups(self, name: str = "") -> list[str]:
        """Return the cgroups of the container *name*, or of all that this service has made."""
        needle = name or f"lxp-{self.instance}"
        return [
            os.path.join(directory, child)
            for directory, children, _files in os.walk("/sys/fs/cgroup")
            for child in children
            if needle in child
        ]

    def semaphores(self) -> dict[str, str]:
        """Return the files of the semaphores that this service has made, with their inodes."""
        with os.scandir("/dev/shm") as entries:
            return {entry.path: str(entry.inode()) for entry in entries if f"lxp-{self.instance}" in entry.name}

    def has_traces(self, name: str) -> bool:
        """Return whether anything of the container *name* is left."""
        return bool((self.containers / name).exists() or self.cgroups(name) or self._lock_files(name))

    def traces(self) -> list[str]:
        """Return whatever the service has left, in words."""
        if not (self.state_dir / "instance").exists():
            return [f"process {pid}: {_read(f'/proc/{pid}/cmdline')!r}" for pid in self.marked()]
        needles = (f"lxp-{self.instance}".encode(), str(self.containers).encode())
        found = [f"process {pid}, started by the service: {_read(f'/proc/{pid}/cmdline')!r}" for pid in self.marked()]
        found += [
            f"process {pid} of a container: {line!r}"
            for pid in _pids()
            if any(
                needle in (line := _read(f"/proc/{pid}/cmdline") + _read(f"/proc/{pid}/cgroup")) for needle in needles
            )
            and _lives(pid)
        ]
        found += [f"cgroup {path}" for path in self.cgroups()]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        found += [f"mount {mount}" for mount in mounts if str(self.directory) in mount]
        if self.containers.exists():
            found += [f"directory {path}" for path in self.containers.iterdir()]
        found += [f"lock file {path}" for path in self._lock_files()]
        found += [f"semaphore {path}" for path in self.semaphores()]
        found += self.network_traces()
        found += [
            f"file {self.host_dir / name}" for name in ("pool.sock", "authkey") if (self.host_dir / name).exists()
        ]
        return found

    def network_traces(self) -> list[str]:
        """Return the network devices and rules that the service has made, in words."""
        devices = [name for _index, name in socket.if_nameindex()]
        rules: list[str] = []
        if self.namespace is not None:
            devices = self.namespace.devices()
            rules = [*self.namespace.tables(), *self.namespace.run("iptables", "-S").splitlines()]
        found = [f"network device {name}" for name in devices if name.startswith(f"lxp{self.instance}")]
        return [*found, *(f"rule {rule}" for rule in rules if f"lxp-{self.instance}" in rule)]

    def assert_clean(self) -> None:
        """Assert that nothing of a service that has ended is left."""
        found = self.traces()
        assert not found, "\n".join(["the service left:", *found, "its log:", self.log])

    def close(self) -> None:
        """End the service if it runs, assert that nothing is left, and remove the directories.

        After a kill that no start has followed, one does: whatever was left is the next service's to remove.
        """
        try:
            for pool in self._pools:
                pool.close()
            if self.process is None and (self.state_dir / "instance").exists() and self.traces():
                self.launch(size=1)
                self.await_ready()
            if self.process is not None:
                if self.process.poll() is None:
                    with contextlib.closing(PoolManager.connect(self.host_dir)) as pool:
                        pool.shutdown(grace=0)
                finished = self.wait()
                assert finished.status == 0, finished.log
            self.assert_clean()
        finally:
            self._remove_everything()

    def _lock_files(self, name: str = "") -> list[Path]:
        locks = _LOCKS / self.containers.relative_to("/")
        return [path for path in locks.rglob("*") if not path.is_dir() and name in path.name]

    def _remove_everything(self) -> None:
        """Leave nothing, even where the service under test has failed."""
        if self.process is not None:
            self.process.kill()
            self.wait()
        for pid in self.marked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if (self.state_dir / "instance").exists():
            for directory in self.cgroups():
                for word in _read(f"{directory}/cgroup.procs").split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(word), signal.SIGKILL)
            deadline = time.monotonic() + 5
            while (left := self.cgroups()) and time.monotonic() < deadline:
                for directory in left:
                    for inner, _children, _files in os.walk(directory, topdown=False):
                        with contextlib.suppress(OSError):
                            os.rmdir(inner)
            for _index, name in socket.if_nameindex():
                if name.startswith(f"lxp{self.instance}"):
                    subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
            for semaphore in self.semaphores():
                Path(semaphore).unlink()
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(_LOCKS / self.directory.relative_to("/"), ignore_errors=True)


@contextlib.contextmanager
def running(images: Path, config: str, namespace: Namespace | None = None) -> Iterator[Service]:
    """Have a service that runs, for tests that neither configure nor end it; afterwards nothing of it may be left."""
    service = Service(images, namespace)
    try:
        service.start(config=config)
        yield service
    finally:
        service.close()


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and int(entry) != os.getpid()]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def _lives(pid: int) -> bool:
    """Return whether a process is there and no zombie: those are their parent's to wait for."""
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"], [b"X"])
