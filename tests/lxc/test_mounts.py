"""Files and directories of the host in real containers, privileged or not, through the real service."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool import Container, LeaseError, PoolServiceProxy
from tests.support.real_service import Service, running
from tests.support.waiting import eventually

CONFIG = """\
[pool]
workers = 2
[profile.default]
size = 1
[profile.root]
size = 1
privileged = true
[profile.mounted]
size = 1
{mounts}
[profile.mounted-root]
size = 1
privileged = true
{mounts}
"""
MOUNTS = """\
mounts = [
    {{ host_path = "{0}/data", dst = "/srv/made/data" }},
    {{ host_path = "{0}/shared", dst = "/srv/shared", readonly = false }},
    {{ host_path = "{0}/data/public", dst = "/etc/public.conf" }},
]
"""
SOMEBODY = 64001
"""A uid without an account."""


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What profiles mount: `data`, root's, and `shared`, somebody's."""
    directory = tmp_path_factory.mktemp("lent")
    for name, owner in (("data", 0), ("shared", SOMEBODY)):
        (directory / name).mkdir()
        (directory / name / "public").write_text(f"{name} for all\n")
        (directory / name / "private").write_text(f"{name} for one\n")
        (directory / name / "private").chmod(0o600)
        for path in (directory / name, *(directory / name).iterdir()):
            os.chown(path, owner, owner)
    return directory


@pytest.fixture(scope="module")
def mount_service(images: Path, lent: Path) -> Iterator[Service]:
    with running(images, CONFIG.format(mounts=MOUNTS.format(lent))) as service:
        yield service


@pytest.fixture
def pool(mount_service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolServiceProxy]:
    """The service's pool; whatever a test does, there is then nothing of it among the host's mounts."""
    with mount_service.connect() as pool:
        yield pool
    assert mounts_of(mount_service, tmp_path_factory) == []


@pytest.fixture(params=["default", "root"])
def container(pool: PoolServiceProxy, request: pytest.FixtureRequest) -> Iterator[Container]:
    with pool.lease("mounts", timeout=30, profile=request.param) as container:
        yield container


@pytest.fixture
def plain(pool: PoolServiceProxy) -> Iterator[Container]:
    """An unprivileged container, which the test may end."""
    with pool.lease("mounts", timeout=30) as container:
        yield container


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "deep").mkdir(parents=True)
    (root / "file").write_text("words\n")
    (root / "deep/file").write_text("deeper\n")
    return root


