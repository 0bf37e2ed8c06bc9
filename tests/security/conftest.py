"""A service on real containers for a module's attacks, and the program that attacks from inside."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lxc_pool import Container, PoolServiceProxy
from lxc_pool.images import busybox
from lxc_pool.images.store import ImageStore
from tests.security.attackers import LIMITS, Attacker
from tests.support import real_service
from tests.support.netlab import lab  # noqa: F401  # a fixture
from tests.support.real_service import Service, running


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image directory with the busybox image, and in it what a careless import could have left: a device node."""
    if (reason := real_service.missing()) is not None:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("images")

    def build(rootfs: Path, report: Callable[[str], None]) -> None:
        busybox.build(rootfs, report)
        subprocess.run(["mknod", "-m", "666", str(rootfs / "zero"), "c", "1", "5"], check=True)

    ImageStore(directory).build("busybox", lambda _line: None, build)
    return directory


@pytest.fixture(scope="session")
def attack_program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """`attack.c`, built."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler: what attacks from inside is a program of system calls")
    program = tmp_path_factory.mktemp("attack") / "attack"
    source = Path(__file__).with_name("attack.c")
    subprocess.run([compiler, "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program.read_bytes()


@pytest.fixture(scope="module")
def real(images: Path) -> Iterator[Service]:
    """A running service with narrow limits, for the tests of a module."""
    with running(images, LIMITS.configuration) as service:
        yield service


@pytest.fixture
def pool(real: Service) -> Iterator[PoolServiceProxy]:
    with real.connect() as pool:
        pool.wait_ready()
        yield pool


@pytest.fixture
def new_attacker(pool: PoolServiceProxy, attack_program: bytes) -> Iterator[Callable[[], Attacker]]:
    """Makes containers with the program in them; they are released when the test is over."""
    taken: list[Container] = []

    def make() -> Attacker:
        container = pool.get("attacker", 30)
        assert container is not None
        taken.append(container)
        return Attacker(container, attack_program)

    try:
        yield make
    finally:
        for container in taken:
            container.release()


@pytest.fixture
def attacker(new_attacker: Callable[[], Attacker]) -> Attacker:
    return new_attacker()


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A short directory that every user may enter: pytest's own are closed to others and too long for a socket."""
    path = Path(tempfile.mkdtemp(prefix="lxp-test-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)
