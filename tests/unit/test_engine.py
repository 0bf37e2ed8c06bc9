"""What the lanes' backend says where a start goes wrong before, or after, liblxc has its turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from lxc_pool.backend.lxc.engine import LxcBackend
from lxc_pool.backend.protocol import Blueprint
from lxc_pool.config import ProfileConfig
from lxc_pool.errors import StartFailed
from lxc_pool.images.store import Image
from tests.support.descriptors import few_descriptors

IMAGE = Image("busybox", "20240101-000000-000000-000000", Path("/nowhere"), 0, 0.0, "sha256:")
BLUEPRINT = Blueprint("c1", ProfileConfig("default", 1), IMAGE, 0.0)


def test_without_lxc_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartFailed, match="lxc-start is not installed"):
        LxcBackend(tmp_path)._start(BLUEPRINT, tmp_path)


def test_a_container_that_can_not_be_looked_at_has_not_started(tmp_path: Path) -> None:
    backend = LxcBackend(tmp_path)
    with (
        few_descriptors(0),
        pytest.raises(StartFailed, match="c1 is up, but can't be looked at"),
    ):
        backend._await_init(BLUEPRINT, tmp_path, [tmp_path])
