"""Cgroups of containers: found in every layout, emptied whatever is in them, removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Never

import pytest

from lxc_pool.errors import DestroyFailed
from lxc_pool.host import cgroups
from lxc_pool.host.cgroups import Hierarchy, Layout
from tests.support.recorded_layouts import LAYOUTS, NAME, Host

OTHERS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
28 24 0:25 / /run rw,nosuid shared:5 master:1 - tmpfs tmpfs rw,size=4k
"""

# CentOS 7, Debian 9 and the like: systemd on version 1 alone.
V1 = f"""{OTHERS}\
31 23 0:28 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:8 - tmpfs tmpfs ro,mode=755
32 31 0:29 / /sys/fs/cgroup/systemd rw,nosuid shared:9 - cgroup cgroup rw,xattr,release_agent=/agent,name=systemd
33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:10 - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/freezer rw,nosuid shared:11 - cgroup cgroup rw,freezer
35 31 0:32 / /sys/fs/cgroup/pids rw,nosuid shared:12 - cgroup cgroup rw,pids
36 31 0:33 / /sys/fs/cgroup/cpuset rw,nosuid shared:13 - cgroup cgroup rw,cpuset,noprefix,clone_children
"""

HYBRID = f"""{OTHERS}\
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""

V2 = f"""{OTHERS}\
30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
"""


def test_pure_version_1_is_read_with_its_controllers() -> None:
    found = cgroups.hierarchies(V1)
    assert [(tree.mount_point.name, tree.controllers) for tree in found] == [
        ("systemd", ("name=systemd",)),
        ("cpu,cpuacct", ("cpu", "cpuacct")),
        ("freezer", ("freezer",)),
        ("pids", ("pids",)),
        ("cpuset", ("cpuset",)),
    ]
    assert {tree.version for tree in found} == {1}
    assert cgroups.layout(found) is Layout.V1


def test_a_hybrid_host_has_both_versions() -> None:
    found = cgroups.hierarchies(HYBRID)
    assert [tree.version for tree in found] == [1, 1, 1, 2]
    assert found[-1] == Hierarchy(Path("/sys/fs/cgroup/unified"), (), 2)
    assert cgroups.layout(found) is Layout.HYBRID


def test_pure_version_2_is_one_hierarchy() -> None:
    found = cgroups.hierarchies(V2)
    assert found == (Hierarchy(Path("/sys/fs/cgroup"), (), 2),)
    assert cgroups.layout(found) is Layout.V2


def test_a_host_without_cgroups_has_no_layout() -> None:
    assert cgroups.layout(cgroups.hierarchies(OTHERS)) is Layout.NONE
    assert cgroups.hierarchies("") == ()
    assert cgroups.hierarchies("garbage\n\n1 2 - cgroup2 x\n") == ()


def test_a_hierarchy_that_is_mounted_twice_counts_once_as_a_whole() -> None:
    text = (
        "50 23 0:26 /docker/x /jail/a rw - cgroup2 cgroup2 rw\n"
        "30 23 0:26 / /sys/fs/with\\040blank rw - cgroup2 cgroup2 rw\n"
        "51 23 0:26 / /jail/b rw - cgroup2 cgroup2 rw\n"
    )
    assert cgroups.hierarchies(text) == (Hierarchy(Path("/sys/fs/with blank"), (), 2),)


def test_this_host_has_a_layout_or_none() -> None:
    assert cgroups.layout(cgroups.hierarchies()) in Layout


def make(*directories: Path) -> None:
    for directory in directories:
        directory.mkdir(parents=True)


def test_the_cgroups_of_a_container_are_found_at_the_root_of_every_hierarchy(tmp_path: Path) -> None:
    trees = (Hierarchy(tmp_path / "pids", ("pids",), 1), Hierarchy(tmp_path / "unified", (), 2))
    wanted = [
        tmp_path / tree / name
        for tree in ("pids", "unified")
        for name in ("lxc.payload.c", "lxc.monitor.c", "lxc.monitor.c-1", "lxc.payload.c-12")
    ]
    make(*wanted)
    make(
        *(
            tmp_path / "pids" / name
            for name in ("lxc.payload.cc", "lxc.payload.c-x", "lxc.payload.c-1-x", "lxc.pivot", "c")
        )
    )
    (tmp_path / "unified/lxc.payload.c-3").symlink_to(wanted[0])
    (tmp_path / "unified/lxc.payload.c-4").touch()
    assert sorted(cgroups.container_cgroups("c", trees, ())) == sorted(wanted)


def test_a_name_with_a_dot_is_no_pattern(tmp_path: Path) -> None:
    make(tmp_path / "lxc.payload.aXb")
    assert cgroups.container_cgroups("a.b", (Hierarchy(tmp_path, (), 2),), ()) == ()


def test_cgroups_below_the_starters_own_are_found_too(tmp_path: Path) -> None:
    trees = (
        Hierarchy(tmp_path / "cpu", ("cpu", "cpuacct"), 1),
        Hierarchy(tmp_path / "unified", (), 2),
        Hierarchy(tmp_path / "absent", ("pids",), 1),
    )
    wanted = {
        tmp_path / "cpu/session/lxc.payload.c",
        tmp_path / "unified/user.slice/lxc.payload.c",
        tmp_path / "unified/machine/lxc.monitor.c",
    }
    make(*wanted)
    make(tmp_path / "unified/session/lxc.payload.c")  # not a cgroup of ours in that hierarchy
    memberships = (
        "2:cpu,cpuacct:/session\n1:name=systemd:/\n0::/user.slice\n",
        "3:pids:/\n0::/machine/init.scope\n",
        "0::/../outside\n",
    )
    assert set(cgroups.container_cgroups("c", trees, memberships)) == wanted


def test_a_running_containers_cgroups_are_found_where_pid_1_is(tmp_path: Path) -> None:
    trees = (Hierarchy(tmp_path / "memory", ("memory",), 1), Hierarchy(tmp_path / "unified", (), 2))
    wanted = {tmp_path / "memory/job/lxc.payload.c", tmp_path / "unified/lxc.payload.c"}
    make(*wanted, tmp_path / "memory/lxc.payload.d", tmp_path / "unified/job")
    assert set(cgroups.payload_cgroups("c", trees, "2:memory:/job\n0::/init.scope\n")) == wanted


def test_own_cgroups_are_taken_relative_to_what_is_mounted(tmp_path: Path) -> None:
    make(tmp_path / "job/lxc.payload.c")
    tree = Hierarchy(tmp_path, (), 2, root="/docker/x")
    assert cgroups.container_cgroups("c", (tree,), ("0::/docker/x/job\n",)) == (tmp_path / "job/lxc.payload.c",)
    assert cgroups.container_cgroups("c", (tree,), ("0::/elsewhere\n",)) == ()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_containers_cgroups_are_found_on_hosts_of_every_layout(name: str, tmp_path: Path) -> None:
    host = Host.put_up(name, tmp_path)
    version = {tree.version for tree in host.trees}
    wanted = {Layout.V1: {1}, Layout.HYBRID: {1, 2}, Layout.V2: {2}}[cgroups.layout(host.trees)]
    assert version == wanted
    memberships = ["\n".join(host.recording["first_membership"]), "\n".join(host.recording["own_membership"])]
    # Of a running container every hierarchy has both; what /proc says of its init is just those.
    found = cgroups.container_cgroups(NAME, host.trees, memberships)
    assert {(path.parent, path.name) for path in found} == {
        (tree.mount_point, f"lxc.{part}.{NAME}") for tree in host.trees for part in ("payload", "monitor")
    }
    assert len(host.payload) == len(host.recording["membership"])
    assert all(line.endswith(f":/lxc.payload.{NAME}") for line in host.recording["membership"])
    (init,) = {pid for path in host.payload for pid in cgroups.pids(path)}
    (monitor,) = {pid for path in set(found) - set(host.payload) for pid in cgroups.pids(path)}
    assert init != monitor


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_named_hierarchy_alone_is_without_controllers(name: str, tmp_path: Path) -> None:
    host = Host.put_up(name, tmp_path)
    named = [tree.controllers for tree in host.trees if tree.is_named]
    assert named == ([] if cgroups.layout(host.trees) is Layout.V2 else [("name=systemd",)])


def test_no_container_of_that_name_has_no_cgroups() -> None:
    assert cgroups.container_cgroups("no-such-container-here") == ()


def test_pids_are_those_of_the_whole_subtree(tmp_path: Path) -> None:
    make(tmp_path / "c/nested/deep", tmp_path / "c/threaded")
    (tmp_path / "c/cgroup.procs").write_text("30\n7\n")
    (tmp_path / "c/nested/deep/cgroup.procs").write_text("7\n12\n")
    assert cgroups.pids(tmp_path / "c") == (7, 12, 30)
    assert cgroups.pids(tmp_path / "absent") == ()


def test_processes_of_another_pid_namespace_are_never_signalled(tmp_path: Path) -> None:
    """The kernel lists them as 0, which kill(2) takes for the caller's whole process group."""
    (tmp_path / "cgroup.procs").write_text("0\n0\n")
    assert cgroups.pids(tmp_path) == ()
    assert cgroups.kill(tmp_path) == ()


