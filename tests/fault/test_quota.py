"""Layers on the disk, and processes that are killed anywhere: nothing of them stays, and nothing of them is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import quota_disk
from tests.support.quota_disk import projects
from tests.support.real_service import ROOT, Service
from tests.support.waiting import eventually

_DISK = 48 << 20
_CONFIGURATION = f"[pool]\nworkers = 2\n[profile.default]\nsize = 1\ndisk = {_DISK}\n"

_PATIENCE = 120.0
"""Seconds for removals, which some machines that have these file systems only emulate."""

_MAKE = (
    *("os.chmod:1", "idranges.take:1", "os.mkdir:3", "quota.mark:1", "quota.limit:1", "layers.make:1"),
    *("mounts.mounted_again:1", "mounts.mount:1", "binding.container:1"),
)
_REMOVE = ("discarded.put_aside:0", "discarded.put_aside:1", "removal.remove:1")
_SWEEP = (
    *(
        "quota.limit:1",
        "razing.empty:0",
        "razing._lift:2",
        "razing.empty:1",
        "quota.limit:2",
        "discarded._remove_layer:1",
    ),
    *("idranges.give_back:0", "idranges.give_back:1", "shutil.rmtree:1"),
)
"""Where a process is killed: a function, and how often it has returned before; 0: it is killed when it is called."""

_CHILD = """\
import importlib, os, signal, sys, time
from pathlib import Path
from lxc_pool.backend.lxc import binding, discarded, layers, removal
from lxc_pool.backend.lxc.engine import LxcBackend
from lxc_pool.backend.protocol import Blueprint
from lxc_pool.config import ProfileConfig
from lxc_pool.host import idranges, mounts, quota, razing
import shutil

state_dir, name, phase, place = sys.argv[1:]
backend = LxcBackend(Path(state_dir))
backend.open()

def arm():
    path, _, calls = place.partition(":")
    module, _, function = path.partition(".")
    module = globals()[module]
    original, left = getattr(module, function), int(calls)

    def deadly(*arguments, **keywords):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **keywords)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, function, deadly)

if phase == "make":
    arm()
profile = ProfileConfig("default", size=0, disk=48 << 20)
backend.create(Blueprint(name, profile, backend.prepare("busybox"), time.monotonic() + 60))
layer = Path(state_dir, "containers", name, "layer/delta")
for number in range(5):
    (layer / f"{number}/a/b/c").mkdir(parents=True)
    (layer / f"{number}/a/b/file").touch()
if phase == "remove":
    arm()
backend.destroy(name, force=False)
if phase == "sweep":
    arm()
