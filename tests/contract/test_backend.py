"""What the pool relies on in a container engine: one suite, over every backend that there is."""

from __future__ import annotations

import dataclasses
import itertools
import os
import queue
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from lxc_pool.backend.memory import Fault, MemoryBackend
from lxc_pool.backend.protocol import Blueprint
from lxc_pool.config import ProfileConfig
from lxc_pool.errors import BackendError, CloneFailed, ImageError, LxcPoolError, StartFailed
from lxc_pool.host import cgroups
from lxc_pool.host.processes import ProcessIdentity, identify
from lxc_pool.images.store import Image
from lxc_pool.service.jobs import CreateJob, DestroyJob, Job, Outcome, PrepareJob, perform
from lxc_pool.service.lanes import ProcessLane
from lxc_pool.service.worker import stop_fork_server

DEADLINE = 30.0
"""Seconds that a container may take to come up; it takes a hundredth of one."""

NEEDS_LXC = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("lxc-start") is None, reason="needs root and lxc")


class Engine(Protocol):
    """A backend, and what the suite has to know of its world beside it."""

    def do(self, job: Job) -> Outcome:
        """Let the backend do a job. Raises its errors."""

    def names(self) -> tuple[str, ...]: ...

    def newest(self, image_name: str) -> Image | None: ...

    def log_tail(self, name: str) -> str: ...

    def lives(self, init: ProcessIdentity) -> bool:
        """Whether a container's init is a living process."""

    def traces(self, name: str) -> list[str]:
        """Everything that is there of a container."""

    def half_made(self, name: str) -> list[Callable[[], None]]:
        """Ways to leave a container half made, as killed workers do."""

    def unstartable(self, image: Image) -> Image:
        """Return an image that no container comes up from, or let the next start fail."""

    def failing_probe(self) -> tuple[str, ...]:
        """Return a probe that fails."""


class MemoryEngine:
    def __init__(self) -> None:
        self.backend = MemoryBackend(lambda _seconds: None)

    def do(self, job: Job) -> Outcome:
        return perform(self.backend, job)

    def names(self) -> tuple[str, ...]:
        return self.backend.names()

    def newest(self, image_name: str) -> Image | None:
        return self.backend.newest(image_name)

    def log_tail(self, name: str) -> str:
        return self.backend.log_tail(name)

    def lives(self, init: ProcessIdentity) -> bool:
        return init in self.backend.running.values()

    def traces(self, name: str) -> list[str]:
        return [name] if name in self.backend.present or name in self.backend.running else []

    def half_made(self, name: str) -> list[Callable[[], None]]:
        return [lambda: self.backend.present.add(name)]

    def unstartable(self, image: Image) -> Image:
        self.backend.script("start", Fault(error=StartFailed("No such file or directory: /sbin/init")))
        return image

    def failing_probe(self) -> tuple[str, ...]:
        self.backend.script("probe", Fault(error=StartFailed("its probe still ends with 1")))
        return ("false",)