def test_a_process_that_left_the_cgroup_while_it_was_opened_is_spared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup.procs").write_text(f"{os.getppid()}\n")
    pidfd_open = os.pidfd_open

    def leave(pid: int) -> int:
        (tmp_path / "cgroup.procs").write_text("")
        return pidfd_open(pid)

    monkeypatch.setattr(os, "pidfd_open", leave)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_arguments: pytest.fail("signalled"))
    assert cgroups.kill(tmp_path, timeout=0) == ()


def test_a_busy_cgroup_without_processes_is_tried_again_until_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "c")
    rmdir, refusals = os.rmdir, [errno.EBUSY, errno.EBUSY]

    def busy(path: str) -> None:
        if refusals:
            raise OSError(refusals.pop(), "Device or resource busy", path)
        rmdir(path)

    monkeypatch.setattr(os, "rmdir", busy)
    cgroups.remove(tmp_path / "c")
    assert not (tmp_path / "c").exists()

    make(tmp_path / "d")
    refusals.extend([errno.EBUSY] * 1000)
    with pytest.raises(DestroyFailed, match="busy"):
        cgroups.remove(tmp_path / "d", timeout=0.01)


def test_removal_goes_on_past_what_fails_and_reports_all_of_it(tmp_path: Path) -> None:
    make(tmp_path / "a/x", tmp_path / "b", tmp_path / "c")
    for name in ("a/x", "c"):
        (tmp_path / name / "file").touch()
    with pytest.raises(DestroyFailed) as caught:
        cgroups.remove(*(tmp_path / name for name in ("a", "b", "c", "absent")))
    assert "a/x: Directory not empty" in str(caught.value)
    assert "c: Directory not empty" in str(caught.value)
    assert not (tmp_path / "b").exists()


