"""Real services that faults can be planned for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool.images.store import ImageStore
from tests.support import real_service
from tests.support.faults import FaultyService
from tests.support.netlab import lab  # noqa: F401  # a fixture


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image directory with the busybox image, to be given to services, which must not change it."""
    if (reason := real_service.missing()) is not None:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("images")
    ImageStore(directory).ensure("busybox", lambda _line: None)
    return directory


@pytest.fixture
def service(images: Path) -> Iterator[FaultyService]:
    """A service of the test's own, not started yet; when the test is over, nothing of it may be left."""
    service = FaultyService(images)
    try:
        yield service
    finally:
        service.close()