class LxcEngine:
    """The real one, in the worker process that it is made for."""

    def __init__(self, state_dir: Path) -> None:
        from lxc_pool.backend.lxc.engine import LxcBackend  # noqa: PLC0415  # needs the binding

        self.state_dir = state_dir
        self.backend = LxcBackend(state_dir)
        self.lane = ProcessLane(self.backend)
        self.lane.open()
        (state_dir / "containers").mkdir(mode=0o755)

    def do(self, job: Job) -> Outcome:
        outcomes: queue.Queue[Outcome] = queue.Queue()
        self.lane.start(job, outcomes.put)
        outcome = outcomes.get(timeout=100)
        if isinstance(outcome, LxcPoolError):
            raise outcome
        return outcome

    def names(self) -> tuple[str, ...]:
        return self.backend.names()

    def newest(self, image_name: str) -> Image | None:
        return self.backend.newest(image_name)

    def log_tail(self, name: str) -> str:
        return self.backend.log_tail(name)

    def lives(self, init: ProcessIdentity) -> bool:
        try:
            return identify(init.pid) == init
        except ProcessLookupError:
            return False

    def traces(self, name: str) -> list[str]:
        lock = Path("/run/lxc/lock") / str(self.backend.lxcpath).lstrip("/") / f".{name}"
        directory = self.backend.lxcpath / name
        found = [str(path) for path in (lock, directory) if path.exists()]
        found += map(str, cgroups.container_cgroups(name))
        found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if name in line]
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
            except OSError:
                continue
            if name in words:
                found.append(f"{entry.parent.name}: {' '.join(words)}")
        return found

    def half_made(self, name: str) -> list[Callable[[], None]]:
        directory = self.backend.lxcpath / name

        def with_config(text: str) -> None:
            directory.mkdir()
            (directory / "config").write_text(text, encoding="ascii")

        return [
            directory.mkdir,
            lambda: with_config(""),
            lambda: with_config(f"lxc.uts.name = {name}\n"),
            lambda: (directory / "overlay" / "work" / "work").mkdir(parents=True),
        ]

    def unstartable(self, image: Image) -> Image:
        empty = self.state_dir / "without-init"
        if not empty.exists():
            shutil.copytree(image.rootfs, empty, symlinks=True)
            for name in ("sbin/init", "linuxrc", "bin/busybox"):
                (empty / name).unlink(missing_ok=True)
        return dataclasses.replace(image, version="broken", rootfs=empty)

    def failing_probe(self) -> tuple[str, ...]:
        return ("false",)


@pytest.fixture(scope="module")
def lxc_engine() -> Iterator[LxcEngine]:
    # Not below pytest's own directory: that is closed to the ids of containers.
    state_dir = Path(tempfile.mkdtemp(prefix="lxp-contract-"))
    state_dir.chmod(0o755)
    engine = LxcEngine(state_dir)
    try:
        yield engine
    finally:
        engine.lane.close()
        stop_fork_server()
        shutil.rmtree(state_dir)
        lock_dir = Path("/run/lxc/lock") / str(engine.backend.lxcpath).lstrip("/")
        if lock_dir.exists():
            os.removedirs(lock_dir)


@pytest.fixture(params=["memory", pytest.param("lxc", marks=NEEDS_LXC)])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "memory":
        return MemoryEngine()
    found: LxcEngine = request.getfixturevalue("lxc_engine")
    return found


@pytest.fixture
def image(engine: Engine) -> Image:
    image = engine.do(PrepareJob("busybox"))
    assert isinstance(image, Image)
    return image


_numbers = itertools.count(1)


@pytest.fixture
def name(engine: Engine) -> Iterator[str]:
    """Return a name that no container had; nothing of it is there before or afterwards."""
    name = f"lxp-contract-{os.getpid()}-{next(_numbers)}"
    assert engine.traces(name) == []
    try:
        yield name
    finally:
        engine.do(DestroyJob(name, force=True))
    assert engine.traces(name) == []


def blueprint(name: str, image: Image, probe: tuple[str, ...] = (), seconds: float = DEADLINE) -> Blueprint:
    return Blueprint(name, ProfileConfig("default", 1, probe=probe), image, time.monotonic() + seconds)


def create(engine: Engine, wanted: Blueprint) -> ProcessIdentity:
    init = engine.do(CreateJob(wanted))
    assert isinstance(init, ProcessIdentity)
    return init


def test_preparing_an_image_twice_is_preparing_it_once(engine: Engine, image: Image) -> None:
    assert engine.do(PrepareJob("busybox")) == image
    assert engine.newest("busybox") == image
    assert image.name == "busybox"


def test_an_unknown_image_is_an_error_that_names_it(engine: Engine) -> None:
    with pytest.raises(ImageError, match="nonesuch"):
        engine.do(PrepareJob("nonesuch"))
    assert engine.newest("nonesuch") is None


def test_a_created_container_is_up_and_listed_until_it_is_destroyed(engine: Engine, image: Image, name: str) -> None:
    init = create(engine, blueprint(name, image))
    assert engine.lives(init)
    assert name in engine.names()
    assert isinstance(engine.log_tail(name), str)
    engine.do(DestroyJob(name, force=False))
    assert not engine.lives(init)
    assert name not in engine.names()
    assert engine.traces(name) == []