def mounts_of(service: Service, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what is mounted on the host of these tests' own, at the service's places, or where mounts are prepared."""
    needles = (str(tmp_path_factory.getbasetemp()), str(service.directory), "/dev/mount")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if any(needle in line for needle in needles)]


def sh(container: Container, script: str) -> str:
    """Run a script; return what it said, errors included."""
    done = container.run(["sh", "-c", f"exec 2>&1; {script}"], stdout=subprocess.PIPE, text=True, timeout=30)
    return str(done.stdout)


# --- what is mounted --------------------------------------------------------------------------------------------------


def test_a_directory_is_there_and_can_only_be_read(container: Container, tree: Path) -> None:
    container.mount(tree, "/mnt/tree")
    assert sh(container, "cat /mnt/tree/file /mnt/tree/deep/file") == "words\ndeeper\n"
    assert "Read-only" in sh(container, "echo x >/mnt/tree/file")
    assert "Read-only" in sh(container, "rm -r /mnt/tree/deep")
    (tree / "later").write_text("comes through\n")
    assert sh(container, "cat /mnt/tree/later") == "comes through\n"


def test_a_writable_one_takes_files_which_are_the_callers(container: Container, tree: Path) -> None:
    container.mount(tree, "/mnt/tree", readonly=False)
    assert sh(container, "echo new >/mnt/tree/new; mkdir /mnt/tree/directory; echo more >>/mnt/tree/file") == ""
    assert (tree / "new").read_text() == "new\n"
    assert (tree / "file").read_text() == "words\nmore\n"
    for name in ("new", "directory"):
        assert ((tree / name).stat().st_uid, (tree / name).stat().st_gid) == (os.getuid(), os.getgid())
    assert sh(container, "stat -c %u:%g /mnt/tree/new /mnt/tree") == "0:0\n0:0\n"


def test_a_file_is_mounted_alone(container: Container, tree: Path) -> None:
    container.mount(tree / "file", "/mnt/words", readonly=False)
    assert sh(container, "cat /mnt/words; ls /mnt; echo more >>/mnt/words") == "words\nwords\n"
    assert (tree / "file").read_text() == "words\nmore\n"


def test_a_link_on_the_hosts_side_is_followed_there(container: Container, tree: Path) -> None:
    (tree.parent / "link").symlink_to(tree)
    container.mount(tree.parent / "link", "/mnt/tree")
    assert sh(container, "cat /mnt/tree/file") == "words\n"


def test_links_below_are_followed_in_the_container(container: Container, tree: Path) -> None:
    (tree / "out").symlink_to("/etc/mark")
    sh(container, "echo inside >/etc/mark")
    container.mount(tree, "/mnt/tree")
    assert sh(container, "cat /mnt/tree/out") == "inside\n"


def test_what_is_mounted_below_on_the_host_is_not_seen(container: Container, tree: Path) -> None:
    with mounted_on_host(tree / "deep"):
        (tree / "deep/covering").touch()
        container.mount(tree, "/mnt/tree")
        assert sh(container, "ls /mnt/tree/deep") == "file\n"


def test_mounts_of_either_side_stay_on_it(container: Container, tree: Path) -> None:
    container.mount(tree, "/mnt/tree", readonly=False)
    assert sh(container, "mount -t tmpfs none /mnt/tree/deep && ls /mnt/tree/deep") == ""
    assert (tree / "deep/file").exists()
    (tree / "empty").mkdir()
    with mounted_on_host(tree / "empty"):
        (tree / "empty/on-the-host").touch()
        assert sh(container, "ls /mnt/tree/empty") == ""


def test_a_running_process_sees_it(container: Container, tree: Path) -> None:
    waiting = container.popen(["sh", "-c", "read line; cat $line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    container.mount(tree, "/mnt/tree")
    out, _ = waiting.communicate(b"/mnt/tree/file\n", timeout=30)
    assert out == b"words\n"


@pytest.mark.parametrize("name", ["with space", "späte Ähre", "new\nline", b"\xff\xfe"])
def test_paths_are_data(plain: Container, tmp_path: Path, name: str | bytes) -> None:
    source = tmp_path / os.fsdecode(name)
    source.mkdir()
    (source / "file").touch()
    destination = f"/mnt/{os.fsdecode(name)}"
    plain.mount(os.fsencode(source), os.fsencode(destination))
    assert b"file" in plain.run(["ls", destination], capture_output=True).stdout
    plain.unmount(destination)
    assert b"file" not in plain.run(["ls", destination], capture_output=True).stdout


# --- where it is mounted ----------------------------------------------------------------------------------------------


def test_what_is_missing_is_made_and_stays(container: Container, tree: Path) -> None:
    container.mount(tree, "/a/b/tree")
    container.mount(tree / "file", "/a/c/file")
    assert sh(container, "cat /a/b/tree/file /a/c/file") == "words\nwords\n"
    container.unmount("/a/b/tree")
    container.unmount("/a/c/file")
    assert sh(container, "stat -c '%F %u:%g %a' /a /a/b/tree /a/c/file") == (
        "directory 0:0 755\ndirectory 0:0 755\nregular empty file 0:0 644\n"
    )


def test_a_relative_destination_begins_at_the_root(container: Container, tree: Path) -> None:
    container.mount(tree, "mnt/tree/")
    assert sh(container, "cat /mnt/tree/file") == "words\n"
    container.unmount("mnt/tree")
    assert sh(container, "ls /mnt/tree") == ""


def test_links_are_followed_inside_the_container(container: Container, tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    sh(container, f"mkdir -p /real; ln -s /real /link; ln -s {outside} /astray; ln -s ../../../../../../etc /mnt/up")
    container.mount(tree, "/link/tree")
    assert sh(container, "cat /real/tree/file") == "words\n"
    container.mount(tree, "/mnt/up/tree")
    assert sh(container, "cat /etc/tree/file") == "words\n"
    with pytest.raises(FileExistsError) as caught:
        container.mount(tree, "/astray")  # it leads nowhere there
    assert caught.value.filename == "/astray"
    assert list(outside.iterdir()) == []
    assert not Path("/etc/tree").exists()


def test_mounts_cover_each_other_and_come_off_in_turn(container: Container, tree: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
        container.mount(tmp_path / name, "/mnt/place")
    container.mount(tree, "/mnt/beside")
    assert sh(container, "cat /mnt/place/name") == "two"
    container.unmount("/mnt/place")
    assert sh(container, "cat /mnt/place/name") == "one"
    container.unmount("/mnt/place")
    assert sh(container, "ls /mnt/place; cat /mnt/beside/file") == "words\n"
    sh(container, "mount -t tmpfs none /mnt/place")
    container.mount(tree, "/mnt/place")
    assert sh(container, "cat /mnt/place/file") == "words\n"


def test_what_does_not_fit_is_refused_and_changes_nothing(container: Container, tree: Path) -> None:
    sh(container, "touch /file; mkdir /directory")
    with pytest.raises(IsADirectoryError, match="name the file itself"):
        container.mount(tree / "file", "/directory")
    with pytest.raises(NotADirectoryError):
        container.mount(tree, "/file")
    with pytest.raises(NotADirectoryError):
        container.mount(tree, "/file/below")
    with pytest.raises(NotADirectoryError):
        container.mount(tree / "file", "/mnt/new/")
    for missing in ("/missing/.", "/missing/../"):
        with pytest.raises(FileNotFoundError):
            container.mount(tree, missing)
    for root in ("/", "/directory/..", "//"):
        with pytest.raises(ValueError, match="root directory"):
            container.mount(tree, root)
    for nothing in ("", "/mnt/\0"):
        with pytest.raises(ValueError, match="must be a path"):
            container.mount(tree, nothing)
    assert "idmapped" not in sh(container, "cat /proc/self/mountinfo")


# --- what can't be mounted --------------------------------------------------------------------------------------------


def test_special_files_are_refused_by_name(plain: Container, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        sock.bind("socket")
    for path, word in (("fifo", "a fifo"), ("socket", "a socket"), ("/dev/null", "a character device")):
        with pytest.raises(ValueError, match=word):
            plain.mount(tmp_path / path, "/mnt/x")


def test_a_missing_path_is_the_callers_own_error(plain: Container, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        plain.mount(tmp_path / "missing", "/mnt/x")
    assert caught.value.filename == str(tmp_path / "missing")
    for wrong in (None, 5):
        with pytest.raises(TypeError):
            plain.mount(tmp_path, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="readonly"):
        plain.mount(tmp_path, "/mnt/x", "no")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/proc", "/sys", "/proc/version"])
def test_a_file_system_that_can_not_be_seen_with_other_owners_is_named(container: Container, path: str) -> None:
    with pytest.raises(OSError, match=r"\((proc|sysfs)\).*push\(\)") as caught:
        container.mount(path, "/mnt/x")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert caught.value.filename == path


# --- taking it away ---------------------------------------------------------------------------------------------------


def test_only_what_was_mounted_so_is_unmounted(container: Container, tree: Path) -> None:
    container.mount(tree, "/mnt/tree")
    sh(container, "mkdir -p /mnt/own; mount -t tmpfs none /mnt/own")
    for path in ("/proc", "/dev", "/", "/mnt", "/mnt/own", "/mnt/tree/.."):
        with pytest.raises(ValueError, match="nothing that mount"):
            container.unmount(path)
    with pytest.raises(ValueError, match="not the place of a mount itself"):
        container.unmount("/mnt/tree/deep")
    with pytest.raises(FileNotFoundError) as caught:
        container.unmount("/mnt/missing")
    assert caught.value.filename == "/mnt/missing"
    assert sh(container, "cat /mnt/tree/file; umount /mnt/own") == "words\n"
    container.unmount("/mnt/tree")
    with pytest.raises(ValueError, match="nothing that mount"):
        container.unmount("/mnt/tree")


def test_the_name_of_a_mount_point_is_no_line_of_its_own(container: Container, tree: Path) -> None:
    container.mount(tree, "/mnt/a\r1\v1\v0:1\v/\v/\vrw\v-\vext4\vx\vrw\rb")
    container.mount(tree, "/mnt/later")
    container.unmount("/mnt/later")


def test_a_busy_one_stays_until_it_is_not(container: Container, tree: Path) -> None:
    container.mount(tree, "/mnt/tree")
    script = "cd /mnt/tree; echo there; read line; cd /; echo away; read line"
    with container.popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "there\n"
        with pytest.raises(OSError, match="end it first") as caught:
            container.unmount("/mnt/tree")
        assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, "/mnt/tree")
        assert sh(container, "cat /mnt/tree/file") == "words\n"
        worker.stdin.write("go\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "away\n"
        container.unmount("/mnt/tree")
        worker.stdin.close()


def test_the_container_may_take_it_away_itself(container: Container, tree: Path) -> None:
    container.mount(tree, "/mnt/tree")
    assert sh(container, "umount /mnt/tree && ls /mnt/tree") == ""
    with pytest.raises(ValueError, match="nothing that mount"):
        container.unmount("/mnt/tree")


def test_it_ends_with_the_container(mount_service: Service, plain: Container, tree: Path) -> None:
    plain.mount(tree, "/mnt/tree", readonly=False)
    keeper = plain.popen(["sh", "-c", "cd /mnt/tree; sleep 1000"])
    plain.release()
    eventually(lambda: not mount_service.has_traces(plain.name), "the container is gone")
    assert keeper.wait(30) == -9
    assert (tree / "file").read_text() == "words\n"
    with pytest.raises(LeaseError):
        plain.mount(tree, "/mnt/tree")
    with pytest.raises(LeaseError):
        plain.unmount("/mnt/tree")


def test_a_pickled_handle_mounts_too(plain: Container, tree: Path) -> None:
    copy: Container = pickle.loads(pickle.dumps(plain))  # noqa: S301  # our own
    copy.mount(tree, "/mnt/tree")
    assert sh(plain, "cat /mnt/tree/file") == "words\n"
    plain.unmount("/mnt/tree")


def test_no_descriptor_of_ours_is_left(plain: Container, tree: Path) -> None:
    plain.mount(tree, "/mnt/tree")  # the first time connects
    before = len(os.listdir("/proc/self/fd"))
    plain.unmount("/mnt/tree")
    plain.mount(tree, "/mnt/tree")
    with pytest.raises(ValueError, match="root directory"):
        plain.mount(tree, "/")
    assert len(os.listdir("/proc/self/fd")) == before


# --- what a profile mounts --------------------------------------------------------------------------------------------


@pytest.fixture(params=["mounted", "mounted-root"])
def furnished(pool: PoolServiceProxy, request: pytest.FixtureRequest) -> Iterator[Container]:
    """A container of a profile with mounts."""
    with pool.lease("mounts", timeout=30, profile=request.param) as container:
        yield container


def test_a_profiles_mounts_are_there_from_the_start(furnished: Container) -> None:
    assert sh(furnished, "cat /srv/made/data/public /etc/public.conf /srv/shared/public") == (
        "data for all\ndata for all\nshared for all\n"
    )
    for path in ("/srv/made/data/public", "/etc/public.conf"):
        assert "Read-only" in sh(furnished, f"echo x >{path}")
    assert sh(furnished, "stat -c %u:%g /srv /srv/made /srv/shared /srv/shared/private") == "0:0\n" * 4


def test_of_a_writable_one_its_owner_is_root_inside(furnished: Container, lent: Path) -> None:
    assert sh(furnished, "cat /srv/shared/private; echo new >/srv/shared/new") == "shared for one\n"
    try:
        assert (lent / "shared/new").read_text() == "new\n"
        assert ((lent / "shared/new").stat().st_uid, (lent / "shared/new").stat().st_gid) == (SOMEBODY, SOMEBODY)
    finally:
        (lent / "shared/new").unlink()


def test_what_is_not_for_everybody_stays_closed_in_an_unprivileged_one(pool: PoolServiceProxy) -> None:
    with pool.lease("mounts", timeout=30, profile="mounted") as container:
        assert sh(container, "stat -c %u /srv/made/data") == "65534\n"
        assert "denied" in sh(container, "cat /srv/made/data/private")


def test_a_profiles_mounts_can_be_covered_and_not_be_unmounted(furnished: Container, tree: Path) -> None:
    with pytest.raises(ValueError, match="nothing that mount"):
        furnished.unmount("/srv/made/data")
    furnished.mount(tree, "/srv/shared")
    assert sh(furnished, "cat /srv/shared/file") == "words\n"
    furnished.unmount("/srv/shared")
    assert sh(furnished, "cat /srv/shared/public") == "shared for all\n"
    if furnished.profile == "mounted":  # root of a privileged one may take anything away
        with pytest.raises(ValueError, match="one of the profile's"):
            furnished.unmount("/srv/shared")
        for path in ("/srv/shared", "/srv/made/data", "/etc/public.conf"):
            assert sh(furnished, f"umount {path} || umount -l {path}").count("Invalid") == 2


def test_a_profiles_mount_that_can_not_be_made_is_told(service: Service, tmp_path: Path) -> None:
    mounts = f'mounts = [{{ host_path = "{tmp_path}/missing", dst = "/mnt/x" }}]'
    pool = service.start(config=f"[pool]\nworkers = 1\n[profile.default]\nsize = 1\n{mounts}\n")
    eventually(lambda: pool.status().error_count, "it has failed")
    assert f"mount of {tmp_path}/missing on /mnt/x failed: No such file" in (pool.status().last_error or "")
    service.stop()


@contextlib.contextmanager
def mounted_on_host(path: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)