backend.sweep()
"""


@pytest.fixture(params=sorted(quota_disk.KINDS))
def service(request: pytest.FixtureRequest, images: Path) -> Iterator[Service]:
    with (
        tempfile.TemporaryDirectory(prefix="lxp-quota-") as directory,
        quota_disk.mounted(request.param, Path(directory, "disk")) as place,
    ):
        Path(directory).chmod(0o755)
        service = Service(images, place=place)
        try:
            yield service
        finally:
            service.close()


def _swept(service: Service) -> bool:
    """Return whether only the warm container is left."""
    return len(os.listdir(service.containers)) == 1 and len(projects(service.directory)) == 1


def _is_clean(service: Service) -> bool:
    done = service.cli("audit", "--state-dir", service.state_dir)
    return (done.returncode, done.stdout) == (0, "clean\n")


def test_whatever_a_killed_process_leaves_the_next_service_removes(service: Service) -> None:
    service.start(config=_CONFIGURATION).wait_ready(timeout=60)
    service.stop()
    places = [(phase, place) for phase in ("make", "remove", "sweep") for place in globals()[f"_{phase.upper()}"]]
    for number, (phase, place) in enumerate(places):
        name = f"lxp-{service.instance}-dead-{number}"
        command = [sys.executable, "-c", _CHILD, str(service.state_dir), name, phase, place]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL, f"{phase} {place} was never reached: {done.stderr}"
    assert service.cli("audit", "--state-dir", service.state_dir).returncode == 1
    service.start(config=_CONFIGURATION).wait_ready(timeout=60)
    eventually(lambda: _swept(service), "nothing is left of them", _PATIENCE)
    assert _is_clean(service)


def test_whatever_a_killed_process_leaves_cleanup_removes(service: Service) -> None:
    service.start(config=_CONFIGURATION).wait_ready(timeout=60)
    service.stop()
    for number, (phase, place) in enumerate([("make", "quota.limit:1"), ("sweep", "razing._lift:2")]):
        name = f"lxp-{service.instance}-dead-{number}"
        command = [sys.executable, "-c", _CHILD, str(service.state_dir), name, phase, place]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    found = service.cli("audit", "--state-dir", service.state_dir).stdout
    assert found.count("an upper layer, not removed yet") == 1
    done = service.cli("cleanup", "--state-dir", service.state_dir, "--execute", timeout=_PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(service.containers) == []
    assert projects(service.directory) == {}
    assert _is_clean(service)


def test_a_quota_whose_layer_an_administrator_has_removed_goes_with_the_container(service: Service) -> None:
    service.start(config=_CONFIGURATION).wait_ready(timeout=60)
    service.kill()
    for directory in service.containers.iterdir():
        subprocess.run(["lxc-stop", "-k", "-P", service.containers, "-n", directory.name], check=True)
        subprocess.run(["rm", "-rf", directory], check=True)
    assert len(projects(service.directory)) == 1
    done = service.cli("cleanup", "--state-dir", service.state_dir, "--execute", timeout=_PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert projects(service.directory) == {}


def test_leases_and_their_bounds_outlive_the_service(service: Service) -> None:
    pool = service.start(config=_CONFIGURATION)
    with pool.lease("x", timeout=60) as container:
        container.run(["sh", "-c", "echo x >/file"], check=True)
        service.kill()
        service.start(config=_CONFIGURATION)
        done = container.run(["sh", "-c", "cat /file; dd if=/dev/zero of=/full bs=64k"], capture_output=True, text=True)
        assert done.stdout == "x\n"
        assert done.returncode != 0
        assert max(record.used for record in projects(service.directory).values()) <= _DISK
        assert _is_clean(service)
    eventually(lambda: _swept(service), "nothing is left of it", _PATIENCE)


def test_a_service_that_is_killed_while_it_removes_a_layer_is_followed_by_one_that_does(service: Service) -> None:
    pool = service.start(config=_CONFIGURATION)
    with pool.lease("x", timeout=60) as container:
        container.run(["sh", "-c", "mkdir /d; cd /d; mkdir -p $(seq 900 | sed s:$:/e:)"], check=True)
        aside = service.containers / ".discarded" / container.name
    eventually(aside.exists, "its removal has begun", _PATIENCE)
    service.kill()
    service.start(config=_CONFIGURATION)
    eventually(lambda: _swept(service), "nothing is left of it", _PATIENCE)
    assert _is_clean(service)


def test_a_sweeper_that_is_killed_is_replaced(service: Service) -> None:
    pool = service.start(config=_CONFIGURATION)
    with pool.lease("x", timeout=60) as container:
        container.run(["sh", "-c", "echo x >/file"], check=True)
        held = (service.containers / container.name / "layer/delta/file").open("rb")
        aside = service.containers / ".discarded" / container.name
    with held:
        eventually(lambda: aside.exists() and not (aside / "layer").exists(), "all but the file is gone", _PATIENCE)
        (sweeper,) = (process for process in map(psutil.Process, service.marked()) if process.nice() == 10)
        sweeper.kill()
        sweeper.wait(10)
        pool.wait_ready(timeout=60)
        assert aside.exists()
    eventually(lambda: _swept(service), "nothing is left of it", _PATIENCE)
