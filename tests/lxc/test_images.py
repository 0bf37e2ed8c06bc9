"""Images and the containers that are made of them: imported ones boot, used ones stay, replaced ones go."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lxc_pool import PoolTimeout, State
from lxc_pool.images import busybox
from lxc_pool.images.store import ImageStore
from tests.support.real_service import Service
from tests.support.waiting import eventually

pytestmark = pytest.mark.host


def versions(service: Service) -> list[str]:
    return [image.ref for image in ImageStore(service.state_dir / "images").list()]


def test_a_busybox_root_file_system_comes_back_from_an_archive_as_it_was(service: Service, tmp_path: Path) -> None:
    store = ImageStore(service.state_dir / "images")
    image = store.newest("busybox")
    assert image is not None
    packed = tmp_path / "busybox.tar.gz"
    subprocess.run(["tar", "-C", image.rootfs, "-czf", packed, "."], check=True)
    done = service.cli("image", "import", "again", packed, "--state-dir", service.state_dir, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checksum"] == image.checksum
    for privileged in ("false", "true"):
        pool = service.start(config=f'[profile.default]\nimage = "again"\nsize = 1\nprivileged = {privileged}\n')
        with pool.lease("x", timeout=30) as container:
            done = container.run(["sh", "-c", "id -u; su user -c 'id -u'"], capture_output=True, text=True, timeout=10)
            assert done.stdout == "0\n1000\n", done
        service.stop()


def test_a_replaced_image_is_removed_once_the_pool_is_full(service: Service) -> None:
    store = ImageStore(service.state_dir / "images")
    newest = store.build("busybox", lambda _line: None)
    assert len(versions(service)) == 2
    pool = service.start(size=1)
    pool.wait_ready()
    eventually(lambda: versions(service) == [newest.ref], "the older one is removed")


def test_an_image_that_is_used_stays_until_its_last_container_goes(service: Service) -> None:
    pool = service.start(size=1)
    (old,) = versions(service)
    container = pool.get("x", 30)
    assert container is not None
    service.cli("stop", "--keep-leases")
    service.wait()
    new = ImageStore(service.state_dir / "images").build("busybox", lambda _line: None)
    pool = service.start(size=1)
    pool.wait_ready()
    state = ("--state-dir", service.state_dir)
    for reference in (old, new.ref, "busybox"):
        refused = service.cli("image", "rm", reference, *state)
        assert refused.returncode == 5
        assert "in use" in refused.stderr
    assert versions(service) == [old, new.ref]
    assert container.run(["true"], timeout=10).returncode == 0
    container.release()
    eventually(lambda: versions(service) == [new.ref], "nobody uses the old one any more")


def test_an_image_that_vanishes_is_replaced_by_the_next_one(service: Service) -> None:
    pool = service.start(size=1)
    pool.wait_ready()
    store = ImageStore(service.state_dir / "images")
    (old,) = versions(service)
    store.remove(old, list)  # as if nobody had been asked
    new = store.build("busybox", lambda _line: None)
    with pool.lease("x", timeout=30):
        pass
    with pool.lease("x", timeout=30):
        pass
    pool.wait_ready()
    assert pool.status().profiles["default"].image == new.ref


def test_only_root_may_look_at_images(make_service: Callable[[], Service]) -> None:
    service = make_service()
    service.start(size=1).wait_ready()
    listing = ["setpriv", "--reuid", "65534", "--clear-groups", "ls", str(service.state_dir / "images")]
    assert subprocess.run(listing, capture_output=True, check=False).returncode != 0


def tamper(service: Service) -> None:
    """Change the newest version of the image, as a bad disk or a hand does."""
    image = ImageStore(service.state_dir / "images").list()[-1]
    (image.rootfs / "etc/motd").write_text("not what was built")


@pytest.mark.parametrize("large", [False, True])
def test_an_image_that_has_changed_is_refused_when_a_service_starts_and_leases_go_on(
    service: Service, large: bool
) -> None:
    store, state = ImageStore(service.state_dir / "images"), ("--state-dir", service.state_dir)
    if large:

        def build(rootfs: Path, report: Callable[[str], None]) -> None:
            busybox.build(rootfs, report)
            with (rootfs / "filling").open("wb") as file:
                file.truncate(40 << 20)

        store.build("busybox", lambda _line: None, build)
    pool = service.start(size=1)
    container = pool.get("x", 30)
    assert container is not None
    eventually(lambda: "is what was made" in service.log, "it has been looked at")
    assert service.log.count("is what was made") == 1
    service.cli("stop", "--keep-leases")
    service.wait()
    tamper(service)
    service.launch(size=1)
    service.await_ready()
    eventually(lambda: "has changed since it was built" in (pool.status().last_error or ""), "it has been noticed")
    eventually(lambda: not {State.WARM, State.BUILDING} & {i.state for i in pool.containers()}, "no other one is there")
    with pytest.raises(PoolTimeout, match=r"has changed since it was built .* make a new version"):
        pool.lease("y", timeout=1).__enter__()
    assert "has changed since it was built" in service.log
    assert "HAS CHANGED" in service.cli("image", "ls", *state).stdout
    assert container.run(["true"], timeout=10).returncode == 0
    assert service.cli("image", "build", "busybox", *state).returncode == 0
    with pool.lease("z", timeout=30) as other:
        assert other.run(["test", "-e", "/etc/motd"], timeout=10).returncode == 1
    container.release()