def test_two_containers_of_one_image_are_two(engine: Engine, image: Image, name: str) -> None:
    other = f"{name}-other"
    first, second = create(engine, blueprint(name, image)), create(engine, blueprint(other, image))
    assert first != second
    engine.do(DestroyJob(other, force=False))
    assert engine.lives(first)
    assert not engine.lives(second)
    assert engine.traces(other) == []


def test_a_name_that_is_taken_is_not_taken_again(engine: Engine, image: Image, name: str) -> None:
    init = create(engine, blueprint(name, image))
    with pytest.raises(CloneFailed, match=name):
        engine.do(CreateJob(blueprint(name, image)))
    assert engine.lives(init)


@pytest.mark.parametrize("force", [False, True])
def test_destroying_what_is_gone_or_never_was_is_no_error(
    engine: Engine, image: Image, name: str, *, force: bool
) -> None:
    engine.do(DestroyJob(name, force=force))
    create(engine, blueprint(name, image))
    for _ in range(2):
        engine.do(DestroyJob(name, force=force))
        assert engine.traces(name) == []


def test_destroying_by_force_ends_what_runs(engine: Engine, image: Image, name: str) -> None:
    init = create(engine, blueprint(name, image))
    engine.do(DestroyJob(name, force=True))
    assert not engine.lives(init)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_half_made_is_listed_and_can_be_destroyed(engine: Engine, name: str, *, force: bool) -> None:
    for make in engine.half_made(name):
        make()
        assert name in engine.names()
        engine.do(DestroyJob(name, force=force))
        assert name not in engine.names()
        assert engine.traces(name) == []


def test_a_start_that_fails_says_so_in_the_engines_words_and_leaves_nothing_once_it_is_destroyed(
    engine: Engine, image: Image, name: str
) -> None:
    with pytest.raises((StartFailed, CloneFailed)) as caught:
        engine.do(CreateJob(blueprint(name, engine.unstartable(image))))
    assert "No such file or directory" in str(caught.value)
    assert isinstance(caught.value, BackendError)
    assert name in engine.names()
    engine.do(DestroyJob(name, force=False))
    assert engine.traces(name) == []


def test_a_probe_that_succeeds_is_no_hindrance(engine: Engine, image: Image, name: str) -> None:
    assert engine.lives(create(engine, blueprint(name, image, probe=("test", "-e", "/etc/passwd"))))


def test_a_probe_that_still_fails_at_the_deadline_is_a_failed_start(engine: Engine, image: Image, name: str) -> None:
    with pytest.raises(StartFailed, match=r"probe .*still ends with 1"):
        engine.do(CreateJob(blueprint(name, image, probe=engine.failing_probe(), seconds=0.5)))
    engine.do(DestroyJob(name, force=False))
    assert engine.traces(name) == []


@NEEDS_LXC
@pytest.mark.parametrize(
    ("ignored", "words"),
    [("pids", "processes: pids.max is max, not 1000"), ("memory", "memory: memory."), ("cpu", "cpu weight: cpu.")],
)
def test_a_container_that_is_up_without_its_limits_is_a_failed_start(
    lxc_engine: LxcEngine, ignored: str, words: str
) -> None:
    from tests.support.faults import UnlimitedBackend  # noqa: PLC0415  # needs the binding

    image = lxc_engine.do(PrepareJob("busybox"))
    assert isinstance(image, Image)
    name = f"lxp-contract-{os.getpid()}-{next(_numbers)}"
    wanted = dataclasses.replace(blueprint(name, image), profile=ProfileConfig("default", 1, cpu=50))  # 100 is usual
    lane = ProcessLane(UnlimitedBackend(lxc_engine.state_dir, ignored))
    lane.open()
    outcomes: queue.Queue[Outcome] = queue.Queue()
    try:
        lane.start(CreateJob(wanted), outcomes.put)
        outcome = outcomes.get(timeout=100)
    finally:
        lane.close()
        lxc_engine.do(DestroyJob(name, force=False))
    assert isinstance(outcome, StartFailed)
    assert f"{name} is up without its limits: " in str(outcome)
    assert words in str(outcome)
    assert lxc_engine.traces(name) == []
