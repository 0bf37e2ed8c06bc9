"""Reading trees, making them, and what a hostile stream or a racing process gets out of it: nothing."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lxc_pool.execution import trees
from lxc_pool.execution.frames import (
    CHUNK,
    DATA,
    DIRECTORY,
    DONE,
    END,
    FAILED,
    FILE,
    HOLE,
    LINK,
    SPECIAL,
    FrameError,
    FrameReader,
    FrameWriter,
    StreamEnd,
)
from lxc_pool.execution.tree_sink import Policy, TreeSink
from lxc_pool.execution.tree_source import UNSIZED, send
from tests.unit.test_files_format import Written, frame, reader

OUT = (b"evil", b"out")


class Watch:
    """Counts; calls *on_entry* before each entry."""

    def __init__(self, on_entry: Callable[[int], None] = lambda _count: None) -> None:
        self.bytes = self.entries = 0
        self.names: list[bytes] = []
        self._on_entry = on_entry

    def moved(self, count: int) -> None:
        self.bytes += count

    def entered(self) -> None:
        self.entries += 1
        self._on_entry(self.entries)

    def skipped(self, path: bytes) -> None:
        self.names.append(path)


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def sent(path: Path, watch: Watch | None = None) -> bytes:
    written = Written()
    send(bytes(path), written.writer, watch or Watch())
    written.writer.done()
    return written.data


def receive(data: bytes, destination: Path, watch: Watch | None = None, **policy: object) -> Path:
    """Make what *data* says, and return where."""
    place = trees.find_place(os.fsencode(destination), b"named", parents=False)
    try:
        TreeSink(place, reader(data), Policy(**policy), watch or Watch()).receive()  # type: ignore[arg-type]  # as given
    finally:
        os.close(place.directory)
    return Path(os.fsdecode(place.path))


def listing(path: Path) -> dict[str, tuple[object, ...]]:
    """Return all that can be said of a tree, by path."""
    found: dict[str, tuple[object, ...]] = {}
    for place in (path, *sorted(path.rglob("*"))):
        status = place.lstat()
        content: object = None
        if place.is_symlink():
            content = os.readlink(place)
        elif place.is_file():
            content = place.read_bytes()
        found[str(place.relative_to(path))] = (stat.filemode(status.st_mode), status.st_mtime_ns, content)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with one of each."""
    root = tmp_path / "tree"
    (root / "deep/er").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "file").write_bytes(b"words\n")
    (root / "nothing").touch()
    (root / "long").write_bytes(os.urandom(3 * CHUNK + 17))
    (root / "deep/er/tool").write_text("#!/bin/sh\n")
    (root / os.fsdecode(b"\xff name\n")).write_text("strange")
    (root / "deep/link").symlink_to("../file")
    (root / "deep/broken").symlink_to("/nowhere/at/all")
    (root / "deep/er/tool").chmod(0o755)
    (root / "file").chmod(0o640)
    (root / "empty").chmod(0o1777)
    for number, place in enumerate([*root.rglob("*"), root]):
        os.utime(place, ns=(10**18, 10**18 + number), follow_symlinks=False)
    return root


def test_a_tree_comes_out_as_it_went_in(tree: Path, tmp_path: Path) -> None:
    watch, other = Watch(), Watch()
    made = receive(sent(tree, watch), tmp_path / "new", other)
    assert made == tmp_path / "new"
    assert listing(made) == listing(tree)
    assert (watch.bytes, watch.entries) == (other.bytes, other.entries) == (6 + 3 * CHUNK + 17 + 10 + 7, 11)
    assert sorted(os.listdir(tmp_path)) == ["new", "tree"]


