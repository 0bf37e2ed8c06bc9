"""Every kind of image that can be made is made as it is typed, boots, and leaves nothing if it is cut short."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool.images.store import ImageStore
from lxc_pool.images.tree import measure
from tests.support.debian import UNREACHABLE
from tests.support.real_service import ROOT, Service
from tests.support.waiting import eventually

pytestmark = [pytest.mark.host, pytest.mark.timeout(300)]

KINDS = ("directory", "tar", "tar.gz", "tar.xz", "tar.zst", "oci", "docker")
needs_oci = pytest.mark.skipif(not (shutil.which("skopeo") and shutil.which("umoci")), reason="needs skopeo and umoci")


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


def make(kind: str, root: Path, directory: Path) -> str | Path:
    """Make what is to be imported of the root file system *root*."""
    if kind == "directory":
        return root
    source = directory / f"source.{kind}"
    if kind.startswith("tar"):
        run("tar", "-C", root, "--auto-compress", "-cf", source, ".")
        return source
    layout = directory / "layout"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:v1")
    run("umoci", "insert", "--image", f"{layout}:v1", root, "/")
    if kind == "oci":
        return f"{layout}:v1"
    run("skopeo", "--insecure-policy", "copy", f"oci:{layout}:v1", f"docker-archive:{source}:board:v1")
    return source


@pytest.fixture(scope="module")
def imported(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, str]]]:
    """A service with a profile for each kind of import, and the checksum of each image."""
    service = Service(images)
    try:
        busybox = ImageStore(service.state_dir / "images").newest("busybox")
        assert busybox is not None
        checksums = {"busybox": busybox.checksum}
        config = "[profile.default]\nsize = 1\n"
        for kind in KINDS:
            if kind in ("oci", "docker") and not (shutil.which("skopeo") and shutil.which("umoci")):
                continue
            source = make(kind, busybox.rootfs, tmp_path_factory.mktemp("source"))
            done = service.cli("image", "import", kind, source, "--state-dir", service.state_dir, "--json")
            assert done.returncode == 0, done.stderr
            checksums[kind] = json.loads(done.stdout)["checksum"]
            config += f'[profile."{kind.replace(".", "-")}"]\nimage = "{kind}"\nsize = 1\n'
        service.start(config=config).wait_ready()
        yield service, checksums
    finally:
        service.close()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs_oci if kind in ("oci", "docker") else ()) for kind in KINDS]
)
def test_what_was_imported_boots_and_is_what_it_was(imported: tuple[Service, dict[str, str]], kind: str) -> None:
    service, checksums = imported
    if kind not in ("oci", "docker"):  # whose layers have no times of directories that are only on the way
        assert checksums[kind] == checksums["busybox"]
    with service.connect() as pool, pool.lease("x", timeout=30, profile=kind.replace(".", "-")) as container:
        script = "id -u; su user -c 'id -u; touch ~/x'; stat -c %a /tmp /etc/shadow; readlink /bin/sh"
        done = container.run(["sh", "-c", script], capture_output=True, text=True, timeout=10)
        assert done.stdout == "0\n1000\n1777\n600\nbusybox\n", done.stderr


def test_images_are_verified_against_their_checksums(imported: tuple[Service, dict[str, str]]) -> None:
    """What containers have written makes no difference."""
    service, checksums = imported
    state = ("--state-dir", service.state_dir)
    with service.connect() as pool, pool.lease("x", timeout=30) as container:
        container.run(["sh", "-c", "rm -rf /etc /home; echo x >/bin/busybox; dd if=/dev/zero of=/bin/new count=9"])
    for each in ImageStore(service.state_dir / "images").list():
        assert measure(each.rootfs).checksum == each.checksum == checksums[each.name]
    verified = service.cli("image", "verify", *state)
    assert (verified.returncode, verified.stdout.count("unchanged since it was made")) == (0, len(checksums))
    image = ImageStore(service.state_dir / "images").newest("tar")
    assert image is not None
    passwd = image.rootfs / "etc/passwd"
    text = passwd.read_text()
    passwd.write_text(text.replace("1000", "1001", 1))
    refused = service.cli("image", "verify", "tar", *state, "--json")
    assert refused.returncode == 1
    assert [entry["ok"] for entry in json.loads(refused.stdout)] == [False]
    passwd.write_text(text)
    assert service.cli("image", "verify", "tar", *state).returncode == 0


def test_busybox_is_built_as_it_is_typed_and_each_time_a_new_version(service: Service) -> None:
    state = ("--state-dir", service.state_dir)
    before = ImageStore(service.state_dir / "images").list()
    refs = [service.cli("image", "build", "busybox", *state).stdout.strip() for _ in range(2)]
    after = ImageStore(service.state_dir / "images").list()
    assert [image.ref for image in after] == [*(image.ref for image in before), *refs]
    assert after[: len(before)] == before
    listed = json.loads(service.cli("image", "ls", "--json", *state).stdout)
    assert [f"{entry['name']}:{entry['version']}" for entry in listed] == [image.ref for image in after]


def test_a_terminal_is_shown_a_bar(service: Service, tmp_path: Path) -> None:
    image = ImageStore(service.state_dir / "images").newest("busybox")
    assert image is not None
    packed = tmp_path / "busybox.tar"
    run("tar", "-C", image.rootfs, "-cf", packed, ".")
    ours, its = pty.openpty()
    with subprocess.Popen(
        service.command("image", "import", "again", packed, "--state-dir", service.state_dir),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=its,
    ) as command:
        os.close(its)
        said = b""
        try:
            while more := os.read(ours, 4096):
                said += more
        except OSError:  # EIO: the other end is closed
            pass
        os.close(ours)
    assert command.returncode == 0
    assert b"[####" in said
    assert b"% unpacked " in said


def build_debian(service: Service) -> subprocess.Popen[str]:
    """Start a real build, and wait until it counts the packages that it installs, with /proc mounted for them."""
    build = subprocess.Popen(
        [sys.executable, "-m", "lxc_pool", "image", "build", "debian", "--state-dir", service.state_dir],
        cwd=ROOT,
        env=os.environ | {"LXC_POOL_TEST_SERVICE": service.mark},  # by which the service finds its own
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert build.stderr is not None
    said = []
    for line in build.stderr:
        said.append(line)
        if re.search(r"installing essential packages: [1-9]\d* of \d+ packages unpacked, \d+ configured", line):
            return build
    build.wait()
    build.stderr.close()
    if UNREACHABLE.search("".join(said)):
        pytest.skip(f"no mirror could be reached: {said}")
    pytest.fail(f"the build did not come so far: {said}")


@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="needs mmdebstrap")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_real_build_that_is_cut_short_leaves_nothing(service: Service, number: signal.Signals) -> None:
    with build_debian(service) as build:
        assert len(service.marked()) > 3
        build.send_signal(number)
        build.wait(30)
    assert build.returncode == (130 if number is signal.SIGINT else -signal.SIGKILL)
    eventually(lambda: not service.marked(), "all that it started has ended")
    assert str(service.state_dir) not in Path("/proc/self/mountinfo").read_text()
    store = ImageStore(service.state_dir / "images")
    assert [image.name for image in store.list()] == ["busybox"]
    directory = store.directory / "debian"
    if number is signal.SIGKILL:
        assert len(os.listdir(directory)) == 1
        service.start(size=1).wait_ready()
        eventually(lambda: not os.listdir(directory), "the service has removed what is left")
    assert os.listdir(directory) == []
