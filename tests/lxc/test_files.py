"""Files into real containers and out of them, privileged or not, friendly or not, through the real service."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lxc_pool import Container, ExecFailed, LeaseError, LeaseExpired, PoolServiceProxy, UnknownLease
from lxc_pool.client.files import Copied
from tests.support.real_service import Service
from tests.support.waiting import eventually

CONFIG = """\
[pool]
workers = 2
[profile.default]
size = 1
[profile.root]
size = 1
privileged = true
disk = 67108864
"""
MIB = 1 << 20


@pytest.fixture(scope="module")
def files_service(images: Path) -> Iterator[Service]:
    service = Service(images)
    try:
        service.start(config=CONFIG)
        yield service
    finally:
        service.close()


@pytest.fixture
def pool(files_service: Service) -> Iterator[PoolServiceProxy]:
    with files_service.connect() as pool:
        yield pool


@pytest.fixture(params=["default", "root"])
def container(files_service: Service, pool: PoolServiceProxy, request: pytest.FixtureRequest) -> Iterator[Container]:
    """A container, in which nothing of ours may be left."""
    with pool.lease("files", timeout=30, profile=request.param) as container:
        yield container
        eventually(lambda: not copying(files_service, container), "no process copies any more")
        assert sh(container, "find / -xdev -name '.lxc_pool*'") == ""


@pytest.fixture
def plain(files_service: Service, pool: PoolServiceProxy) -> Iterator[Container]:
    """An unprivileged container, which the test may end."""
    with pool.lease("files", timeout=30) as container:
        yield container
    eventually(lambda: not files_service.has_traces(container.name), "the container is gone")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "deep/er").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "file").write_bytes(b"words\n")
    (root / "nothing").touch()
    (root / "long").write_bytes(os.urandom(MIB + 17))
    (root / "deep/er/tool").write_text("#!/bin/sh\necho works\n")
    (root / "späte Ähre\n").write_text("strange")
    (root / "deep/link").symlink_to("../file")
    (root / "deep/out").symlink_to("/etc/passwd")
    (root / "deep/er/tool").chmod(0o755)
    (root / "file").chmod(0o604)
    (root / "empty").chmod(0o1777)
    for number, place in enumerate([*root.rglob("*"), root]):
        os.utime(place, ns=(10**18, 10**18 + 10**9 * number), follow_symlinks=False)
    return root


def sh(container: Container, script: str) -> str:
    done = container.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=30)
    return str(done.stdout)


def copying(service: Service, container: Container) -> list[int]:
    """Return the host's pids of what runs in cgroups of commands."""
    found: set[int] = set()
    for directory in service.cgroups("lxc_pool."):
        if container.name in directory:
            try:
                found.update(map(int, Path(directory, "cgroup.procs").read_text().split()))
            except OSError:  # it has ended just now
                continue
    return sorted(found)


def listing(path: Path) -> dict[str, tuple[object, ...]]:
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


# --- what goes in and comes out ---------------------------------------------------------------------------------------


