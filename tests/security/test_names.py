"""Whoever may run a process on the host can call it what they like: no name is taken from it to remove by."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool.errors import DestroyFailed
from tests.security.attackers import STRANGER
from tests.support.real_service import Service

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be different users")


@pytest.fixture
def service(images: Path) -> Iterator[Service]:
    service = Service(images)
    try:
        yield service
    finally:
        service.close()


@pytest.mark.parametrize("user", [STRANGER, 0], ids=["a stranger's", "root's"])
def test_a_process_that_calls_itself_a_containers_starter_has_nothing_else_removed(service: Service, user: int) -> None:
    pool = service.start(size=1)
    pool.wait_ready()
    victim = service.directory / "victim"
    victim.mkdir()
    (victim / "file").touch()
    with pool.lease("mine", timeout=30) as container:
        container.keep(600)
        way_out = os.path.relpath(victim, service.containers / container.name)
        made_up = f"lxp-{service.instance}-abcdef01-7"
        lies = [f"{container.name}/{way_out}", f"lxp-{service.instance}-\x1b]0;evil\x07", made_up]
        liars = [
            subprocess.Popen(
                ["sh", "-c", "sleep 1000; :", "lxc-start", "-P", str(service.containers), "-n", lie],
                stdin=subprocess.DEVNULL,
                user=user,
            )
            for lie in lies
        ]
        try:
            service.kill()
            audit = service.cli("audit", "--state-dir", service.state_dir)
            cleanup = service.cli("cleanup", "--execute", "--state-dir", service.state_dir)
            assert (victim / "file").exists(), cleanup.stdout
            assert "\x1b" not in audit.stdout + cleanup.stdout
            assert (made_up in audit.stdout) is (user == 0)
            with service.start(size=1) as pool:
                pool.wait_ready()
                assert (victim / "file").exists()
                assert {info.name for info in pool.containers()} >= {container.name}
            if user:
                assert all(liar.poll() is None for liar in liars)
        finally:
            for liar in liars:
                liar.kill()
                liar.wait()


@pytest.mark.parametrize("name", ["inside/../../victim", "../victim", "..", ".", "", ".discarded", "victim\n"])
def test_nothing_is_removed_by_a_name_that_no_container_has(tmp_path: Path, name: str) -> None:
    removal = pytest.importorskip("lxc_pool.backend.lxc.removal")  # needs the binding
    (tmp_path / "victim").mkdir()
    (tmp_path / "containers/inside").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for force in (True, False):
        with pytest.raises(DestroyFailed, match="no container's name: nothing was removed"):
            removal.remove(name, tmp_path / "containers", force=force)
    assert sorted(tmp_path.rglob("*")) == before
