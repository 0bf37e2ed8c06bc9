"""Limits on cgroup layouts that this machine does not have: what hosts with them had when they were recorded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lxc_pool.backend.lxc import limits
from lxc_pool.host.cgroups import Layout, layout
from tests.support.recorded_layouts import LAYOUTS, NAME, Host

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it gives files away")

WRONG = {
    "pids.max": "max",
    "memory.limit_in_bytes": "9223372036854771712",
    "memory.max": "max",
    "cpu.shares": "1",
    "cpu.weight": "1",
}
"""What stands in each file of a limit, other than what was wanted; the first three as where nothing is limited."""

SEALED = {"memory.memsw.limit_in_bytes", "memory.swap.max", "cgroup.max.descendants"}
"""The files that sealing writes to."""

HARMLESS = {"cgroup.procs", "tasks", "cgroup.threads", "cgroup.subtree_control", "cgroup.event_control"} | {
    "memory.oom.group",
    "memory.reclaim",
}
"""What a container's root may write to in its own cgroups: the first four move its processes among its own cgroups,
the others bear on those within its limits. Source: Linux Documentation/admin-guide/cgroup-v2.rst, "Delegation"."""


@pytest.fixture(params=LAYOUTS)
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    return Host.put_up(request.param, tmp_path / "cgroup")


def of_version(host: Host, version: int) -> list[Path]:
    """Return the container's cgroups in hierarchies of that version."""
    points = {tree.mount_point for tree in host.trees if tree.version == version}
    return [cgroup for cgroup in host.payload if cgroup.parent in points]


def test_pure_and_mixed_layouts_are_among_the_recordings(tmp_path: Path) -> None:
    layouts = {layout(Host.put_up(name, tmp_path / name).trees) for name in LAYOUTS}
    assert layouts == {Layout.V1, Layout.HYBRID, Layout.V2}


def test_every_limit_was_in_force_and_one_that_is_not_is_named(host: Host) -> None:
    assert limits.problems(host.profile, host.payload) == []
    tried = set()
    for file, wrong in WRONG.items():
        for path in (cgroup / file for cgroup in host.payload if (cgroup / file).exists()):
            right = path.read_text()
            path.write_text(f"{wrong}\n")
            (problem,) = limits.problems(host.profile, host.payload)
            assert f"{file} is {wrong}, not {right.strip()}" in problem
            path.write_text(right)
            tried.add(file)
    assert tried in ({"pids.max", "memory.limit_in_bytes", "cpu.shares"}, {"pids.max", "memory.max", "cpu.weight"})


def test_a_limit_that_the_layout_has_no_file_for_is_a_problem(host: Host) -> None:
    for cgroup in host.payload:
        (cgroup / "pids.max").unlink(missing_ok=True)
    assert limits.problems(host.profile, host.payload) == ["number of processes: this host has no pids.max for it"]
    assert len(limits.problems(host.profile, [])) == 3


@NEEDS_ROOT
def test_sealing_leaves_what_it_left_on_the_recorded_host(host: Host) -> None:
    limits.seal(host.profile, host.payload, host.trees)
    recording = host.recording
    for path, (mode, uid, gid, content) in {**recording["started"], **recording["sealed"]}.items():
        here = host.here(path)
        if f"lxc.payload.{NAME}" in path:
            status = here.stat()
            assert (f"{status.st_mode:o}", status.st_uid, status.st_gid) == (mode, uid, gid), path
        if here.name in {*WRONG, *SEALED}:
            # A plain file keeps the rest of a longer text that was there.
            assert here.read_text().startswith((content or "").strip()), path


@NEEDS_ROOT
def test_its_root_can_write_from_inside_to_just_what_the_outside_shows_and_to_no_limit(host: Host) -> None:
    limits.seal(host.profile, host.payload, host.trees)
    can_write = host.open_to_root()
    assert can_write == host.open_to_root_seen_from_inside()
    assert {path.name for path in can_write if path.is_file()} <= HARMLESS
    # It may make cgroups where their number is bounded, and in the one that systemd needs; `perf_event` has no files
    # of its own, and is none like that.
    named = {tree.mount_point for tree in host.trees if tree.controllers == ("name=systemd",)}
    unified = {tree.mount_point for tree in host.trees if tree.version == 2}
    assert {path.parent for path in can_write if path.is_dir()} == named | unified
    for cgroup in of_version(host, 2):
        assert (cgroup / "cgroup.max.descendants").read_text() == "500"


@NEEDS_ROOT
def test_swap_is_closed_wherever_memory_is_limited(host: Host) -> None:
    limits.seal(host.profile, host.payload, host.trees)
    bounds = {
        path.name: path.read_text()
        for cgroup in host.payload
        for path in (cgroup / "memory.swap.max", cgroup / "memory.memsw.limit_in_bytes")
        if path.exists()
    }
    ((file, bound),) = bounds.items()
    assert bound.startswith("0" if file == "memory.swap.max" else str(host.profile.memory))


@NEEDS_ROOT
@pytest.mark.parametrize("when", ["before it is sealed", "while it is sealed"])
def test_cgroups_that_its_init_has_made_are_taken_from_it(
    host: Host, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = host.recording["first_id"]
    chown, made = os.chown, set[Path]()

    def make(parent: Path) -> None:
        path = parent / "made by its init"
        if not path.exists() and len(path.relative_to(host.root).parts) < 6:
            path.mkdir()
            chown(path, first, first)
            made.add(path)

    def make_and_chown(path: str, uid: int, gid: int) -> None:
        make(Path(path))
        chown(path, uid, gid)

    if when == "before it is sealed":
        for cgroup in of_version(host, 1):
            make(cgroup)
    else:
        monkeypatch.setattr(os, "chown", make_and_chown)
    limits.seal(host.profile, host.payload, host.trees)
    assert bool(made) == bool(of_version(host, 1))
    owners = {path.stat().st_uid for path in made if f"{host.root}/systemd" not in str(path)}
    assert owners <= {0}


@NEEDS_ROOT
def test_a_host_that_does_not_count_swap_is_none_the_worse(host: Host) -> None:
    files = [
        path for cgroup in host.payload for path in (*cgroup.glob("memory.swap.*"), *cgroup.glob("memory.memsw.*"))
    ]
    for path in files:
        path.unlink()
    limits.seal(host.profile, host.payload, host.trees)
    assert files
    assert not [path for path in files if path.exists()]