def test_a_tree_comes_back_as_it_went(container: Container, tree: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pushed = container.push(tree, "/tmp", progress=lambda *counts: told.append(counts))
    pulled = container.pull("/tmp/tree", tmp_path / "back")
    assert pushed == Copied("/tmp/tree", pushed.byte_count, 11, ())
    assert pulled == Copied(str(tmp_path / "back"), pushed.byte_count, 11, ())
    assert listing(tmp_path / "back") == listing(tree)
    assert told == sorted(told)
    assert told[-1] == (pushed.byte_count, 11)
    assert sh(container, "/tmp/tree/deep/er/tool; readlink /tmp/tree/deep/out") == "works\n/etc/passwd\n"
    assert sh(container, "find /tmp/tree -exec stat -c %u:%g {} + | sort -u") == "0:0\n"
    assert {place.lstat().st_uid for place in (tmp_path / "back").rglob("*")} == {os.geteuid()}


def test_an_empty_file_and_a_long_one(container: Container, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "long").write_bytes(os.urandom(5 * MIB + 1))
    for name in ("empty", "long"):
        container.push(tmp_path / name, f"/tmp/{name}")
        container.pull(f"/tmp/{name}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == (tmp_path / name).read_bytes()


def test_the_caller_owns_nothing_inside_unless_told_otherwise(container: Container, tree: Path) -> None:
    for place in (tree, *tree.rglob("*")):
        os.chown(place, 4321, 4321, follow_symlinks=False)
    container.push(tree, "/tmp/a")
    assert sh(container, "find /tmp/a -exec stat -c %u:%g {} + | sort -u") == "0:0\n"
    container.push(tree, "/home/user/x/y/b", owner="user", parents=True)
    assert sh(container, "find /home/user/x -exec stat -c %U:%G {} + | sort -u") == "user:user\n"
    container.push(tree / "file", "/tmp/c", owner="1000:0")
    assert sh(container, "stat -c %u:%g /tmp/c") == "1000:0\n"
    with pytest.raises(ValueError, match="stranger"):
        container.push(tree, "/tmp/d", owner="stranger")
    with pytest.raises(ValueError, match="user"):
        container.push(tree, "/tmp/d", owner="a:b:c")
    assert sh(container, "ls /tmp") == "a\nc\n"


def test_set_id_bits_stay_behind(container: Container, tmp_path: Path) -> None:
    (tmp_path / "tool").touch()
    (tmp_path / "tool").chmod(0o6755)
    container.push(tmp_path / "tool", "/tmp/tool")
    assert sh(container, "stat -c %a /tmp/tool; chmod 6755 /tmp/tool") == "755\n"
    container.pull("/tmp/tool", tmp_path / "back")
    assert stat.S_IMODE((tmp_path / "back").stat().st_mode) == 0o755


def test_holes_stay_holes_both_ways(container: Container, tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(100 * MIB)
        file.write(b"middle")
        file.truncate(900 * MIB)  # more than the container could hold
    container.push(tmp_path / "sparse", "/tmp/sparse")
    assert int(sh(container, "stat -c %b /tmp/sparse")) < 100
    copied = container.pull("/tmp/sparse", tmp_path / "back")
    assert copied.byte_count == (tmp_path / "back").stat().st_size == 900 * MIB
    assert (tmp_path / "back").stat().st_blocks < 100
    with (tmp_path / "back").open("rb") as file:
        file.seek(100 * MIB - 1)
        assert file.read(8) == b"\0middle\0"


def test_what_is_long_is_streamed(files_service: Service, plain: Container, tmp_path: Path) -> None:
    size = 256 * MIB
    block = os.urandom(MIB)
    with (tmp_path / "long").open("wb") as file:
        for _ in range(size // MIB):
            file.write(block)
    peaks = {"inside": 0, "here": 0}

    def measure(count: int, _entries: int) -> None:
        if count > size * 3 // 4:
            peaks["here"] = peak("self")
            for pid in copying(files_service, plain):
                peaks["inside"] = max(peaks["inside"], peak(pid))

    Path("/proc/self/clear_refs").write_text("5")  # proc(5): begin a new peak
    before = peak("self")
    plain.push(tmp_path / "long", "/tmp/long", progress=measure)
    (tmp_path / "long").unlink()
    plain.pull("/tmp/long", tmp_path / "long", progress=measure)
    assert (tmp_path / "long").stat().st_size == size
    assert 0 < peaks["inside"] < 40 * MIB, "what a Python process takes, and a buffer or two"
    assert peaks["here"] - before < 8 * MIB


def peak(pid: int | str) -> int:
    """Return the most memory that a process had resident, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def test_files_of_proc_can_be_pulled(container: Container, tmp_path: Path) -> None:
    container.pull("/proc/1/status", tmp_path / "status")
    assert "Name:\t" in (tmp_path / "status").read_text()


def test_the_source_may_be_a_link_of_the_container_which_stays_inside(container: Container, tmp_path: Path) -> None:
    sh(container, "ln -s /etc/passwd /tmp/abs; ln -s ../../../../../../../etc /tmp/up")
    container.pull("/tmp/abs", tmp_path)
    assert "user:x:1000" in (tmp_path / "abs").read_text()
    container.pull("/tmp/up", tmp_path)
    assert (tmp_path / "up/passwd").read_text() == (tmp_path / "abs").read_text()


# --- where it goes ----------------------------------------------------------------------------------------------------


def test_where_a_file_goes(container: Container, tree: Path, tmp_path: Path) -> None:
    assert container.push(tree / "file", "/tmp").path == "/tmp/file"
    assert container.push(tree / "file", "/tmp/other").path == "/tmp/other"
    assert container.push(tree / "file", "tmp/").path == "/tmp/file"
    assert container.push(tree / "file", "/a/b/", parents=True).path == "/a/b/file"
    assert container.push(tree / "file", "/var/lock").path == "/var/lock/file"
    assert sh(container, "cat /tmp/other /run/lock/file; stat -c %a /a") == "words\nwords\n755\n"
    sh(container, "ln -s /etc/passwd /tmp/link")
    assert container.push(tree / "file", "/tmp/link").path == "/tmp/link"
    assert "words" not in sh(container, "cat /etc/passwd")
    (tmp_path / "there").mkdir()
    assert container.pull("/tmp/other", tmp_path / "there").path == str(tmp_path / "there/other")
    assert container.pull("tmp/other", tmp_path / "x/y", parents=True).path == str(tmp_path / "x/y")


def test_what_can_not_be_done_is_told_as_pathlib_and_shutil_do(
    container: Container, tree: Path, tmp_path: Path
) -> None:
    sh(container, "mkdir -p /there/file /there/tree; echo old >/plain; ln -s plain /link")
    cases: list[tuple[Callable[[], object], type[OSError], str]] = [
        (lambda: container.push(tmp_path / "none", "/tmp"), FileNotFoundError, f"{tmp_path}/none"),
        (lambda: container.push(tree, "/none/x"), FileNotFoundError, "/none"),
        (lambda: container.push(tree, "/none/"), FileNotFoundError, "/none/"),
        (lambda: container.push(tree, ""), FileNotFoundError, ""),
        (lambda: container.push(tree / "file", "/plain/"), NotADirectoryError, "/plain/"),
        (lambda: container.push(tree / "file", "/plain/x"), NotADirectoryError, "/plain/x"),
        (lambda: container.push(tree / "file", "/there"), IsADirectoryError, "/there/file"),
        (lambda: container.push(tree, "/there"), FileExistsError, "/there/tree"),
        (lambda: container.push(tree, "/plain"), NotADirectoryError, "/plain"),
        (lambda: container.push(tree, "/link"), NotADirectoryError, "/link"),
        (lambda: container.push(tree / "file", "/proc/x"), FileNotFoundError, "/proc/x"),
        (lambda: container.pull("/none", tmp_path), FileNotFoundError, "/none"),
        (lambda: container.pull("", tmp_path), FileNotFoundError, ""),
        (lambda: container.pull("/plain/x", tmp_path), NotADirectoryError, "/plain/x"),
        (lambda: container.pull("/plain", tmp_path / "no/x"), FileNotFoundError, f"{tmp_path}/no"),
        (lambda: container.pull("/there/tree", tmp_path), FileExistsError, f"{tmp_path}/tree"),
        (lambda: container.pull("/dev/null", tmp_path), OSError, "/dev/null"),
    ]
    for action, error, filename in cases:
        with pytest.raises(error) as caught:
            action()
        assert caught.value.filename == filename
    assert sorted(os.listdir(tmp_path)) == ["tree"]
    assert sh(container, "cat /plain; ls /there/tree /there/file") == "old\n/there/file:\n\n/there/tree:\n"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"timeout": -1}, ValueError),
        ({"timeout": "soon"}, TypeError),
        ({"max_bytes": -1}, ValueError),
        ({"max_entries": "few"}, TypeError),
    ],
)
def test_wrong_arguments(plain: Container, tmp_path: Path, options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        plain.pull("/etc/passwd", tmp_path, **options)  # type: ignore[arg-type]  # wrong on purpose


def test_what_has_no_name_of_its_own_needs_one(plain: Container, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name"):
        plain.pull("/etc/..", tmp_path)
    with pytest.raises(ValueError, match="name"):
        plain.push("/", "/tmp")
    with pytest.raises(ValueError, match="NUL"):
        plain.push(tmp_path, "/tmp/a\0b")


def test_trees_are_merged_when_asked_for(container: Container, tree: Path, tmp_path: Path) -> None:
    sh(container, "mkdir -p /opt/tree/deep /opt/victim; echo old >/opt/tree/file; echo mine >/opt/tree/deep/mine")
    container.push(tree, "/opt", dirs_exist_ok=True)
    assert sh(container, "cat /opt/tree/file /opt/tree/deep/mine") == "words\nmine\n"
    sh(container, "rm -r /opt/tree/deep/er; ln -s /opt/victim /opt/tree/deep/er")
    with pytest.raises(NotADirectoryError) as caught:
        container.push(tree, "/opt", dirs_exist_ok=True)
    assert caught.value.filename == "/opt/tree/deep/er"
    assert sh(container, "ls /opt/victim") == ""
    (tmp_path / "there/tree/deep").mkdir(parents=True)
    container.pull("/opt/tree", tmp_path / "there", dirs_exist_ok=True)
    assert (tmp_path / "there/tree/deep/mine").read_text() == "mine\n"


def test_a_full_disk_is_told_and_nothing_stays(pool: PoolServiceProxy, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(os.urandom(MIB) * 80)
    with pool.lease("files", profile="root") as container:
        with pytest.raises(OSError, match="No space left") as caught:
            container.push(tmp_path / "long", "/tmp/long")
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/tmp/long")
        assert sh(container, "ls -A /tmp") == ""


# --- hostile containers -----------------------------------------------------------------------------------------------


def test_special_files_are_left_out_and_reported(container: Container, tmp_path: Path) -> None:
    sh(container, "mkdir /tmp/t; mkfifo /tmp/t/fifo; echo x >/tmp/t/file; mknod /tmp/t/dev c 1 3 || true")
    copied = container.pull("/tmp/t", tmp_path)
    assert os.listdir(tmp_path / "t") == ["file"]
    assert "/fifo" in copied.skipped
    assert copied.entry_count == 2
    with pytest.raises(OSError, match="neither a file nor a directory"):
        container.pull("/tmp/t/fifo", tmp_path, timeout=10)


def test_what_is_too_much_is_not_taken(container: Container, tmp_path: Path) -> None:
    sh(container, "mkdir /tmp/t; for i in $(seq 500); do ln -s x /tmp/t/$i; done; truncate -s 1000000000000 /tmp/huge")
    for options, source in (({"max_entries": 400}, "/tmp/t"), ({}, "/tmp/huge"), ({"max_bytes": 100}, "/etc/passwd")):
        with pytest.raises(OSError, match="more than max_") as caught:
            container.pull(source, tmp_path / "x", **options)  # type: ignore[arg-type]  # as named
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, source)
    assert os.listdir(tmp_path) == []
    container.pull("/tmp/t", tmp_path / "x", max_entries=501)


def test_a_file_that_grows_for_ever_comes_to_an_end(container: Container, tmp_path: Path) -> None:
    script = (
        "while :; do head -c 65536 /dev/zero >>/tmp/log; [ $(stat -c %s /tmp/log) -lt 20000000 ] || : >/tmp/log; done"
    )
    with container.popen(["sh", "-c", script]) as writer:
        eventually(lambda: sh(container, "stat -c %s /tmp/log 2>/dev/null || true").strip() > "0", "it writes")
        for number in range(5):
            container.pull("/tmp/log", tmp_path / str(number), timeout=20, max_bytes=64 * MIB)
        writer.kill_tree()
    assert all((tmp_path / str(number)).stat().st_size < 64 * MIB for number in range(5))


def test_links_that_come_and_go_lead_nowhere(container: Container, tmp_path: Path) -> None:
    """Root inside swaps a directory for a link all the time; what is pulled is the one or the other."""
    sh(container, "mkdir -p /tmp/t/d; echo fine >/tmp/t/d/file; mkdir /secret; echo secret >/secret/file")
    script = "cd /tmp/t; while :; do mv d ../e; ln -s /secret d; rm d; mv ../e d; done"
    with container.popen(["sh", "-c", script]) as swapper:
        try:
            for number in range(30):
                container.pull("/tmp/t", tmp_path / str(number), timeout=20)
                place = tmp_path / str(number) / "d"
                if place.is_symlink():
                    assert os.readlink(place) == "/secret"
                elif (place / "file").exists():
                    assert (place / "file").read_text() == "fine\n"
        finally:
            swapper.kill_tree()


def test_a_push_is_not_led_elsewhere(container: Container, tree: Path) -> None:
    """Root inside puts links in place of everything that is being made."""
    sh(container, "mkdir /tmp/there /victim")
    script = (
        "cd /tmp/there; while :; do for d in .lxc_pool* .lxc_pool*/* .lxc_pool*/*/*; do "
        '[ -d "$d" ] && [ ! -L "$d" ] && mv "$d" /tmp/moved$RANDOM && ln -s /victim "$d"; done; done'
    )
    with container.popen(["sh", "-c", script], stderr=subprocess.DEVNULL) as swapper:
        for number in range(30):
            try:
                container.push(tree, f"/tmp/there/{number}", timeout=20)
            except OSError:
                continue
        swapper.kill_tree()
    assert sh(container, "ls -A /victim; rm -rf /tmp/*") == ""


def status_of(pid: int | None) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def is_waiting_inside(pid: int, container: Container) -> bool:
    status = status_of(pid)
    return status["State"].startswith("S") and status["Seccomp"] == status_of(container.init_pid)["Seccomp"]


def test_what_copies_inside_is_confined_but_out_of_reach(
    files_service: Service, container: Container, tree: Path
) -> None:
    """It is in every namespace of the container's but that of pids, from which its memory and program could be had."""
    seen: dict[str, object] = {}

    def look(_count: int, _entries: int) -> None:
        if seen:
            return
        eventually(lambda: copying(files_service, container), "it has been forked")
        (pid,) = copying(files_service, container)
        # What it is sent now waits in the pipe: it may still be on its way in.
        eventually(lambda: is_waiting_inside(pid, container), "it waits for more")
        for kind in ("mnt", "net", "ipc", "uts", "cgroup", "user", "pid"):
            seen[kind] = os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink(f"/proc/{container.init_pid}/ns/{kind}")
        status, init = status_of(pid), status_of(container.init_pid)
        for name in ("CapBnd", "Seccomp", "Seccomp_filters", "NoNewPrivs"):
            seen[name] = status[name] == init[name]
        seen["uid"] = status["Uid"].split()[0] == init["Uid"].split()[0]
        seen["descriptors"] = sorted(os.listdir(f"/proc/{pid}/fd"))
        seen["streams"] = {os.readlink(f"/proc/{pid}/fd/{fd}").split(":")[0] for fd in "012"}
        seen["ps"] = sh(container, "ps -o comm")

    container.push(tree, "/tmp/x", progress=look)
    assert seen.pop("pid") is False
    assert "python" not in str(seen.pop("ps"))
    assert seen.pop("streams") == {"pipe"}
    descriptors = seen.pop("descriptors")
    assert isinstance(descriptors, list)
    assert len(descriptors) <= 6, "three streams, and what it is writing"
    assert all(seen.values()), seen


# --- ends -------------------------------------------------------------------------------------------------------------


def test_what_progress_raises_ends_it(container: Container, tree: Path, tmp_path: Path) -> None:
    def raise_late(count: int, _entries: int) -> None:
        if count > 100:
            raise FileNotFoundError(2, "mine", "own")

    with pytest.raises(FileNotFoundError, match="mine") as caught:
        container.push(tree, "/tmp/x", progress=raise_late)
    assert caught.value.filename == "own"
    assert sh(container, "ls -A /tmp") == ""
    container.push(tree, "/tmp/x")
    with pytest.raises(FileNotFoundError, match="mine"):
        container.pull("/tmp/x", tmp_path / "x", progress=raise_late)
    assert os.listdir(tmp_path) == ["tree"]


def test_a_timeout_leaves_nothing(
    files_service: Service, container: Container, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lxc_pool.client.inside.GRACE", 0.2)  # one that is stopped makes no use of it
    (tmp_path / "long").write_bytes(bytes(4 * MIB))
    os.mkdir(tmp_path / "out")

    def stop(_count: int, _entries: int) -> None:
        for pid in copying(files_service, container):
            os.kill(pid, signal.SIGSTOP)

    container.push(tmp_path / "long", "/tmp/ok")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: container.pull("/tmp/ok", tmp_path / "out/x", timeout=0.5, progress=stop), "/tmp/ok"),
        (lambda: container.push(tmp_path / "long", "/tmp/x", timeout=0.5, progress=stop), "/tmp/x"),
    ]
    for copy, path in cases:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"0\.5 s") as caught:
            copy()
        assert caught.value.filename == path
        assert time.monotonic() - began < 10
        assert copying(files_service, container) == []
    assert os.listdir(tmp_path / "out") == []
    # one that was stopped could not tidy up; it has no name that anybody would take for the file's
    assert sh(container, "ls /tmp; rm -f /tmp/.lxc_pool*") == "ok\n"


def test_a_slow_callback_counts(container: Container, tree: Path) -> None:
    with pytest.raises(TimeoutError):
        container.push(tree, "/tmp/x", timeout=0.3, progress=lambda _count, _entries: time.sleep(0.2))
    assert sh(container, "ls -A /tmp") == ""


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_killed_client_leaves_no_process_and_no_file(
    files_service: Service, container: Container, tmp_path: Path, direction: str
) -> None:
    (tmp_path / "long").write_bytes(bytes(4 * MIB))
    container.push(tmp_path / "long", "/tmp/ok")
    (tmp_path / "out").mkdir()
    call = {"push": ("push", str(tmp_path / "long"), "/tmp/x"), "pull": ("pull", "/tmp/ok", str(tmp_path / "out/x"))}
    name, *paths = call[direction]
    script = f"""
        import pickle, time
        container = pickle.loads(bytes.fromhex({pickle.dumps(container).hex()!r}))
        def wait(count, entries):
            if count:
                print("begun")
                time.sleep(1000)
        container.{name}(*{paths!r}, progress=wait)
    """
    with files_service.client(script) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        assert len(copying(files_service, container)) == 1
        client.kill()
        client.wait()
    eventually(lambda: copying(files_service, container) == [], "the process inside has ended")
    assert sh(container, "ls -A /tmp") == "ok\n"
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("direction", ["push", "pull"])
@pytest.mark.parametrize("end", ["kill", "release"])
def test_a_container_that_ends_meanwhile_is_told(
    files_service: Service, plain: Container, tmp_path: Path, direction: str, end: str
) -> None:
    (tmp_path / "long").write_bytes(bytes(16 * MIB))
    (tmp_path / "out").mkdir()
    plain.push(tmp_path / "long", "/tmp/ok")
    ended = threading.Event()

    def end_it(count: int, _entries: int) -> None:
        if count and not ended.is_set():
            ended.set()
            if end == "kill":
                os.kill(plain.init_pid, signal.SIGKILL)
            else:
                plain.release()
            eventually(lambda: copying(files_service, plain) == [], "what copies has ended")

    copy: Callable[[], object] = {
        "push": lambda: plain.push(tmp_path / "long", "/tmp/x", progress=end_it),
        "pull": lambda: plain.pull("/tmp/ok", tmp_path / "out/x", progress=end_it),
    }[direction]
    with pytest.raises((ExecFailed, LeaseError)) as caught:
        copy()
    assert "ended" in str(caught.value) or plain.name in str(caught.value)
    if end == "release":
        assert isinstance(caught.value, LeaseError)
    assert os.listdir(tmp_path / "out") == []
    eventually(lambda: not files_service.has_traces(plain.name), "the container is gone")


def test_a_lease_that_is_over_is_told(plain: Container, tmp_path: Path) -> None:
    plain.release()
    with pytest.raises((UnknownLease, LeaseExpired)):
        plain.push(tmp_path, "/tmp/x")
    with pytest.raises((UnknownLease, LeaseExpired)):
        plain.pull("/etc/passwd", tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_many_at_once(container: Container, tree: Path, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def copy(number: int) -> None:
        try:
            container.push(tree, f"/tmp/{number}")
            container.pull(f"/tmp/{number}", tmp_path / str(number))
        except BaseException as error:  # noqa: BLE001 - for the test's thread to see
            errors.append(error)

    threads = [threading.Thread(target=copy, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(listing(tmp_path / str(number)) == listing(tree) for number in range(6))


def test_an_interrupted_copy_leaves_nothing(files_service: Service, container: Container, tree: Path) -> None:
    def interrupt(count: int, _entries: int) -> None:
        if count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        container.push(tree, "/tmp/x", progress=interrupt)
    assert copying(files_service, container) == []
    assert sh(container, "ls -A /tmp") == ""
