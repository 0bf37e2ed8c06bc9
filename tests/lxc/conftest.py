"""Real services for the tests on real containers: one that those of a module share, and one of the test's own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lxc_pool import PoolServiceProxy, State
from lxc_pool.images.store import ImageStore
from tests.support import real_service
from tests.support.netlab import lab  # noqa: F401  # a fixture
from tests.support.real_service import Service
from tests.support.starter import Starter

SHARED_SIZE = 3


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image directory with the busybox image, to be given to services, which must not change it."""
    if (reason := real_service.missing()) is not None:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("images")
    ImageStore(directory).ensure("busybox", lambda _line: None)
    return directory


@pytest.fixture(scope="module")
def shared_service(images: Path) -> Iterator[Service]:
    """A running service of size 3, for the tests of a module that neither configure nor end it."""
    service = Service(images)
    try:
        service.start(size=SHARED_SIZE)
        yield service
    finally:
        service.close()


@pytest.fixture
def pool(shared_service: Service) -> Iterator[PoolServiceProxy]:
    """The shared service's pool, all warm; a test gives back what it takes."""
    with shared_service.connect() as pool:
        pool.wait_ready()
        yield pool
        left = [info for info in pool.containers() if info.state in (State.LEASED, State.RESERVED)]
        assert not left, f"the test has not released {left}"


@pytest.fixture
def service(images: Path) -> Iterator[Service]:
    """A service of the test's own, not started yet; when the test is over, nothing of it may be left."""
    service = Service(images)
    try:
        yield service
    finally:
        service.close()


@pytest.fixture
def make_service(images: Path) -> Iterator[Callable[[], Service]]:
    """Makes more services of the test's own."""
    made: list[Service] = []

    def make() -> Service:
        made.append(Service(images))
        return made[-1]

    try:
        yield make
    finally:
        for service in made:
            service.close()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty directory for benchmarks, short enough for sockets; after the test, nothing of them may be left."""
    path = Path("/tmp") / f"lxpt-{os.getpid()}"
    path.mkdir()
    yield path
    left = [*path.iterdir()]
    shutil.rmtree(path)
    locks = Path("/run/lxc/lock") / path.relative_to("/")
    assert not left
    assert not [*locks.rglob("*")]
    shutil.rmtree(locks, ignore_errors=True)
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(path) in str(process.info["cmdline"])]


@pytest.fixture
def starter() -> Iterator[Starter]:
    """A stand-in for lxc-start that can hang and fail; give its directory to a service's start."""
    with tempfile.TemporaryDirectory(prefix="lxp-test-") as directory:
        yield Starter(Path(directory))
