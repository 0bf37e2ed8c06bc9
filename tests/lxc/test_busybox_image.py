"""The busybox image boots in a real container, by itself: nothing of the host's file system is bound in."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool.host import cgroups
from lxc_pool.images.store import Image, ImageStore, verify

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("lxc-start") is None, reason="needs root and lxc")

KERNEL_FILESYSTEMS = {"tmpfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"}


class Container:
    """A container whose configuration is written by hand."""

    def __init__(self, image: Image, directory: Path) -> None:
        self.image, self.directory, self.name = image, directory, f"lxc-pool-image-{os.getpid()}"

    def lxc(self, program: str, *arguments: str, check: bool = True) -> str:
        command = [program, "-P", str(self.directory), "-n", self.name, *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=check).stdout

    def run(self, script: str) -> str:
        return self.lxc("lxc-attach", "--clear-env", "--", "sh", "-c", script)

    def start(self) -> None:
        home = self.directory / self.name
        for name in ("overlay/delta", "overlay/work", "rootfs"):
            (home / name).mkdir(parents=True)
        (home / "config").write_text(
            f"lxc.uts.name = {self.name}\n"
            f"lxc.rootfs.path = overlay:{self.image.rootfs}:{home}/overlay/delta\n"
            "lxc.net.0.type = empty\n"
            "lxc.net.0.flags = up\n"
            "lxc.mount.auto = proc:rw sys:rw\n"
            "lxc.pty.max = 64\n"
            "lxc.apparmor.profile = unchanged\n"
        )
        self.lxc("lxc-start")

    def stop(self) -> None:
        self.lxc("lxc-stop", "--kill", check=False)
        paths = cgroups.container_cgroups(self.name)
        assert cgroups.kill(*paths) == ()
        cgroups.remove(*paths)
        locks = Path("/run/lxc/lock") / self.directory.relative_to("/")
        (locks / f".{self.name}").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the directories above may be another's as well
            os.removedirs(locks)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    directory = tmp_path_factory.mktemp("images")
    return ImageStore(directory).ensure("busybox", lambda _line: None)


@pytest.fixture(scope="module")
def container(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    container = Container(image, tmp_path_factory.mktemp("containers"))
    try:
        container.start()
        yield container
    finally:
        container.stop()
    assert cgroups.container_cgroups(container.name) == ()


def test_it_boots_with_busybox_as_its_init(container: Container) -> None:
    assert container.lxc("lxc-info", "-s", "-H").strip() == "RUNNING"
    assert container.run("cat /proc/1/comm; readlink /proc/1/exe") == "init\n/bin/busybox\n"


def test_nothing_of_the_host_is_mounted_but_the_overlay_itself(container: Container) -> None:
    kinds = {}
    for line in container.run("cat /proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        kinds[mount.split(" ")[4]] = filesystem.split(" ")[0]
    assert kinds.pop("/") == "overlay"
    assert set(kinds.values()) <= KERNEL_FILESYSTEMS


def test_its_init_starts_nothing_and_then_sleeps(container: Container) -> None:
    pid = container.lxc("lxc-info", "-p", "-H").strip()
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    assert sum(map(int, ticks)) <= 2  # of 10 ms, for the whole boot
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


def test_the_plain_user_exists_and_has_a_home(container: Container) -> None:
    assert container.run("su user -c 'id -u; echo ~; cd && touch x && ls'") == "1000\n/home/user\nx\n"
    assert container.run("id -u nobody") == "65534\n"


def test_programs_are_found_on_the_usual_path_and_tmp_is_open(container: Container) -> None:
    found = container.run("which sh env ls awk ip; su nobody -s /bin/sh -c 'touch /tmp/x /var/tmp/x' && echo open")
    assert found.splitlines() == ["/bin/sh", "/usr/bin/env", "/bin/ls", "/usr/bin/awk", "/sbin/ip", "open"]


def test_names_are_resolved_from_the_hosts_file(container: Container) -> None:
    assert "127.0.0.1" in container.run("ping -c 1 -W 1 localhost")


def test_a_container_that_writes_everywhere_leaves_the_image_as_it_was(container: Container, image: Image) -> None:
    container.run("echo x > /etc/passwd.new; rm /bin/ls; chmod 700 /usr; chown 5 /home")
    verify(image)
