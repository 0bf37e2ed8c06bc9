"""The image store: versions appear complete or not at all, whoever is killed meanwhile."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lxc_pool.errors import ImageError
from lxc_pool.images import busybox, manifest, tree
from lxc_pool.images.store import Image, ImageStore, verify

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BUILD_FOR_EVER = """
import sys, threading
from pathlib import Path
from lxc_pool.images.store import ImageStore

def build(rootfs, report):
    (rootfs / "half").write_text("x")
    print("building", flush=True)
    threading.Event().wait(60)

ImageStore(Path(sys.argv[1]), {"toy": build}).build("toy", lambda line: None)
"""


def silent(_line: str) -> None:
    pass


def build_toy(rootfs: Path, report: Callable[[str], None]) -> None:
    report("filling")
    (rootfs / "etc").mkdir()
    (rootfs / "etc/motd").write_text("hello")


def toy_store(directory: Path) -> ImageStore:
    return ImageStore(directory / "images", {"toy": build_toy})


def partials(store: ImageStore) -> list[Path]:
    return list(store.directory.glob("*/.partial-*"))


def start_endless_build(store: ImageStore) -> subprocess.Popen[str]:
    # A killed process leaves coverage a broken data file.
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    child = subprocess.Popen(
        [sys.executable, "-c", BUILD_FOR_EVER, str(store.directory)], stdout=subprocess.PIPE, text=True, env=unmeasured
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    with child:
        pass


def test_nothing_is_written_before_the_first_build(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    assert store.newest("toy") is None
    assert store.list() == ()
    assert store.sweep() == ()
    assert not store.directory.exists()


def test_ensure_builds_once_and_then_returns_the_same_image(tmp_path: Path) -> None:
    lines: list[str] = []
    first = toy_store(tmp_path).ensure("toy", lines.append)
    assert (first.rootfs / "etc/motd").read_text() == "hello"
    assert toy_store(tmp_path).ensure("toy", pytest.fail) == first
    assert lines[0] == "building base image toy"
    assert lines[1] == "filling"
    assert lines[-1].startswith(f"built {first.ref}, ")


def test_an_image_says_what_it_is_and_survives_pickling(tmp_path: Path) -> None:
    image = toy_store(tmp_path).build("toy", silent)
    assert image.ref == f"toy:{image.version}"
    assert image.size == len("hello")
    assert image.checksum.startswith("sha256:")
    assert pickle.loads(pickle.dumps(image)) == image  # noqa: S301 - our own bytes


def test_versions_sort_by_age_even_if_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = toy_store(tmp_path)
    images = [store.build("toy", silent)]
    for now in (images[0].created + 10, images[0].created - 3600, 0.0):
        monkeypatch.setattr("time.time", lambda now=now: now)
        images.append(store.build("toy", silent))
    assert store.list() == tuple(images)
    assert store.newest("toy") == images[-1]
    assert sorted(images, key=lambda image: image.created) == images


def test_an_unknown_image_error_names_what_exists_and_how_to_build(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    image = store.build("toy", silent)
    with pytest.raises(ImageError, match="no base image 'other'") as caught:
        store.ensure("other", silent)
    assert image.ref in str(caught.value)
    assert "lxc-pool image build toy" in str(caught.value)
    assert not (store.directory / ".lock-other").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "-a", ".a", "a\n", "a:b", "a,b", "ä", "a" * 64])
def test_a_name_that_could_leave_the_store_is_refused(tmp_path: Path, name: str) -> None:
    store = toy_store(tmp_path)
    for act in (store.newest, lambda name: store.ensure(name, silent), lambda name: store.build(name, silent)):
        with pytest.raises(ImageError, match="an image's name is"):
            act(name)


def test_nobody_but_root_may_look_at_images_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        store = toy_store(tmp_path / "new/parents")
        image = store.build("toy", silent)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(image.rootfs.stat().st_mode) == 0o755  # what a container sees as its root
    for directory in list(store.directory.parents)[:2]:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o711


def test_a_directory_of_images_that_others_may_enter_is_closed(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    store.directory.mkdir(mode=0o755)
    store.build("toy", silent)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700


def test_a_failed_build_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    def fail(rootfs: Path, _report: Callable[[str], None]) -> None:
        (rootfs / "half").write_text("x")
        raise OSError(28, "No space left on device")

    store = ImageStore(tmp_path, {"toy": fail})
    with pytest.raises(ImageError, match=r"can't build base image 'toy'.*No space left"):
        store.ensure("toy", silent)
    assert store.newest("toy") is None
    assert partials(store) == []


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(rootfs: Path, _report: Callable[[str], None]) -> None:
        (rootfs / "half").write_text("x")
        raise KeyboardInterrupt

    store = ImageStore(tmp_path, {"toy": interrupt})
    with pytest.raises(KeyboardInterrupt):
        store.build("toy", silent)
    assert partials(store) == []


def test_a_killed_build_is_no_image_and_the_next_build_removes_it(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    end(start_endless_build(store))
    assert len(partials(store)) == 1
    assert store.newest("toy") is None
    assert store.list() == ()
    image = store.ensure("toy", silent)
    assert partials(store) == []
    assert store.list() == (image,)


def test_a_sweep_removes_a_killed_build_but_never_a_live_one(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    child = start_endless_build(store)
    try:
        assert store.sweep() == ()
        (partial,) = partials(store)
    finally:
        end(child)
    assert store.sweep() == (partial,)
    assert partials(store) == []


def test_a_sweep_reports_what_it_could_not_remove_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = toy_store(tmp_path)
    for name in ("a", "b"):
        (store.directory / name / ".partial-x").mkdir(parents=True)
    remove = tree.remove

    def fail_first(path: Path) -> None:
        if path.parent.name == "a":
            raise ImageError("mounts in it")
        remove(path)

    monkeypatch.setattr(tree, "remove", fail_first)
    with pytest.raises(ImageError, match="mounts in it"):
        store.sweep()
    assert [partial.parent.name for partial in partials(store)] == ["a"]


def test_of_two_that_ensure_at_once_one_builds_and_the_other_finds_it(tmp_path: Path) -> None:
    builds: list[Path] = []
    entered, go_on = threading.Event(), threading.Event()

    def build(rootfs: Path, _report: Callable[[str], None]) -> None:
        builds.append(rootfs)
        entered.set()
        assert go_on.wait(10)

    images: list[Image] = []

    def ensure() -> None:
        images.append(ImageStore(tmp_path, {"toy": build}).ensure("toy", silent))

    threads = [threading.Thread(target=ensure) for _ in range(2)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()  # there is no image yet: it comes to the lock
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(builds) == 1
    assert images[0] == images[1]


def test_a_forked_child_of_a_builder_does_not_keep_the_lock(tmp_path: Path) -> None:
    inherited: list[int] = []

    def build(_rootfs: Path, _report: Callable[[str], None]) -> None:
        (lock,) = [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(locked)]
        inherited.append(os.dup(int(lock)))  # shares the lock as a forked child's copy does

    locked = tmp_path / ".lock-toy"
    ImageStore(tmp_path, {"toy": build}).build("toy", silent)
    try:
        with locked.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(inherited[0])


def test_links_in_place_of_directories_are_not_followed(tmp_path: Path) -> None:
    image = toy_store(tmp_path).build("toy", silent)
    elsewhere = ImageStore(tmp_path / "elsewhere", {"toy": build_toy})
    elsewhere.directory.mkdir()
    (elsewhere.directory / "toy").symlink_to(tmp_path / "images/toy")
    assert elsewhere.newest("toy") is None
    assert elsewhere.list() == ()
    with pytest.raises(ImageError, match="not a directory"):
        elsewhere.build("toy", silent)
    (elsewhere.directory / "toy").unlink()
    (elsewhere.directory / "toy").mkdir()
    (elsewhere.directory / "toy" / image.version).symlink_to(image.rootfs.parent)
    assert elsewhere.newest("toy") is None


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    store.directory.mkdir()
    (store.directory / ".lock-toy").symlink_to(tmp_path / "made")
    with pytest.raises(ImageError, match="can't use the image directory"):
        store.build("toy", silent)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"format": 2}', '{"format": 1, "name": "x", "version": "y"}'])
def test_a_version_without_a_sound_manifest_is_passed_over(tmp_path: Path, text: str | None) -> None:
    store = toy_store(tmp_path)
    older, broken = store.build("toy", silent), store.build("toy", silent)
    described = broken.rootfs.parent / "manifest.json"
    described.unlink()
    if text is not None:
        described.write_text(text)
    assert store.newest("toy") == older
    assert store.list() == (older,)


def test_a_version_without_its_tree_is_passed_over(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    image = store.build("toy", silent)
    tree.remove(image.rootfs)
    image.rootfs.symlink_to("/")
    assert store.newest("toy") is None


def test_a_store_can_be_moved(tmp_path: Path) -> None:
    image = toy_store(tmp_path).build("toy", silent)
    assert "rootfs" not in json.loads((image.rootfs.parent / "manifest.json").read_text())
    moved = ImageStore((tmp_path / "images").rename(tmp_path / "moved")).newest("toy")
    assert moved is not None
    assert moved.rootfs == tmp_path / "moved/toy" / image.version / "rootfs"
    verify(moved)


def test_a_directory_that_is_a_file_is_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("")
    with pytest.raises(ImageError, match="can't use the image directory"):
        toy_store(tmp_path).build("toy", silent)


def test_a_disk_that_can_not_be_written_out_makes_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def syncfs(self, _descriptor: int) -> int:
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *_args, **_keywords: Libc())
    store = toy_store(tmp_path)
    with pytest.raises(ImageError, match="syncfs"):
        store.build("toy", silent)
    assert store.newest("toy") is None
    assert partials(store) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "etc/motd").write_text("HELLO"),
        lambda root: (root / "etc/motd").chmod(0o600),
        lambda root: (root / "etc/motd").rename(root / "etc/issue"),
        lambda root: (root / "etc/motd").unlink(),
        lambda root: (root / "empty").mkdir(),
        lambda root: (root / "link").symlink_to("etc"),
        lambda root: os.mkfifo(root / "fifo"),
        lambda root: root.chmod(0o700),
    ],
)
def test_verify_notices_a_changed_tree(tmp_path: Path, change: Callable[[Path], object]) -> None:
    image = toy_store(tmp_path).build("toy", silent)
    verify(image)
    change(image.rootfs)
    with pytest.raises(ImageError, match="has changed since it was built"):
        verify(image)


def test_verify_says_so_if_the_tree_is_gone(tmp_path: Path) -> None:
    image = toy_store(tmp_path).build("toy", silent)
    tree.remove(image.rootfs)
    with pytest.raises(ImageError, match="can't read base image"):
        verify(image)


@needs_root
def test_the_checksum_covers_owners_and_devices(tmp_path: Path) -> None:
    sums = [tree.measure(tmp_path).checksum]
    (tmp_path / "x").symlink_to("y")
    sums.append(tree.measure(tmp_path).checksum)
    os.lchown(tmp_path / "x", 1, 1)
    sums.append(tree.measure(tmp_path).checksum)
    for minor in (3, 5):
        os.mknod(tmp_path / f"dev{minor}", stat.S_IFCHR | 0o600, os.makedev(1, minor))
        (tmp_path / f"dev{minor}").rename(tmp_path / "dev")
        sums.append(tree.measure(tmp_path).checksum)
    assert len(set(sums)) == len(sums)


def test_a_file_with_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    os.link(tmp_path / "a", tmp_path / "b")
    assert tree.measure(tmp_path).size == 5


def test_the_checksum_is_of_the_tree_and_not_of_its_place_or_age(tmp_path: Path) -> None:
    for name in ("one", "two"):
        root = tmp_path / name
        root.mkdir()
        build_toy(root, silent)
    os.utime(tmp_path / "two/etc/motd", (0, 0))
    assert tree.measure(tmp_path / "one") == tree.measure(tmp_path / "two")


def test_removing_what_is_not_there_is_fine_but_a_file_is_not_a_tree(tmp_path: Path) -> None:
    tree.remove(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        tree.remove(tmp_path / "file")


def test_a_tree_with_a_mount_in_it_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = tmp_path / "a b"
    (partial / "proc").mkdir(parents=True)
    recorded = tmp_path / "mountinfo"
    recorded.write_text(f"41 31 0:38 / {tmp_path}/a\\040b/proc rw - proc proc rw\n42 31 0:39 / / rw - ext4 a rw\n")
    monkeypatch.setattr(tree, "_MOUNTINFO", str(recorded))
    with pytest.raises(ImageError, match="unmount"):
        tree.remove(partial)
    assert (partial / "proc").is_dir()


def test_a_manifest_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = toy_store(tmp_path).build("toy", silent)

    def no_rename(_path: Path, _target: Path) -> None:
        raise OSError("killed here")

    monkeypatch.setattr(Path, "rename", no_rename)
    with pytest.raises(OSError, match="killed here"):
        manifest.save(tmp_path, image)
    assert not (tmp_path / "manifest.json").exists()


def elf(kinds: list[int], *, wide: bool = True, order: str = "<") -> bytes:
    header = bytearray(64 if wide else 52)
    header[:6] = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2])
    struct.pack_into(order + ("Q" if wide else "I"), header, 32 if wide else 28, len(header))
    struct.pack_into(order + "HH", header, 54 if wide else 42, 56 if wide else 32, len(kinds))
    return bytes(header) + b"".join(struct.pack(order + "I", kind).ljust(56 if wide else 32, b"\0") for kind in kinds)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_program_with_an_interpreter_is_not_static(wide: bool, order: str) -> None:
    assert busybox.is_static(elf([1, 1, 7], wide=wide, order=order))
    assert not busybox.is_static(elf([6, 3, 1], wide=wide, order=order))


@pytest.mark.parametrize(
    "content",
    [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\2\1", elf([1])[:66]],
    ids=["empty", "script", "magic only", "no header", "no program headers"],
)
def test_what_is_no_program_is_no_busybox(content: bytes) -> None:
    with pytest.raises(ValueError, match="ELF"):
        busybox.is_static(content)


def test_a_missing_or_dynamic_busybox_names_the_package(tmp_path: Path) -> None:
    (tmp_path / "dynamic").write_bytes(elf([3]))
    (tmp_path / "script").write_text("#!/bin/sh\n")
    with pytest.raises(ImageError, match="apt-get install busybox-static") as caught:
        busybox.find([tmp_path / "absent", tmp_path / "dynamic", tmp_path / "script"])
    for reason in ("absent: No such file", "dynamic is dynamically linked", "script: not an ELF program"):
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("listing", "complaint"),
    [
        ("echo bin/sh", "no init or no sh"),
        ("exit 3", "exit status 3"),
        ("printf 'sbin/init\\nbin/sh\\n../x\\n'", "outside"),
    ],
)
def test_a_busybox_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, complaint: str
) -> None:
    fake = tmp_path / "busybox"
    fake.write_text(f"#!/bin/sh\n{listing}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(busybox, "is_static", lambda _content: True)
    (tmp_path / "rootfs").mkdir()
    with pytest.raises(ImageError, match=complaint):
        busybox.build(tmp_path / "rootfs", silent, [fake])


@needs_root
def test_the_busybox_tree_is_complete_and_all_its_links_stay_inside(tmp_path: Path) -> None:
    lines: list[str] = []
    busybox.build(tmp_path, lines.append)
    for program in ("sbin/init", "bin/sh", "usr/bin/env", "linuxrc"):
        assert (tmp_path / program).resolve() == tmp_path / "bin/busybox"
    outside = {"etc/mtab", "var/run", "var/lock"}
    for path in tmp_path.rglob("*"):
        if path.is_symlink() and str(path.relative_to(tmp_path)) not in outside:
            assert path.resolve() == tmp_path / "bin/busybox", path
    assert stat.S_IMODE((tmp_path / "tmp").stat().st_mode) == 0o1777
    assert stat.S_IMODE((tmp_path / "root").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "etc/shadow").stat().st_mode) == 0o600
    assert (tmp_path / "home/user").stat().st_uid == 1000
    assert (tmp_path / "etc/resolv.conf").read_bytes() == b""
    assert "ID=busybox" in (tmp_path / "etc/os-release").read_text()
    assert "respawn" not in (tmp_path / "etc/inittab").read_text().replace("nothing to respawn", "")
    assert lines[-1].startswith("linked ")


@needs_root
def test_two_builds_of_the_same_busybox_are_the_same_tree(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    one, two = store.ensure("busybox", silent), store.build("busybox", silent)
    assert one.version != two.version
    assert one.checksum == two.checksum
