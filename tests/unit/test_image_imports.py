"""Images from foreign archives and directories: what is hostile ends the import, and nothing outside ever changes."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lxc_pool.errors import ImageError
from lxc_pool.images import archive, imports, init, program, tree, unpack
from lxc_pool.images.store import Image, ImageStore, verify
from lxc_pool.progress import Milestone

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files get other owners")

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(content), 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def directory(name: str, mode: int = 0o755, **fields: object) -> Member:
    return member(name, b"", tarfile.DIRTYPE, mode=mode, **fields)


def link(name: str, target: str) -> Member:
    return member(name, kind=tarfile.SYMTYPE, linkname=target)


def hard_link(name: str, target: str) -> Member:
    return member(name, kind=tarfile.LNKTYPE, linkname=target)


INIT = member("sbin/init", b"#!/bin/sh\n", mode=0o755)


def pack(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class World:
    """A store, something outside of it that must stay as it is, and what was said."""

    def __init__(self, path: Path) -> None:
        self.store = ImageStore(path / "images", {})
        self.path = path
        self.outside = path / "outside"
        self.outside.mkdir()
        (self.outside / "precious").write_text("gold")
        self.before = tree.measure(self.outside)
        self.said: list[str] = []

    def bring(self, content: bytes, name: str = "image.tar") -> Image:
        (self.path / name).write_bytes(content)
        return self.bring_path(self.path / name)

    def bring_path(self, path: Path | str) -> Image:
        image = self.store.build("foreign", self.said.append, imports.builder(str(path)))
        verify(image)
        return image

    def assert_untouched(self) -> None:
        assert tree.measure(self.outside) == self.before
        assert self.store.list() == ()
        assert list(self.store.directory.glob("*/*")) == []
        assert not Path("/lxc-pool-evil").exists()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_an_archive_becomes_an_image_with_owners_modes_times_and_links(world: World) -> None:
    image = world.bring(
        pack(
            directory("./", mode=0o700, uid=5),
            INIT,
            directory("etc", mode=0o750, uid=3, gid=4, mtime=1000),
            member("etc/shadow", b"secret", mode=0o640, uid=0, gid=42, mtime=2000.5),
            member("usr/bin/su", b"elf", mode=0o4755, uid=0),
            link("bin", "usr/bin"),
            link("etc/localtime", "/usr/share/zoneinfo/UTC"),
            hard_link("usr/bin/su2", "./usr/bin/su"),
            member("run/pipe", kind=tarfile.FIFOTYPE, mode=0o622),
        )
    )
    root = image.rootfs
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    assert root.stat().st_uid == 0
    shadow = (root / "etc/shadow").stat()
    assert (stat.S_IMODE(shadow.st_mode), shadow.st_gid, shadow.st_mtime) == (0o640, 42, 2000.5)
    etc = (root / "etc").stat()
    assert (stat.S_IMODE(etc.st_mode), etc.st_uid, etc.st_gid, etc.st_mtime) == (0o750, 3, 4, 1000)
    su = (root / "usr/bin/su").stat()
    assert stat.S_IMODE(su.st_mode) == 0o4755
    assert su.st_ino == (root / "usr/bin/su2").stat().st_ino
    assert os.readlink(root / "etc/localtime") == "/usr/share/zoneinfo/UTC"
    assert stat.S_ISFIFO((root / "run/pipe").stat().st_mode)
    assert stat.S_IMODE((root / "run/pipe").stat().st_mode) == 0o622
    assert image.probe == ()


def test_device_nodes_are_left_out_and_that_is_said(world: World) -> None:
    nodes = [
        member("dev/sda", kind=tarfile.BLKTYPE, devmajor=8, devminor=0),
        member("dev/null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3),
    ]
    image = world.bring(pack(INIT, *nodes))
    assert not (image.rootfs / "dev").exists() or os.listdir(image.rootfs / "dev") == []
    assert "left out 2 device nodes" in world.said


def evil(path: Path) -> dict[str, list[Member]]:
    outside = str(path / "outside")
    deep = "/".join(["d"] * 300)
    return {
        "an absolute path": [member("/lxc-pool-evil", b"x")],
        "an absolute directory": [directory(outside, mode=0o777)],
        "a path that goes up": [member("../outside/precious", b"x")],
        "a path that goes down and further up": [member("a/../../outside/precious", b"x")],
        "a path that only goes up": [directory("..", mode=0o777)],
        "a file through a link": [link("l", outside), member("l/precious", b"x")],
        "a file through a relative link": [link("l", "../../../../outside"), member("l/precious", b"x")],
        "a file through two links": [link("a", outside), link("b", "a"), member("b/precious", b"x")],
        "a file through a link to a directory of the image": [directory("usr"), link("l", "usr"), member("l/x", b"x")],
        "a directory in a link's place": [link("l", outside), directory("l", mode=0o777)],
        "a directory below a link": [link("l", outside), directory("l/new")],
        "a link below a link": [link("l", outside), link("l/new", "x")],
        "a pipe below a link": [link("l", outside), member("l/new", kind=tarfile.FIFOTYPE)],
        "a hard link to an absolute path": [hard_link("stolen", outside + "/precious")],
        "a hard link that goes up": [hard_link("stolen", "../outside/precious")],
        "a hard link through a link": [link("l", outside), hard_link("stolen", "l/precious")],
        "a hard link below a link": [member("x", b"x"), link("l", outside), hard_link("l/new", "x")],
        "a hard link to a directory": [directory("d"), hard_link("d2", "d")],
        "a hard link to the root": [hard_link("again", ".")],
        "a hard link to nothing": [hard_link("stolen", "nothing")],
        "a file in a directory's place": [directory("d"), member("d", b"x")],
        "a link in a directory's place": [member("d/x", b"x"), link("d", outside)],
        "a link in the root's place": [link(".", outside)],
        "a file in the root's place": [member("./", b"x", kind=tarfile.REGTYPE)],
        "a file below a file": [member("f", b"x"), member("f/g", b"x")],
        "a user that is none": [member("x", b"x", uid=2**32 - 1)],
        "a negative group": [member("x", b"x", gid=-2)],
        "a path that is too deep": [member(f"{deep}/x", b"x")],
        "a path that is too long": [member("/".join(["n" * 200] * 25), b"x")],
        "a name that is too long": [member("n" * 256, b"x")],
        "a kind that is unknown": [member("x", kind=b"Q")],
    }


@pytest.mark.parametrize("trick", evil(Path("/")))
def test_a_hostile_archive_ends_the_import_and_changes_nothing(world: World, trick: str) -> None:
    with pytest.raises(ImageError):
        world.bring(pack(INIT, *evil(world.path)[trick], form=tarfile.GNU_FORMAT if "gative" in trick else 2))
    world.assert_untouched()


def test_a_file_in_a_links_place_replaces_the_link_and_not_what_it_leads_to(world: World) -> None:
    target = str(world.outside / "precious")
    image = world.bring(
        pack(INIT, link("l", target), member("l", b"new"), link("m", target), hard_link("n", "m"), member("n", b"new"))
    )
    assert (image.rootfs / "l").read_text() == "new"
    assert not (image.rootfs / "l").is_symlink()
    assert not (image.rootfs / "n").is_symlink()
    assert tree.measure(world.outside) == world.before


def test_a_file_that_comes_twice_is_the_second_one(world: World) -> None:
    image = world.bring(pack(INIT, member("x", b"first"), hard_link("y", "x"), member("x", b"second", mode=0o600)))
    assert (image.rootfs / "x").read_text() == "second"
    assert (image.rootfs / "y").read_text() == "first"


@pytest.mark.parametrize("mtime", [float("inf"), float("nan"), -5e20, 1e300])
def test_times_that_are_none_do_not_matter(world: World, mtime: float) -> None:
    info, content = member("x", b"x")
    info.pax_headers = {"mtime": str(mtime)}
    image = world.bring(pack(INIT, (info, content)))
    assert 0 <= (image.rootfs / "x").stat().st_mtime <= 2**33


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_headers_is_read(world: World, form: int) -> None:
    name = "/".join(["directory"] * 9) + "/file"  # longer than the 100 characters that a plain header takes, with this
    if form != tarfile.USTAR_FORMAT:
        name = "more/" * 30 + name
    image = world.bring(pack(INIT, member(name, b"x", uid=65000), form=form))
    assert (image.rootfs / name).stat().st_uid == 65000


def test_a_name_that_is_no_utf8_is_kept_as_it_is(world: World) -> None:
    image = world.bring(pack(INIT, member("caf\udce9", b"x"), form=tarfile.GNU_FORMAT))
    assert b"caf\xe9" in os.listdir(os.fsencode(image.rootfs))


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q"], input=data, capture_output=True, check=True).stdout


def gzip_twice(data: bytes) -> bytes:
    return gzip.compress(data[:1000]) + gzip.compress(data[1000:])


needs_zstd = pytest.mark.skipif(shutil.which("zstd") is None, reason="needs zstd")
COMPRESSIONS = [
    pytest.param(bytes, id="none"),
    pytest.param(gzip.compress, id="gzip"),
    pytest.param(gzip_twice, id="gzip twice"),
    pytest.param(lzma.compress, id="xz"),
    pytest.param(zstd, id="zstd", marks=needs_zstd),
]


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_compressed_archive_is_known_by_its_content(world: World, compress: Callable[[bytes], bytes]) -> None:
    body = os.urandom(300_000)
    image = world.bring(compress(pack(INIT, member("big", body))), "no-suffix")
    assert (image.rootfs / "big").read_bytes() == body


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("where", ["in a file", "between files", "before the end"])
def test_an_archive_that_is_cut_short_is_no_image(world: World, compress: Callable[[bytes], bytes], where: str) -> None:
    plain = pack(INIT, member("a", os.urandom(100_000)), member("b", b"b"))
    second = plain.index(b"b\0" * 1, 100_000) // 512 * 512
    cut = {"in a file": 50_000, "between files": second, "before the end": len(plain.rstrip(b"\0")) // 512 * 512 + 512}
    with pytest.raises(ImageError):
        world.bring(compress(plain[: cut[where]]))
    world.assert_untouched()


@pytest.mark.parametrize("compress", COMPRESSIONS[1:])
def test_a_compressed_file_that_is_cut_short_is_no_image(world: World, compress: Callable[[bytes], bytes]) -> None:
    packed = compress(pack(INIT, member("a", os.urandom(100_000))))
    with pytest.raises(ImageError):
        world.bring(packed[:-5000])
    world.assert_untouched()


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"x" * 2000, b"\x1f\x8bnonsense", b"\xfd7zXZ\0nonsense", b"PK\3\4"]
)
def test_what_is_no_archive_is_said_to_be_none(world: World, content: bytes) -> None:
    with pytest.raises(ImageError):
        world.bring(content)
    world.assert_untouched()


def test_a_file_that_claims_more_than_the_disk_has_is_refused_before_it_is_written(world: World) -> None:
    info, _ = member("huge")
    info.size = 1 << 55
    packed = INIT[0].tobuf(tarfile.GNU_FORMAT) + INIT[1].ljust(512, b"\0") + info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(ImageError, match="more than the disk"):
        world.bring(packed + b"x" * 10_000)
    world.assert_untouched()


def test_a_bomb_is_stopped_before_the_disk_is_full(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    room = iter([8 << 20] * 2)
    monkeypatch.setattr(unpack, "check_room", lambda _path: next(room, 0))
    bomb = gzip.compress(pack(INIT, *(member(f"zeros{number}", bytes(3 << 20)) for number in range(4))))
    with pytest.raises(ImageError, match="more than the disk"):
        world.bring(bomb)
    world.assert_untouched()


def test_a_million_of_empty_files_count_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "_MOST_ENTRIES", 10)
    with pytest.raises(ImageError, match="more than 10 files"):
        world.bring(pack(INIT, *(member(str(number)) for number in range(20))))
    world.assert_untouched()


def test_a_header_of_gigabytes_is_not_read(world: World) -> None:
    info, _ = member("x", kind=tarfile.XHDTYPE)
    info.size = 8 << 30
    with pytest.raises(ImageError, match="header claims"):
        world.bring(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    world.assert_untouched()


def test_headers_without_an_end_are_refused(world: World) -> None:
    info, _ = member("x", b"", kind=tarfile.XHDTYPE)
    with pytest.raises(ImageError):
        world.bring(info.tobuf(tarfile.GNU_FORMAT) * 5000)
    world.assert_untouched()


def test_memory_is_not_taken_without_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_arguments: object) -> None:
        bytearray(3 << 30)

    monkeypatch.setattr(archive, "_unpack_member", greedy)
    with pytest.raises(ImageError, match="memory"):
        world.bring(pack(INIT))
    world.assert_untouched()


def test_an_image_without_an_init_is_refused_and_told_why(world: World) -> None:
    for members in ([member("bin/sh", b"x")], [member("sbin/init", b"x", mode=0o644)], [link("sbin/init", "/nowhere")]):
        with pytest.raises(ImageError, match="no /sbin/init"):
            world.bring(pack(*members))
    world.assert_untouched()


def test_systemd_is_known_by_where_its_link_leads_inside(world: World) -> None:
    image = world.bring(
        pack(
            member("usr/lib/systemd/systemd", b"elf", mode=0o755),
            link("lib", "usr/lib"),
            link("usr/sbin/init", "/lib/systemd/systemd"),
            link("sbin", "../../usr/sbin"),
        )
    )
    assert image.probe == init.SYSTEMD_PROBE


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert init.resolve(tmp_path, "/a") is None
    assert init.resolve(tmp_path, "/../../..") == tmp_path


# --- directories ------------------------------------------------------------------------------------------------------


def make_root(root: Path) -> Path:
    (root / "sbin").mkdir(parents=True)
    (root / "sbin/init").write_text("#!/bin/sh\n")
    (root / "sbin/init").chmod(0o755)
    return root


def test_a_directory_becomes_an_image_without_its_devices_and_sockets(world: World) -> None:
    root = make_root(world.path / "root")
    (root / "etc").mkdir()
    (root / "etc/motd").write_text("hello")
    os.chown(root / "etc/motd", 7, 8)
    (root / "etc/motd").chmod(0o4711)
    os.link(root / "etc/motd", root / "etc/motd2")
    (root / "etc/out").symlink_to(world.outside)
    os.mkfifo(root / "etc/pipe")
    os.mknod(root / "etc/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "s"))
    image = world.bring_path(root)
    motd = (image.rootfs / "etc/motd").stat()
    assert (motd.st_uid, motd.st_gid, stat.S_IMODE(motd.st_mode), motd.st_nlink) == (7, 8, 0o4711, 2)
    assert sorted(os.listdir(image.rootfs / "etc")) == ["motd", "motd2", "out", "pipe"]
    assert os.readlink(image.rootfs / "etc/out") == str(world.outside)
    assert sorted(os.listdir(image.rootfs)) == ["etc", "sbin"]
    assert {"left out 1 device nodes", "left out 1 sockets"} <= set(world.said)


def test_another_file_system_in_a_directory_stays_out(world: World) -> None:
    root = make_root(world.path / "root")
    (root / "proc").mkdir()
    script = 'mount -t tmpfs none "$0/proc" && touch "$0/proc/x" && exec "$@"'
    code = (
        "import sys; from pathlib import Path; from lxc_pool.images import imports; from lxc_pool.images.store import "
        "ImageStore; print(ImageStore(Path(sys.argv[1]), {}).build('x', print, imports.builder(sys.argv[2])).rootfs)"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, root, sys.executable, "-c", code, world.path / "images", root],
        cwd=Path(imports.__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(Path(done.stdout.splitlines()[-1]) / "proc") == []


def test_a_source_that_changes_while_it_is_copied_can_not_lead_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root(world.path / "root")
    (root / "etc").mkdir()
    (root / "etc/precious").write_text("lead")
    real = imports._open_below

    def swap(source: Path, relative: bytes) -> int:
        if relative == b"etc" and not (root / "etc").is_symlink():
            shutil.rmtree(root / "etc")
            (root / "etc").symlink_to(world.outside)
        return real(source, relative)

    monkeypatch.setattr(imports, "_open_below", swap)
    with pytest.raises(ImageError):
        world.bring_path(root)
    world.assert_untouched()


def test_what_is_not_there_is_said_to_be_missing(world: World) -> None:
    with pytest.raises(ImageError, match="there is no"):
        imports.builder(str(world.path / "nothing"))
    root = make_root(world.path / "root")
    with pytest.raises(ImageError, match="has no tags"):
        imports.builder(f"{root}:latest")


# --- OCI --------------------------------------------------------------------------------------------------------------


def test_an_oci_image_names_the_packages_that_it_needs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = world.path / "layout"
    layout.mkdir()
    (layout / "oci-layout").write_text("{}")
    monkeypatch.setattr(program.shutil, "which", lambda *_args, **_keywords: None)  # type: ignore[attr-defined]
    with pytest.raises(ImageError, match="apt-get install skopeo umoci"):
        world.bring_path(layout)
    world.assert_untouched()


needs_oci = pytest.mark.skipif(not (shutil.which("skopeo") and shutil.which("umoci")), reason="needs skopeo and umoci")


def umoci(*arguments: str | Path) -> None:
    subprocess.run(["umoci", *arguments], check=True, capture_output=True)


@pytest.fixture
def layout(world: World) -> Path:
    """An OCI layout of two layers; the second one changes a file and removes another."""
    layout, bundle = world.path / "lay:out", world.path / "bundle"
    real = world.path / "layout"
    umoci("init", "--layout", real)
    umoci("new", "--image", f"{real}:v1")
    umoci("unpack", "--image", f"{real}:v1", bundle)
    root = make_root(bundle / "rootfs")
    (root / "old").write_text("old")
    (root / "gone").write_text("gone")
    umoci("repack", "--image", f"{real}:v1", bundle)
    (root / "gone").unlink()
    (root / "old").write_text("new")
    os.mknod(root / "node", stat.S_IFBLK | 0o600, os.makedev(8, 0))
    umoci("repack", "--image", f"{real}:v1", "--refresh-bundle", bundle)
    shutil.rmtree(bundle)
    real.rename(layout)
    return layout


@needs_oci
def test_an_oci_layout_becomes_an_image(world: World, layout: Path) -> None:
    for source in (f"{layout}:v1", layout):
        image = world.bring_path(source)
        assert sorted(os.listdir(image.rootfs)) == ["old", "sbin"]
        assert (image.rootfs / "old").read_text() == "new"
        assert sorted(os.listdir(image.rootfs.parent)) == ["manifest.json", "rootfs", "verified.json"]
    assert "left out 1 device nodes" in world.said
    with pytest.raises(ImageError, match="skopeo failed"):
        world.bring_path(f"{layout}:nonesuch")
    assert len(world.store.list()) == 2


@needs_oci
@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_of_docker_save_becomes_an_image(world: World, layout: Path, compressed: bool) -> None:
    plain = world.path / "plain"
    layout.rename(plain)
    saved = world.path / "saved.tar"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", f"oci:{plain}:v1", f"docker-archive:{saved}:my/image:v1"],
        check=True,
        capture_output=True,
    )
    content = saved.read_bytes()
    image = world.bring(gzip.compress(content) if compressed else content, "docker:archive")
    assert (image.rootfs / "old").read_text() == "new"
    told = [line for line in world.said if isinstance(line, Milestone)]
    steps = ["reading ", *["decompressed 0 MiB"] * compressed, "copying its layers", "copied 0 MiB of its layers"]
    steps += ["putting its layers together", "copying ", "copied "]
    found = iter(told)
    assert all(any(line.startswith(step) for line in found) for step in steps), told
    assert [line.done for line in told] == sorted(line.done for line in told)
    assert (told[0].done, told[-1].done) == (0.0, 1.0)