def test_a_file_comes_out_as_it_went_in(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "a").chmod(0o751)
    for anonymous in (False, True):
        made = receive(sent(tmp_path / "a"), tmp_path / "b", anonymous=anonymous)
        assert listing(made) == listing(tmp_path / "a")
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_set_id_bits_stay_behind(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree").chmod(0o3777)
    (tmp_path / "tree/tool").touch()
    (tmp_path / "tree/tool").chmod(0o7755)
    made = receive(sent(tmp_path / "tree"), tmp_path / "new")
    assert stat.S_IMODE(made.stat().st_mode) == 0o1777
    assert stat.S_IMODE((made / "tool").stat().st_mode) == 0o755


def test_a_directory_that_nobody_may_enter_is_given_a_floor(tmp_path: Path) -> None:
    (tmp_path / "tree/closed").mkdir(parents=True)
    (tmp_path / "tree/closed").chmod(0)
    made = receive(sent(tmp_path / "tree"), tmp_path / "new", floor=0o700)
    assert stat.S_IMODE((made / "closed").stat().st_mode) == 0o700


@pytest.mark.parametrize("layout", [(0, 5), (0, 1 << 20), (1 << 20, 5), (5 << 20, 9 << 20), (0, 0)])
def test_holes_stay_holes(tmp_path: Path, layout: tuple[int, int]) -> None:
    first, behind = layout
    with (tmp_path / "a").open("wb") as file:
        file.seek(first)
        file.write(b"data")
        file.truncate(first + 4 + behind)
    made = receive(sent(tmp_path / "a"), tmp_path / "b")
    assert made.read_bytes() == (tmp_path / "a").read_bytes()
    assert made.stat().st_blocks <= 16


def test_a_file_that_is_all_hole(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    data = sent(tmp_path / "a")
    assert len(data) < 100
    made = receive(data, tmp_path / "b")
    assert (made.stat().st_size, made.stat().st_blocks) == (1 << 40, 0)


def test_special_files_are_left_out_and_reported(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "tree/fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "tree/sock"))
    watch, other = Watch(), Watch()
    made = receive(sent(tmp_path / "tree", watch), tmp_path / "new", other)
    assert os.listdir(made) == []
    assert sorted(watch.names) == [bytes(tmp_path / "tree/fifo"), bytes(tmp_path / "tree/sock")]
    assert sorted(other.names) == [b"/fifo", b"/sock"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/null", path)])
def test_a_special_file_itself_can_t_be_sent(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", lambda *_: pytest.fail("opening a device may do something"))
        with pytest.raises(OSError, match="neither a file nor a directory") as caught:
            sent(tmp_path / "x")
    assert caught.value.filename == bytes(tmp_path / "x")


def test_the_root_may_be_a_link_and_what_is_below_is_not_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(tree)
    assert listing(receive(sent(tmp_path / "way"), tmp_path / "new")) == listing(tree)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        sent(tmp_path / "none")
    assert caught.value.filename == bytes(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_what_may_not_be_read_is_named(tree: Path) -> None:
    (tree / "file").chmod(0)
    with pytest.raises(PermissionError) as caught:
        sent(tree)
    assert caught.value.filename == bytes(tree / "file")


def test_files_of_proc_that_claim_no_size_are_read(tmp_path: Path) -> None:
    made = receive(sent(Path("/proc/version")), tmp_path / "new")
    assert made.read_text() == Path("/proc/version").read_text()


# --- sources that change ----------------------------------------------------------------------------------------------


def test_what_vanishes_or_turns_into_a_link_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/x").write_text("secret")
    for number in range(6):
        (root / f"f{number}").write_text("fine")
        (root / f"d{number}").mkdir()

    def plant(count: int) -> None:
        # after the first one: the rest has been listed, or not; either way it is not what it was
        if count == 2:
            for number in range(6):
                (root / f"f{number}").unlink()
                (root / f"d{number}").rmdir()
                if number % 2:
                    (root / f"f{number}").symlink_to(tmp_path / "secret")
                    (root / f"d{number}").symlink_to(tmp_path / "secrets")

    data = sent(root, Watch(plant))
    assert b"secret" not in data.replace(os.fsencode(tmp_path), b"").replace(b"/secrets", b"").replace(b"/secret", b"")


def test_a_file_that_has_become_a_fifo_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_text("x")
    real = os.open

    def late(path: object, *args: object, **kwargs: object) -> int:
        if path == b"file":
            (root / "file").unlink()
            os.mkfifo(root / "file")
        return real(path, *args, **kwargs)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(os, "open", late)
    watch = Watch()
    sent(root, watch)
    assert watch.names == [bytes(root / "file")]


def test_a_link_that_has_become_something_else_does_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "link").symlink_to("anywhere")
    (source / "file").write_text("fine", encoding="ascii")

    def late(_name: bytes, **_kwargs: object) -> bytes:
        raise OSError(errno.EINVAL, "Invalid argument")  # what readlink(2) says of a directory

    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", late)
        data = sent(source)
    assert os.listdir(receive(data, tmp_path / "copy")) == ["file"]


def test_a_file_that_grows_is_cut_and_one_that_shrinks_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * CHUNK * 3)
    real = os.preadv

    def growing(fd: int, buffers: list[memoryview], offset: int) -> int:
        with path.open("ab") as file:
            file.write(b"y" * CHUNK)
        return real(fd, buffers, offset)

    def shrinking(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = real(fd, buffers, offset)
        os.truncate(path, CHUNK)
        return count

    monkeypatch.setattr(os, "preadv", growing)
    grown = sent(path)
    monkeypatch.setattr(os, "preadv", shrinking)
    shrunk = sent(path)
    monkeypatch.undo()
    assert receive(grown, tmp_path / "a").read_bytes() == b"x" * CHUNK * 3
    assert receive(shrunk, tmp_path / "b").read_bytes() == b"x" * CHUNK


def test_an_endless_file_without_a_size_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setattr(os, "preadv", lambda _fd, buffers, _offset: len(buffers[0]))
    watch = Watch()
    sent(path, watch)
    assert watch.bytes == UNSIZED


def test_a_tree_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    for _ in range(trees.MAX_DEPTH + 1):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    with pytest.raises(OSError, match="in one another") as caught:
        sent(tmp_path / "d")
    assert caught.value.errno == errno.ENAMETOOLONG


# --- where it goes ----------------------------------------------------------------------------------------------------


def at(destination: object, *, parents: bool = False) -> str:
    place = trees.find_place(os.fsencode(str(destination)), b"named", parents=parents)
    os.close(place.directory)
    return os.fsdecode(place.path)


def test_into_a_directory_or_as_the_thing_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "way").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "round").symlink_to("round")
    assert at(tmp_path) == f"{tmp_path}/named"
    assert at(f"{tmp_path}/") == f"{tmp_path}/named"
    assert at(f"{tmp_path}/.") == f"{tmp_path}/./named"
    assert at(tmp_path / "new") == f"{tmp_path}/new"
    assert at(tmp_path / "file") == f"{tmp_path}/file"
    assert at(tmp_path / "way") == f"{tmp_path}/way/named"
    assert at(tmp_path / "broken") == f"{tmp_path}/broken"
    assert at(tmp_path / "round") == f"{tmp_path}/round"
    assert at("new") == "new"
    assert at(".") == "./named"


@pytest.mark.parametrize(
    ("destination", "error", "named"),
    [
        ("none/x", FileNotFoundError, "none"),
        ("none/", FileNotFoundError, "none/"),
        ("file/", NotADirectoryError, "file/"),
        ("file/x", NotADirectoryError, "file/x"),
    ],
)
def test_where_nothing_can_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destination: str, error: type[OSError], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(error) as caught:
        at(destination)
    assert caught.value.filename == named.encode()
    if error is NotADirectoryError:
        with pytest.raises(OSError):  # noqa: PT011 - NotADirectoryError or FileExistsError, as mkdir(2) has it
            at(destination, parents=True)


def test_nowhere_is_no_place() -> None:
    with pytest.raises(FileNotFoundError):
        at("")


def test_missing_directories_are_made_when_asked_for(tmp_path: Path) -> None:
    owned: list[str] = []
    path = os.fsencode(f"{tmp_path}/a/b/c/")
    place = trees.find_place(
        path, b"named", parents=True, own=lambda fd: owned.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    os.close(place.directory)
    assert os.fsdecode(place.path) == f"{tmp_path}/a/b/c/named"
    assert owned == [f"{tmp_path}/a", f"{tmp_path}/a/b", f"{tmp_path}/a/b/c"]


def test_what_has_no_name_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name"):
        trees.find_place(bytes(tmp_path), b"", parents=False)


def test_a_file_replaces_a_file_or_a_link_but_no_directory(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "file").write_text("old")
    (tmp_path / "victim").write_text("old")
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "there/named").mkdir(parents=True)
    data = sent(tmp_path / "a")
    assert receive(data, tmp_path / "file").read_text() == "new"
    assert receive(data, tmp_path / "link").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "victim").read_text() == "old"
    with pytest.raises(IsADirectoryError) as caught:
        receive(data, tmp_path / "there")
    assert caught.value.filename == bytes(tmp_path / "there/named")


def test_a_tree_has_to_be_new(tree: Path, tmp_path: Path) -> None:
    data = sent(tree)
    (tmp_path / "there/named").mkdir(parents=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError) as caught:
        receive(data, tmp_path / "there")
    assert caught.value.filename == bytes(tmp_path / "there/named")
    for merge in (False, True):
        with pytest.raises(NotADirectoryError):
            receive(data, tmp_path / "file", merge=merge)
    assert sorted(os.listdir(tmp_path)) == ["file", "there", "tree"]


def test_a_tree_can_be_merged(tree: Path, tmp_path: Path) -> None:
    there = tmp_path / "there/named"
    (there / "deep/er").mkdir(parents=True)
    (there / "deep").chmod(0o700)
    (there / "deep/er/tool").write_text("old")
    (there / "deep/er/mine").write_text("mine")
    (there / "file").symlink_to("/etc/passwd")
    (there / "deep/link").write_text("no link")
    made = receive(sent(tree), tmp_path / "there", merge=True)
    assert (made / "deep/er/mine").read_text() == "mine"
    (made / "deep/er/mine").unlink()
    expected, found = listing(tree), listing(made)
    for name in (".", "deep", "deep/er"):  # they were there
        expected.pop(name)
        found.pop(name)
    assert found == expected
    assert stat.S_IMODE((made / "deep").stat().st_mode) == 0o700


def test_merging_follows_no_link_and_replaces_no_directory(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    there = tmp_path / "there/named"
    there.mkdir(parents=True)
    (there / "deep").symlink_to(tmp_path / "victim")
    (there / "empty").symlink_to(tmp_path / "victim")
    with pytest.raises(NotADirectoryError) as caught:
        receive(sent(tree), tmp_path / "there", merge=True)
    assert caught.value.filename in (bytes(there / "deep"), bytes(there / "empty"))
    (there / "deep").unlink()
    (there / "empty").unlink()
    (there / "file").mkdir(exist_ok=True) if not (there / "file").exists() else None
    assert os.listdir(tmp_path / "victim") == []


def test_merging_does_not_put_a_file_over_a_directory(tree: Path, tmp_path: Path) -> None:
    there = tmp_path / "there/named"
    (there / "file").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        receive(sent(tree), tmp_path / "there", merge=True)
    assert caught.value.filename == bytes(there / "file")
    assert not [name for _, _, names in os.walk(there) for name in names if name.startswith(".lxc_pool")]


# --- hostile streams --------------------------------------------------------------------------------------------------


def body(name: bytes, mode: int = 0o777) -> bytes:
    return struct.pack("<Iq", mode, 0) + name


ROOT, CLOSE, FINISH = frame(DIRECTORY, body(b"")), frame(END), frame(DONE)


def a_file(name: bytes, content: bytes = b"evil") -> bytes:
    return frame(FILE, body(name)) + frame(DATA, content) + frame(END)


def a_link(name: bytes, target: bytes) -> bytes:
    return frame(LINK, body(name) + b"\0" + target)


def a_directory(name: bytes, *inner: bytes) -> bytes:
    return frame(DIRECTORY, body(name)) + b"".join(inner) + frame(END)


def tricks(outside: bytes) -> dict[str, bytes]:
    """Return every way to write elsewhere, to confuse or to be too much."""
    deep = frame(DIRECTORY, body(b"d")) * (trees.MAX_DEPTH + 5)
    return {
        "absolute name": ROOT + a_file(outside + b"/evil"),
        "name that leads up": ROOT + a_file(b"../evil"),
        "up": ROOT + a_directory(b"..", a_file(b"evil")),
        "here": ROOT + a_directory(b".", a_file(b"evil")),
        "no name": ROOT + a_file(b""),
        "name with a slash": ROOT + a_file(b"x/evil"),
        "name with a NUL": ROOT + a_file(b"evil\0x"),
        "name too long": ROOT + a_file(b"e" * 256),
        "through a link": ROOT + a_link(b"l", outside) + a_directory(b"l", a_file(b"evil")),
        "through a link to a file": ROOT + a_link(b"l", outside + b"/file") + a_file(b"l"),
        "link over a directory": ROOT + a_directory(b"d") + a_link(b"d", outside),
        "file twice": ROOT + a_file(b"x") + a_file(b"x"),
        "directory twice": ROOT + a_directory(b"x") + a_directory(b"x"),
        "link twice": ROOT + a_link(b"x", b"a") + a_link(b"x", b"b"),
        "link as the root": a_link(b"", outside),
        "special as the root": frame(SPECIAL, body(b"")),
        "root with a name": frame(FILE, body(b"evil")) + frame(END),
        "link without a target": ROOT + frame(LINK, body(b"x")),
        "link with a long target": ROOT + a_link(b"x", b"t" * 5000),
        "data in a directory": ROOT + frame(DATA, b"x"),
        "hole in a directory": ROOT + frame(HOLE, struct.pack("<q", 1)),
        "file in a file": ROOT + frame(FILE, body(b"x")) + a_file(b"y"),
        "done in a file": ROOT + frame(FILE, body(b"x")) + FINISH,
        "done in a directory": ROOT + FINISH,
        "end too many": ROOT + CLOSE + CLOSE,
        "more than one root": ROOT + CLOSE + ROOT,
        "hole backwards": ROOT + frame(FILE, body(b"x")) + frame(HOLE, struct.pack("<q", -5)),
        "hole beyond all": ROOT + frame(FILE, body(b"x")) + frame(HOLE, struct.pack("<q", 2**63 - 1)) * 2,
        "too deep": ROOT + deep + CLOSE * (trees.MAX_DEPTH + 5),
        "impossible mode": ROOT + frame(FILE, body(b"x", 0o170000)),
        "unknown frame": ROOT + frame(77),
        "long frame": ROOT + frame(DATA, length=2**31),
        "cut off": ROOT + a_directory(b"d", a_file(b"x")) + frame(FILE, body(b"y")) + frame(DATA, b"half"),
        "cut off before the last word": ROOT + CLOSE,
        "failure": ROOT + a_file(b"x") + frame(FAILED, struct.pack("<iI", 13, 2) + b"/xPermission denied"),
        "failure of an impossible length": ROOT + frame(FAILED, struct.pack("<iI", 13, 2**32 - 1)),
        "nothing": b"",
    }


@pytest.mark.parametrize("trick", tricks(b""))
@pytest.mark.parametrize("merge", [False, True])
def test_a_hostile_stream_gets_nothing(tmp_path: Path, trick: str, merge: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (tmp_path / "there").mkdir()
    if merge:
        (tmp_path / "there/named").mkdir()
    data = tricks(bytes(outside))[trick]
    replaced = merge and trick in {"through a link to a file", "file twice", "link twice", "directory twice"}
    if replaced:  # one after the other, as the caller has asked for
        receive(data + CLOSE + FINISH, tmp_path / "there", merge=True)
    else:
        closing = b"" if trick.startswith(("cut off", "nothing", "end", "more", "failure")) else CLOSE + FINISH
        with pytest.raises((FrameError, StreamEnd, OSError)):
            receive(data + closing, tmp_path / "there", merge=merge)
    assert os.listdir(outside) == ["file"]
    assert (outside / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["outside", "there"]
    left = [name for _, dirs, names in os.walk(tmp_path) for name in dirs + names]
    assert not [name for name in left if name.startswith(".lxc_pool") or "evil" in name]
    if not merge:
        assert os.listdir(tmp_path / "there") == []


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize("anonymous", [False, True])
def test_what_is_not_complete_is_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anonymous: bool
) -> None:
    """Whoever opens it before it has its permissions goes on reading what they would close."""
    real, seen = os.fchmod, []

    def fchmod(fd: int, mode: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(fd).st_mode))
        real(fd, mode)

    monkeypatch.setattr(os, "fchmod", fchmod)
    receive(a_file(b"") + FINISH, tmp_path / "file", anonymous=anonymous)
    receive(ROOT + a_file(b"x") + a_directory(b"d") + CLOSE + FINISH, tmp_path / "new", anonymous=anonymous)
    assert seen == [0o600, 0o600, 0o700, 0o700]


@pytest.mark.usefixtures("open_umask")
def test_missing_directories_are_not_for_all_to_write_to(tmp_path: Path) -> None:
    os.close(trees.find_place(bytes(tmp_path / "a/b/x"), b"", parents=True).directory)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o755, 0o755]


def test_a_tree_over_a_file_is_refused_before_anything_comes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        receive(ROOT, tmp_path / "file")


def test_a_file_takes_the_place_of_a_link_to_a_directory_when_merged(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "named").mkdir()
    (tmp_path / "named/x").symlink_to(tmp_path / "victim")
    receive(ROOT + a_file(b"x", b"words") + CLOSE + FINISH, tmp_path, merge=True)
    assert (tmp_path / "named/x").read_text() == "words"
    assert not (tmp_path / "named/x").is_symlink()


def test_holes_can_not_lead_beyond_what_a_file_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "lseek", lambda _fd, position, _whence: position)  # as xfs and btrfs: no limit below 2^63
    hole = frame(HOLE, struct.pack("<q", 2**63 - 1))
    with pytest.raises(OSError, match="File too large"):
        receive(frame(FILE, body(b"")) + hole + hole + frame(END) + FINISH, tmp_path / "file")


def test_removal_is_not_led_elsewhere_by_a_link_that_has_taken_a_directorys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim/inner").mkdir(parents=True)
    (tmp_path / "victim/file").write_text("mine")
    (tmp_path / "tree/d").mkdir(parents=True)
    real = os.unlink

    def unlink(name: bytes, *, dir_fd: int) -> None:
        try:
            real(name, dir_fd=dir_fd)
        except IsADirectoryError:
            if name == b"d":
                (tmp_path / "tree/d").rename(tmp_path / "moved")
                (tmp_path / "tree/d").symlink_to(tmp_path / "victim")
            raise

    monkeypatch.setattr(os, "unlink", unlink)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        trees.remove(descriptor, b"tree")
    finally:
        os.close(descriptor)
    assert (tmp_path / "moved").is_dir()
    assert sorted(os.listdir(tmp_path / "victim")) == ["file", "inner"]


@pytest.mark.parametrize("anonymous", [False, True])
def test_a_file_that_is_cut_off_leaves_the_old_one(tmp_path: Path, anonymous: bool) -> None:
    (tmp_path / "file").write_text("old")
    data = frame(FILE, body(b"")) + frame(DATA, b"new")
    for rest in (b"", frame(END), frame(FAILED, struct.pack("<iI", 5, 0)), frame(END) + frame(DATA, b"x")):
        with pytest.raises((FrameError, StreamEnd, OSError)):
            receive(data + rest, tmp_path / "file", anonymous=anonymous)
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_system_without_nameless_files_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: object, flags: int, *args: object, **kwargs: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(path, flags, *args, **kwargs)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(os, "open", refuse)
    data = a_file(b"", b"words") + FINISH
    assert receive(data, tmp_path / "file", anonymous=True).read_text() == "words"


def test_links_planted_while_a_tree_is_made_lead_nowhere(tmp_path: Path) -> None:
    """Who can write beside the tree swaps each directory for a link as soon as it is there."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "there").mkdir()

    def plant(_count: int) -> None:
        for directory, names, _ in os.walk(tmp_path / "there"):
            for name in names:
                path = Path(directory, name)
                if not path.is_symlink():
                    path.rename(tmp_path / f"moved-{os.urandom(4).hex()}")
                    path.symlink_to(victim)

    data = (
        ROOT + a_directory(b"a", a_file(b"evil"), a_directory(b"b", a_file(b"evil"))) + a_file(b"evil") + CLOSE + FINISH
    )
    with contextlib.suppress(OSError):
        receive(data, tmp_path / "there", Watch(plant))
    assert os.listdir(victim) == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        receive(ROOT + a_directory(b"d", a_file(b"x")) + CLOSE + FINISH, tmp_path / "new")
    assert caught.value.filename == bytes(tmp_path / "new/d/x")
    assert os.listdir(tmp_path) == []


def test_an_overlay_that_does_not_rename_directories(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename

    def rename(old: bytes, new: bytes, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        if src_dir_fd == dst_dir_fd and stat.S_ISDIR(os.stat(old, dir_fd=src_dir_fd).st_mode):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", rename)
    assert listing(receive(sent(tree), tmp_path / "new")) == listing(tree)
    assert sorted(os.listdir(tmp_path)) == ["new", "tree"]


@pytest.mark.usefixtures("open_umask")
def test_one_that_is_moved_there_name_by_name_is_closed_until_it_is_complete_and_removed_if_it_can_not_be(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = sent(tree), []

    def rename(_old: bytes, _new: bytes, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        if src_dir_fd == dst_dir_fd:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        seen.append(stat.S_IMODE(os.fstat(dst_dir_fd).st_mode))
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        receive(data, tmp_path / "new")
    assert seen == [0o700]
    assert os.listdir(tmp_path) == ["tree"]


def test_removal_takes_trees_and_goes_on_past_what_resists(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        trees.remove(descriptor, b"link")
        assert tree.exists()
        trees.remove(descriptor, b"tree")
        trees.remove(descriptor, b"none")
    finally:
        os.close(descriptor)
    assert os.listdir(tmp_path) == []


def test_ten_thousand_entries_in_one_directory(tmp_path: Path) -> None:
    data = io.BytesIO()
    writer = FrameWriter(lambda buffers: data.write(b"".join(buffers)))
    (tmp_path / "many").mkdir()
    for number in range(10_000):
        os.symlink("x", tmp_path / f"many/{number}")
    watch = Watch()
    send(bytes(tmp_path / "many"), writer, watch)
    writer.done()
    assert watch.entries == 10_001
    assert len(os.listdir(receive(data.getvalue(), tmp_path / "new"))) == 10_000


def test_frames_are_read_from_anything_that_fills_a_buffer(tmp_path: Path) -> None:
    source = io.BytesIO(a_file(b"", b"words") + FINISH)
    place = trees.find_place(bytes(tmp_path / "new"), b"", parents=False)
    TreeSink(place, FrameReader(source.readinto), Policy(), Watch()).receive()
    os.close(place.directory)
    assert (tmp_path / "new").read_text() == "words"