# --- with the kernel's own cgroups ----------------------------------------------------------------------------------


def mounted(controller: str) -> Path | None:
    """Return where *controller* of version 1, or version 2 if it is empty, is mounted."""
    for tree in cgroups.hierarchies():
        if (controller in tree.controllers) if controller else (tree.version == 2):
            return tree.mount_point
    return None


@pytest.fixture(params=["", "pids", "freezer", "memory"], ids=["v2", "v1 pids", "v1 freezer", "v1 memory"])
def cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    root = mounted(request.param)
    if os.geteuid() != 0 or root is None:
        pytest.skip("needs root and this hierarchy")
    path = root / f"lxc-pool-test-{os.getpid()}"
    path.mkdir()
    yield path
    assert cgroups.kill(path) == ()
    cgroups.remove(path)
    assert not path.exists()


def start_in(*paths: Path, program: str = "sleep 60") -> subprocess.Popen[str]:
    moves = "".join(f"echo $$ > {path}/cgroup.procs; " for path in paths)
    child = subprocess.Popen(["sh", "-c", f"{moves} echo in; exec {program}"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    return child


def test_everything_in_a_cgroup_and_below_is_killed_and_then_removed(cgroup: Path) -> None:
    (cgroup / "nested/deep").mkdir(parents=True)
    with start_in(cgroup) as one, start_in(cgroup / "nested/deep") as two:
        assert cgroups.pids(cgroup) == tuple(sorted((one.pid, two.pid)))
        with pytest.raises(DestroyFailed, match=f"processes in it: {min(one.pid, two.pid)}"):
            cgroups.remove(cgroup)
        assert cgroups.kill(cgroup) == ()
        # Neither has been waited for yet: a zombie keeps no cgroup.
        cgroups.remove(cgroup)
        assert not cgroup.exists()
        assert [one.wait(30), two.wait(30)] == [-signal.SIGKILL] * 2
    cgroup.mkdir()


def test_killing_an_absent_or_empty_cgroup_is_fine(cgroup: Path) -> None:
    assert cgroups.kill(cgroup, cgroup / "absent") == ()
    cgroups.remove(cgroup / "absent")


def test_a_fork_bomb_is_killed(cgroup: Path) -> None:
    """It is let loose, but ends by itself, and never has more than some tens of processes."""
    program = f"""{sys.executable} -I -S -c '
import os, time
end = time.monotonic() + 20
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
'"""
    with start_in(cgroup, program=program) as bomb:
        bomb.wait(30)  # the first has forked
        assert cgroups.pids(cgroup)
        assert cgroups.kill(cgroup, timeout=10) == ()


def test_this_process_is_spared(cgroup: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from lxc_pool.host import cgroups\n"
        "assert cgroups.kill(Path(sys.argv[1]), timeout=5) == (os.getpid(),)\n"
    )
    with start_in(cgroup) as other:
        subprocess.run(
            [
                "sh",
                "-c",
                'echo $$ > "$3/cgroup.procs"; exec "$1" -c "$2" "$3"',
                "sh",
                sys.executable,
                program,
                str(cgroup),
            ],
            check=True,
        )
        assert other.wait(30) == -signal.SIGKILL


def test_a_frozen_process_is_killed_on_either_version(cgroup: Path) -> None:
    version1 = cgroup / "freezer.state"
    freezer = version1 if version1.exists() else cgroup / "cgroup.freeze"
    if not freezer.exists():
        pytest.skip("this hierarchy does not freeze")
    with start_in(cgroup) as child:
        freezer.write_text("FROZEN" if freezer == version1 else "1")
        assert cgroups.kill(cgroup) == ()
        assert child.wait(30) == -signal.SIGKILL


def test_a_process_frozen_in_another_hierarchy_is_killed_if_all_cgroups_are_given(cgroup: Path) -> None:
    root = mounted("freezer")
    if root is None or root == cgroup.parent:
        pytest.skip("needs a freezer of version 1 beside this hierarchy")
    freezer = root / cgroup.name
    freezer.mkdir()
    try:
        with start_in(cgroup, freezer) as child:
            (freezer / "freezer.state").write_text("FROZEN")
            assert cgroups.kill(cgroup, freezer) == ()
            assert child.wait(30) == -signal.SIGKILL
    finally:
        cgroups.kill(freezer)
        cgroups.remove(freezer)


def test_without_a_wait_the_survivors_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            (tmp_path / "cgroup.procs").write_text(f"{child.pid}\n")
            monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_arguments: None)
            assert cgroups.kill(tmp_path, timeout=0) == (child.pid,)
            assert cgroups.kill(tmp_path, timeout=0.01) == (child.pid,)
        finally:
            child.kill()


def test_more_processes_than_are_watched_at_a_time_are_all_killed(
    cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "_BATCH", 2)
    children = [start_in(cgroup) for _ in range(5)]
    try:
        assert cgroups.kill(cgroup) == ()
    finally:
        for child in children:
            child.kill()
            with child:
                pass
    assert threading.active_count() == 1
    assert {child.returncode for child in children} == {-signal.SIGKILL}


def test_what_can_not_be_looked_into_is_neither_empty_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "there"
    path.mkdir()

    def scandir(where: object) -> Never:
        raise OSError(errno.EMFILE, "Too many open files", str(where))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(OSError, match="Too many open files"):
            cgroups.pids(path)
        with pytest.raises(DestroyFailed, match=r"there: Too many open files"):
            cgroups.remove(path, timeout=0)
    assert path.exists()
    cgroups.remove(path, tmp_path / "never was")
    assert not path.exists()
